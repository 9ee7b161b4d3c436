"""Means and scales against a direct computation over the rows that are trained on."""

from pathlib import Path

import numpy as np
import pytest

from cltjax import normalisation
from cltjax.errors import UserError
from cltjax.normalisation import Normalisation, blank, normalisation_of
from cltjax.store import ActivationStore
from cltjax.tokens import TokenRules
from cltjax.wiring import wire
from outlier_stores import LAYERS, Large, outlier_store, rules_of
from store_cases import make_case, write

SOURCES, TARGETS = (1, 4), (4, 3)


def direct(store: ActivationStore, rules: TokenRules) -> Normalisation:
    """By the definition, in float64, over the rows themselves."""
    rows, found = rules.rows("train"), []
    for which, layers in (("site", SOURCES), ("mlp_out", TARGETS)):
        x = store.read(which, rows, layers).astype(np.float64)
        found += [x.mean(0), np.sqrt(np.square(x - x.mean(0)).mean((0, 2)))]
    return Normalisation(*found)


def agree(found: Normalisation, expected: Normalisation, rtol: float = 1e-6) -> None:
    for mean, std in (("in_mean", "in_std"), ("out_mean", "out_std")):
        scale = getattr(expected, std)
        np.testing.assert_allclose(getattr(found, std), scale, rtol=rtol)
        # A mean near zero is as exact as its layer's scale is.
        error = np.abs(getattr(found, mean) - getattr(expected, mean)) / scale[:, None]
        assert error.max() < 3 * rtol
        assert getattr(found, mean).dtype == getattr(found, std).dtype == np.float32


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8"])
def held(request, tmp_path_factory) -> tuple[ActivationStore, list[Large]]:
    return outlier_store(tmp_path_factory.mktemp("normalisation") / "s", request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"special": True},
        {"outliers": True},
        {"special": True, "outliers": True},
        {"image_share": 0.0},
        {"image_share": 1.0, "outliers": True},
        {"outlier_factor": 1.0},
    ],
)
def test_over_the_used_rows_only(held, options: dict):
    store, large = held
    rules = rules_of(store, SOURCES, TARGETS, **options)
    used, train = rules.rows("train"), store.rows_of("train")
    assert len(used) < len(train) or rules.left_out == ()
    found = normalisation_of(store, SOURCES, TARGETS, rules)
    agree(found, direct(store, rules))
    if options == {}:
        # Rows 1e5 times as large are among the train rows, and would rule the scale.
        every = store.stats().site.std[store.axis_of(SOURCES)]
        assert {one.size for one in large if one.row in train} >= {1e5} and every[0] > 50 * found.in_std[0]


def test_all_rows_are_the_stores_own_statistics(tmp_path: Path):
    """Bit for bit, as before there were token rules."""
    store, _ = outlier_store(tmp_path / "s", parts=3)
    rules = rules_of(store, SOURCES, TARGETS, special=True, outliers=True)
    found, stats = normalisation_of(store, SOURCES, TARGETS, rules), store.stats()
    sources, targets = store.axis_of(SOURCES), store.axis_of(TARGETS)
    np.testing.assert_array_equal(found.in_mean, stats.site.mean[sources])
    np.testing.assert_array_equal(found.in_std, stats.site.std[sources])
    np.testing.assert_array_equal(found.out_mean, stats.mlp_out.mean[targets])
    np.testing.assert_array_equal(found.out_std, stats.mlp_out.std[targets])


def test_only_the_outliers_are_read(tmp_path: Path, monkeypatch):
    store, _ = outlier_store(tmp_path / "s", parts=3)
    rules = rules_of(store, SOURCES, TARGETS)
    expected, whole, asked = direct(store, rules), store.read, []
    monkeypatch.setattr(store, "read", lambda which, rows, layers: (asked.append(rows), whole(which, rows, layers))[1])
    agree(normalisation_of(store, SOURCES, TARGETS, rules), expected)
    text_and_image = store.rows_of("train")[store.column("modality")[store.rows_of("train")] < 2]
    left_out = np.setdiff1d(text_and_image, rules.rows("train"))
    assert [rows.tolist() for rows in asked] == [left_out.tolist()] * 2 and 0 < len(left_out) < 20
    # In pieces, one row at a time, the result is the same.
    monkeypatch.setattr(normalisation, "_READ_BYTES", 1)
    asked.clear()
    agree(normalisation_of(store, SOURCES, TARGETS, rules), expected)
    assert len(asked) == 2 * len(left_out)


def test_where_the_difference_has_no_digits_left(tmp_path: Path):
    """Beside rows 1e12 times as large, float64 sums do not show the others any more: those are read then."""
    case = make_case("float32", 71, (211,), splits=("train", "test"), brought=np.float32)
    (rows, _, _) = case.batches[0]
    ordinary = np.flatnonzero(rows.columns["modality"] < 2)
    rows.site[ordinary[5:12], 0] *= 1e12
    rows.mlp_out[ordinary[50:53], 1] *= 1e12
    write(tmp_path / "s", case)
    store = ActivationStore.open(tmp_path / "s")
    rules = rules_of(store, SOURCES, TARGETS)
    assert store.stats().site.std[0] > 1e8
    agree(normalisation_of(store, SOURCES, TARGETS, rules), direct(store, rules))


def test_what_cannot_be_normalised(tmp_path: Path):
    store, _ = outlier_store(tmp_path / "s", samples=23)
    with pytest.raises(UserError, match="no train row .* outlier"):
        normalisation_of(store, SOURCES, TARGETS, rules_of(store, outlier_factor=1e-9))
    case = make_case("float32", 71, (31,), brought=np.float32)
    case.batches[0][0].mlp_out[:, 1] = 0.5
    write(tmp_path / "flat", case)
    flat = ActivationStore.open(tmp_path / "flat")
    normalisation_of(flat, (1,), (4,), rules_of(flat))
    with pytest.raises(UserError, match="mlp_out of layer 3 .* does not vary"):
        normalisation_of(flat, SOURCES, TARGETS, rules_of(flat))


def test_blank_has_the_shapes(tmp_path: Path):
    store, _ = outlier_store(tmp_path / "s", samples=23)
    wiring = wire("1,3", 7, 0, 2)
    assert wiring.targets == (1, 2, 3, 4)
    for empty, layers in zip(vars(blank(wiring, store.d_model)).values(), (2, 2, 4, 4), strict=True):
        assert len(empty) == layers and empty.dtype == np.float32 and not empty.any()
    assert blank(wiring, 11).in_mean.shape == (2, 11) and store.layers == LAYERS
