"""Trained runs: what is read back from a run directory to measure it, to export it, or to train on what it leaves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from cltjax.checkpoint import CONFIG, LEFT_OUT, Checkpoints, digest_of, last_step, read_config, weights_of
from cltjax.clt import CLT
from cltjax.config import TrainConfig, from_json
from cltjax.distributed import agree, check_features, make_mesh, together
from cltjax.errors import UserError
from cltjax.loss import SteeredPenalty
from cltjax.normalisation import Normalisation, blank
from cltjax.step import Frozen, TrainState, abstract_state, graph_of, shardings
from cltjax.store_format import differences
from cltjax.wiring import Wiring, wire


@dataclass(frozen=True)
class Trained:
    """A run: its own model (arrays on a mesh), the penalty that it was steered by, if it was, its configuration and
    data, and what identifies these weights."""

    run: Path
    step: int
    clt: CLT
    penalty: SteeredPenalty | None
    config: TrainConfig
    data: dict[str, Any]
    digest: str


def load(run: Path, mesh: Mesh | None = None, best: bool = False) -> Trained:
    """The last checkpoint of a run (or that with the best validation FVU), on `mesh` (by default one device): its own
    weights, not those of runs it was given. Not to be called inside of `together`.

    UserError where there is none, or its features do not divide into the mesh's shards.
    """
    mesh = mesh or make_mesh("1x1")
    with together():
        found = read_config(run)
        config, data = from_json(found["config"]), found["data"]
        check_features(mesh, config.model.features)
        if not (run / "checkpoints").is_dir():
            raise unfinished(run)
    wiring = wire(config.layer, data["model"]["n_layers"], config.offset, config.n_targets)
    scales = blank(wiring, data["model"]["d_model"])
    checkpoints = Checkpoints(run)
    try:
        with together():
            step = checkpoints.best() if best else checkpoints.last()
            if step is None:
                raise UserError(f"{run} has no best checkpoint: no val FVU was measured") if best else unfinished(run)
        agree(f"another checkpoint of {run}", step)
        state, _ = checkpoints.restore(step, weights_alone(abstract_state(config, wiring, scales, mesh)))
    finally:
        checkpoints.close()
    clt = nnx.merge(graph_of(config, wiring, scales), state.parameters, state.constants)
    return Trained(run, step, clt, state.penalty, config, data, digest_of(found, step))


def unfinished(run: Path) -> UserError:
    return UserError(f"{run} has no checkpoint yet: run train.py again")


def weights_alone(like: TrainState) -> TrainState:
    """A state to be restored without what only training needs and is large: twice as large as the weights."""
    rest = {name: getattr(like, name) for name in like._fields if name not in ("parameters", "constants", "penalty")}
    return like._replace(**jax.tree.map(lambda _: LEFT_OUT, rest))


def load_given(run: Path, given: Iterable[Path], mesh: Mesh) -> tuple[Trained, ...]:
    """The runs that `run` is given, by their sources: in whatever order they are named, sums are the same.

    UserError for one that is missing or unfinished. Not to be called inside of `together`.
    """
    paths = [path.absolute() for path in given]
    with together():
        for path in paths:
            if not (path / CONFIG).is_file():
                raise UserError(
                    f"{run} needs the given run {path}, which is not there: put it back, or run train.py for {run} "
                    "with --given where it is now"
                )
    loaded = [load(path, mesh) for path in paths]
    with together():
        for one in loaded:
            if one.step < one.config.steps:
                raise UserError(
                    f"the given run {one.run} is unfinished, at step {one.step} of {one.config.steps}: finish it first"
                )
    return tuple(sorted(loaded, key=lambda one: one.clt.wiring.sources))


def pins(given: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """Which weights a run is trained beside, by their source layers: part of its data."""
    return {one.clt.wiring.name: pin_of(one.run, one.step, one.digest) for one in given}


def pin_of(run: Path, step: int, digest: str) -> dict[str, Any]:
    return {"run": str(run), "step": step, "digest": digest}


def check_unchanged(trained: Trained, given: Sequence[Trained]) -> None:
    """UserError for a given run that is another one than when `trained` was trained."""
    pinned = trained.data.get("given_runs", {})
    for name, pin in pins(given).items():
        if name not in pinned or weights_of(pinned[name]) != weights_of(pin):
            raise UserError(
                f"{trained.run} was trained with the given run {pin['run']}, which has changed since: restore that, or "
                f"train {trained.run} again"
            )


def input_layers(wiring: Wiring, given: Sequence[Trained]) -> tuple[int, ...]:
    """A run's own sources, then those of the runs it is given that are not among them."""
    others = {source for one in given for source in one.clt.wiring.sources}
    return (*wiring.sources, *sorted(others - set(wiring.sources)))


def freeze(wiring: Wiring, given: Sequence[Trained]) -> tuple[tuple[Frozen, ...], tuple[nnx.State, ...]]:
    """The given runs as a step takes them. UserError for one that writes to none of this run's targets."""
    layers, frozen, arrays = input_layers(wiring, given), [], []
    for one in given:
        theirs = one.clt.wiring
        shared = tuple(
            (theirs.targets.index(t), wiring.targets.index(t)) for t in theirs.targets if t in wiring.targets
        )
        if not shared:
            raise UserError(f"--given {one.run} writes to none of the targets of this run: leave it out")
        graph, state = nnx.split(one.clt)
        frozen.append(Frozen(graph, tuple(layers.index(source) for source in theirs.sources), shared))
        arrays.append(state)
    return tuple(frozen), tuple(arrays)


