"""Checksums of a training state, by which a checkpoint is known to be read as it was saved."""

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(state: Any, meta: dict[str, Any]) -> list[int | None]:
    """Of each array of a state, in the order of the pytree, and then of `meta`. None of a leaf that is no array.

    One array at a time: for all of them at once XLA would hold the mixed bits of many together, gigabytes of them.
    """
    found = [array_checksum(leaf) if hasattr(leaf, "dtype") else None for leaf in jax.tree.leaves(state)]
    text = json.dumps(meta, sort_keys=True)
    return [*(None if one is None else int(one) for one in found), zlib.crc32(text.encode())]


@jax.jit
def array_checksum(leaf: jax.Array) -> jax.Array:
    """[] uint32 of an array of 32-bit numbers, computed where it is. The same on every mesh: sums of whole numbers have
    no order. An array with one element changed has another sum for certain; with more, in all but one of 2^32 cases."""
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = np.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * stride
    # Bits are mixed one to one (lowbias32, Ellis 2018): sums of what is not would not see two signs that flip.
    h = jax.lax.bitcast_convert_type(leaf, jnp.uint32) + place * np.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
