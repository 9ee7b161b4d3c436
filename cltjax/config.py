"""The options of training and evaluation: frozen, typed, documented field by field. Imports no jax.

A config file (`--config configs/x.py`) is Python that defines `config = TrainConfig(...)`; other options override it.
"""

import dataclasses
import difflib
import math
import runpy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cltjax.errors import UserError
from cltjax.store_format import brief, differences
from cltjax.typed import check_types, converted

# Fields in which two runs may differ and still be the same: where things lie, what computes, how it is looked at.
# (What weights `given` and `start_from` are is in the run's data, wherever these lie, under names that are not here.)
NOT_THE_RUN = ("store", "out", "config", "given", "start_from", "log", "mesh", "device_cache", "processes")

Activation = Literal["topk", "topk_joint", "batchtopk", "jumprelu", "relu"]
# The rules that a penalty keeps sparse; under the others `k` features are active by construction.
PENALISED: tuple[Activation, ...] = ("jumprelu", "relu")
# Sparsity options that only some rules have.
ONLY_UNDER: dict[str, tuple[Activation, ...]] = {
    "penalty": PENALISED,
    "ramp": PENALISED,
    "scale": ("jumprelu",),
    "threshold": ("jumprelu",),
    "bandwidth": ("jumprelu",),
}
FEW_DEAD = 8  # dead features are few when at most one in so many is dead in any source: `revive` then costs little


@dataclass(frozen=True)
class ModelConfig:
    """The cross-layer transcoder: its size, and which of its features are active on a token."""

    features: int = 1024
    """Features per source layer (F)."""
    k: float | tuple[float, ...] = 16
    """Active features per token and source layer; below 1 a share of the features. Several numbers: one a source."""
    activation: Activation = "topk"
    """topk: k a token and source; topk_joint: over all sources; batchtopk: over a batch; jumprelu, relu: by penalty."""
    slots: int | None = None
    """Most active features of a training token and source, for rules other than topk; by default 4 k, or all."""


@dataclass(frozen=True)
class SparsityConfig:
    """How features are kept few and alive while training."""

    penalty: float | None = None
    """Weight of jumprelu's tanh(scale a |W_dec|), or relu's a |W_dec|; by default steered so that k are active."""
    scale: float = 4.0
    """Scale inside jumprelu's tanh."""
    ramp: float = 1.0
    """Share of the steps over which the penalty rises to `penalty`, linearly."""
    threshold: float = 0.03
    """jumprelu's initial threshold."""
    bandwidth: float = 0.3
    """Width of the window around a threshold in which the straight-through estimator lets its gradient pass."""
    k_start: float = 1.0
    """Begin with so many times k active features ..."""
    anneal: float = 0.2
    """... and come down to k over this share of the steps, linearly."""
    dead_after: int | None = None
    """Tokens of silence after which a feature is dead (while training); by default 1000 F / k."""
    auxk: float = 0.0
    """Weight of AuxK: the `auxk_features` strongest dead features of a token reconstruct what is left (try 1/32)."""
    auxk_features: int = 32
    """Dead features per token and source that AuxK uses."""
    revive: float = 0.0
    """Weight of the penalty that pushes dead features towards firing (try 6e-5, with dead_after 20,000)."""


@dataclass(frozen=True)
class TokensConfig:
    """Which tokens are trained on, and in which shares. What is left out is counted and reported apart."""

    special: bool = False
    """Train on special tokens too (BOS, image delimiters, ...)."""
    outliers: bool = False
    """Train on outlier tokens too: those whose norm, at any layer that is read or written, is large."""
    outlier_factor: float = 20.0
    """An outlier's norm is at least this many times its layer's mean norm."""
    image_share: float | None = None
    """Share of image tokens in every batch; by default as they come."""


@dataclass(frozen=True)
class DataConfig:
    """How training rows are drawn: pages of neighbouring rows in random order, shuffled within a buffer of pages."""

    # Below the store's blocks (up to 128 rows) a page is a part of one, which is then read for each of its pages.
    page_rows: int | None = None
    """Rows read together, whole blocks if they hold any; by default 256, or down to 16 for 32 of them in a buffer."""
    buffer_mib: int = 512
    """Memory for the rows read ahead, in MiB: the buffer in use and the next one. The larger, the better mixed."""


