"""Ridge regression by summed normal equations against a direct solution."""

from pathlib import Path

import numpy as np
import pytest
from stores import synthetic_store

from cltjax.batches import split_batches
from cltjax.errors import UserError
from cltjax.normalisation import normalisation_of
from cltjax.ridge import PENALTIES, fit_ridge, measure_ridge, normalise, sum_moments
from cltjax.wiring import wire


def split_arrays(store, wiring, split, scales):
    x, y = zip(*(normalise(batch, scales) for batch, _ in split_batches(store, wiring, split)), strict=True)
    return np.concatenate(x).astype(np.float64), np.concatenate(y).astype(np.float64)


@pytest.mark.parametrize("layers", ["0", "all"])
def test_ridge_is_the_best_penalised_linear_map(tmp_path: Path, layers: str):
    store = synthetic_store(tmp_path / "s", rows=1511, layers=3, d=7)
    wiring = wire(layers, 3, 1, 16)
    scales = normalisation_of(store, wiring)
    train, val = (sum_moments(split_batches(store, wiring, split, 101), scales) for split in ("train", "val"))
    ridge = fit_ridge(wiring, train, val)
    x, y = split_arrays(store, wiring, "train", scales)
    x_val, y_val = split_arrays(store, wiring, "val", scales)
    x_test, y_test = split_arrays(store, wiring, "test", scales)
    fit = measure_ridge(ridge, split_batches(store, wiring, "test", 101), scales).figures(wiring.targets)
    for t, target in enumerate(wiring.targets):
        inputs = [s for s, source in enumerate(wiring.sources) if (source, target) in wiring.pairs]
        a, a_val, a_test = (part[:, inputs].reshape(len(part), -1) for part in (x, x_val, x_test))
        solved = []
        for penalty in PENALTIES:
            scale = np.linalg.eigvalsh(a.T @ a).mean()
            w = np.linalg.solve(a.T @ a + penalty * scale * np.eye(a.shape[1]), a.T @ y[:, t])
            solved.append((np.square(y_val[:, t] - a_val @ w).sum(), penalty, w))
        error, penalty, w = min(solved, key=lambda one: one[0])
        # The errors at the smallest penalties differ by less than float32 products can tell.
        chosen = next(one for one in solved if one[1] == ridge.penalty[t])
        assert chosen[0] == pytest.approx(error, rel=1e-5)
        np.testing.assert_allclose(ridge.weights[t], chosen[2], atol=1e-4 * np.abs(w).max())
        direct = np.square(y_test[:, t] - a_test @ w).sum() / np.square(y_test[:, t]).sum()
        assert fit[str(target)]["all"]["fvu"] == pytest.approx(direct, rel=1e-4)


def test_no_val_rows(tmp_path: Path):
    store = synthetic_store(tmp_path / "s", rows=300, layers=2, d=3, splits=("train", "test"))
    wiring = wire("0", 2, 1, 1)
    scales = normalisation_of(store, wiring)
    train, val = (sum_moments(split_batches(store, wiring, split), scales) for split in ("train", "val"))
    with pytest.raises(UserError, match="no val rows"):
        fit_ridge(wiring, train, val)
