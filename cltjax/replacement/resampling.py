"""Bootstrap intervals of figures that are ratios of sums over samples, with several samples an image taken together.

    drawn = Resampled({"kl": kl, "tokens": tokens}, units=images, seed=0)      columns [n], one number a sample
    interval(ratio(drawn["kl"], drawn["tokens"]))                              {"value", "low", "high"}

The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). What is drawn is
an image with all its questions, since answers about one image go together; sums, not ratios, are drawn, so that long
answers weigh as much in a resample as in the figure.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
TAILS = (2.5, 97.5)  # per cent
Figure = dict[str, float | None]  # value, low, high


class Resampled:
    """Totals [1 + resamples] of columns: of the samples as they are, then of each resample.

    columns: [n] each, one number a sample; units: [n] what is drawn with replacement, the same for samples that go
    together.
    """

    def __init__(
        self,
        columns: Mapping[Any, np.ndarray],
        units: Sequence[Hashable],
        seed: int = 0,
        resamples: int = RESAMPLES,
    ):
        self._places = {key: place for place, key in enumerate(columns)}
        numbers: dict[Hashable, int] = {}
        unit = np.array([numbers.setdefault(one, len(numbers)) for one in units])
        self.units = len(numbers)
        sums = np.zeros((self.units, len(columns)))
        np.add.at(sums, unit, np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1))
        rng = np.random.default_rng(seed)
        self._totals = np.empty((1 + resamples, len(columns)))
        self._totals[0] = sums.sum(0)
        for i in range(1, 1 + resamples):
            times = np.bincount(rng.integers(self.units, size=self.units), minlength=self.units)
            self._totals[i] = times @ sums

    def __getitem__(self, key: Hashable) -> np.ndarray:
        return self._totals[:, self._places[key]]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below where below is positive, NaN elsewhere: there the figure does not exist."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def interval(values: np.ndarray) -> Figure:
    """The figure of the samples as they are, values[0], and the middle 95 % of those of the resamples.

    None where the figure does not exist; resamples in which it does not are left out.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(drawn):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(drawn, TAILS)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}
