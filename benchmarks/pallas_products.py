"""Candidates for the sparse products of cltjax/sparse_products.py on a GPU, in Pallas. Not used by training: no GPU has
measured them yet. benchmarks/products.py does, beside what is used.

One output row is a sum of rows of a table, and stays in registers until it is whole, where XLA's loop reads and writes
it for every few slots. Both gather_sum (a token's rows) and scatter_sum (a feature's tokens) are that. compiler_params
choose Mosaic GPU or Triton; under jax 0.10.2's Mosaic gather_dot takes a float32 table only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cltjax.sparse_products import by_feature

BLOCK = 1024  # numbers of a row that one program sums up


def sum_rows(
    table: jax.Array,
    values: jax.Array,
    places: jax.Array,
    starts: jax.Array,
    compiler_params: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """out[s] = the sum over p from starts[s] to starts[s + 1] of values[p] table[places[p]].

    table [F, M], values, places [P], starts [n + 1] ascending -> [n, M] float32. M is a multiple of BLOCK or smaller.
    """
    n, (_, M) = len(starts) - 1, table.shape
    block = min(BLOCK, M)
    if M % block:
        raise ValueError(f"rows of {M} numbers are no multiple of {block}")
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(table: jax.Array, values: jax.Array, places: jax.Array, starts: jax.Array, out: jax.Array) -> None:
        s, here = pl.program_id(0), pl.ds(pl.program_id(1) * block, block)
        first, stop = starts[s], starts[s + 1]

        def term(p: jax.Array) -> jax.Array:
            return values[p] * table[places[p], here].astype(jnp.float32)

        # The sum begins with a row, weighed by 0 where there is none: it has the layout of rows in registers.
        at = jnp.minimum(first, len(values) - 1)
        begin = jnp.where(stop > first, values[at], 0.0) * table[places[at], here].astype(jnp.float32)
        out[s, here] = jax.lax.fori_loop(first + 1, stop, lambda p, total: total + term(p), begin)

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n, M), jnp.float32),
        grid=(n, M // block),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        compiler_params=compiler_params,
        interpret=interpret,
    )
    return call(table, values, places, starts)


def gather_sum(
    table: jax.Array, values: jax.Array, indices: jax.Array, compiler_params: Any = None, interpret: bool = False
) -> jax.Array:
    """As cltjax.sparse_products.gather_sum, of table [F, M]; every index is a feature's."""
    n, C = indices.shape
    starts = jnp.arange(n + 1, dtype=jnp.int32) * C
    return sum_rows(table, values.reshape(-1), indices.reshape(-1), starts, compiler_params, interpret)


def scatter_sum(
    values: jax.Array,
    indices: jax.Array,
    rows: jax.Array,
    features: int,
    compiler_params: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """As cltjax.sparse_products.scatter_sum, of rows [n, M]."""
    order, starts = by_feature(indices, features)
    return sum_rows(rows, values.reshape(-1)[order], order // indices.shape[1], starts, compiler_params, interpret)


def gather_dot(
    table: jax.Array, rows: jax.Array, indices: jax.Array, compiler_params: Any = None, interpret: bool = False
) -> jax.Array:
    """As cltjax.sparse_products.gather_dot, of table [F, M] and rows [n, M]; every index is a feature's."""
    (n, C), M = indices.shape, table.shape[1]
    block = min(BLOCK, M)
    if M % block:
        raise ValueError(f"rows of {M} numbers are no multiple of {block}")
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def kernel(table: jax.Array, rows: jax.Array, indices: jax.Array, out: jax.Array) -> None:
        i, c = pl.program_id(0), pl.program_id(1)
        place = indices[i, c]

        def term(number: jax.Array | int) -> jax.Array:
            here = pl.ds(number * block, block)
            return rows[i, here] * table[place, here].astype(jnp.float32)

        out[i, c] = jnp.sum(jax.lax.fori_loop(1, M // block, lambda number, total: total + term(number), term(0)))

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((n, C), jnp.float32),
        grid=(n, C),
        in_specs=[anywhere] * 3,
        out_specs=anywhere,
        compiler_params=compiler_params,
        interpret=interpret,
    )
    return call(table, rows, indices)
