"""Sparsity rules: which features of a token are active, and with what value.

A rule ranks a token's features, takes the `slots` that rank highest in each source as candidates, and makes activations
of them. What flows on is (values, indices) [S, B, C]. Letters: S sources, B tokens, F features here, C slots.

    topk         ranked by pre-activation h; the first k are active
    topk_joint   ranked by h |W_dec|; the K first over all sources are active, K = sum of the sources' k
    batchtopk    ranked by h |W_dec|; the k B first of a source over all tokens of the batch are active
    jumprelu     ranked by h - theta; active where h > theta
    relu         ranked by h; active where h > 0

topk_joint and batchtopk look at other sources or tokens only while training. Later each source has one threshold on
h |W_dec|, which is a threshold on h for each feature.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cltjax.axes import Axes, shards, total, varying_like

RANKED_BY_NORM = ("topk_joint", "batchtopk")
# Neighbours whose maximum is looked at first, and how many times k a row has to be for that to be faster. On two CPU
# cores, k = 32, the encoder's bias being added on the way: 51 instead of 128 ms for 2048 rows of 32768, 55 instead of
# 105 for 4096 of 8192; of 1024 no gain. (79 for runs of 16 and their maxima by `max`: XLA first writes what it adds.)
RUN, LONG = 8, 256
# Pieces of a top-k on CPU: jax 0.10.2 runs no fewer than nine beside one another. Two cores, 3072 rows of 1024, k = 32:
# 17 instead of 31 ms.
PIECES = 16
LARGEST_FLOAT = 0x7F800000  # the bits of infinity; those of non-negative floats are ordered as the floats are


class Candidates(NamedTuple):
    """rank [S, B, C], descending, alike on every shard of `model`; indices [S, B, C] among this shard's features,
    F where another shard has the feature."""

    rank: jax.Array
    indices: jax.Array


def candidates(rank: jax.Array, slots: int, axis: str | None = None) -> Candidates:
    """The `slots` features of each token and source that rank highest; of equal ones the lowest index wins.

    rank [S, B, F]. With features split over `axis`: each shard's best are gathered, never all ranks, and the best of
    those are exactly the best of all.
    """
    features = rank.shape[-1]
    own = min(slots, features)
    best, places = top_k(rank, own)
    if shards(axis) == 1:
        return Candidates(best, places)
    assert axis is not None
    gathered = jax.lax.all_gather(best, axis, axis=rank.ndim - 1, tiled=True)  # in shard order: ties stay right
    best, winners = top_k(gathered, slots)
    mine = winners - jax.lax.axis_index(axis) * own
    here = (mine >= 0) & (mine < own)
    return Candidates(best, jnp.where(here, jnp.take_along_axis(places, jnp.where(here, mine, 0), -1), features))


def top_k(rank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` over the last axis, ties included (but 0 and -0 are one); of long rows by way of their runs' maxima.

    The k largest lie in the k runs of neighbours whose maxima are the largest: whatever is before a run's largest in
    the order (larger, or equal and at a lower index) is, for runs that rank higher, at least one number each.
    """
    if rank.shape[-1] < LONG * k or rank.shape[-1] % RUN:
        return whole_top_k(rank, k)
    runs = rank.reshape(*rank.shape[:-1], -1, RUN)
    largest = reduce(jnp.maximum, (runs[..., place] for place in range(RUN)))
    chosen = jnp.sort(whole_top_k(largest, k)[1], axis=-1)  # ascending: of equal numbers the lowest index wins
    members = jnp.take_along_axis(runs, chosen[..., None], -2, mode="promise_in_bounds")
    best, places = whole_top_k(members.reshape(*rank.shape[:-1], k * RUN), k)
    run = jnp.take_along_axis(chosen, places // RUN, -1, mode="promise_in_bounds")
    return best, run * RUN + places % RUN


def whole_top_k(rank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of float32, without a gradient, as XLA does it fast on CPU: over rows of a matrix, and not fused with
    a slice of its result, which would make it a full sort (a hundredfold slower).

    As a call has one thread, the rows are cut in PIECES, which XLA runs beside one another. It would not if the memory
    of one piece's results served for the next one's, so all results are put together at once: an array of both.
    """
    rows = rank.reshape(-1, rank.shape[-1])
    size = max(1, -(-len(rows) // PIECES) if jax.default_backend() == "cpu" else len(rows))
    found = [jax.lax.top_k(rows[start : start + size], k) for start in range(0, max(1, len(rows)), size)]
    bits = [jax.lax.bitcast_convert_type(best, jnp.int32) for best, _ in found]
    both = jax.lax.optimization_barrier(jnp.concatenate([*bits, *(places for _, places in found)]))
    shape = (*rank.shape[:-1], k)
    best = jax.lax.bitcast_convert_type(both[: len(rows)], rank.dtype)
    return best.reshape(shape), both[len(rows) :].reshape(shape)


def cut_topk(rank: jax.Array, k: jax.Array) -> jax.Array:
    """k [S] -> the k-th largest rank of each token and source [S, B, 1]."""
    kept = jnp.arange(rank.shape[-1]) < k[:, None, None]
    return jnp.where(kept, rank, jnp.inf).min(-1, keepdims=True)


def cut_joint(rank: jax.Array, k: jax.Array) -> jax.Array:
    """The K-th largest rank of each token over all its candidates [1, B, 1], K the sum of k [S]."""
    S, B, C = rank.shape
    ordered = jnp.sort(jnp.moveaxis(rank, 0, 1).reshape(B, S * C), axis=-1, descending=True)
    kept = jnp.arange(S * C) < k.sum()
    return jnp.where(kept, ordered, jnp.inf).min(-1)[None, :, None]


def cut_batch(rank: jax.Array, k: jax.Array, axis: str | None = None) -> jax.Array:
    """The n-th largest rank of each source over all tokens [S, 1, 1], n = k [S] times tokens; at least 0.

    By bisection on the bits of non-negative floats: 31 counts and no sort. With tokens split over `axis`, counts are
    added up over the shards.
    """
    B = rank.shape[1] * shards(axis)
    wanted = jnp.round(k * B).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(rank, 0.0), jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at least `wanted` ranks reach low, fewer reach high
        middle = low + (high - low) // 2
        enough = total((bits >= middle[:, None, None]).sum((1, 2)), axis) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = total(varying_like(jnp.zeros(len(rank), jnp.int32), bits), axis)
    bounds = jax.lax.fori_loop(0, 31, halve, (low, low + LARGEST_FLOAT))
    return jax.lax.bitcast_convert_type(bounds[0], jnp.float32)[:, None, None]


def training_cut(activation: str, rank: jax.Array, k: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Which candidates may be active in a training step [S, B, C], and the rank that takes (broadcasts).

    rank [S, B, C] of the candidates; k [S].
    """
    if activation == "topk":
        cut = cut_topk(rank, k)
        kept = jnp.broadcast_to(jnp.arange(rank.shape[-1]) < k[:, None, None], rank.shape)  # exactly k, ties or not
    else:
        if activation == "topk_joint":
            cut = cut_joint(rank, k)
        elif activation == "batchtopk":
            cut = cut_batch(rank, k, axes.data)
        else:
            cut = jnp.zeros((1, 1, 1))
        kept = rank >= cut
    return kept, cut


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def jumprelu(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """`pre` where it is above `threshold`, else 0.

    The threshold learns by the straight-through estimator: d/d threshold = -(threshold / bandwidth) where `pre` is
    within bandwidth / 2 of it (Rajamanoharan et al. 2024, eq. 11, with a rectangle as kernel).
    """
    return jnp.where(pre > threshold, pre, 0.0)


@jumprelu.defjvp
def _jumprelu_tangent(bandwidth: float, primals: tuple, tangents: tuple):
    (pre, threshold), (pre_tangent, threshold_tangent) = primals, tangents
    near = jnp.abs(pre - threshold) < bandwidth / 2
    slope = jnp.where(near, -threshold / bandwidth, 0.0)
    tangent = jnp.where(pre > threshold, pre_tangent, 0.0) + slope * threshold_tangent
    return jumprelu(pre, threshold, bandwidth), tangent
