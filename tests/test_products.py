"""Candidates for sparse products on a GPU agree with what training uses, and their benchmark with itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pallas_products
from benchmarks.products import loops, measure, pallas, products, table
from cltjax import sparse_products

F, n, C = 37, 11, 5
PALLAS = {"pallas, mosaic", "pallas, triton"}


@pytest.mark.parametrize("M, blocks", [(96, 1), (96, 3), (7, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pallas_products_are_those_of_training(M: int, blocks: int, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_products, "BLOCK", M // blocks)
    keys = jax.random.split(jax.random.key(M), 4)
    weights = jax.random.normal(keys[0], (F, M), dtype)
    values, rows = jax.random.normal(keys[1], (n, C)), jax.random.normal(keys[2], (n, M))
    indices = jax.vmap(lambda key: jax.random.choice(key, 19, (C,), replace=False))(jax.random.split(keys[3], n))
    assert len(np.unique(indices)) < 20  # the other features have no token
    for name, inputs in (
        ("gather_sum", (weights, values, indices)),
        ("gather_dot", (weights, rows, indices)),
        ("scatter_sum", (values, indices, rows, F)),
    ):
        found = getattr(pallas_products, name)(*inputs, interpret=True)
        wanted = getattr(sparse_products, name)(*inputs)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="later versions compile for a GPU that is described to them"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiler", ["mosaic", "triton"])
def test_pallas_products_compile_for_a_gpu(dtype: str, compiler: str):
    """As far as they do without one."""
    weights, rows = jnp.ones((F, 4096), dtype), jnp.ones((n, 4096))
    values, indices = jnp.ones((n, C)), jnp.zeros((n, C), jnp.int32)
    for name, inputs in (
        ("gather_sum", (weights, values, indices)),
        ("gather_dot", (weights, rows, indices)),
        ("scatter_sum", (values, indices, rows)),
    ):
        product = getattr(pallas_products, name)
        way = pallas(partial(product, features=F) if name == "scatter_sum" else product)[f"pallas, {compiler}"]
        traced = jax.jit(way).trace(*inputs)
        if (name, compiler, dtype) == ("gather_dot", "mosaic", "bfloat16"):
            with pytest.raises(ValueError, match="layouts"):
                traced.lower(lowering_platforms=("cuda",))
        else:
            assert "custom_call" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_rows_that_no_block_divides_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_products, "BLOCK", 8)
    ones = jnp.ones((3, 12))
    for product in (pallas_products.gather_sum, pallas_products.gather_dot):
        with pytest.raises(ValueError, match="12 numbers are no multiple of 8"):
            product(ones, ones, jnp.zeros((3, 12), jnp.int32))


def test_every_way_is_measured_and_agrees():
    """But for Pallas, which a CPU can only interpret; and a wrong one is found out."""
    found = products((2048, 48, 23, 5), "bfloat16")
    found[0].ways["wrong"] = lambda *inputs: sparse_products.gather_sum(*inputs) * 1.01
    for product in found:
        measure(product, rounds=2)
        ways = set(product.ways) - {*PALLAS, "wrong"}
        assert {name: len(seconds) for name, seconds in product.seconds.items()} == dict.fromkeys(ways, 2)
    assert found[0].faults["wrong"].startswith("differs from the first way by up to ")
    assert [set(product.faults) - {"wrong"} for product in found] == [PALLAS] * 3 + [set()]
    assert table((2048, 48, 23, 5), found).row_count == sum(len(product.ways) for product in found)


def test_so_many_slots_in_a_turn():
    """Each way is compiled with its own, and what training uses is not touched."""
    inputs = jnp.ones((7, 3)), jnp.ones((5, 33)), jnp.zeros((5, 33), jnp.int32)
    ways = loops(sparse_products.gather_sum)
    before, sizes = sparse_products.UNROLL, []
    for way in ways.values():
        sizes.append(len(jax.jit(way).lower(*inputs).as_text()))
    assert sizes == sorted(sizes) and len(set(sizes)) == len(ways) == 3
    assert before == sparse_products.UNROLL
