"""Sparsity rules: pre-activations in, the K active features of each token out, as (values, indices)."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def topk(pre: ArrayLike, k: int) -> tuple[jax.Array, jax.Array]:
    """ReLU of the k largest pre-activations of each token; of equal ones the lowest index wins.

    pre: [..., F] -> values [..., K] (largest first, never negative), indices [..., K] int32.
    The result of `top_k` must not be sliced: on CPU that defeats XLA's fast path (a hundredfold slower).
    """
    values, indices = jax.lax.top_k(pre, k)
    return jnp.maximum(values, 0), indices
