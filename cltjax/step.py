"""The state of training and the one step that advances it: pure functions, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cltjax.clt import CLT
from cltjax.config import TrainConfig
from cltjax.loss import reconstruction_loss, squared_errors
from cltjax.normalisation import Normalisation
from cltjax.wiring import Wiring

# Silent tokens are counted up to here (int32 must not wrap).
SILENT_LIMIT = 1 << 30


class TrainState(NamedTuple):
    """Everything a checkpoint holds."""

    parameters: nnx.State
    constants: nnx.State  # normalisation: part of the model, not trained
    optimiser: optax.OptState
    silent: jax.Array  # [S, F] int32: tokens since a feature was last active
    step: jax.Array  # [] int32: steps done


def schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Learning rate by step: a rise over `warmup` steps, flat, a fall to 0 over the last share `decay`, both linear."""
    warmup, fall = float(config.warmup), config.decay * config.steps

    def rate(step: Any) -> Any:
        up = jnp.minimum(1.0, (step + 1) / (warmup + 1))
        down = jnp.minimum(1.0, (config.steps - step) / fall) if fall > 0 else 1.0
        return config.lr * jnp.minimum(up, down)

    return rate


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""
    adamw = optax.adamw(schedule(config), weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def build(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> CLT:
    """The untrained model."""
    return CLT(wiring, config.model.features, config.model.k, scales, jax.random.key(config.seed))


def initial_state(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> TrainState:
    """The state before the first step."""
    _, parameters, constants = nnx.split(build(config, wiring, scales), nnx.Param, ...)
    silent = jnp.zeros((len(wiring.sources), config.model.features), jnp.int32)
    optimiser = make_optimiser(config).init(parameters)
    return TrainState(parameters, constants, optimiser, silent, jnp.zeros((), jnp.int32))


def graph_of(config: TrainConfig, wiring: Wiring, scales: Normalisation) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(config, wiring, scales)))


Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_step(config: TrainConfig, graph: nnx.GraphDef) -> Step:
    """One optimiser step: (state, x [B, S, D], y [B, T, D]) -> (state, figures of this batch). The state is donated."""
    optimiser, rate = make_optimiser(config), schedule(config)
    # method.md: dead while training is silent for 1000 F/k tokens.
    dead_after = min(SILENT_LIMIT, 1000 * config.model.features // config.model.k)

    def loss_of(parameters: nnx.State, constants: nnx.State, x: jax.Array, y: jax.Array):
        clt: CLT = nnx.merge(graph, parameters, constants)
        values, indices = clt.encode(x)
        target = clt.normalise_targets(y)
        errors = squared_errors(clt.decode(values, indices), target)
        power = jnp.mean(jnp.square(target), axis=-1)
        return reconstruction_loss(errors), (values, indices, errors.mean(0), power.mean(0))

    def step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, found), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.parameters, state.constants, x, y)
        values, indices, error, power = found
        updates, moments = optimiser.update(gradients, state.optimiser, state.parameters)
        active = values > 0
        source = jnp.arange(len(values))[:, None, None]
        fired = jnp.zeros(state.silent.shape, bool).at[source, indices].max(active)
        silent = jnp.where(fired, 0, jnp.minimum(state.silent + x.shape[0], SILENT_LIMIT))
        figures = {
            "loss": loss,
            "error": error,
            "power": power,
            "l0": active.sum(-1).mean(),
            "dead": (silent > dead_after).mean(),
            "grad_norm": optax.tree.norm(gradients),
            "lr": rate(state.step),
        }
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(parameters, state.constants, moments, silent, state.step + 1), figures  # type: ignore[arg-type]

    return jax.jit(step, donate_argnums=0)
