"""Which rows are trained on: by modality, by norm, by option; and what is said of the others."""

from pathlib import Path

import numpy as np
import pytest

from cltjax.config import TokensConfig
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.tokens import GROUPS, OUTLIER, NormLimits, token_rules
from outlier_stores import LAYERS, Large, outlier_store, rules_of
from stores import synthetic_store


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> tuple[ActivationStore, list[Large]]:
    return outlier_store(tmp_path_factory.mktemp("tokens") / "store")


def direct(store: ActivationStore, sources, targets, factor: float) -> np.ndarray:
    """Outliers by the definition, from the vectors themselves."""
    train, found = store.rows_of("train"), np.zeros(store.rows, bool)
    for which, layers in (("site", sources), ("mlp_out", targets)):
        norms = np.linalg.norm(store.read(which, slice(None), layers).astype(np.float64), axis=-1)
        found |= ((norms >= factor * norms[train].mean(0)) & (norms > 0)).any(1)
    return found


@pytest.mark.parametrize("sources, targets", [(LAYERS, LAYERS), ((1,), (3,)), ((4,), (4, 1)), ((3,), (1, 3))])
def test_outliers_are_those_of_the_layers_read_and_written(held, sources, targets):
    store, large = held
    rules = rules_of(store, sources, targets)
    outlier = rules.group == OUTLIER
    np.testing.assert_array_equal(outlier, direct(store, sources, targets, 20))
    touched = [one.row for one in large if one.layer in (sources if one.which == "site" else targets)]
    # Sizes of 1e5 raise the mean norm so much that those of 1e3 may pass.
    assert set(np.flatnonzero(outlier)) <= set(touched) and (bool(outlier.any()) == bool(touched))
    np.testing.assert_array_equal(rules.group[~outlier], store.column("modality")[~outlier])


def test_the_counts_are_the_stores_own(held):
    """At factor 20, one layer at a time, the train outliers are what stats.safetensors counts."""
    store, _ = held
    train, total = store.split == 0, 0
    for place, layer in enumerate(LAYERS):
        for which, sources, targets in (("site", (layer,), ()), ("mlp_out", (), (layer,))):
            outlier = rules_of(store, sources, targets).group == OUTLIER
            counted = store.stats()[which].outliers[place]
            assert [(outlier & train & (store.column("modality") == m)).sum() for m in range(3)] == counted.tolist()
            total += counted.sum()
    assert total > 3


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("share", [None, 0.3, 0.0, 1.0])
def test_a_row_is_used_if_every_option_allows_it(held, special: bool, outliers: bool, share: float | None):
    store, _ = held
    rules = rules_of(store, special=special, outliers=outliers, image_share=share)
    modality, outlier = store.column("modality"), direct(store, LAYERS, LAYERS, 20)
    allowed = {None: [0, 1], 0.3: [0, 1], 0.0: [0], 1.0: [1]}[share] + [2] * (special and share != 1.0)
    used = np.isin(modality, allowed) & (outliers | ~outlier)
    for code, split in enumerate(("train", "val", "test")):
        np.testing.assert_array_equal(rules.rows(split), np.flatnonzero(used & (store.split == code)))
        counts = rules.counts(split)
        assert sum(counts.values()) == (store.split == code).sum()
        assert sum(n for name, n in counts.items() if name not in rules.left_out) == len(rules.rows(split))
    assert sorted([*rules.used_groups, *(GROUPS[name] for name in rules.left_out)]) == [0, 1, 2, 3]
    if share is None and not special and not outliers:
        counts = rules.counts("train")
        assert counts["outlier"] > 0 and rules.left_out == ("special", "outlier")
        said = f"{counts['text']} text, {counts['image']} image; left out: {counts['special']} special, "
        assert rules.describe("train") == said + f"{counts['outlier']} outlier"


def test_limits_of_another_store(held, tmp_path: Path):
    store, _ = held
    limits = rules_of(store).limits
    assert len(limits.site) == len(limits.mlp_out) == 3
    same = token_rules(store, LAYERS, LAYERS, TokensConfig(), limits)
    np.testing.assert_array_equal(same.group, rules_of(store).group)
    low = token_rules(store, (), (4,), TokensConfig(), NormLimits((), (0.0,)))
    norms = store.norms("mlp_out")[:, 2]
    np.testing.assert_array_equal(low.group == OUTLIER, norms > 0)  # a zero vector is no outlier
    test_only = synthetic_store(tmp_path / "t", rows=60, layers=2, d=3, splits=("test",))
    with pytest.raises(UserError, match="no train rows"):
        token_rules(test_only, (0,), (1,), TokensConfig())
    assert len(token_rules(test_only, (0,), (1,), TokensConfig(), NormLimits((1e9,), (1e9,))).some_rows("test")) > 0


def test_zero_vectors_are_no_outliers(tmp_path: Path):
    """A layer whose mean norm is 0 has the limit 0, which every norm reaches."""
    store, _ = outlier_store(tmp_path / "s", samples=5)
    limits = NormLimits((), (0.0,))
    store.norm_pieces = lambda which: iter([np.zeros((store.rows, 3), np.float32)])  # type: ignore[method-assign]
    assert not (token_rules(store, (), (1,), TokensConfig(), limits).group == OUTLIER).any()


def test_several_parts(tmp_path: Path):
    store, large = outlier_store(tmp_path / "s", parts=3)
    assert len(store.parts) == 3
    outlier = rules_of(store).group == OUTLIER
    np.testing.assert_array_equal(outlier, direct(store, LAYERS, LAYERS, 20))
    assert outlier[[one.row for one in large if one.size == 1e5]].all()
    pieces = np.concatenate(list(store.norm_pieces("mlp_out")))
    np.testing.assert_array_equal(pieces, store.norms("mlp_out"))


def test_nothing_left_is_said_in_one_line(held):
    store, _ = held
    rules = rules_of(store, outlier_factor=1e-9)
    with pytest.raises(UserError, match=r"no train row .* leave out [\d,]+ outlier rows") as error:
        rules.some_rows("train")
    assert "\n" not in str(error.value) and "--tokens" in str(error.value)
    with pytest.raises(UserError, match="layer 2 is not in"):
        rules_of(store, (2,), (3,))
