"""Ridge regression by summed normal equations against a direct solution."""

from pathlib import Path

import numpy as np
import pytest

from cltjax.batches import Batch, split_batches
from cltjax.config import TokensConfig
from cltjax.errors import UserError
from cltjax.normalisation import normalisation_of
from cltjax.ridge import PENALTIES, fit_ridge, measure_ridge, normalise, sum_moments
from cltjax.tokens import token_rules
from cltjax.wiring import wire
from stores import synthetic_store


def batches_of(store, wiring, rules, split, size=2048):
    return split_batches(store, wiring.sources, wiring.targets, rules.group, split, size)


def split_arrays(store, wiring, rules, split, scales):
    """The used rows of a split, normalised, float64."""
    rows = rules.rows(split)
    batch = Batch(store.read("site", rows, wiring.sources), store.read("mlp_out", rows, wiring.targets))
    return (part.astype(np.float64) for part in normalise(batch, scales))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("layers", ["0", "all"])
def test_ridge_is_the_best_penalised_linear_map(tmp_path: Path, layers: str, special: bool):
    """Of the rows that are trained on: special tokens change the solution, if they are among them."""
    store = synthetic_store(tmp_path / "s", rows=1511, layers=3, d=7)
    wiring = wire(layers, 3, 1, 16)
    rules = token_rules(store, wiring.sources, wiring.targets, TokensConfig(special=special))
    scales = normalisation_of(store, wiring.sources, wiring.targets, rules)
    train, val = (
        sum_moments(batches_of(store, wiring, rules, split, 101), scales, rules.used_groups)
        for split in ("train", "val")
    )
    assert train.rows == len(rules.rows("train")) and (train.rows < len(store.rows_of("train"))) != special
    ridge = fit_ridge(wiring, train, val)
    x, y = split_arrays(store, wiring, rules, "train", scales)
    x_val, y_val = split_arrays(store, wiring, rules, "val", scales)
    x_test, y_test = split_arrays(store, wiring, rules, "test", scales)
    fit = measure_ridge(ridge, batches_of(store, wiring, rules, "test", 101), scales)
    fit = fit.figures(wiring.targets, rules.used_groups)
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
    rules = token_rules(store, wiring.sources, wiring.targets, TokensConfig())
    scales = normalisation_of(store, wiring.sources, wiring.targets, rules)
    train, val = (
        sum_moments(batches_of(store, wiring, rules, split), scales, rules.used_groups) for split in ("train", "val")
    )
    with pytest.raises(UserError, match="no val rows"):
        fit_ridge(wiring, train, val)
