"""Means and scales that inputs and targets are normalised with: over the `train` rows that a run is trained on.

A store's statistics are over all its train rows. Here the modalities that are used are joined, and what the outliers
that are left out add to them is taken off again: they are few (of any 20 rows at most one has 20 times the mean norm),
so only they are read. Everything is float64 until the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cltjax.errors import UserError
from cltjax.statistics import Moments
from cltjax.store import ActivationStore
from cltjax.tokens import OUTLIER, TokenRules, used_modalities
from cltjax.wiring import Wiring

_READ_BYTES = 64 << 20  # at most this much float64 at a time
# Where what remains is a smaller share than this of the squares it is left over from, its digits are lost.
_FEWEST_DIGITS = 1e-9


@dataclass(frozen=True)
class Normalisation:
    """Per-dimension train means and one scalar standard deviation per layer, float32.

    in_mean [S, D] and in_std [S] of the sources' inputs, out_mean [T, D] and out_std [T] of the targets.
    """

    in_mean: np.ndarray
    in_std: np.ndarray
    out_mean: np.ndarray
    out_std: np.ndarray


def normalisation_of(
    store: ActivationStore, sources: Sequence[int], targets: Sequence[int], rules: TokenRules
) -> Normalisation:
    """The statistics of the train rows that `rules` use, at the layers read and written.

    UserError where no row is left, and for a layer whose activations never vary.
    """
    found = []
    for which, name, layers in (("site", store.site, sources), ("mlp_out", "mlp_out", targets)):
        spread = used_spread(store, which, layers, rules)
        std = np.sqrt(spread.m2 / (spread.count * store.d_model)).astype(np.float32)
        for layer, scale in zip(layers, std, strict=True):
            if not (np.isfinite(scale) and scale > 0):
                raise UserError(f"{name} of layer {layer} in {store.path} does not vary (standard deviation {scale})")
        found += [spread.mean.astype(np.float32), std]
    return Normalisation(*found)


@dataclass(frozen=True)
class Spread:
    """Of some rows at L layers: their number, mean [L, D], and sum over rows and dimensions of (x - mean)^2 [L]."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    def plus(self, other: "Spread") -> "Spread":
        """Of these rows and others together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + np.square(delta).sum(-1) * (self.count * other.count / count)
        return Spread(count, self.mean + delta * (other.count / count), m2)

    def minus(self, part: "Spread") -> "Spread":
        """Of these rows without some of them, of which at least one remains: `plus` solved for its first term."""
        count = self.count - part.count
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        delta = part.mean - mean
        return Spread(count, mean, self.m2 - part.m2 - np.square(delta).sum(-1) * (count * part.count / self.count))


def used_spread(store: ActivationStore, which: str, layers: Sequence[int], rules: TokenRules) -> Spread:
    """Of "site" or "mlp_out" at some layers, over the train rows that `rules` use."""
    rows = rules.some_rows("train")
    joined = of_modalities(store.moments(which), used_modalities(rules.tokens))
    axis = store.axis_of(layers)
    whole = Spread(int(joined.count), joined.mean[axis], joined.m2[axis])
    if whole.count == len(rows):
        return whole
    train = store.rows_of("train")
    modality = store.column("modality")[train]
    left_out = train[np.isin(modality, used_modalities(rules.tokens)) & (rules.group[train] == OUTLIER)]
    assert len(left_out) == whole.count - len(rows), "token rules of another store"
    rest = whole.minus(spread_of(store, which, layers, left_out))
    if np.any(rest.m2 < _FEWEST_DIGITS * whole.m2):
        return spread_of(store, which, layers, rows)
    return rest


def of_modalities(moments: Moments, modalities: Sequence[int]) -> Moments:
    """The rows of some modalities as one."""
    chosen = np.isin(np.arange(len(moments.count)), modalities)
    return Moments(
        np.where(chosen, moments.count, 0),
        moments.mean,
        np.where(chosen[:, None], moments.m2, 0),
        np.where(chosen[:, None], moments.norm_sum, 0),
    ).total()


def spread_of(store: ActivationStore, which: str, layers: Sequence[int], rows: np.ndarray) -> Spread:
    """Of at least one row, read a piece at a time."""
    size = max(1, _READ_BYTES // (8 * len(layers) * store.d_model))
    found = Spread(0, np.zeros((len(layers), store.d_model)), np.zeros(len(layers)))
    for start in range(0, len(rows), size):
        values = store.read(which, rows[start : start + size], layers).astype(np.float64)
        mean = values.mean(0)
        found = found.plus(Spread(len(values), mean, np.square(values - mean).sum((0, 2))))
    return found


def blank(wiring: Wiring, d_model: int) -> Normalisation:
    """Zeros of the right shapes, for a model whose constants are about to be restored."""
    S, T = len(wiring.sources), len(wiring.targets)
    shapes = ((S, d_model), (S,), (T, d_model), (T,))
    return Normalisation(*(np.zeros(shape, np.float32) for shape in shapes))