def check_given(wiring: Wiring, given: Sequence[Trained], data: dict[str, Any]) -> None:
    """UserError where a given run has a source of this one, or the same as another, or was trained on other data."""
    taken: dict[int, str] = dict.fromkeys(wiring.sources, "this run")
    for one in given:
        for source in one.clt.wiring.sources:
            if source in taken:
                raise UserError(f"source {source} is in {taken[source]} and in --given {one.run}: name it once")
            taken[source] = str(one.run)
        check_same_model(f"--given {one.run}", one.data, data)


def check_same_model(what: str, theirs: dict[str, Any], data: dict[str, Any]) -> None:
    """UserError where an earlier run was trained on activations of another model or site."""
    for name in ("model", "site"):
        for field, was, here in differences({name: theirs[name]}, {name: data[name]}):
            raise UserError(f"{what} was trained on a store with {field} {was}, this one has {here}")


def pin_of_start(run: Path, config: TrainConfig, wiring: Wiring, data: dict[str, Any]) -> dict[str, Any] | None:
    """Which weights `run` starts from, where it does not start anew: part of its data, as those of given runs are.

    A run that is resumed needs them no more: where they are gone, they are what they were. UserError where it cannot
    start from them: another model or site, other pairs, features, or kind of activation.
    """
    start = config.start_from
    if start is None:
        return None
    if not (start / CONFIG).exists() and last_step(run) is not None:
        before = read_config(run)["data"].get("start_run")
        if before is not None and before["run"] == str(start):
            return before
    found = read_config(start)
    check_same_model(f"--start-from {start}", found["data"], data)
    check_alike(start, from_json(found["config"]), config, wiring, data["model"]["n_layers"])
    step = last_step(start)
    if step is None:
        raise unfinished(start)
    return pin_of(start, step, digest_of(found, step))


def start_of(pin: dict[str, Any], scales: Normalisation, mesh: Mesh) -> tuple[nnx.State, SteeredPenalty | None]:
    """The weights that make a run whose normalisation is `scales` begin as the function that an earlier one is, and the
    penalty that keeps that one as sparse as it is.

    UserError where that is not what was pinned. Not to be called inside of `together`.
    """
    earlier = load(Path(pin["run"]), mesh)
    with together():
        if pin_of(earlier.run, earlier.step, earlier.digest) != pin:
            raise UserError(f"--start-from {earlier.run} is being trained: wait until it is finished, or stop it")
    graph, parameters, constants = nnx.split(earlier.clt, nnx.Param, ...)
    move = jax.jit(partial(refold, graph), out_shardings=shardings(parameters, mesh))
    moved = move(parameters, constants, scales.in_mean, scales.in_std, scales.out_mean, scales.out_std)
    return moved, earlier.penalty


def check_alike(run: Path, earlier: TrainConfig, config: TrainConfig, wiring: Wiring, n_layers: int) -> None:
    """UserError where weights of an earlier run do not mean here what they mean there."""

    def pairs(one: TrainConfig) -> str:
        return f"--layer {one.layer} --offset {one.offset} --n-targets {one.n_targets}"

    if wire(earlier.layer, n_layers, earlier.offset, earlier.n_targets).pairs != wiring.pairs:
        raise UserError(f"--start-from {run} has other sources and targets: {pairs(earlier)}; here {pairs(config)}")
    before, now = earlier.model, config.model
    if before.features != now.features:
        raise UserError(f"--start-from {run} has --model.features {before.features}, this run {now.features}")
    if "jumprelu" in (before.activation, now.activation) and before.activation != now.activation:
        raise UserError(
            f"--start-from {run} has --model.activation {before.activation}, this run {now.activation}: jumprelu has "
            "thresholds, which the others have not"
        )


def refold(
    graph: nnx.GraphDef,
    parameters: nnx.State,
    constants: nnx.State,
    in_mean: jax.Array,
    in_std: jax.Array,
    out_mean: jax.Array,
    out_std: jax.Array,
) -> nnx.State:
    """Weights for another normalisation (Normalisation's shapes) under which a CLT takes raw inputs to the same raw
    outputs.

    Pre-activations stay what they are, and so do thresholds on them. Rules that rank by h |W_dec| may choose other
    features, where targets change their scales unlike each other: those norms are of normalised decoders.
    """
    clt: CLT = nnx.merge(graph, parameters, constants)
    rescale(clt, in_mean, in_std, out_mean, out_std)
    return nnx.split(clt, nnx.Param, ...)[1]


def rescale(clt: CLT, in_mean: jax.Array, in_std: jax.Array, out_mean: jax.Array, out_std: jax.Array) -> None:
    """`refold` in place; the constants of `clt` stay what they were."""
    wider = in_std / clt.in_std[...]  # [S]
    shift = (in_mean - clt.in_mean[...]) / clt.in_std[...][:, None]  # [S, D]
    # In full precision: accelerators would round what is added to every token's pre-activation.
    moved = jnp.einsum("sfd,sd->sf", clt.W_enc[...], shift, precision="highest")
    clt.b_enc[...] = clt.b_enc[...] + moved
    clt.W_enc[...] = clt.W_enc[...] * wider[:, None, None]
    scale = clt.out_std[...] / out_std  # [T]
    for source, window in zip(clt.wiring.sources, clt.wiring.windows, strict=True):
        head = clt.W_dec[str(source)]
        head[...] = head[...] * scale[window][:, None]
    clt.b_dec[...] = clt.b_dec[...] * scale[:, None] + (clt.out_mean[...] - out_mean) / out_std[:, None]
