"""Sparse decoding: K rows of a decoder a token, never a dense [B, F] code.

Forward and backward go over the K active features one at a time, so that the largest intermediate is [B, D]
and not [B, K, D]. Measured on two CPU cores (B=512, F=1024, K=16, D=128, 5 heads): forward 0.8 ms, both gradients
5 ms, against 8 ms and 16 ms for matrix products with a dense code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cltjax.wiring import Wiring

# Features handled by one turn of the loop. More do not make a step faster on CPU, but longer to compile.
UNROLL = 2


@jax.custom_vjp
def decode_head(W_dec: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """One (source, target) pair: sum over k of values[b, k] W_dec[indices[b, k]].

    W_dec [F, D], values [B, K], indices [B, K] -> [B, D]. The gradient with respect to W_dec is a scatter-add of
    the K rows each token touched; the gradient with respect to values is a gather and a dot product.
    """

    def add(total: jax.Array, active: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, index = active
        return total + value[:, None] * W_dec[index], None

    start = jnp.zeros((values.shape[0], W_dec.shape[1]), W_dec.dtype)
    return jax.lax.scan(add, start, (values.T, indices.T), unroll=UNROLL)[0]


def _forward(W_dec: jax.Array, values: jax.Array, indices: jax.Array):
    return decode_head(W_dec, values, indices), (W_dec, values, indices)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    W_dec, values, indices = saved

    def add(total: jax.Array, active: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, index = active
        return total.at[index].add(value[:, None] * gradient), jnp.sum(gradient * W_dec[index], -1)

    W_gradient, value_gradient = jax.lax.scan(add, jnp.zeros_like(W_dec), (values.T, indices.T), unroll=UNROLL)
    return W_gradient, value_gradient.T, None


decode_head.defvjp(_forward, _backward)


def decode(W_dec: jax.Array, b_dec: jax.Array, values: jax.Array, indices: jax.Array, wiring: Wiring) -> jax.Array:
    """The joint sum y_hat_t = b_dec_t + sum over sources s of a_s W_dec_{s->t}.

    W_dec [P, F, D], b_dec [T, D], values and indices [S, B, K] -> [B, T, D].
    """
    source = np.array(wiring.source_index)
    written = jax.vmap(decode_head)(W_dec, values[source], indices[source])
    totals = [written[pairs].sum(0) for pairs in wiring.target_slices]
    return jnp.stack(totals, axis=1) + b_dec
