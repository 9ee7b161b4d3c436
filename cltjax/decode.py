"""Sparse decoding: K rows of a decoder a token, never a dense [B, F] code.

A source's heads lie side by side, W_dec [F, T_l, D], so that one gather of T_l x D neighbouring numbers serves all
its targets.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from cltjax.axes import zeros
from cltjax.sparse_products import gather_dot, gather_sum, scatter_sum
from cltjax.wiring import Wiring


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def decode_source(W_dec: jax.Array, values: jax.Array, indices: jax.Array, dtype: str = "float32") -> jax.Array:
    """All heads of one source: sum over k of values[b, k] W_dec[indices[b, k]].

    W_dec [F, T_l, D], values [B, K], indices [B, K] -> [B, T_l, D] float32. An index F (one too many) stands for no
    feature, with a value of 0. The gradient with respect to W_dec is a scatter-add of the K rows each token touched;
    with respect to values it is a gather and a dot product. `dtype` is what W_dec is rounded to; sums are float32.
    """
    return gather_sum(W_dec.astype(dtype), values, indices)


def _forward(W_dec: jax.Array, values: jax.Array, indices: jax.Array, dtype: str):
    return decode_source(W_dec, values, indices, dtype), (W_dec, values, indices)


def _backward(dtype: str, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    W_dec, values, indices = saved
    W_gradient = scatter_sum(values, indices, gradient, len(W_dec))
    return W_gradient, gather_dot(W_dec.astype(dtype), gradient, indices), None


decode_source.defvjp(_forward, _backward)


def decode(
    W_dec: Mapping[str, jax.Array], values: jax.Array, indices: jax.Array, wiring: Wiring, dtype: str = "float32"
) -> jax.Array:
    """The joint sum, without b_dec: sum over sources s of a_s W_dec_{s->t} for each target t.

    W_dec by source layer ("0": [F, T_l, D]), values and indices [S, B, K] -> [B, T, D]. Where features are split over
    devices, this is the part of the sum that this device's features make.
    """
    B, D = values.shape[1], W_dec[str(wiring.sources[0])].shape[-1]
    y_hat = zeros((B, len(wiring.targets), D), values, *W_dec.values())
    for s, (source, window) in enumerate(zip(wiring.sources, wiring.windows, strict=True)):
        y_hat = y_hat.at[:, window].add(decode_source(W_dec[str(source)], values[s], indices[s], dtype))
    return y_hat


def decode_source_codes(W_dec: jax.Array, codes: jax.Array) -> jax.Array:
    """`decode_source` of dense codes [B, F], by a matrix product: [B, T_l, D]."""
    return jnp.einsum("bf,ftd->btd", codes, W_dec, precision=jax.lax.Precision.HIGHEST)


def decode_codes(W_dec: Mapping[str, jax.Array], codes: jax.Array, wiring: Wiring) -> jax.Array:
    """`decode` of dense codes [S, B, F], by matrix products: for measuring rules under which a token may have any
    number of active features. Training never makes such codes."""
    B, D = codes.shape[1], W_dec[str(wiring.sources[0])].shape[-1]
    y_hat = zeros((B, len(wiring.targets), D), codes, *W_dec.values())
    for s, (source, window) in enumerate(zip(wiring.sources, wiring.windows, strict=True)):
        y_hat = y_hat.at[:, window].add(decode_source_codes(W_dec[str(source)], codes[s]))
    return y_hat