@dataclass(frozen=True)
class LogConfig:
    """What is said and kept on the way; changes nothing about the result."""

    every: int = 50
    """Steps between progress lines and records in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints: the last one is kept, and the best."""
    val_rows: int = 8192
    """Validation rows measured at each checkpoint, to know the best; 0 for none."""


@dataclass(frozen=True)
class ProcessesConfig:
    """Several processes, each with its own devices, as one run: start the same command once for each of them."""

    auto: bool = False
    """Let jax find the others: under SLURM, Open MPI or Kubernetes, or on a TPU pod."""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all, where nothing else tells; with count and id."""
    count: int | None = None
    """Number of processes."""
    id: int | None = None
    """Number of this process, from 0."""

    def check(self) -> tuple[str | None, int | None, int | None]:
        """(coordinator, count, id): all of them, or none. UserError where they cannot go together."""
        found = self.coordinator, self.count, self.id
        if found == (None, None, None):
            return found
        if self.auto:
            raise UserError("--processes.auto finds coordinator, count and id by itself: leave those out, or leave it")
        if self.coordinator is None or self.count is None or self.id is None:
            raise UserError("--processes.coordinator, --processes.count and --processes.id go together")
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"--processes.coordinator {self.coordinator} is not of the form HOST:PORT")
        if not 0 <= self.id < self.count:
            raise UserError(f"--processes.id {self.id} is not between 0 and --processes.count {self.count} less 1")
        return found


@dataclass(frozen=True)
class TrainConfig:
    """Train a cross-layer transcoder on an activation store."""

    layer: str
    """Source layers: 0, 0-3, 0,2,4 or all. Several are trained jointly."""
    store: Path = Path("activations")
    """The activation store (python capture/run.py writes one)."""
    out: Path | None = None
    """Run directory; by default runs/L<layers>. A run found there is resumed."""
    config: Path | None = None
    """Python file that defines `config`, from which the other options start."""
    offset: int = 1
    """Nearest target of source l is layer l+offset: 1 for future layers only, 0 to include its own."""
    n_targets: int = 16
    """Target layers of each source, cut to the model's depth."""
    given: tuple[Path, ...] = ()
    """Earlier, finished runs that stay as they are: this run is trained on what these leave."""
    start_from: Path | None = None
    """Earlier run of the same sources, targets and features to start from as it is; its rows may have been others."""
    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 512
    """Tokens a step."""
    microbatches: int = 1
    """Pieces that a step is computed in, for less memory; batchtopk's cut, AuxK and `revive` then look at one alone."""
    lr: float | None = None
    """Peak learning rate of Adam; by default 2e-4 / sqrt(features / 16384)."""
    warmup: int | None = None
    """Steps in which the learning rate rises to its peak; by default a tenth of them all, and at most 100."""
    decay: float = 0.2
    """Last share of the steps, in which the learning rate falls to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    target_weights: tuple[float, ...] = ()
    """Weight of each target layer in the loss, in ascending order; by default 1 each."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What products are computed in. Weights, moments, sums and pre-activations are float32 always."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""
    mesh: str = "1x1"
    """Devices as DATAxMODEL: tokens are split over the first number, features over the second."""
    device_cache: bool = False
    """Keep all train rows on each device, read once: where they fit beside the weights, no step waits for the host."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    data: DataConfig = field(default_factory=DataConfig)
    log: LogConfig = field(default_factory=LogConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)

    def check(self) -> None:
        """Raise UserError where a value is of another type than its field, or values cannot go together."""
        check_types(self)
        ks = k_values(self.model.k, self.model.features)
        for k, given in zip(ks, as_tuple(self.model.k), strict=True):
            if given >= 1 and k != given:
                raise UserError(f"--model.k {given} must be a whole number, or below 1: a share of the features")
            if not 1 <= k <= self.model.features:
                raise UserError(
                    f"--model.k {given:g} is not between 1 and --model.features {self.model.features}"
                    + (f": it is {k} features" if given < 1 else "")
                )
        if not ks:
            raise UserError("--model.k needs a number")
        slots = None if self.model.activation == "topk" else self.model.slots
        if slots is not None and not max(ks) <= slots <= self.model.features:
            raise UserError(
                f"--model.slots {slots} is not between k ({max(ks)}) and --model.features {self.model.features}"
            )
        positive = {
            "steps": self.steps,
            "batch-size": self.batch_size,
            "microbatches": self.microbatches,
            "lr": self.learning_rate,
            "clip": self.clip,
            "sparsity.scale": self.sparsity.scale,
            "sparsity.threshold": self.sparsity.threshold,
            "sparsity.bandwidth": self.sparsity.bandwidth,
            "sparsity.auxk-features": self.sparsity.auxk_features,
            "tokens.outlier-factor": self.tokens.outlier_factor,
            "data.page-rows": 1 if self.data.page_rows is None else self.data.page_rows,
            "data.buffer-mib": self.data.buffer_mib,
            "log.every": self.log.every,
            "log.checkpoint-every": self.log.checkpoint_every,
        }
        for name, value in positive.items():
            if not value > 0:
                raise UserError(f"--{name} {value} must be above 0")
        at_least_0 = {
            "warmup": self.warmup_steps,
            "weight-decay": self.weight_decay,
            "seed": self.seed,
            "sparsity.penalty": self.sparsity.penalty or 0,
            "sparsity.auxk": self.sparsity.auxk,
            "sparsity.revive": self.sparsity.revive,
            "sparsity.dead-after": self.sparsity.dead_after or 0,
            "log.val-rows": self.log.val_rows,
        }
        for name, value in at_least_0.items():
            if not value >= 0:
                raise UserError(f"--{name} {value} must be 0 or above")
        shares = {"decay": self.decay, "sparsity.ramp": self.sparsity.ramp, "sparsity.anneal": self.sparsity.anneal}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"--{name} {value} is a share of the steps: between 0 and 1")
        if self.warmup_steps > self.steps:
            raise UserError(f"--warmup {self.warmup} is longer than the run, of --steps {self.steps}: lower it")
        if self.target_weights and not (min(self.target_weights) >= 0 < max(self.target_weights)):
            weights = " ".join(f"{weight:g}" for weight in self.target_weights)
            raise UserError(f"--target-weights {weights} must be 0 or above, and one of them above")
        if self.tokens.image_share is not None and not 0 <= self.tokens.image_share <= 1:
            raise UserError(f"--tokens.image-share {self.tokens.image_share} is not between 0 and 1")
        if not self.sparsity.k_start >= 1:
            raise UserError(f"--sparsity.k-start {self.sparsity.k_start} must be 1 or above")
        for name, rules in ONLY_UNDER.items():
            value, default = getattr(self.sparsity, name), getattr(SparsityConfig(), name)
            if value != default and self.model.activation not in rules:
                raise UserError(
                    f"--sparsity.{name.replace('_', '-')} {value:g} does nothing under --model.activation "
                    f"{self.model.activation}, only under {', '.join(rules)}: leave it out"
                )
        if self.steered and self.sparsity.ramp != SparsityConfig().ramp:
            raise UserError("--sparsity.ramp does nothing without --sparsity.penalty: name both, or leave it")
        if not self.has_k and self.sparsity.k_start != 1:
            raise UserError(
                "--sparsity.k-start does nothing beside --sparsity.penalty, which stays as given: leave one"
            )
        if self.batch_size % self.microbatches:
            raise UserError(f"--batch-size {self.batch_size} does not divide into --microbatches {self.microbatches}")

    @property
    def penalised(self) -> bool:
        """Whether the rule is one that a penalty keeps sparse."""
        return self.model.activation in PENALISED

    @property
    def steered(self) -> bool:
        """Whether that penalty follows k."""
        return self.penalised and self.sparsity.penalty is None

    @property
    def has_k(self) -> bool:
        """Whether k is how many features are to be active: by the rule itself, or by a penalty that follows it."""
        return self.steered or not self.penalised

    @property
    def learning_rate(self) -> float:
        """`lr`, or what follows from the number of features (EleutherAI's rule; method.md)."""
        return 2e-4 / math.sqrt(self.model.features / 2**14) if self.lr is None else self.lr

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or what follows from the number of steps."""
        return min(100, self.steps // 10) if self.warmup is None else self.warmup


def as_tuple(k: float | tuple[float, ...]) -> tuple[float, ...]:
    """`ModelConfig.k`: one number, or one a source."""
    return k if isinstance(k, tuple) else (k,)


def k_values(k: float | tuple[float, ...], features: int) -> tuple[int, ...]:
    """`ModelConfig.k` as whole numbers of features."""
    return tuple(round(one * features) if one < 1 else round(one) for one in as_tuple(k))


def slots_of(model: ModelConfig, k_start: float = 1.0) -> int:
    """Most features that are active on a token in one source (`k_start` times as many while k comes down)."""
    most = max(k_values(model.k, model.features))
    if model.activation == "topk":
        return min(model.features, round(most * k_start))
    return min(model.features, max(4 * most, round(most * k_start))) if model.slots is None else model.slots


def parse_mesh(text: str) -> tuple[int, int]:
    """`2x4` as (data, model)."""
    data, x, model = text.partition("x")
    if not (x and data.isdecimal() and model.isdecimal() and int(data) and int(model)):
        raise UserError(f"--mesh {text} is not of the form DATAxMODEL, for example 2x4")
    return int(data), int(model)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained run on a store's test rows."""

    clt: Path
    """Run directory of train.py, or CLT directory of cltjax export."""
    store: Path = Path("activations")
    """The activation store whose test rows are used."""
    best: bool = False
    """Measure the checkpoint with the best FVU on val rows, instead of the last."""
    ridge: bool = False
    """Also fit ridge regression from the same input on the store's train rows, as a baseline."""
    mesh: str = "1x1"
    """Devices as DATAxMODEL, as in training: for a run that one device cannot hold."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)


# The groups of options inside TrainConfig.
NESTED = {f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if isinstance(f.default_factory, type)}


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(values: Any) -> TrainConfig:
    """The configuration that `as_json` wrote. UserError for fields this version does not know, or lacks, and for values
    that are none of theirs."""
    try:
        config = converted(values, TrainConfig)
        check_types(config)
    except (TypeError, UserError) as error:
        raise UserError(f"config.json is not a training configuration: {error}") from error
    return config


def differing(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field (`model.k: 8 -> 16`) that makes two JSON configurations different runs, or None."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if name not in NOT_THE_RUN}
        if "model" in found and "sparsity" in found:  # of these, what does nothing under the rule may be anything
            rule = found["model"]["activation"]
            idle = {name for name, rules in ONLY_UNDER.items() if rule not in rules}
            found["sparsity"] = {name: value for name, value in found["sparsity"].items() if name not in idle}
        return found

    for name, before, after in differences(kept(old), kept(new)):
        return f"{name}: {brief(before)} -> {brief(after)}"
    return None


def _nearest(message: str) -> str:
    """The field that a mistyped keyword argument was probably meant to be."""
    _, found, rest = message.partition("unexpected keyword argument '")
    if not found:
        return ""
    kinds = (TrainConfig, *NESTED.values())
    names = [f.name for kind in kinds for f in dataclasses.fields(kind)]
    near = difflib.get_close_matches(rest.rstrip("'"), names, 1)
    return f" (near: {near[0]})" if near else ""


def read_config_file(args: Sequence[str]) -> TrainConfig | None:
    """The starting point that `--config FILE` among the arguments names, if any."""
    for position, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name != "--config":
            continue
        if not equals:
            if position + 1 == len(args):
                raise UserError("--config needs the name of a Python file")
            value = args[position + 1]
        if not Path(value).is_file():
            raise UserError(f"--config {value}: no such file (configs/ has some)")
        return run_config_file(value)
    return None


def run_config_file(name: str) -> TrainConfig:
    """The `config` that a Python file defines. UserError, with the line where there is one, for whatever fails in it,
    and for values of a wrong type."""
    try:
        found = runpy.run_path(name).get("config")
    except (Exception, SystemExit) as error:  # whatever can go wrong in a file that anybody wrote
        line = _line_of(error, name)
        where, kind = name if line is None else f"{name}, line {line}", type(error).__name__
        what = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise UserError(f"--config {where}: {kind}{what and ': '}{what}{_nearest(what)}") from error
    if not isinstance(found, TrainConfig):
        raise UserError(f"--config {name}: the file must define `config = TrainConfig(...)`")
    try:
        made = converted(found, TrainConfig)
        check_types(made)
    except (TypeError, UserError) as error:
        raise UserError(f"--config {name}: {error}") from error
    return made


def _line_of(error: BaseException, file: str) -> int | None:
    """The line of `file` that an error came from: the last that was run there, or the one that cannot be read."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None
