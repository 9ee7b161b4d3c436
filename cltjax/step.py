"""The state of training and the one step that advances it: pure functions, compiled once, split over a device mesh.

Parameters of features are split over the mesh's `model` axis, tokens over `data`. Where devices are several, forward
and backward run inside `jax.shard_map`, so that what crosses them is what is written here: the candidates' ranks, one
sum of y_hat, counts, and one sum of each gradient over `data` (tests/test_sharding.py reads it off the compiled
program).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.axes import ALONE, MESH, Axes, shards, total, varying_like
from cltjax.clt import CLT
from cltjax.config import TrainConfig, k_values, slots_of
from cltjax.loss import (
    SteeredPenalty,
    activate,
    auxiliary,
    first_penalty,
    k_at,
    penalty,
    penalty_weight,
    revival,
    squared_errors,
    steer,
)
from cltjax.normalisation import Normalisation
from cltjax.store_format import SCALE_BYTES
from cltjax.wiring import Wiring

# Silent tokens are counted up to here (int32 must not wrap).
SILENT_LIMIT = 1 << 30
# The firing rate is averaged over about so many tokens.
DENSITY_TOKENS = 1 << 20
# Features that fire less often than this are counted as rare.
RARE = 1e-5

# Where the axis of the features is, by the name of what has one. Everything else is alike on all devices.
FEATURE_AXIS = {"W_enc": 1, "b_enc": 1, "log_threshold": 1, "W_dec": 0, "silent": 1, "density": 1}
# What weight decay acts on.
DECAYING = {"W_enc", "W_dec"}


class TrainState(NamedTuple):
    """Everything a checkpoint holds."""

    parameters: nnx.State
    constants: nnx.State  # normalisation and thresholds: part of the model, not trained
    optimiser: optax.OptState
    silent: jax.Array  # [S, F] int32: tokens since a feature was last active
    density: jax.Array  # [S, F] float32: firing rate, averaged over the last DENSITY_TOKENS or so
    step: jax.Array  # [] int32: steps done
    penalty: SteeredPenalty | None = None  # where it is steered


def names_in(path: tuple) -> list[str]:
    """The names on the way to an array of a pytree."""
    return [str(getattr(entry, "name", getattr(entry, "key", None))) for entry in path]


def specs(tree: Any) -> Any:
    """How each array of a pytree (a state, its gradients, its moments) is split over the mesh: a tree of P."""

    def spec(path: tuple, _: Any) -> P:
        for name in names_in(path):
            if name in FEATURE_AXIS:
                return P(*(None,) * FEATURE_AXIS[name], "model")
        return P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The same as NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree), is_leaf=lambda leaf: isinstance(leaf, P))


def schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Learning rate by step: a rise over `warmup_steps`, flat, a fall to 0 over the last share `decay`, both linear."""
    warmup, fall = float(config.warmup_steps), config.decay * config.steps

    def rate(step: Any) -> Any:
        up = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        down = jnp.minimum(1.0, (config.steps - step) / fall) if fall > 0 else 1.0
        return config.learning_rate * jnp.minimum(up, down)

    return rate


def decaying(parameters: Any) -> Any:
    """Which parameters weight decay acts on: a tree of bool."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not DECAYING.isdisjoint(names_in(path)), parameters)


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Only matrices decay: a threshold is a logarithm, and would go to 1."""
    adamw = optax.adamw(schedule(config), weight_decay=config.weight_decay, mask=decaying)
    return optax.chain(clip(config.clip), adamw)


