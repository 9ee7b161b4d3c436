"""The names of the device mesh's axes, and what moves between devices: `data` splits tokens, `model` splits features.

Inside `jax.shard_map` every function sees its own shard and calls these; outside of it (`ALONE`) they do nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
    """Names of the mesh axes that a computation is split over, or None where it is not."""

    data: str | None = None
    model: str | None = None


ALONE = Axes()
MESH = Axes("data", "model")


def total(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over an axis' shards, on each of them."""
    return x if axis is None else jax.lax.psum(x, axis)


def shards(axis: str | None) -> int:
    """How many shards an axis has."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def varying_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x`, typed as different on each shard over which one of `others` differs.

    `shard_map` types values by the axes they vary over. A loop must begin with the type it goes on with, and a
    gradient have the type of its parameter.
    """

    def axes(value: jax.Array) -> frozenset[str]:
        return jax.typeof(value).manual_axis_type.varying

    wanted = frozenset().union(*map(axes, others)) - axes(x)
    return jax.lax.pcast(x, tuple(wanted), to="varying") if wanted else x


def zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """float32 zeros, typed as `varying_like`."""
    return varying_like(jnp.zeros(shape, jnp.float32), *like)
