"""Ways to do the products of a sparse code, and top-k, side by side: what cltjax/sparse_products.py chooses from.

    python -m benchmarks.products                                  # results/products_cpu.txt or products_gpu.txt
    python -m benchmarks.products --shapes 8192,4096,4096,32 --dtype float32

A shape is F,M,n,C: features, numbers in a feature's row, tokens, slots of a token. Ways take turns, and figures are
medians. GB/s is of the rows that the slots name, each read once (and, in scatter_sum's result, each number written
once): of a way that moves more it is less than what it moves. A way that does not run on this device is named with the
reason.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu, triton
from rich.table import Table

from benchmarks import pallas_products
from benchmarks.report import machine, publish
from cltjax import sparse_products, sparsity
from cltjax.allocator import keep_freed_memory, will_use_cpu
from cltjax.rates import WEIGHT

RESULTS = Path(__file__).resolve().parent / "results"
ON_CPU = ((8192, 4096, 4096, 32), (32768, 4096, 2048, 32), (1024, 768, 512, 64))
ON_GPU = ((32768, 65536, 8192, 64), (8192, 65536, 4096, 32), (32768, 4096, 8192, 64))
UNROLLS = (2, 8, 32)

Way = Callable[..., Any]


@dataclass
class Product:
    """A product, its inputs, the bytes of rows that it is about, and the ways to do it."""

    name: str
    inputs: tuple[Any, ...]
    size: int
    ways: dict[str, Way]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


@contextmanager
def unrolled(slots: int):
    """sparse_products with so many slots in a turn of its loops."""
    before = sparse_products.UNROLL
    sparse_products.UNROLL = slots
    try:
        yield
    finally:
        sparse_products.UNROLL = before


def loops(product: Way) -> dict[str, Way]:
    """A loop over slots, so many in a turn."""

    def way(slots: int) -> Way:
        def run(*inputs: Any) -> Any:
            with unrolled(slots):
                return product(*inputs)

        return run

    return {f"loop, {slots} slots a turn": way(slots) for slots in UNROLLS}


def pallas(product: Way) -> dict[str, Way]:
    """A Pallas kernel by either of its compilers."""
    compilers = {"mosaic": mosaic_gpu.CompilerParams(), "triton": triton.CompilerParams()}
    return {f"pallas, {name}": partial(product, compiler_params=params) for name, params in compilers.items()}


def products(shape: Sequence[int], dtype: str) -> list[Product]:
    """What is to be done at a shape, on noise. Rows are those of the features that rank highest: at random places."""
    F, M, n, C = shape
    keys = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(keys[0], (F, M), dtype)
    rows, values = jax.random.normal(keys[1], (n, M)), jax.random.normal(keys[2], (n, C))
    rank = jax.random.normal(keys[3], (n, F))
    _, indices = jax.lax.top_k(rank, C)
    of_table, of_rows = n * C * M * table.dtype.itemsize, n * C * M * WEIGHT
    found = [
        Product(
            "gather_sum",
            (table, values, indices),
            of_table,
            {**loops(sparse_products.gather_sum), **pallas(pallas_products.gather_sum)},
        ),
        Product(
            "gather_dot",
            (table, rows, indices),
            of_table,
            {
                "by row": sparse_products.gather_dot_by_row,
                **loops(sparse_products.gather_dot_loop),
                **pallas(pallas_products.gather_dot),
            },
        ),
        Product(
            "scatter_sum",
            (values, indices, rows),
            of_rows + WEIGHT * F * M,
            {
                "by row": partial(sparse_products.scatter_sum_by_row, features=F),
                **loops(partial(sparse_products.scatter_sum_loop, features=F)),
                **pallas(partial(pallas_products.scatter_sum, features=F)),
            },
        ),
        Product("top_k", (rank,), rank.nbytes, {"whole": partial(sparsity.whole_top_k, k=C)}),
    ]
    if F >= sparsity.LONG * C and F % sparsity.RUN == 0:
        found[-1].ways["by runs"] = partial(sparsity.top_k, k=C)
    return found


@jax.jit
def difference(one: jax.Array, other: jax.Array) -> jax.Array:
    """The largest, as a share of the largest number; made on the device, as results may have gigabytes."""
    return jnp.abs(one - other).max() / jnp.abs(other).max()


def measure(product: Product, rounds: int) -> None:
    """Fill in the seconds of each way, or why there are none."""
    compiled, first = {}, None
    for name, way in product.ways.items():
        try:
            compiled[name] = jax.jit(way).lower(*product.inputs).compile()
            found = jax.block_until_ready(compiled[name](*product.inputs))
        except Exception as error:  # not swallowed: it stands in the table
            product.faults[name] = (str(error) or type(error).__name__).splitlines()[0][:80]
            compiled.pop(name, None)
            continue
        values = found[0] if isinstance(found, tuple) else found
        if first is None:
            first = values
        elif not (off := float(difference(values, first))) < 1e-3:
            product.faults[name] = f"differs from the first way by up to {off:.3g} of the largest number"
            compiled.pop(name)
    product.seconds = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*product.inputs))
            product.seconds[name].append(time.perf_counter() - began)


def table(shape: Sequence[int], found: Sequence[Product]) -> Table:
    title = f"F, M, n, C = {', '.join(map(str, shape))}"
    shown = Table(title=title, title_justify="left")
    for name in ("", "way", "ms", "GB/s", "times the fastest"):
        shown.add_column(name, justify="left" if name in ("", "way") else "right")
    for product in found:
        medians = {name: statistics.median(seconds) for name, seconds in product.seconds.items()}
        for name in product.ways:
            if name in medians:
                seconds = medians[name]
                figures = f"{1e3 * seconds:,.1f}", f"{product.size / seconds / 1e9:,.1f}"
                shown.add_row(product.name, name, *figures, f"{seconds / min(medians.values()):.2f}")
            else:
                shown.add_row(product.name, f"{name}: {product.faults[name]}", "", "", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: tuple(map(int, text.split(","))), nargs="*")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the table; default: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    if will_use_cpu():
        keep_freed_memory()
    on_cpu = jax.default_backend() == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    path = options.results / f"products_{'cpu' if on_cpu else 'gpu'}.txt"
    device = jax.devices()[0].device_kind
    publish(path, [f"{machine('jax')}, {device}; {dtype} table, {options.rounds} rounds"])
    for shape in options.shapes or (ON_CPU if on_cpu else ON_GPU):
        found = products(shape, dtype)
        for product in found:
            measure(product, options.rounds)
        publish(path, [table(shape, found)], append=True)  # what is measured stays if the next is too much


if __name__ == "__main__":
    main()
