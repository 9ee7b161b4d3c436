"""The training loss: reconstruction, and what keeps features few and alive.

    sum over targets t of weight_t |y_t - y_hat_t|^2 / variance_t, mean over tokens       (method.md)
    + penalty    jumprelu: sum of tanh(scale a |W_dec|)   relu: sum of a |W_dec|          (Anthropic 2025; L1),
                 each source's by its own weight where these are steered towards k active features
    + revive     how far dead features are below being active (Anthropic 2025), where the loss is
    + auxk       what is left, reconstructed with the strongest dead features            (Gao et al. 2024)

Inside `jax.shard_map` a value is this shard's tokens' part of a sum over tokens, alike on every shard of `model`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cltjax.axes import Axes, shards, total
from cltjax.clt import CLT, TINY
from cltjax.config import FEW_DEAD, SparsityConfig
from cltjax.encode import pre_activations
from cltjax.sparsity import RANKED_BY_NORM, candidates, jumprelu, training_cut

# Where the penalty is steered: a source with r times as many active features as it is to have gets r ** PROPORTIONAL
# times a weight whose logarithm grows by INTEGRAL x lr x log r a step: lr is how fast Adam's weights, and so L0,
# follow. What is needed falls tenfold in the course of a run; an integral alone follows so late that half of jumprelu's
# features are dead by then, and L0 is a third of k.
INTEGRAL, PROPORTIONAL = 2.5, 6.0
MOST_EXCESS = 0.7  # log r is taken for this at most, in size: else the weight is far too large once L0 has followed
MOST_PENALTY = 1e2


class Steering(NamedTuple):
    """`first`: the weight that a rule begins with, while log r is at least MOST_EXCESS. `least`: the smallest. `unit`:
    where it is not 0, the weight w changes as said above where |w| is well above this, but linearly near 0, which it
    so may cross: what changes is not log w but arcsinh(w / unit).

    Under jumprelu a weight below 0 brings thresholds down. Reconstruction alone does not where the learning rate makes
    pre-activations noisy: on the demo (lr 8e-3) L0 went from 16 to 10 while the weight fell to 0. It begins so that it
    would be below 0 at log r = 0: to be above, it first has to have been at many active features for a while. L1 with a
    weight below 0 would have no bound.
    """

    first: float
    least: float
    unit: float


STEERING = {"jumprelu": Steering(6.7e-4, -1e-2, 1e-4), "relu": Steering(6.7e-3, 1e-8, 0.0)}


class Active(NamedTuple):
    """values, indices [S, B, C] of the active features; pre, rank [S, B, F]; cut: the rank that takes (broadcasts);
    full [S, B]: whether a token has no slot left, and so perhaps fewer active features than its rule gives it."""

    values: jax.Array
    indices: jax.Array
    pre: jax.Array
    rank: jax.Array
    cut: jax.Array
    full: jax.Array


def activate(clt: CLT, normal: jax.Array, k: jax.Array, slots: int, bandwidth: float, axes: Axes) -> Active:
    """Active features of a training batch: normalised inputs [B, S, D], k [S] of this step."""
    pre = clt.pre_activations(normal)
    rank = clt.rank(pre)
    if clt.activation in RANKED_BY_NORM:
        rank = jax.lax.optimization_barrier(rank)  # computed once: `revival` compares it with the cut taken from it
    found = candidates(rank, slots, axes.model)
    kept, cut = training_cut(clt.activation, found.rank, k, axes)
    full = kept[..., -1] & (clt.activation != "topk")
    picked = clt.pick(normal, pre, found.indices)
    if clt.activation == "jumprelu":
        # Inactive candidates stay, with a value of 0: their decoder's gradient is what teaches their threshold.
        here = at(clt.thresholds(), found.indices)
        return Active(jumprelu(picked, here, bandwidth), found.indices, pre, rank, cut, full)
    return Active(jnp.where(kept, jnp.maximum(picked, 0), 0), found.indices, pre, rank, cut, full)


def at(table: jax.Array, indices: jax.Array) -> jax.Array:
    """table [S, F] at indices [S, B, C] -> [S, B, C]; 0 where the index is F."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(table, indices)


def squared_errors(y_hat: jax.Array, y: jax.Array) -> jax.Array:
    """Each token's squared error at each target, in units of that target's variance.

    y_hat, y: [B, T, D], normalised -> [B, T]. One scalar standard deviation per target was divided out, so that the
    squared targets have mean 1: the mean over D of the squared error is |y - y_hat|^2 / variance.
    """
    return jnp.mean(jnp.square(y - y_hat), axis=-1)


def penalty(clt: CLT, active: Active, scale: float, axes: Axes) -> jax.Array:
    """The sparsity penalty of jumprelu or relu by source [S], summed over tokens and features."""
    weighted = active.values * at(clt.decoder_norms(), active.indices)
    cost = jnp.tanh(scale * weighted) if clt.activation == "jumprelu" else weighted
    return total(jnp.sum(cost, (1, 2)), axes.model)


