"""Gains against plain least squares in numpy float64, and joined runs against the sum of their predictions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from cltjax.batches import Batch
from cltjax.combine import (
    FOLDS,
    Moments,
    compare,
    fit_gains,
    folds_of,
    joined,
    joint_wiring,
    moments_of,
    solve,
    squared_error,
    with_gains,
    writers,
)
from cltjax.errors import UserError
from cltjax.folding import thresholds_of
from cltjax.wiring import wire
from test_clt import LAYERS, B, D, close, forward, model

OFFSET, N_TARGETS = 1, 3


def parts(activation: str = "topk") -> list[Any]:
    """Two runs that share targets, with normalisations of their own."""
    return [model(layers, OFFSET, N_TARGETS, seed, activation)[0] for seed, layers in enumerate(("1,3", "0"))]


def whole(activation: str = "topk") -> Any:
    return joined(parts(activation), wire("0,1,3", LAYERS, OFFSET, N_TARGETS))


def raw_prediction(clt: Any, x: np.ndarray) -> np.ndarray:
    """[B, T, D] with all active features, in raw units."""
    if clt.activation == "topk":
        return np.asarray(forward(clt, x)[-1], np.float64)
    normal = clt.contributions_of_codes(clt.codes(x)) + clt.b_dec[...]
    return np.asarray(normal * clt.out_std[...][:, None] + clt.out_mean[...], np.float64)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_joined_runs_predict_the_sum(activation: str):
    """Of their predictions about their train means, on top of the first one's."""
    pair, clt = parts(activation), whole(activation)
    x = np.random.default_rng(7).normal(0, 3, (B, 3, D)).astype(np.float32)
    inputs = {"0": x[:, :1], "1,3": x[:, 1:]}
    assert clt.wiring.sources == (0, 1, 3) and clt.wiring.targets == (1, 2, 3, 4)
    expected = np.zeros((B, 4, D))
    for part, layers in zip(pair, ("1,3", "0"), strict=True):
        for t, target in enumerate(part.wiring.targets):
            expected[:, clt.wiring.targets.index(target)] += raw_prediction(part, inputs[layers])[:, t]
    for t, target in enumerate(clt.wiring.targets):
        means = [np.asarray(part.out_mean[...][part.wiring.targets.index(target)]) for part in pair
                 if target in part.wiring.targets]  # fmt: skip
        expected[:, t] -= sum(means[1:], start=np.zeros(D))  # the first run's is the whole's
        if target in pair[0].wiring.targets:
            np.testing.assert_array_equal(clt.out_mean[...][t], means[0])
    close(raw_prediction(clt, x), expected)
    if activation in ("batchtopk", "jumprelu"):
        whole_limits, limits = thresholds_of(clt), [thresholds_of(part) for part in reversed(pair)]
        assert whole_limits is not None
        np.testing.assert_allclose(whole_limits, np.concatenate(limits), rtol=1e-6)  # pyright: ignore[reportArgumentType, reportCallIssue]


