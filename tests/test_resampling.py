"""cltjax/replacement/resampling.py: intervals that are as wide as they should be."""

import numpy as np
import pytest

from cltjax.replacement.resampling import Resampled, interval, ratio


def test_a_constant_has_no_width() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 37)
    drawn = Resampled({"kl": 0.25 * tokens, "tokens": tokens}, list(range(37)), resamples=101)
    assert interval(ratio(drawn["kl"], drawn["tokens"])) == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert interval(drawn["tokens"])["low"] != interval(drawn["tokens"])["high"]


def test_the_figure_is_a_ratio_of_sums() -> None:
    drawn = Resampled({"a": np.array([1.0, 0.0, 5.0]), "b": np.array([2.0, 1.0, 7.0])}, ["x", "y", "z"], resamples=11)
    assert interval(ratio(drawn["a"], drawn["b"]))["value"] == 0.6


def test_it_covers_what_is_true() -> None:
    """Right tokens of answers of unequal length, where an answer's tokens go together."""
    rng = np.random.default_rng(1)
    inside, widths, rounds = 0, [], 300
    for seed in range(rounds):
        tokens = rng.integers(1, 13, 61)
        ease = rng.beta(4, 2, 61)  # mean 2/3, whatever the length
        right = rng.binomial(tokens, ease)
        drawn = Resampled({"right": right, "tokens": tokens}, list(range(61)), seed, 199)
        found = interval(ratio(drawn["right"], drawn["tokens"]))
        assert found["low"] is not None and found["high"] is not None
        inside += found["low"] <= 2 / 3 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.90 <= inside / rounds <= 0.98
    assert 0.08 < np.mean(widths) < 0.16


def test_questions_about_one_image_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, 53).astype(float)
    ones = np.ones(53)
    images = [f"image {i}" for i in range(53)]
    alone = Resampled({"right": right, "n": ones}, images, 3)
    five = [np.repeat(column, 5) for column in (right, ones)]
    together = Resampled({"right": five[0], "n": five[1]}, np.repeat(images, 5).tolist(), 3)
    apart = Resampled({"right": five[0], "n": five[1]}, list(range(5 * 53)), 3)
    assert (alone.units, together.units, apart.units) == (53, 53, 265)

    def width(drawn: Resampled) -> float:
        found = interval(ratio(drawn["right"], drawn["n"]))
        assert found["low"] is not None and found["high"] is not None
        return found["high"] - found["low"]

    assert width(together) == pytest.approx(width(alone))
    assert width(apart) == pytest.approx(width(alone) / np.sqrt(5), rel=0.2)


def test_the_seed_decides() -> None:
    column = {"a": np.random.default_rng(0).normal(size=31)}
    first, same, other = (Resampled(column, list(range(31)), seed, 17)["a"] for seed in (5, 5, 6))
    assert np.array_equal(first, same) and not np.array_equal(first, other) and first[0] == other[0]


def test_what_does_not_exist() -> None:
    drawn = Resampled({"a": np.array([0.0, 3.0]), "none": np.zeros(2), "b": np.array([0.0, 4.0])}, [0, 1], resamples=99)
    assert interval(ratio(drawn["a"], drawn["none"])) == {"value": None, "low": None, "high": None}
    found = interval(ratio(drawn["a"], drawn["b"]))  # not in the resamples with the first sample alone
    assert found == {"value": 0.75, "low": 0.75, "high": 0.75}
    assert np.isnan(ratio(drawn["a"], drawn["b"])).any()
    assert np.isnan(ratio(np.array([1.0]), np.array([-2.0])))[0]
