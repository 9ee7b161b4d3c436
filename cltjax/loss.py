"""The training loss."""

import jax
import jax.numpy as jnp


def squared_errors(y_hat: jax.Array, y: jax.Array) -> jax.Array:
    """Each token's squared error at each target, in units of that target's variance.

    y_hat, y: [B, T, D], normalised -> [B, T]. One scalar standard deviation per target was divided out, so that the
    squared targets have mean 1: the mean over D of the squared error is |y - y_hat|^2 / variance.
    """
    return jnp.mean(jnp.square(y - y_hat), axis=-1)


def reconstruction_loss(errors: jax.Array) -> jax.Array:
    """Sum over targets, mean over tokens, of errors [B, T]."""
    return jnp.sum(jnp.mean(errors, axis=0))