def clip(most: float) -> optax.GradientTransformation:
    """Gradients scaled to a global norm of `most` where theirs is larger.

    One factor, which XLA multiplies by where a gradient is used. optax.clip_by_global_norm divides behind a `select`:
    clipped gradients are then written to memory and read again, and an update of 134 M parameters takes 2.7 times as
    long (benchmarks/train_step.py).
    """

    def scaled(gradients: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(1.0, most / optax.tree.norm(gradients))
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(scaled)


def build(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> CLT:
    """The untrained model."""
    key = jax.random.key(config.seed)
    return CLT(wiring, config.model, scales, key, config.sparsity.threshold, config.dtype)


def initial_state(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> TrainState:
    """The state before the first step."""
    _, parameters, constants = nnx.split(build(config, wiring, scales), nnx.Param, ...)
    shape = len(wiring.sources), config.model.features
    optimiser = make_optimiser(config).init(parameters)
    silent, density, step = jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros((), jnp.int32)
    steered = first_penalty(config.model.activation, len(wiring.sources)) if config.steered else None
    return TrainState(parameters, constants, optimiser, silent, density, step, steered)


def abstract_state(config: TrainConfig, wiring: Wiring, scales: Normalisation, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of `initial_state`, without its arrays."""
    shapes = jax.eval_shape(partial(initial_state, config, wiring, scales))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def graph_of(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(config, wiring, scales)))


@dataclass(frozen=True)
class Frozen:
    """A trained CLT that helps to predict and stays as it is; its arrays are handed to the step beside this.

    inputs: where its sources' inputs are in a batch. targets: (its target, ours) for the targets that both have.
    slots: most active features of a token and source in a training step; None for as many as it was trained with, which
    under rules with a threshold is fewer than are measured (metrics.room says how many are needed).
    """

    graph: nnx.GraphDef
    inputs: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    slots: int | None = None

    def contributions(self, arrays: nnx.State, x: jax.Array, clt: CLT, axes: Axes, whole: bool) -> jax.Array:
        """What it writes to the targets of `clt`, in its units [B, T, D]: here the part of this shard's features.

        whole: of all its active features, and not only of as many as it has slots for.
        """
        frozen: CLT = nnx.merge(self.graph, arrays)
        frozen.slots = frozen.slots if self.slots is None else self.slots
        written = active_contributions(frozen, x[:, self.inputs], axes, whole)
        theirs, ours = map(list, zip(*self.targets, strict=True))
        scale = (frozen.out_std[...][jnp.array(theirs)] / clt.out_std[...][jnp.array(ours)])[:, None]
        y_hat = varying_like(jnp.zeros((len(x), *clt.b_dec[...].shape)), written)
        return y_hat.at[:, jnp.array(ours)].add(written[:, jnp.array(theirs)] * scale)

    def bias(self, arrays: nnx.State, clt: CLT) -> jax.Array:
        """Its b_dec in the units of `clt` [T, D]."""
        frozen: CLT = nnx.merge(self.graph, arrays)
        theirs, ours = (jnp.array(places) for places in zip(*self.targets, strict=True))
        scale = (frozen.out_std[...][theirs] / clt.out_std[...][ours])[:, None]
        return jnp.zeros_like(clt.b_dec[...]).at[ours].add(frozen.b_dec[...][theirs] * scale)


def active_contributions(clt: CLT, x: jax.Array, axes: Axes, whole: bool) -> jax.Array:
    """What a trained CLT writes for raw inputs x [B, S, D]: [B, T, D], without b_dec."""
    if whole and clt.activation != "topk":
        return clt.contributions_of_codes(clt.codes(x))
    return clt.contributions(*clt.encode(x, axes))


def predict(
    clt: CLT,
    written: jax.Array,
    x: jax.Array,
    frozen: Sequence[Frozen],
    arrays: Sequence[nnx.State],
    axes: Axes,
    whole: bool = False,
) -> jax.Array:
    """Normalised predictions [B, T, D]: what a CLT's active features have `written` on this shard, together with what
    frozen ones write (`whole`: Frozen.contributions); one sum over `model`."""
    y_hat, bias = written, clt.b_dec[...]
    for one, held in zip(frozen, arrays, strict=True):
        y_hat = y_hat + jax.lax.stop_gradient(one.contributions(held, x, clt, axes, whole))
        bias = bias + jax.lax.stop_gradient(one.bias(held, clt))
    return total(y_hat, axes.model) + bias


def unpacked(rows: jax.Array) -> jax.Array:
    """store_format.unpack on the device; anything but int8 as it is."""
    if rows.dtype != jnp.int8:
        return rows
    scale = jax.lax.bitcast_convert_type(rows[..., -SCALE_BYTES:], jnp.float32)
    return rows[..., :-SCALE_BYTES].astype(jnp.float32) * scale[..., None]


Figures = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array, jax.Array, Sequence[nnx.State]], tuple[TrainState, Figures]]


def annealed_steps(config: TrainConfig) -> int:
    """Steps in which more than k features are active."""
    return math.ceil(config.sparsity.anneal * config.steps) if config.sparsity.k_start > 1 else 0


def dead_after(config: TrainConfig) -> int:
    """Tokens of silence after which a feature is dead while training: 1000 F / k (method.md) where none are given."""
    default = 1000 * config.model.features // max(k_values(config.model.k, config.model.features))
    return min(SILENT_LIMIT, default if config.sparsity.dead_after is None else config.sparsity.dead_after)


def make_gradients(
    config: TrainConfig, graph: nnx.GraphDef, mesh: Mesh, frozen: Sequence[Frozen] = (), annealing: bool = False
) -> Callable[..., tuple[nnx.State, Figures, jax.Array]]:
    """(state, x [M, B/M, S, D], y [M, B/M, T, D], frozen arrays) -> gradients, figures, tokens by feature [S, F].

    x and y may be packed int8 [.., D + 4] (`unpacked`).
    M microbatches are gone through one after the other; gradients are of their mean loss.
    """
    slots = slots_of(config.model, config.sparsity.k_start if annealing else 1.0)
    axes = MESH if mesh.size > 1 else ALONE  # a sum over one device would copy what it adds up
    data, model = axes

    def penalty_weights(state: TrainState) -> jax.Array:
        if state.penalty is not None:
            return state.penalty.weight
        assert config.sparsity.penalty is not None
        return penalty_weight(config.sparsity.penalty, config.sparsity.ramp, config.steps, state.step)

    def loss_of(parameters: nnx.State, state: TrainState, x: jax.Array, y: jax.Array, arrays: Sequence[nnx.State]):
        """This shard's part of one microbatch's loss; figures are sums over this shard's tokens."""
        clt: CLT = nnx.merge(graph, parameters, state.constants)
        x, y = unpacked(x), unpacked(y)
        tokens = len(x) * shards(data)
        normal = clt.normalise_inputs(x[:, : len(clt.wiring.sources)])
        k = k_at(clt.k, config.model.features, config.sparsity, config.steps, state.step)
        active = activate(clt, normal, k, slots, config.sparsity.bandwidth, axes)
        target = clt.normalise_targets(y)
        y_hat = predict(clt, clt.contributions(active.values, active.indices), x, frozen, arrays, axes)
        of_tokens = squared_errors(y_hat, target)
        errors = of_tokens.sum(0)
        weights = jnp.array(config.target_weights) if config.target_weights else jnp.ones(errors.shape)
        loss = weights @ errors / tokens
        dead = state.silent > dead_after(config)
        if config.penalised:
            found = penalty(clt, active, config.sparsity.scale, axes) / tokens
            loss += jnp.sum(penalty_weights(state) * found)
        if config.sparsity.revive > 0:
            losses = jax.lax.stop_gradient(of_tokens @ weights)
            loss += config.sparsity.revive * revival(clt, normal, active, dead, losses, axes) / tokens
        if config.sparsity.auxk > 0:
            left = jax.lax.stop_gradient(target - y_hat)
            slots_left = min(config.sparsity.auxk_features, config.model.features)
            found = auxiliary(clt, normal, active.pre, left, dead, slots_left, axes).sum(0)
            power = total(jnp.mean(jnp.square(left), -1).sum(0), data)
            loss += config.sparsity.auxk * (weights @ (found / power))
        fires = active.values > 0
        source = jnp.arange(len(fires))[:, None, None]
        fired = varying_like(jnp.zeros(state.silent.shape, jnp.int32), fires, state.silent)
        fired = fired.at[source, active.indices].add(fires.astype(jnp.int32), mode="drop")
        figures = {
            "loss": loss,
            "error": errors / tokens,
            "power": jnp.mean(jnp.square(target), -1).sum(0) / tokens,
            "l0": total(fires.sum((1, 2)), model) / tokens,
            "full": total(active.full.sum(1), model) / shards(model) / tokens,
        }
        if config.steered:  # by all that would be active, were there slots for them: as they will be measured
            figures["above"] = total((active.rank > 0).sum((1, 2)), model) / tokens
        return loss, (figures, fired)

    def local(state: TrainState, x: jax.Array, y: jax.Array, arrays: Sequence[nnx.State]):
        """Gradients of this shard's tokens, added up over microbatches and then over `data`."""
        differing = jax.tree.map(lambda leaf: varying_like(leaf, x), state.parameters)

        def one(x: jax.Array, y: jax.Array):
            (_, found), gradients = jax.value_and_grad(loss_of, has_aux=True)(differing, state, x, y, arrays)
            return gradients, *found

        sums = one(x[0], y[0])
        if len(x) > 1:

            def add(sums: Any, batch: tuple[jax.Array, jax.Array]):
                return jax.tree.map(jnp.add, sums, one(*batch)), None

            sums = jax.lax.scan(add, sums, (x[1:], y[1:]))[0]
        gradients, figures, fired = sums
        over_data = partial(jax.tree.map, lambda leaf: total(leaf, data))
        mean = partial(jax.tree.map, lambda leaf: leaf / len(x))
        return mean(over_data(gradients)), mean(over_data(figures)), over_data(fired)

    def gradients(state: TrainState, x: jax.Array, y: jax.Array, arrays: Sequence[nnx.State]):
        if axes == ALONE:
            return local(state, x, y, arrays)
        by_batch = P(None, data)
        outputs = specs(state.parameters), P(), P(None, model)
        inputs = specs(state), by_batch, by_batch, specs(arrays)
        return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs)(state, x, y, arrays)

    return gradients


def make_step(
    config: TrainConfig, graph: nnx.GraphDef, mesh: Mesh, frozen: Sequence[Frozen] = (), annealing: bool = False
) -> Step:
    """One optimiser step: (state, x [M, B/M, S, D], y [M, B/M, T, D], frozen arrays) -> (state, figures of this batch).

    The state is donated. Where k comes down from `k_start` times k, the first `annealed_steps` need a step made with
    `annealing`, which has room for more active features.
    """
    optimiser, rate = make_optimiser(config), schedule(config)
    ks = k_values(config.model.k, config.model.features)
    wanted = partial(k_at, ks, config.model.features, config.sparsity, config.steps)
    gradients_of = make_gradients(config, graph, mesh, frozen, annealing)

    def step(state: TrainState, x: jax.Array, y: jax.Array, arrays: Sequence[nnx.State]) -> tuple[TrainState, Figures]:
        gradients, figures, fired = gradients_of(state, x, y, arrays)
        updates, moments = optimiser.update(gradients, state.optimiser, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        tokens = x.shape[0] * x.shape[1]
        silent = jnp.where(fired > 0, 0, jnp.minimum(state.silent + tokens, SILENT_LIMIT))
        # The average of all tokens at first, of the last DENSITY_TOKENS later.
        share = jnp.maximum(1 / (state.step + 1), min(1.0, tokens / DENSITY_TOKENS))
        density = state.density + share * (fired / tokens - state.density)
        figures |= {
            "dead": (silent > dead_after(config)).mean(),
            "rare": (density < RARE).mean(),
            "grad_norm": optax.tree.norm(gradients),
            "lr": rate(state.step),
        }
        steered = state.penalty
        if steered is not None:
            figures["penalty"] = steered.weight
            above, k = figures.pop("above"), wanted(state.step)
            steered = steer(config.model.activation, steered, above, k, rate(state.step))
        advanced = TrainState(parameters, state.constants, moments, silent, density, state.step + 1, steered)  # type: ignore[arg-type]
        keep = jax.tree.map(jax.lax.with_sharding_constraint, advanced, shardings(advanced, mesh))
        return keep, figures

    return jax.jit(step, donate_argnums=0)
