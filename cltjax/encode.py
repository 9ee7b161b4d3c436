"""The encoder: dense pre-activations, and the active ones among them with a sparse gradient."""

import jax
import jax.numpy as jnp

from cltjax.axes import zeros
from cltjax.sparse_products import scatter_sum


def pre_activations(W_enc: jax.Array, b_enc: jax.Array, x: jax.Array, dtype: str = "float32") -> jax.Array:
    """W_enc [S, F, D], b_enc [S, F], normalised x [B, S, D] -> [S, B, F] float32.

    `dtype` is what the factors are rounded to; products are summed in float32. Pre-activations decide which features
    exist, so float32 means float32, not the TF32 that GPUs use by default.
    """
    product = jnp.einsum(
        "bsd,sfd->sbf",
        x.astype(dtype),
        W_enc.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )
    return product + b_enc[:, None]


@jax.custom_vjp
def pick(W_enc: jax.Array, b_enc: jax.Array, x: jax.Array, pre: jax.Array, indices: jax.Array) -> jax.Array:
    """The pre-activations at `indices`, whose gradient reaches W_enc and b_enc without a dense [B, F] product.

    x [B, S, D]; pre [S, B, F] as `pre_activations` gives it, without a gradient of its own; indices [S, B, K], F
    (one too many) where there is none: its value is 0 and nothing is added for it. -> [S, B, K].
    """
    return jnp.take_along_axis(pre, indices, -1, mode="fill", fill_value=0)


def _forward(W_enc: jax.Array, b_enc: jax.Array, x: jax.Array, pre: jax.Array, indices: jax.Array):
    return pick(W_enc, b_enc, x, pre, indices), (W_enc, x, indices)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    W_enc, x, indices = saved
    S, F, _ = W_enc.shape

    def one_source(s: int) -> tuple[jax.Array, jax.Array]:
        b_gradient = zeros((F,), W_enc, gradient).at[indices[s]].add(gradient[s], mode="drop")
        return scatter_sum(gradient[s], indices[s], x[:, s], F), b_gradient

    found = [one_source(s) for s in range(S)]
    return jnp.stack([W for W, _ in found]), jnp.stack([b for _, b in found]), None, None, None


pick.defvjp(_forward, _backward)
