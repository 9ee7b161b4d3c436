"""Products with sparse codes: both ways against sums written out, with unused features and slots without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax import sparse_products
from cltjax.sparse_products import by_feature, gather_dot, gather_sum, scatter_sum

n, C, F, shape = 19, 3, 11, (2, 19)  # 38 = 2 TERMS + 6


def case(seed: int = 0) -> tuple[np.ndarray, ...]:
    """table [F, 2, 19], rows [n, 2, 19], values, indices [n, C]; the last token has one feature only."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.choice(F - 1, C, replace=False) for _ in range(n)]).astype(np.int32)
    values = rng.normal(size=(n, C)).astype(np.float32)
    indices[-1, 1:], values[-1, 1:] = F, 0
    table, rows = (rng.normal(size=(count, *shape)).astype(np.float32) for count in (F, n))
    return table, rows, values, indices


@pytest.fixture(params=["loop", "by row"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sparse_products, "by_row", lambda: request.param == "by row")
    monkeypatch.setattr(sparse_products, "TOKENS", 7)  # several turns, and a part of one
    return request.param


def test_gather_sum():
    table, _, values, indices = case()
    expected = np.zeros((n, *shape))
    for i, c in np.ndindex(n, C):
        if indices[i, c] < F:
            expected[i] += values[i, c].astype(float) * table[indices[i, c]]
    np.testing.assert_allclose(gather_sum(*map(jnp.asarray, (table, values, indices))), expected, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_gather_dot():
    table, rows, _, indices = case()
    found = gather_dot(*map(jnp.asarray, (table, rows, indices)))
    for i, c in np.ndindex(n, C):
        expected = np.sum(rows[i].astype(float) * table[min(indices[i, c], F - 1)])
        assert found[i, c] == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("way")
def test_scatter_sum():
    _, rows, values, indices = case()
    expected = np.zeros((F, *shape))
    for i, c in np.ndindex(n, C):
        if indices[i, c] < F:
            expected[indices[i, c]] += values[i, c].astype(float) * rows[i]
    found = scatter_sum(jnp.asarray(values), jnp.asarray(indices), jnp.asarray(rows), F)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.any(found[F - 1])  # no token has it


def test_a_cpu_goes_by_row():
    _, rows, values, indices = case()
    program = jax.jit(scatter_sum, static_argnums=3).lower(values, indices, rows, F).compile().as_text()
    assert "csr_sparse_dense" in str(program)  # jaxlib's kernel, and not a gather of n x C rows


@settings(deadline=None, max_examples=25)
@given(
    features=st.sampled_from([3, 11, 2**20]),
    tokens=st.integers(1, 40),
    slots=st.integers(1, 3),
    bits=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
def test_places_are_ordered_by_feature(features: int, tokens: int, slots: int, bits: int, seed: int):
    """Whether feature and place fit into one integer or not."""
    indices = np.random.default_rng(seed).integers(0, features + 1, (tokens, slots)).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_products, "KEY_BITS", bits)
        order, starts = map(np.asarray, by_feature(jnp.asarray(indices), features))
    flat = indices.reshape(-1)
    assert order.tolist() == np.argsort(flat, kind="stable").tolist()
    assert starts.tolist() == np.searchsorted(flat[order], np.arange(features + 1)).tolist()


def test_feature_and_place_fit_into_one_integer_or_are_sorted_apart():
    """At the limit: 2^20 features and 2^12 places are 2^32 keys, and slots without a feature need one more."""
    indices = np.random.default_rng(0).integers(0, 2**20 + 1, (2**11, 2)).astype(np.int32)
    indices[::7] = 2**20
    order, _ = by_feature(jnp.asarray(indices), 2**20)
    assert np.asarray(order).tolist() == np.argsort(indices.reshape(-1), kind="stable").tolist()