def revival(clt: CLT, normal: jax.Array, active: Active, dead: jax.Array, losses: jax.Array, axes: Axes) -> jax.Array:
    """How far dead features [S, F] are below being active, summed over sources, tokens and features; a token counts by
    its part of the reconstruction loss of its microbatch, `losses` [B], in units of the mean.

    In units of rank for the topk rules; for jumprelu and relu times |W_dec|, as in Anthropic's pre-activation loss.
    There all tokens count alike: a dead feature is then pushed along the mean input, comes back on many tokens at once,
    and the features that it drives out are the next to die. The dead share of batchtopk on the demo (k = 8) went up to
    .4 in the middle of a run, and FVU from .035 to .14 (benchmarks/quality.py). What has a large loss is where another
    feature is of use, as in the resampling of Bricken et al. 2023.

    The gradient goes to encoders, by way of the pre-activations of normalised inputs [B, S, D], and to jumprelu's
    thresholds. Were these to stay where they were when their features died, each that came back would at once write
    as much as its threshold says: that took train FVU on the demo (k = 16, lr 8e-3) from .035 to .3 within 600 steps.
    Dead features are few as a rule: then only theirs are computed again, and a dense backward pass of the encoder is
    not needed.
    """
    tokens = losses.size * shards(axes.data)
    share = tokens * losses / jnp.maximum(total(losses.sum(), axes.data), TINY)
    norms = jax.lax.stop_gradient(clt.decoder_norms())
    none = jnp.zeros_like(norms)
    tables = {
        "W_enc": clt.W_enc[...],
        "b_enc": clt.b_enc[...],
        "threshold": clt.thresholds() if clt.activation == "jumprelu" else none,
        "scale": none + 1 if clt.activation == "topk" else norms,
    }
    # Whether a feature is short of the cut is seen by the ranks that the cut was taken from: another product has
    # another rounding error, and the feature at the cut would have the gradient of a real shortfall.
    short = dead[:, None] & (active.rank < active.cut)

    @jax.checkpoint  # else each branch returns what the other one's backward pass needs, as zeros
    def shortfall(tables: dict[str, jax.Array], short: jax.Array) -> jax.Array:
        h = pre_activations(tables["W_enc"], tables["b_enc"], normal, clt.dtype)
        rank = (h - tables["threshold"][:, None]) * tables["scale"][:, None]
        return jnp.sum(jnp.where(short, active.cut - rank, 0) * share[:, None])

    def of_few(tables: dict[str, jax.Array], short: jax.Array) -> jax.Array:
        places = jax.vmap(lambda dead: jnp.nonzero(dead, size=few, fill_value=F)[0])(dead)
        rows = {name: jax.vmap(partial(jnp.take, axis=0, mode="clip"))(table, places) for name, table in tables.items()}
        return shortfall(rows, jnp.take_along_axis(short, places[:, None], -1, mode="fill", fill_value=False))

    F = dead.shape[1]
    few = -(-F // FEW_DEAD)
    return total(jax.lax.cond(dead.sum(1).max() <= few, of_few, shortfall, tables, short), axes.model)


def auxiliary(
    clt: CLT, normal: jax.Array, pre: jax.Array, left: jax.Array, dead: jax.Array, slots: int, axes: Axes
) -> jax.Array:
    """Squared errors [B, T] of reconstructing what is `left` [B, T, D] with the strongest dead features of a token."""
    rank = jnp.where(dead[:, None], jax.lax.stop_gradient(pre), -jnp.inf)
    found = candidates(rank, slots, axes.model)
    picked = jnp.where(found.rank > 0, clt.pick(normal, pre, found.indices), 0)
    return squared_errors(total(clt.contributions(picked, found.indices), axes.model), left)


def penalty_weight(penalty: float, ramp: float, steps: int, step: jax.Array) -> jax.Array:
    """The penalty's weight at a step, where it is given: a linear rise over the share `ramp` of the steps."""
    rise = ramp * steps
    return penalty * (jnp.minimum(1.0, (step + 1) / rise) if rise > 0 else jnp.ones(()))


class SteeredPenalty(NamedTuple):
    """The penalty's weight of each source [S], and log r of the step before [S] (see INTEGRAL)."""

    weight: jax.Array
    excess: jax.Array


def first_penalty(activation: str, sources: int) -> SteeredPenalty:
    """Before the first step."""
    return SteeredPenalty(jnp.full(sources, STEERING[activation].first), jnp.full(sources, MOST_EXCESS))


def steer(activation: str, before: SteeredPenalty, l0: jax.Array, k: jax.Array, lr: jax.Array) -> SteeredPenalty:
    """Weights for the next step, from active features a token in this one, `l0` [S], and those wanted, `k` [S]."""
    _, least, unit = STEERING[activation]
    excess = jnp.log(jnp.maximum(l0, jnp.finfo(jnp.float32).tiny)) - jnp.log(k)
    excess = jnp.clip(excess, -MOST_EXCESS, MOST_EXCESS)
    change = INTEGRAL * lr * excess + PROPORTIONAL * (excess - before.excess)
    if unit > 0:
        weight = unit * jnp.sinh(jnp.arcsinh(before.weight / unit) + change)
    else:
        weight = before.weight * jnp.exp(change)
    return SteeredPenalty(jnp.clip(weight, least, MOST_PENALTY), excess)


def k_at(ks: tuple[int, ...], features: int, sparsity: SparsityConfig, steps: int, step: jax.Array) -> jax.Array:
    """[S] int32: k of each source at a step: `k_start` times k at first, k after the share `anneal` of the steps."""
    fall = sparsity.anneal * steps
    more = (sparsity.k_start - 1) * jnp.maximum(0.0, 1 - step / fall) if fall > 0 else jnp.zeros(())
    return jnp.minimum(jnp.round(jnp.array(ks) * (1 + more)).astype(jnp.int32), features)
