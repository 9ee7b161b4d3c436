"""Trained runs: what is read back from a run directory to measure it, to export it, or to train on what it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from cltjax.checkpoint import Checkpoints, read_config
from cltjax.clt import CLT
from cltjax.config import TrainConfig, from_json
from cltjax.distributed import check_features, make_mesh
from cltjax.errors import UserError
from cltjax.normalisation import blank
from cltjax.step import Frozen, abstract_state, graph_of, initial_state, shardings
from cltjax.store_format import differences
from cltjax.wiring import Wiring, wire


@dataclass(frozen=True)
class Trained:
    """A run: its model (arrays on a mesh), configuration, the identity of its data, and the runs it was given."""

    run: Path
    step: int
    clt: CLT
    config: TrainConfig
    data: dict[str, Any]
    given: "tuple[Trained, ...]" = ()

    @property
    def family(self) -> "tuple[Trained, ...]":
        """The runs that this one's predictions are added to."""
        return with_their_given(self.given)

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers that must be read: this run's own sources, then the others that were given."""
        return input_layers(self.clt.wiring, self.family)


def load(run: Path, mesh: Mesh | None = None, best: bool = False) -> Trained:
    """The last checkpoint of a run (or that with the best validation FVU), on `mesh` (by default one device).

    UserError where there is none, or its features do not divide into the mesh's shards.
    """
    found = read_config(run)
    config, data = from_json(found["config"]), found["data"]
    wiring = wire(config.layer, data["model"]["n_layers"], config.offset, config.n_targets)
    scales = blank(wiring, data["model"]["d_model"])
    nothing = UserError(f"{run} has no checkpoint yet: run train.py again")
    if not (run / "checkpoints").is_dir():
        raise nothing
    mesh = mesh or make_mesh("1x1")
    check_features(mesh, config.model.features)
    checkpoints = Checkpoints(run)
    try:
        step = checkpoints.best() if best else checkpoints.last()
        if step is None:
            raise nothing
        state, _ = checkpoints.restore(step, abstract_state(config, wiring, scales, mesh))
    finally:
        checkpoints.close()
    clt = nnx.merge(graph_of(config, wiring, scales), state.parameters, state.constants)
    return Trained(run, step, clt, config, data, load_given(config.given, mesh))


def load_given(runs: Sequence[Path], mesh: Mesh) -> tuple[Trained, ...]:
    """The runs that `--given` names."""
    return tuple(load(run, mesh) for run in runs)


def with_their_given(given: Sequence[Trained]) -> tuple[Trained, ...]:
    """Given runs together with those that they were given themselves, each once."""
    found: dict[Path, Trained] = {}
    for one in given:
        found |= {earlier.run: earlier for earlier in (*one.family, one)}
    return tuple(found.values())


def input_layers(wiring: Wiring, family: Sequence[Trained]) -> tuple[int, ...]:
    """A run's own sources, then those of the runs it was given that are not among them."""
    others = {source for one in family for source in one.clt.wiring.sources}
    return (*wiring.sources, *sorted(others - set(wiring.sources)))


def freeze(wiring: Wiring, family: Sequence[Trained]) -> tuple[tuple[Frozen, ...], tuple[nnx.State, ...]]:
    """The given runs as a step takes them. UserError for one that writes to none of this run's targets."""
    layers, frozen, arrays = input_layers(wiring, family), [], []
    for one in family:
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


def check_given(wiring: Wiring, family: Sequence[Trained], data: dict[str, Any]) -> None:
    """UserError where a given run has a source of this one, or the same as another, or was trained on other data."""
    taken: dict[int, str] = dict.fromkeys(wiring.sources, "this run")
    for one in family:
        for source in one.clt.wiring.sources:
            if source in taken:
                raise UserError(f"source {source} is in {taken[source]} and in --given {one.run}: name it once")
            taken[source] = str(one.run)
        for name in ("model", "site"):
            for field, was, here in differences({name: one.data[name]}, {name: data[name]}):
                raise UserError(f"--given {one.run} was trained on a store with {field} {was}, this one has {here}")


def start_from(run: Path, config: TrainConfig, wiring: Wiring, mesh: Mesh) -> nnx.State:
    """The weights of an earlier run, for one of the same shape. UserError where the shapes differ."""
    earlier = load(run, mesh)
    _, parameters, _ = nnx.split(earlier.clt, nnx.Param, ...)
    scales = blank(wiring, earlier.clt.b_dec[...].shape[-1])
    wanted = jax.eval_shape(partial(initial_state, config, wiring, scales)).parameters
    here = jax.tree_util.tree_leaves_with_path(wanted)
    there = dict(jax.tree_util.tree_leaves_with_path(parameters))
    for path, leaf in here:
        if path not in there or there[path].shape != leaf.shape:
            name, had = jax.tree_util.keystr(path), there[path].shape if path in there else "nothing"
            raise UserError(f"--start-from {run} has another shape: {name} {had} there, {leaf.shape} here")
    return jax.device_put(parameters, shardings(parameters, mesh))
