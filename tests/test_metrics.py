"""FVU, calibration slope, L0 and dead features against their definitions in float64."""

from pathlib import Path

import jax
import numpy as np
import pytest
from stores import synthetic_store

from cltjax.batches import split_batches
from cltjax.clt import CLT
from cltjax.metrics import GROUPS, Fit, fit_sums, measure, membership_of, summary
from cltjax.normalisation import normalisation_of
from cltjax.wiring import wire

F, K = 23, 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A CLT with random weights, measured in batches with a short last one; and all test rows at once."""
    store = synthetic_store(tmp_path_factory.mktemp("metrics") / "store", rows=1009, layers=4, d=7)
    wiring = wire("all", 4, 1, 2)
    clt = CLT(wiring, F, K, normalisation_of(store, wiring), jax.random.key(1))
    rng = np.random.default_rng(0)
    clt.W_dec[...] = 0.1 * rng.normal(size=clt.W_dec[...].shape).astype(np.float32)
    clt.b_dec[...] = 0.1 * rng.normal(size=clt.b_dec[...].shape).astype(np.float32)
    clt.b_enc[...] = np.where(np.arange(F) % 5 == 2, -9, -0.1) * np.ones_like(clt.b_enc[...])  # every fifth is dead
    found = summary(measure(clt, split_batches(store, wiring, "test", 37)), clt)
    ((batch, modality),) = split_batches(store, wiring, "test", 10**6)
    return store, clt, found, batch, modality


def test_fvu_and_slope_by_group(measured):
    store, clt, found, batch, modality = measured
    assert len(modality) % 37 != 0 and found["rows"] == len(modality)
    y, y_hat = batch.y.astype(np.float64), np.asarray(clt(batch.x), np.float64)
    mean = store.stats().mlp_out.mean[store.axis_of(clt.wiring.targets)]  # of the train rows
    for t, target in enumerate(clt.wiring.targets):
        for name, member in {"all": modality >= 0, **{g: modality == m for g, m in GROUPS.items()}}.items():
            a, b, c = y[member, t], y_hat[member, t], mean[t]
            got = found["targets"][str(target)][name]
            assert got["rows"] == member.sum()
            assert got["fvu"] == pytest.approx(np.square(a - b).sum() / np.square(a - c).sum(), rel=1e-4)
            a, b = a - a.mean(0), b - b.mean(0)
            assert got["slope"] == pytest.approx((a * b).sum() / np.square(b).sum(), rel=1e-3)
    assert found["fvu"]["image"] == pytest.approx(np.mean([by["image"]["fvu"] for by in found["targets"].values()]))


def test_l0_and_dead(measured):
    _, clt, found, batch, modality = measured
    values, indices = (np.asarray(part) for part in clt.encode(batch.x))
    for s, source in enumerate(clt.wiring.sources):
        active = values[s] > 0
        by = found["sources"][str(source)]
        assert by["l0"] == pytest.approx(active.sum(-1).mean())
        assert 0 < by["l0"] < K
        for name, m in GROUPS.items():
            assert by["l0_by_modality"][name] == pytest.approx(active[modality == m].sum(-1).mean())
        fired = np.unique(indices[s][active])
        assert by["dead"] == pytest.approx(1 - len(fired) / F) and by["dead"] >= 4 / F
        assert sum(by["density"]["counts"]) == len(fired)


def test_fvu_is_not_clamped_and_slope_shows_overcounting():
    """Three sources that each predict the whole target: FVU 4, slope 1/3. A constant prediction has no slope."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(500, 1, 5)).astype(np.float32)
    membership = membership_of(rng.integers(0, 3, 500))
    figures = []
    for y_hat in (3 * y, np.full_like(y, 0.5)):
        fit = Fit()
        for part in (slice(0, 123), slice(123, 500)):
            fit.add(fit_sums(y[part], y_hat[part], membership[:, part]))
        figures.append(fit.figures((4,))["4"]["all"])
    assert figures[0]["fvu"] == pytest.approx(4, rel=1e-5) and figures[0]["slope"] == pytest.approx(1 / 3, rel=1e-5)
    assert figures[1]["fvu"] > 1 and figures[1]["slope"] is None


def test_a_group_without_rows_is_left_out(tmp_path: Path, measured):
    _, clt, _, batch, _ = measured
    found = summary(measure(clt, [(batch, np.zeros(len(batch.x), np.uint8))]), clt)
    assert set(found["fvu"]) == {"all", "text"} and found["fvu"]["all"] == found["fvu"]["text"]