def rows(clt: Any, n: int, seed: int = 3) -> tuple[Batch, np.ndarray]:
    """Inputs, targets that follow from the contributions with gains of their own and noise, and folds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, (n, len(clt.wiring.sources), D)).astype(np.float32)
    c = contributions(clt, x)
    true = rng.uniform(0.2, 0.8, c.shape[1:3])
    normal = np.einsum("ts,btsd->btd", true, c) + rng.normal(0, 1, (n, c.shape[1], D)) + 0.7
    y = normal * np.asarray(clt.out_std[...])[:, None] + np.asarray(clt.out_mean[...])
    return Batch(x, y.astype(np.float32)), rng.integers(0, FOLDS, n)


def contributions(clt: Any, x: np.ndarray) -> np.ndarray:
    """[B, T, S, D] float64, normalised units: each source with the others silenced."""
    values, indices, *_ = forward(clt, x)
    alone = [jnp.zeros_like(values).at[s].set(values[s]) for s in range(len(values))]
    return np.stack([np.asarray(clt.contributions(one, indices), np.float64) for one in alone], 2)


def normal_targets(clt: Any, y: np.ndarray) -> np.ndarray:
    return np.asarray(clt.normalise_targets(y), np.float64)


@pytest.mark.parametrize("non_negative", [False, True])
def test_gains_are_least_squares(non_negative: bool):
    clt = whole()
    batch, sample = rows(clt, 211)
    y = normal_targets(clt, batch.y)
    if non_negative:  # one source is wanted with a gain below 0
        y = y - 1.5 * contributions(clt, batch.x)[:, :, 1]
        raw = y * np.asarray(clt.out_std[...])[:, None] + np.asarray(clt.out_mean[...])
        batch = Batch(batch.x, raw.astype(np.float32))
    halves = [(Batch(batch.x[part], batch.y[part]), sample[part]) for part in (slice(0, 100), slice(100, 211))]
    moments = moments_of(clt, halves)
    gains, every = fit_gains(moments, clt.wiring, non_negative), moments.over(range(FOLDS))
    c = contributions(clt, batch.x)
    for t, target in enumerate(clt.wiring.targets):
        own = writers(clt.wiring, target)
        centred = (c[:, t, own] - c[:, t, own].mean(0)).transpose(0, 2, 1).reshape(-1, len(own))
        wanted = (y[:, t] - y[:, t].mean(0)).ravel()
        expected = nnls(centred, wanted)[0] if non_negative else np.linalg.lstsq(centred, wanted)[0]
        found, _ = solve(every, t, own, 0.0, non_negative)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        chosen, intercept = solve(every, t, own, gains.penalty[t], non_negative)
        np.testing.assert_array_equal(gains.gain[t, own], chosen)
        np.testing.assert_array_equal(gains.intercept[t], intercept)
        assert not np.any(np.delete(gains.gain[t], own))
        assert not non_negative or 1 not in own or gains.gain[t, 1] == 0
        intercept = y[:, t].mean(0) - gains.gain[t, own] @ c[:, t, own].mean(0)
        np.testing.assert_allclose(gains.intercept[t], intercept, atol=1e-4)


def test_moments_give_the_error_of_any_gains():
    clt = whole()
    batch, sample = rows(clt, 101)
    moments = moments_of(clt, [(batch, sample)])
    assert moments.count.sum() == 101 and len(moments.count) == FOLDS
    np.testing.assert_array_equal(moments.count, np.bincount(sample, minlength=FOLDS))
    c, y, rng = contributions(clt, batch.x), normal_targets(clt, batch.y), np.random.default_rng(0)
    chosen = np.isin(sample, (1, 4))
    for t, target in enumerate(clt.wiring.targets):
        own = writers(clt.wiring, target)
        g, b = rng.normal(size=len(own)), rng.normal(size=D)
        left = y[chosen, t] - b - np.einsum("s,bsd->bd", g, c[chosen][:, t, own])
        found = squared_error(moments.over([1, 4]), t, own, g, b)
        assert found == pytest.approx(np.square(left).sum(), rel=1e-5)


def test_gains_go_into_the_decoders():
    clt = whole()
    batch, sample = rows(clt, 101)
    gains = fit_gains(moments_of(clt, [(batch, sample)]), clt.wiring)
    before = raw_prediction(clt, batch.x)
    expected = np.einsum("ts,btsd->btd", gains.gain, contributions(clt, batch.x)) + gains.intercept
    found = raw_prediction(with_gains(clt, gains), batch.x)
    close(found, expected * np.asarray(clt.out_std[...])[:, None] + np.asarray(clt.out_mean[...]))
    np.testing.assert_array_equal(raw_prediction(clt, batch.x), before)  # what it was made from is as it was


def test_sources_that_each_predict_the_whole_share_it():
    """Two sources write the same, which is the target: a naive sum is twice that, and each gets half."""
    rng = np.random.default_rng(0)
    wiring = wire("0-1", 2, 0, 2)
    t = wiring.targets.index(1)
    y = rng.normal(size=(FOLDS, 50, D))
    c = np.zeros((FOLDS, 50, 2, 2, D))
    c[:, :, t] = y[:, :, None]
    target = np.stack([rng.normal(size=y.shape), y], 2)
    moments = Moments(
        np.full(FOLDS, 50.0),
        c.sum(1),
        target.sum(1),
        np.einsum("kbtsd,kbtud->ktsu", c, c),
        np.einsum("kbtsd,kbtd->kts", c, target),
        np.square(target).sum((1, 3)),
    )
    gains = fit_gains(moments, wiring)
    np.testing.assert_allclose(gains.gain[t], 0.5, atol=1e-6)
    assert not np.any(gains.gain[0])  # nothing is written there
    fvu = compare(moments, moments, wiring, np.zeros((2, D)), gains)
    assert fvu["naive sum"][t] == pytest.approx(1) and fvu["gains"][t] < 1e-6 > fvu["mean"][t]
    assert fvu["best single source"][t] < 1e-6


def test_a_source_in_two_runs_is_refused():
    with pytest.raises(UserError, match="source 1 is in a and in b: name it once"):
        joint_wiring([("a", wire("0-1", 5, 1, 3)), ("b", wire("1", 5, 1, 3))], 5, 1, 3)


@pytest.mark.parametrize("samples", [1, 3, 100])
def test_few_samples_leave_folds_empty(samples: int):
    clt = whole()
    batch, _ = rows(clt, 211)
    sample = 16 * (np.arange(211) % samples)  # as the splits of a store may leave them
    folds = folds_of(sample)
    assert len(np.unique(folds)) == min(samples, FOLDS)
    assert all(len(np.unique(folds[sample == one])) == 1 for one in sample)
    gains = fit_gains(moments_of(clt, [(batch, folds)]), clt.wiring)
    assert np.isfinite(gains.gain).all() and np.isfinite(gains.intercept).all() and np.any(gains.gain)
    assert samples > 1 or not gains.penalty.any()  # nothing to choose it by
