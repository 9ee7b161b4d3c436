"""Moments of rows in any order and any pieces are those of the rows at once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax.statistics import Moments, count_outliers, measure_layer, outlier_threshold, summarise

L, D = 2, 7


def moments_of(x: np.ndarray, modality: np.ndarray) -> Moments:
    """Of [N, L, D] rows, all of them counted."""
    groups = [np.flatnonzero(modality == m) for m in range(3)] + [np.zeros(0, int)]
    found = Moments.zeros(L, D)
    found.count[:] = [len(group) for group in groups[:3]]
    for layer in range(L):
        norms, parts = measure_layer(x[:, layer], groups)
        np.testing.assert_allclose(norms, np.linalg.norm(x[:, layer], axis=-1), rtol=1e-6)
        for m, (mean, m2, norm_sum) in enumerate(parts):
            found.mean[m, layer], found.m2[m, layer], found.norm_sum[m, layer] = mean, m2, norm_sum
    return found


@settings(deadline=None, max_examples=50)
@given(
    pieces=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 3.0, 1e6]),
)
def test_pieces_merge_to_the_whole(pieces: list[int], seed: int, offset: float) -> None:
    """Also where the mean is a million times the standard deviation, which sums of squares would not survive."""
    rng = np.random.default_rng(seed)
    x, modality = rng.normal(offset, 1, (sum(pieces), L, D)), rng.integers(0, 3, sum(pieces))
    merged, start = Moments.zeros(L, D), 0
    for size in pieces:
        merged.merge(moments_of(x[start : start + size], modality[start : start + size]))
        start += size
    for m in range(3):
        mine = x[modality == m]
        assert merged.count[m] == len(mine)
        if len(mine):
            np.testing.assert_allclose(merged.mean[m], mine.mean(0), rtol=1e-9, atol=1e-12)
            exact = np.square(mine - mine.mean(0)).sum((0, 2))
            np.testing.assert_allclose(merged.m2[m], exact, rtol=1e-9, atol=1e-9 * len(mine))
    if len(x):
        figures = summarise(merged, np.zeros((L, 3), np.int64))
        np.testing.assert_allclose(figures.mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(figures.std, np.sqrt(np.square(x - x.mean(0)).mean((0, 2))), rtol=1e-6, atol=1e-9)


def test_a_layer_of_many_tiles() -> None:
    """More rows than a tile holds, and rows that no statistic counts but that have a norm."""
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, (1500, 2003)).astype(np.float32)
    groups = np.split(rng.permutation(1500), [700, 701, 1100])
    norms, parts = measure_layer(values, groups)
    np.testing.assert_allclose(norms, np.linalg.norm(values.astype(np.float64), axis=-1), rtol=1e-7)
    for group, (mean, m2, norm_sum) in zip(groups, parts, strict=False):
        x = values[group].astype(np.float64)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(m2, np.square(x - x.mean(0)).sum(), rtol=1e-12)
        np.testing.assert_allclose(norm_sum, norms[group].sum(dtype=np.float64), rtol=1e-12)


def test_there_and_back_as_tensors() -> None:
    moments = moments_of(np.random.default_rng(0).normal(size=(9, L, D)), np.arange(9) % 3)
    back = Moments.of_tensors(moments.tensors("mlp_in"), "mlp_in")
    for name in ("count", "mean", "m2", "norm_sum"):
        np.testing.assert_array_equal(getattr(back, name), getattr(moments, name))


def test_outliers_are_train_rows_from_twenty_mean_norms_on() -> None:
    norms = np.array([[1.0, 20.0], [20.0, 19.9], [30.0, 20.0], [20.0, 20.0]])
    modality, train = np.array([0, 1, 1, 2]), np.array([True, True, False, True])
    found = count_outliers(norms, modality, train, np.array([20.0, 20.0]))
    np.testing.assert_array_equal(found, [[0, 1, 1], [1, 0, 1]])
    zeros = count_outliers(np.zeros((4, 2)), modality, train, np.zeros(2))
    assert not zeros.any(), "a layer that never writes has no outliers"


def test_without_rows_there_are_no_figures_and_no_outliers() -> None:
    empty = Moments.zeros(L, D)
    threshold = outlier_threshold(empty)
    assert np.isnan(threshold).all()
    assert count_outliers(np.ones((3, L)), np.zeros(3), np.ones(3, bool), threshold).sum() == 0
    figures = summarise(empty, np.zeros((L, 3), np.int64))
    assert figures.count == 0 and np.isnan(figures.mean).all() and np.isnan(figures.std).all()
