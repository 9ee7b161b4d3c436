"""The training step on one device against the dense float64 reference, and what surrounds the gradients."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dense
from cltjax.config import ModelConfig, SparsityConfig, TrainConfig, slots_of
from cltjax.loss import (
    INTEGRAL,
    MOST_EXCESS,
    MOST_PENALTY,
    PROPORTIONAL,
    STEERING,
    SteeredPenalty,
    first_penalty,
    steer,
)
from cltjax.normalisation import Normalisation
from cltjax.sparsity import RANKED_BY_NORM
from cltjax.step import (
    Frozen,
    TrainState,
    annealed_steps,
    clip,
    graph_of,
    initial_state,
    make_gradients,
    make_optimiser,
    make_step,
    schedule,
    shardings,
)
from cltjax.wiring import Wiring, wire

B, D, F, STEP = 15, 7, 29, 3
RULES = ("topk", "topk_joint", "batchtopk", "jumprelu", "relu")
ALIVE, DEAD = 0, 10**6  # tokens of silence
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile


class Case(NamedTuple):
    config: TrainConfig
    wiring: Wiring
    scales: Normalisation
    parameters: dict[str, Any]
    state: TrainState  # of numpy arrays
    x: np.ndarray  # raw [B, S, D], and then what only given runs read
    y: np.ndarray  # raw [B, T, D]

    @property
    def graph(self) -> nnx.GraphDef:
        return graph_of(self.config, self.wiring, self.scales)

    def normal(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets normalised, in float64."""
        x = self.x[:, : len(self.wiring.sources)].astype(np.float64)
        scales = self.scales
        return (
            (x - scales.in_mean) / scales.in_std[:, None],
            (self.y.astype(np.float64) - scales.out_mean) / scales.out_std[:, None],
        )


def settings(activation: str, features: int = F, batch: int = B, **changes: Any) -> TrainConfig:
    """A configuration with everything a little out of the ordinary; `sparsity` and `model` are joined with it."""
    model = {"features": features, "activation": activation, "k": 3, "slots": None} | changes.pop("model", {})
    sparsity = {"penalty": 0.1, "ramp": 0.5, "bandwidth": 0.8, "anneal": 0.0} | changes.pop("sparsity", {})
    return TrainConfig(
        "all",
        steps=20,
        batch_size=batch,
        model=ModelConfig(**model),
        sparsity=SparsityConfig(**sparsity),
        **{"warmup": 2, "lr": 1e-3, "clip": 1e6} | changes,
    )


def arrays_of(shapes: Any, found: dict[str, Any]) -> Any:
    """A state of the given shapes with arrays by name."""

    def pick(path: tuple, leaf: Any) -> np.ndarray:
        names = [str(getattr(entry, "key", getattr(entry, "name", None))) for entry in path]
        array = found[names[0]][names[1]] if names[0] == "W_dec" else found[names[0]]
        assert array.shape == leaf.shape, names
        return np.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, shapes)


def case(config: TrainConfig, wiring: Wiring, seed: int = 0, extra: int = 0) -> Case:
    """Random weights, tokens and scales; a third of the features is dead. `extra` inputs are for given runs."""
    rng = np.random.default_rng(seed)
    S, T, N = len(wiring.sources), len(wiring.targets), config.model.features

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    def positive(*shape: int) -> np.ndarray:
        return rng.uniform(0.5, 3, shape).astype(np.float32)

    scales = Normalisation(normal(S, D), positive(S), normal(T, D), positive(T))
    parameters = {
        "W_enc": normal(S, N, D, scale=0.5),
        "b_enc": normal(S, N, scale=0.3),
        "W_dec": {str(s): normal(N, len(wiring.targets_of(s)), D, scale=0.3) for s in wiring.sources},
        "b_dec": normal(T, D),
    }
    if config.model.activation == "jumprelu":
        parameters["log_threshold"] = np.log(rng.uniform(0.2, 0.9, (S, N))).astype(np.float32)
    shapes = jax.eval_shape(lambda: initial_state(config, wiring, scales))
    silent = np.where(rng.random((S, N)) < 1 / 3, DEAD, ALIVE).astype(np.int32)
    weights, excess = (0.1 * np.arange(S, dtype=np.float32) + start for start in (0.05, -0.2))
    if config.model.activation == "jumprelu":
        weights[0] = -weights[0]
    state = TrainState(
        arrays_of(shapes.parameters, parameters),
        arrays_of(shapes.constants, vars(scales) | {"cut": np.zeros(S)}),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.optimiser),
        silent,  # type: ignore[arg-type]
        np.zeros((S, N), np.float32),  # type: ignore[arg-type]
        np.array(STEP, np.int32),  # type: ignore[arg-type]
        SteeredPenalty(weights, excess) if config.steered else None,  # type: ignore[arg-type]
    )
    x = normal(config.batch_size, S + extra, D)
    x[:, :S] = x[:, :S] * scales.in_std[:, None] + scales.in_mean
    y = normal(config.batch_size, T, D) * scales.out_std[:, None] + scales.out_mean
    return Case(config, wiring, scales, parameters, state, x, y)


