"""What the machine at hand does: the rates that an estimate (cltjax/estimate.py) is made with, measured in seconds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cltjax.config import TrainConfig
from cltjax.estimate import WEIGHT, ModelShape, Rates, Sizes, sizes
from cltjax.sparse_products import by_row, gather_dot, gather_sum, scatter_sum
from cltjax.sparsity import top_k
from cltjax.wiring import wire

# Larger than caches, and small enough for any machine that trains.
TABLE_BYTES = 1 << 28
PRODUCT = {"cpu": 4096}  # rows of a square matrix
TOP_K_NUMBERS = 1 << 24
STREAM_NUMBERS = 1 << 26


def measure(config: TrainConfig, shape: ModelShape, link: float = Rates.link) -> Rates:
    """The rates of the first device; that of what it sends to others (link) is not measured.

    Rows at random places, and top-k, are the run's own: their rates depend on a row's length, F and k. A machine that
    has other work to do, like a training that runs, is slower.
    """
    z = sizes(config, shape, wire(config.layer, shape.n_layers, config.offset, config.n_targets))
    return Rates(
        flops=product_rate(config.dtype),
        bandwidth=stream_rate(),
        gather=gather_rate(z, config.dtype),
        select=select_rate(z),
        link=link,
        by_row=by_row(),
    )


def product_rate(dtype: str) -> float:
    """FLOP/s of a large matrix product, as the encoder does it (cltjax/encode.py)."""
    n = PRODUCT.get(jax.default_backend(), 8192)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda a: jax.lax.dot(a, a, precision=precision, preferred_element_type=jnp.float32))
    a = jnp.ones((n, n), dtype)
    return 2 * n**3 / median_seconds(lambda: product(a), times=3)


def stream_rate() -> float:
    """Bytes/s of reading and writing a large array in its place."""
    scaled = jax.jit(lambda a: a * 1.5 + 1, donate_argnums=0)
    numbers = [jnp.ones(STREAM_NUMBERS)]

    def work() -> jax.Array:
        numbers[0] = scaled(numbers[0])
        return numbers[0]

    return 2 * WEIGHT * STREAM_NUMBERS / median_seconds(work, times=12)


def gather_rate(z: Sizes, dtype: str) -> float:
    """Bytes/s of the rows that decoding and its gradients go through: rows of features read, and added to.

    The table is the run's or a part of it; each of its rows is met four times, so that the rest hardly counts where
    sparse products go by row. In loops, what streams by in a turn is in this rate, and is counted once more in a step.
    """
    M = z.D * z.P // z.S
    F = max(1, min(z.F // z.model, TABLE_BYTES // (WEIGHT * M)))
    C = min(z.C, F)
    n = max(1, 4 * F // C)
    key = jax.random.key(0)
    table = jax.random.normal(key, (F, M)).astype(dtype)
    # A token has a feature once: so many steps apart, from a random one on. The number is odd, as rows that lie a power
    # of two apart would all want the same places in a processor's caches.
    indices = (jax.random.randint(key, (n, 1), 0, F) + jnp.arange(C) * ((F // C - 1) | 1)) % F
    rows, values = jnp.ones((n, M)), jnp.ones((n, C))
    products = jax.jit(
        lambda table, rows, values, indices: (
            gather_sum(table, values, indices),
            scatter_sum(values, indices, rows, F),
            gather_dot(table, rows, indices),
        )
    )
    met = n * C * M * (2 * table.dtype.itemsize + (1 if by_row() else 2) * WEIGHT)
    return met / median_seconds(lambda: products(table, rows, values, indices), times=4)


def select_rate(z: Sizes) -> float:
    """Numbers/s that top-k of the run's rows goes through."""
    F = z.F // z.model
    n = max(1, TOP_K_NUMBERS // F)
    rank = jax.random.normal(jax.random.key(0), (n, F))
    found = jax.jit(lambda rank: top_k(rank, min(z.C, F)))
    return rank.size / median_seconds(lambda: found(rank), times=4)


def median_seconds(work: Callable[[], Any], times: int) -> float:
    """Seconds that it takes, after a first time that compiles."""
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])
