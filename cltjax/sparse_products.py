"""Products with a code of C active features a token, never of a dense [n, F] one: what decoding and its gradients are.

Letters: n tokens, C slots, F features, M numbers in a feature's row. `indices` [n, C] are places in a table of F rows;
F (one too many) stands for no feature.

Two ways each, chosen by backend as measured (benchmarks/products.py):
  loop    over the C slots, n rows at a time: no intermediate is larger than [n, M], and it suits a device that hides
          the latency of memory by itself. The table's gradient is read and written again in every turn.
  by row  one output row after the other, or a few at a time, which stay in the processor's cache: for CPUs. The tokens
          of a feature are found by sorting; then its row of the gradient is a row of a sparse matrix times a dense one,
          which jaxlib has a threaded kernel for.
"""

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from cltjax.axes import varying_like, zeros

# Tokens handled by one turn of a loop, by row, and products that it adds up one by one. On two cores, for 4096 tokens
# of 32 rows of 4096 numbers: 78 ms with 128 and 16, 83 with 32 tokens, 87 with 512; 144 as matrices times vectors.
# For 512 of 768, as in a CLT of the demo VLM: .6 ms with 16 products, 1.1 with 32, 1.6 with 8; 2.1 as matrices.
TOKENS, TERMS = 128, 16
# Slots handled by one turn of a loop: it reads and writes what it adds to once a turn. On two cores, for the same 4096
# tokens: 97 ms with 2, 74 with 4, 64 with 8, 57 with all 32, which take long to compile where sources are many.
UNROLL = 8
# An unsigned integer that holds a feature and a place in a batch together sorts four times as fast as the two do.
KEY_BITS = 32


def by_row() -> bool:
    """Whether the backend is one that goes row by row."""
    return jax.default_backend() == "cpu"


def gather_sum(table: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
    """sum over c of values[i, c] table[indices[i, c]]: table [F, ...], values, indices [n, C] -> [n, ...] float32.

    Values at an index F must be 0. By row is no faster here: a token's rows are as scattered as before.
    """

    def add(total: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, index = slot
        row = table.at[index].get(mode="clip").astype(jnp.float32)
        return total + spread(value, row) * row, None

    start = zeros((len(values), *table.shape[1:]), table, values)
    return jax.lax.scan(add, start, (values.T, indices.T), unroll=UNROLL)[0]


def gather_dot(table: jax.Array, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """rows[i] . table[indices[i, c]]: table [F, ...], rows [n, ...], indices [n, C] -> [n, C] float32.

    At an index F the result is that of the last feature.
    """
    flat, rows = table.reshape(len(table), -1), rows.reshape(len(rows), -1)
    return gather_dot_by_row(flat, rows, indices) if by_row() else gather_dot_loop(flat, rows, indices)


def gather_dot_loop(table: jax.Array, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """`gather_dot` of table [F, M] and rows [n, M], slot by slot."""

    def dot(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        return None, jnp.sum(rows * table.at[index].get(mode="clip").astype(jnp.float32), 1)

    return jax.lax.scan(dot, None, indices.T, unroll=UNROLL)[1].T


def gather_dot_by_row(table: jax.Array, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """`gather_dot` of table [F, M] and rows [n, M], by some tokens at a time, whose rows stay in the cache.

    Products that lie M / TERMS apart are added up one by one, which XLA does with vectors and without a copy of the
    table's rows; the few sums are left to a matrix product.
    """
    M = rows.shape[1]
    length = M // TERMS

    def dot(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, index = token

        def products(start: int, stop: int) -> jax.Array:
            return table[:, start:stop].at[index].get(mode="clip").astype(jnp.float32) * row[start:stop]

        first, *others = (products(term * length, (term + 1) * length) for term in range(TERMS))
        sums = jax.lax.optimization_barrier(sum(others, start=first))
        whole = jnp.dot(sums, jnp.ones(length), precision=jax.lax.Precision.HIGHEST)
        return whole if M % TERMS == 0 else whole + products(TERMS * length, M).sum(1)

    return jax.lax.map(dot, (rows, indices), batch_size=TOKENS)


def scatter_sum(values: jax.Array, indices: jax.Array, rows: jax.Array, features: int) -> jax.Array:
    """For each of F features the sum of values[i, c] rows[i] over the (i, c) where indices[i, c] is that feature.

    values, indices [n, C], rows [n, ...] -> [F, ...] float32. An index F is left out.
    """
    flat = rows.reshape(len(rows), -1)
    found = (scatter_sum_by_row if by_row() else scatter_sum_loop)(values, indices, flat, features)
    return found.reshape(features, *rows.shape[1:])


def scatter_sum_loop(values: jax.Array, indices: jax.Array, rows: jax.Array, features: int) -> jax.Array:
    """`scatter_sum` of rows [n, M], slot by slot."""

    def add(total: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, index = slot
        return total.at[index].add(value[:, None] * rows, mode="drop"), None

    start = zeros((features, rows.shape[1]), values, rows)
    return jax.lax.scan(add, start, (values.T, indices.T), unroll=UNROLL)[0]


def scatter_sum_by_row(values: jax.Array, indices: jax.Array, rows: jax.Array, features: int) -> jax.Array:
    """`scatter_sum` of rows [n, M], feature by feature."""
    order, starts = by_feature(indices, features)
    shape, C = (features, len(rows)), indices.shape[1]
    # Tokens of a feature ascend, and a token has a feature once.
    code = sparse.BCSR(
        (values.reshape(-1)[order], order // C, starts), shape=shape, indices_sorted=True, unique_indices=True
    )
    # The sparse product has no rule for how its result varies over a mesh: `shard_map` takes it for alike everywhere.
    return varying_like(code @ rows, values, rows)


def by_feature(indices: jax.Array, features: int) -> tuple[jax.Array, jax.Array]:
    """indices [n, C] -> the places in indices.reshape(-1) ordered by feature, then by place [n C] int32, and where in
    that order each feature begins [F + 1] int32; index F comes last."""
    flat = indices.reshape(-1)
    places = jnp.arange(flat.size, dtype=jnp.uint32)
    bits = max(1, (flat.size - 1).bit_length())
    if features < 1 << (KEY_BITS - bits):
        keys = jnp.sort(flat.astype(jnp.uint32) << bits | places)
        ordered, order = keys >> bits, keys & jnp.uint32((1 << bits) - 1)
    else:
        ordered, order = jax.lax.sort((flat, places), num_keys=1)
    starts = jnp.searchsorted(ordered.astype(jnp.int32), jnp.arange(features + 1, dtype=jnp.int32))
    return order.astype(jnp.int32), starts.astype(jnp.int32)


def spread(value: jax.Array, row: jax.Array) -> jax.Array:
    """value [n], ready to be multiplied with row [n, ...]."""
    return value.reshape(-1, *(1,) * (row.ndim - 1))