def mesh_of(data: int, model: int) -> Mesh:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def arguments(of: Case, mesh: Mesh, frozen: tuple = ()) -> tuple:
    """What a step takes, on the mesh."""
    batches = [
        jax.device_put(one.reshape(of.config.microbatches, -1, *one.shape[1:]), NamedSharding(mesh, P(None, "data")))
        for one in (of.x, of.y)
    ]
    held = jax.device_put(frozen, shardings(frozen, mesh))
    return jax.device_put(of.state, shardings(of.state, mesh)), *batches, held


def compiled(function: Any, *inputs: Any) -> Any:
    """Compiled quickly and not well."""
    return jax.jit(function).lower(*inputs).compile(compiler_options=FAST)


def gradients_of(of: Case, frozen: tuple[Frozen, ...] = (), held: tuple = (), annealing: bool = False):
    """Gradients by name, figures and tokens by feature, on one device."""
    mesh = mesh_of(1, 1)
    inputs = arguments(of, mesh, held)
    made = make_gradients(of.config, of.graph, mesh, frozen, annealing)
    gradients, figures, fired = compiled(made, *inputs)(*inputs)
    return nnx.to_pure_dict(gradients), figures, np.asarray(fired)


def close(found: Any, expected: Any, bound: float = 1e-5) -> None:
    """The project's measure for every tensor: max|a-b| <= 1e-5 max|b|."""

    def one(path: tuple, a: Any, b: Any) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, path
        error, size = (np.abs(c).max() if c.size else 0.0 for c in (a - b, b))
        assert error <= bound * size, f"{jax.tree_util.keystr(path)}: {error:.2e} of {size:.2e}"

    jax.tree_util.tree_map_with_path(one, found, expected)


def equals_dense(of: Case, found: tuple, given: tuple = ()) -> None:
    gradients, figures, fired = found
    x, y = of.normal()
    penalties = None if of.state.penalty is None else of.state.penalty.weight
    expected = dense.loss_and_gradients(
        of.parameters, x, y, of.state.silent, int(of.state.step), of.config, of.wiring, given, penalties
    )
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.gradients)) > 1e-4
    assert float(figures["loss"]) == pytest.approx(expected.loss, rel=1e-5)
    close(figures["error"], expected.parts["reconstruction"])
    close(gradients, expected.gradients)
    assert (fired == (expected.parts["codes"] > 0).sum(1)).all()


WIRINGS = {
    "offset 0": wire("all", 3, 0, 16),
    "offset 1, window 2": wire("all", 4, 1, 2),
    "one source": wire("1", 4, 1, 16),
    "per layer": wire("all", 3, 0, 1),
}


