"""Ridge regression from the CLT's inputs to its targets: the linear baseline a transcoder has to beat.

Closed form from normal equations that are summed over the train rows that the CLT is trained on, a batch at a time;
each target is predicted from all sources that write to it, together. The penalty is chosen per target on `val`. Inputs
and targets are normalised with the CLT's statistics, so that those rows' means are the origin and no intercept is
needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cltjax.batches import Batch
from cltjax.errors import UserError
from cltjax.metrics import Fit, fit_sums, membership_of
from cltjax.normalisation import Normalisation
from cltjax.wiring import Wiring

# Penalties tried, as shares of the mean eigenvalue of the inputs' second moment.
PENALTIES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Moments:
    """Second moments of normalised rows, float64: xx [S D, S D], xy [T, S D, D], yy [T]. Mutable while summed."""

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray
    rows: int = 0


def normalise(batch: Batch, scales: Normalisation) -> tuple[np.ndarray, np.ndarray]:
    """x [B, S, D] and y [B, T, D] in normalised units, float32."""
    x = (batch.x.astype(np.float32) - scales.in_mean) / scales.in_std[:, None]
    return x, (batch.y.astype(np.float32) - scales.out_mean) / scales.out_std[:, None]


def sum_moments(
    batches: Iterable[tuple[Batch, np.ndarray]], scales: Normalisation, used_groups: Sequence[int]
) -> Moments:
    """Sum over the rows of `used_groups` in batches of (rows, group of each).

    The products of one batch are float32, their sum float64.
    """
    (S, D), T = scales.in_mean.shape, len(scales.out_mean)
    total = Moments(np.zeros((S * D, S * D)), np.zeros((T, S * D, D)), np.zeros(T))
    for batch, group in batches:
        used = np.isin(group, used_groups)
        x, y = normalise(Batch(batch.x[used], batch.y[used]), scales)
        flat = x.reshape(len(x), -1)
        total.xx += flat.T @ flat
        for t in range(T):
            total.xy[t] += flat.T @ y[:, t]
        total.yy += np.square(y, dtype=np.float64).sum((0, 2))
        total.rows += len(x)
    return total


@dataclass(frozen=True)
class Ridge:
    """weights[t] [S_t D, D] from the concatenated sources of target t; penalty[t] as a share of the mean eigenvalue."""

    wiring: Wiring
    weights: list[np.ndarray]
    penalty: list[float]

    def columns(self, t: int, D: int) -> np.ndarray:
        """Which of the S x D input dimensions target number t is predicted from."""
        return input_columns(self.wiring, t, D)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Normalised inputs [B, S, D] -> normalised targets [B, T, D], float32."""
        flat = x.reshape(len(x), -1)
        D = x.shape[2]
        made = [flat[:, self.columns(t, D)] @ w.astype(np.float32) for t, w in enumerate(self.weights)]
        return np.stack(made, axis=1)


def input_columns(wiring: Wiring, t: int, D: int) -> np.ndarray:
    """The input dimensions, of S x D, of the sources that write to target number t."""
    target = wiring.targets[t]
    sources = [s for s, source in enumerate(wiring.sources) if (source, target) in wiring.pairs]
    return np.concatenate([np.arange(s * D, (s + 1) * D) for s in sources])


def fit_ridge(wiring: Wiring, train: Moments, val: Moments) -> Ridge:
    """Solve for every target and every penalty by one eigendecomposition per set of sources; keep the best on `val`."""
    if val.rows == 0:
        raise UserError("the store has no val rows to choose the ridge penalty on (of the groups that are trained on)")
    weights, penalties = [], []
    factors: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for t in range(len(wiring.targets)):
        D = train.xy.shape[2]
        columns = input_columns(wiring, t, D)
        key = columns.tobytes()
        if key not in factors:
            values, vectors = np.linalg.eigh(train.xx[np.ix_(columns, columns)])
            factors[key] = np.maximum(values, 0), vectors
        values, vectors = factors[key]
        rotated = vectors.T @ train.xy[t][columns]
        xx, xy = val.xx[np.ix_(columns, columns)], val.xy[t][columns]
        best = None
        for penalty in PENALTIES:
            # Directions the train rows do not have at all get no weight, whatever the penalty.
            damped = values + penalty * values.mean()
            inverse = np.where(values > 1e-12 * values.max(), 1 / np.maximum(damped, 1e-300), 0)
            w = vectors @ (inverse[:, None] * rotated)
            error = val.yy[t] - 2 * np.sum(w * xy) + np.sum(w * (xx @ w))
            if best is None or error < best[0]:
                best = error, penalty, w
        assert best is not None
        penalties.append(best[1])
        weights.append(best[2])
    return Ridge(wiring, weights, penalties)


def measure_ridge(ridge: Ridge, batches: Iterable[tuple[Batch, np.ndarray]], scales: Normalisation) -> Fit:
    """The same sums for ridge's predictions as for a CLT's: over all groups."""
    fit = Fit()
    for batch, group in batches:
        x, y = normalise(batch, scales)
        fit.add(fit_sums(y, ridge.predict(x), membership_of(group)))
    return fit
