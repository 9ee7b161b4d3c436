"""The options of training and evaluation: frozen, typed, documented field by field. Imports no jax.

A config file (`--config configs/x.py`) is Python that defines `config = TrainConfig(...)`; other options override it.
"""

import dataclasses
import difflib
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cltjax.errors import UserError
from cltjax.store_format import brief, differences

# Fields in which two runs may differ and still be the same run: where things lie, and how it is looked at.
NOT_THE_RUN = ("store", "out", "config", "log")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the cross-layer transcoder."""

    features: int = 1024
    """Features per source layer (F)."""
    k: int = 16
    """Active features per token and source layer: the k largest pre-activations, through a ReLU."""


@dataclass(frozen=True)
class DataConfig:
    """How training rows are drawn: pages of neighbouring rows in random order, shuffled within a buffer of pages."""

    page_rows: int = 256
    """Consecutive train rows that are read together."""
    buffer_mib: int = 512
    """Memory for the rows read ahead, in MiB: the buffer in use and the next one. The larger, the better mixed."""


@dataclass(frozen=True)
class LogConfig:
    """What is said and kept on the way; changes nothing about the result."""

    every: int = 50
    """Steps between progress lines and records in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""


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
    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 512
    """Tokens a step."""
    lr: float = 4e-3
    """Peak learning rate of Adam."""
    warmup: int = 100
    """Steps in which the learning rate rises to its peak."""
    decay: float = 0.2
    """Last share of the steps, in which the learning rate falls to zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Raise UserError where values cannot go together."""
        if not 1 <= self.model.k <= self.model.features:
            raise UserError(f"--model.k {self.model.k} is not between 1 and --model.features {self.model.features}")
        positive = {
            "steps": self.steps,
            "batch-size": self.batch_size,
            "lr": self.lr,
            "clip": self.clip,
            "data.page-rows": self.data.page_rows,
            "data.buffer-mib": self.data.buffer_mib,
            "log.every": self.log.every,
            "log.checkpoint-every": self.log.checkpoint_every,
        }
        for name, value in positive.items():
            if not value > 0:
                raise UserError(f"--{name} {value} must be above 0")
        for name, value in {"warmup": self.warmup, "weight-decay": self.weight_decay, "seed": self.seed}.items():
            if not value >= 0:
                raise UserError(f"--{name} {value} must be 0 or above")
        if not 0 <= self.decay <= 1:
            raise UserError(f"--decay {self.decay} is a share of the steps: between 0 and 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained run on a store's test rows."""

    clt: Path
    """Run directory of train.py."""
    store: Path = Path("activations")
    """The activation store whose test rows are used."""
    ridge: bool = False
    """Also fit ridge regression from the same input on the store's train rows, as a baseline."""


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `as_json` wrote. Raises UserError for fields this version does not know, or lacks."""

    def build(kind: type, found: dict[str, Any]) -> Any:
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for name in found.keys() - fields.keys():
            near = difflib.get_close_matches(name, fields, 1)
            raise UserError(f"config.json has an unknown field '{name}'" + (f" (near: {near[0]})" if near else ""))
        nested = {"model": ModelConfig, "data": DataConfig, "log": LogConfig}
        made = {name: build(nested[name], value) if name in nested else value for name, value in found.items()}
        for name in ("store", "out", "config"):
            if made.get(name) is not None:
                made[name] = Path(made[name])
        return kind(**made)

    try:
        return build(TrainConfig, values)
    except TypeError as error:
        raise UserError(f"config.json is not a training configuration: {error}") from error


def differing(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first field (`model.k: 8 -> 16`) that makes two JSON configurations different runs, or None."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in NOT_THE_RUN}

    for name, before, after in differences(kept(old), kept(new)):
        return f"{name}: {brief(before)} -> {brief(after)}"
    return None


def _nearest(message: str) -> str:
    """The field that a mistyped keyword argument was probably meant to be."""
    _, found, rest = message.partition("unexpected keyword argument '")
    if not found:
        return ""
    kinds = (TrainConfig, ModelConfig, DataConfig, LogConfig)
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
        try:
            found = runpy.run_path(value).get("config")
        except (SyntaxError, TypeError, NameError, ImportError) as error:
            raise UserError(f"--config {value}: {error}{_nearest(str(error))}") from error
        if not isinstance(found, TrainConfig):
            raise UserError(f"--config {value}: the file must define `config = TrainConfig(...)`")
        return found
    return None