@pytest.mark.parametrize("activation", RULES)
@pytest.mark.parametrize("name", WIRINGS)
def test_gradients_equal_the_dense_reference(activation: str, name: str):
    wiring = WIRINGS[name]
    weights = tuple(0.5 + 0.75 * t for t in range(len(wiring.targets)))
    ks = tuple(2 + s for s in range(len(wiring.sources)))
    # In turn with nothing else, with revive, with AuxK, and with both over microbatches.
    turn = (RULES.index(activation) + list(WIRINGS).index(name)) % 4
    sparsity = {"revive": 0.3 * (turn in (1, 3)), "auxk": 0.2 * (turn in (2, 3)), "auxk_features": 4}
    config = settings(
        activation, target_weights=weights, model={"k": ks}, sparsity=sparsity, microbatches=3 if turn == 3 else 1
    )
    of = case(config, wiring)
    equals_dense(of, gradients_of(of))


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_each_source_has_its_own_penalty_where_it_is_steered(activation: str):
    of = case(settings(activation, sparsity={"penalty": None}, microbatches=3), wire("all", 3, 0, 16))
    equals_dense(of, gradients_of(of))


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_the_penalty_follows_k(activation: str):
    """By each source's own count, of features without a slot too: it rises where more than k are active, and k comes
    down from k_start times k."""
    sparsity = {"penalty": None, "k_start": 3.0, "anneal": 0.5}
    config = settings(activation, model={"k": (2, 4, 5), "slots": 12}, sparsity=sparsity)
    of = case(config, wire("all", 3, 0, 16))
    inputs = arguments(of, mesh_of(1, 1))
    after, figures = make_step(config, of.graph, mesh_of(1, 1))(*inputs)
    before, found, wanted = of.state.penalty, after.penalty, dense.k_at(STEP, config, 3)
    assert before is not None and found is not None and wanted == (5, 10, 12)
    h = np.einsum("bsd,sfd->sbf", of.normal()[0], of.parameters["W_enc"]) + of.parameters["b_enc"][:, None]
    theta = np.exp(of.parameters["log_threshold"])[:, None] if activation == "jumprelu" else 0
    excess = np.log((h > theta).sum((1, 2)) / B / wanted)
    assert excess[0] > 0.1 and (activation == "jumprelu" or excess[0] > MOST_EXCESS > excess[1] > 0.1)
    excess = np.minimum(excess, MOST_EXCESS)
    assert (np.asarray(figures["penalty"]) == before.weight).all()
    np.testing.assert_allclose(found.excess, excess, rtol=1e-6)
    change = INTEGRAL * float(figures["lr"]) * excess + PROPORTIONAL * (excess - before.excess)
    if unit := STEERING[activation].unit:
        assert before.weight[0] < 0
        expected = unit * np.sinh(np.arcsinh(before.weight / unit) + change)
    else:
        expected = before.weight * np.exp(change)
    np.testing.assert_allclose(found.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_a_steered_penalty_stays_within_bounds_and_comes_back(activation: str):
    """Whatever goes on for long: no active feature at all, or more than any penalty could put out."""
    first, least, unit = STEERING[activation]

    @jax.jit
    def many_steps(weight: SteeredPenalty, l0: jax.Array, k: jax.Array) -> SteeredPenalty:
        return jax.lax.fori_loop(0, 20_000, lambda _, state: steer(activation, state, l0, k, jnp.array(0.004)), weight)

    k, weight = jnp.array([16.0]), first_penalty(activation, 1)
    assert float(weight.weight[0]) == pytest.approx(first)
    for l0, bound in ((0.0, least), (1000.0, MOST_PENALTY), (0.0, least)):
        weight = many_steps(weight, l0 * k, k)
        assert float(weight.weight[0]) == pytest.approx(bound)
    again = steer(activation, weight, k, k, 0.0)  # type: ignore[arg-type]
    change = PROPORTIONAL * MOST_EXCESS
    back = unit * np.sinh(np.arcsinh(least / unit) + change) if unit else least * np.exp(change)
    assert float(again.weight[0]) == pytest.approx(back, rel=1e-5) and back > least


def test_a_steered_penalty_draws_when_too_few_are_active():
    """Under jumprelu it goes through 0, by factors on both sides and by what is added in between; under relu it does
    not."""
    k, few = jnp.array([16.0]), jnp.array([12.0])
    step = INTEGRAL * 0.004 * np.log(12 / 16)

    def weights(activation: str, steps: int) -> list[float]:
        found = [first_penalty(activation, 1)._replace(excess=jnp.log(few / k))]
        for _ in range(steps):
            found.append(steer(activation, found[-1], few, k, jnp.array(0.004)))
        return [float(one.weight[0]) for one in found]

    found = weights("jumprelu", 3000)
    assert found[0] > 0 > found[-1] == pytest.approx(STEERING["jumprelu"].least)
    assert all(after < before or after == found[-1] for before, after in pairwise(found))
    nearest = min(range(len(found)), key=lambda n: abs(found[n]))  # to 0
    assert found[nearest + 1] - found[nearest] == pytest.approx(STEERING["jumprelu"].unit * step, rel=1e-2)
    assert found[1] / found[0] == pytest.approx(np.exp(step), rel=1e-3)
    found = weights("relu", 3000)
    assert found[100] / found[0] == pytest.approx(np.exp(100 * step), rel=1e-3) and min(found) > 0


@pytest.mark.parametrize("activation", ["topk_joint", "jumprelu", "relu"])
def test_few_slots(activation: str):
    """More features are above the cut than there is room for: the highest ranks win."""
    of = case(settings(activation, model={"slots": 4}), wire("0-1", 3, 0, 16), seed=1)
    found = gradients_of(of)
    equals_dense(of, found)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_annealed_k(activation: str):
    sparsity = {"k_start": 4.0, "anneal": 0.5, "revive": 0.3, "auxk": 0.2}
    of = case(settings(activation, sparsity=sparsity), wire("0-1", 3, 0, 16), seed=2)
    found = gradients_of(of, annealing=True)
    equals_dense(of, found)
    assert found[2].sum() > 1.5 * 2 * 3 * B  # far more than k are active


CUT = (0.9, 0.7)  # of a given run that ranks by h |W_dec|
GIVEN_SLOTS = 8  # of a given run while another one is trained: more than it was trained with, fewer than are active


def given_run(activation: str, theirs: Case) -> tuple[nnx.State, dense.Rule]:
    """An earlier run's arrays, with thresholds from its own calibration, and its rule for the reference."""
    ranked = activation in RANKED_BY_NORM
    tau = np.array(CUT, np.float32)[: len(theirs.wiring.sources)] if ranked else None
    constants = theirs.state.constants
    if tau is not None:
        constants = jax.tree_util.tree_map_with_path(lambda path, leaf: tau if "cut" in str(path) else leaf, constants)
    slots = 3 if activation == "topk" else GIVEN_SLOTS
    held = nnx.merge_state(theirs.state.parameters, constants)
    return held, dense.Rule(activation, (3,) * len(theirs.wiring.sources), slots, tau=tau)


@pytest.mark.parametrize(
    "activation, earlier",
    [
        ("topk", "topk"),
        ("relu", "topk_joint"),
        ("jumprelu", "batchtopk"),
        ("batchtopk", "jumprelu"),
        ("topk", "relu"),
    ],
)
def test_given_runs(activation: str, earlier: str):
    """What an earlier run predicts is left aside, though its units differ and it reads a layer that ours does not."""
    ours = case(settings(activation), wire("1-2", 3, 0, 16), seed=3, extra=1)
    theirs = case(settings(earlier, features=23, model={"slots": 5}), wire("0-1", 3, 0, 16), seed=4)
    # Inputs: our layers 1 and 2, and then layer 0; targets: theirs are 0, 1, 2 and ours 1, 2.
    frozen = Frozen(theirs.graph, (2, 0), ((1, 0), (2, 1)), None if earlier == "topk" else GIVEN_SLOTS)
    held, rule = given_run(earlier, theirs)
    x = (ours.x[:, [2, 0]].astype(np.float64) - theirs.scales.in_mean) / theirs.scales.in_std[:, None]
    units = np.append(1, theirs.scales.out_std[1:].astype(np.float64) / ours.scales.out_std)
    given = dense.Given(theirs.parameters, theirs.wiring, rule, x, units)
    equals_dense(ours, gradients_of(ours, (frozen,), (held,)), (given,))
    if earlier != "topk":  # with all that are above the thresholds it would be another sum
        codes = dense.encode(dense.as_float64(theirs.parameters), x, rule._replace(slots=23), theirs.wiring).codes
        assert (codes > 0).sum(-1).max() > GIVEN_SLOTS


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_one_step(activation: str):
    """Counters, clipping by the global norm and the optimiser, from one step and the dense gradients. Weights decay,
    biases and thresholds do not."""
    config = settings(activation, clip=0.5, weight_decay=0.1, sparsity={"revive": 0.3}, microbatches=3)
    of = case(config, wire("0-1", 3, 0, 16))
    of = of._replace(state=of.state._replace(step=np.array(0, np.int32)))  # type: ignore[arg-type]
    x, y = of.normal()
    expected = dense.loss_and_gradients(of.parameters, x, y, of.state.silent, 0, config, of.wiring)
    inputs = arguments(of, mesh_of(1, 1))
    made = make_step(config, of.graph, mesh_of(1, 1))
    after, figures = made.lower(*inputs).compile(compiler_options=FAST)(*inputs)  # type: ignore[attr-defined]

    fired = (expected.parts["codes"] > 0).sum(1)
    assert (np.asarray(after.silent) == np.where(fired > 0, 0, of.state.silent + B)).all()
    np.testing.assert_allclose(after.density, fired / B, rtol=1e-6)
    assert int(after.step) == 1
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(expected.gradients)))
    assert norm > 0.5 and float(figures["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    clipped = jax.tree.map(lambda leaf: leaf * (0.5 / norm), expected.gradients)  # one factor for all
    close(nnx.to_pure_dict(optax.tree.get(after.optimiser, "mu")), jax.tree.map(lambda leaf: 0.1 * leaf, clipped))
    rate = 1e-3 / 3  # the first of 2 steps of warm-up
    assert float(figures["lr"]) == pytest.approx(rate)

    def adamw(path: tuple, old: np.ndarray, g: np.ndarray) -> np.ndarray:
        decay = 0.1 if path[0].key in ("W_enc", "W_dec") else 0.0
        return old - rate * (g / (np.abs(g) + 1e-8) + decay * old)

    found = nnx.to_pure_dict(after.parameters)
    assert ("log_threshold" in found) == (activation == "jumprelu")
    close(found, jax.tree_util.tree_map_with_path(adamw, of.parameters, clipped))


@pytest.mark.parametrize("steps, anneal, k_start", [(32, 0.2, 8.0), (20, 0.5, 3.0), (7, 0.05, 4.0), (9, 1.0, 1.5)])
def test_there_is_room_for_all_features_while_k_comes_down(steps: int, anneal: float, k_start: float):
    """Also where the span is no whole number of steps; and no step has more room than it needs."""
    model, sparsity = ModelConfig(features=1009, k=64), SparsityConfig(k_start=k_start, anneal=anneal)
    config = TrainConfig("0", steps=steps, model=model, sparsity=sparsity)
    asked = [dense.k_at(step, config, 1)[0] for step in range(steps)]
    room = [slots_of(model, k_start if step < annealed_steps(config) else 1.0) for step in range(steps)]
    assert all(k <= slots for k, slots in zip(asked, room, strict=True))
    assert [slots > 64 for slots in room] == [k > 64 for k in asked]
    assert annealed_steps(replace(config, sparsity=SparsityConfig(k_start=1.0))) == 0


def test_schedule():
    config = replace(settings("topk"), steps=100, warmup=9, decay=0.2, lr=2.0)
    rate = schedule(config)
    steps = (0, 4, 9, 10, 80, 90, 99, 100)
    assert [float(rate(step)) for step in steps] == pytest.approx([0.2, 1.0, 2, 2, 2, 1, 0.1, 0])
    assert float(schedule(replace(config, decay=0.0))(99)) == 2
    assert make_optimiser(config)


def test_bfloat16_is_close_to_float32():
    """Products of rounded factors: some features are chosen differently, most are not."""
    wiring = wire("0-1", 3, 0, 16)
    exact, rounded = (
        gradients_of(case(settings("relu", dtype=dtype, model={"slots": F}), wiring))
        for dtype in ("float32", "bfloat16")
    )
    assert float(rounded[1]["loss"]) == pytest.approx(float(exact[1]["loss"]), rel=0.02)
    assert float(rounded[1]["loss"]) != float(exact[1]["loss"])
    for a, b in zip(jax.tree.leaves(rounded[0]), jax.tree.leaves(exact[0]), strict=True):
        assert np.asarray(a).dtype == np.float32
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def products(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes that matrix products in a program give, those in its inner programs included; not in a `cond`."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        if equation.primitive.name != "cond":
            found += [shape for inner in jaxprs_in_params(equation.params) for shape in products(inner)]
    return found


@pytest.mark.parametrize("activation", RULES)
@pytest.mark.parametrize("revive", [0.0, 0.3])
def test_the_encoder_has_no_dense_backward_pass(activation: str, revive: float):
    """But in a branch that is taken when many features are dead."""
    wiring = wire("0-1", 3, 0, 16)
    of = case(settings(activation, sparsity={"revive": revive, "auxk": 0.1, "auxk_features": 4}), wiring)
    inputs = arguments(of, mesh_of(1, 1))
    program = jax.make_jaxpr(make_gradients(of.config, of.graph, mesh_of(1, 1)))(*inputs)
    large = [tuple(sorted(shape)) for shape in products(program.jaxpr) if np.prod(shape) >= F * D]
    assert large == [tuple(sorted((2, B, F)))]  # forward
    assert str(program).count("cond[") == 2 * (revive > 0)  # forward and backward


@pytest.mark.parametrize("norm, expected", [(0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (7.0, 0.5)])
def test_only_gradients_above_the_bound_are_clipped(norm: float, expected: float):
    gradients = {"a": np.array([0.6, 0.0]) * norm, "b": np.array([[0.8]]) * norm}
    clipped, _ = clip(0.5).update(gradients, optax.EmptyState())
    assert float(optax.tree.norm(clipped)) == pytest.approx(expected, abs=1e-6)
