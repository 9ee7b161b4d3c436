"""Several runs as one CLT: least-squares gains for sources that were trained apart.

A source that is trained alone predicts the whole of each target; the sum of S such sources counts it S times
(method.md, "One layer at a time, honestly"). So each contribution c_{s->t} gets a gain, each target a new intercept:

    y_hat_t = b_t + sum over sources s of g_{s->t} c_{s->t}        b_t = mean y_t - sum of g_{s->t} mean c_{s->t}

g_t solves the normal equations of the centred contributions on `val` rows, with a ridge penalty that cross-validation
over samples chooses. Letters: S sources, T targets, B tokens, D width; K folds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import nnls

from cltjax.batches import Batch
from cltjax.clt import CLT
from cltjax.decode import decode_source, decode_source_codes
from cltjax.errors import UserError
from cltjax.folding import empty, renormalised, thresholds_of
from cltjax.normalisation import Normalisation
from cltjax.sparsity import RANKED_BY_NORM
from cltjax.wiring import Wiring, spell_layers, wire

FOLDS = 5
# Ridge penalties that are tried, as shares of the mean power of a source's contribution.
PENALTIES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BATCH_BYTES = 256 << 20  # of one batch's contributions


# ---------------------------------------------------------------------------------------------------- one model of many


def joined(parts: Sequence[CLT], wiring: Wiring) -> CLT:
    """The CLT whose prediction is the sum of those of `parts`, about their train means, of which the first part's is
    kept: as a run is trained with `--given`. Parts have each source of `wiring` once, and are alike in features and
    kind of activation. Thresholds on h |W_dec| become thresholds on h."""
    owner = {source: (part, s) for part in parts for s, source in enumerate(part.wiring.sources)}
    writer = {target: (part, t) for part in reversed(parts) for t, target in enumerate(part.wiring.targets)}

    def of(places: Iterable[tuple[CLT, int]], name: str) -> np.ndarray:
        return np.stack([np.asarray(getattr(part, name)[...][i]) for part, i in places])

    sources, targets = [owner[s] for s in wiring.sources], [writer[t] for t in wiring.targets]
    scales = Normalisation(
        of(sources, "in_mean"), of(sources, "in_std"), of(targets, "out_mean"), of(targets, "out_std")
    )
    first = parts[0]
    kind = "jumprelu" if first.activation in RANKED_BY_NORM else first.activation
    k = tuple(part.k[s] for part, s in sources) if kind == "topk" else ()
    whole = empty(wiring, kind, k, first.b_enc[...].shape[1], scales)
    bias = jnp.zeros_like(whole.b_dec[...])
    for part in parts:
        ours = np.array([wiring.targets.index(target) for target in part.wiring.targets])
        own = np.asarray(part.in_mean[...]), np.asarray(part.in_std[...])
        moved = renormalised(part, Normalisation(*own, scales.out_mean[ours], scales.out_std[ours]))
        limits = thresholds_of(part)
        for s, source in enumerate(part.wiring.sources):
            place = wiring.sources.index(source)
            whole.W_enc[...] = whole.W_enc[...].at[place].set(moved.W_enc[...][s])
            whole.b_enc[...] = whole.b_enc[...].at[place].set(moved.b_enc[...][s])
            whole.W_dec[str(source)][...] = moved.W_dec[str(source)][...]
            if limits is not None:
                whole.log_threshold[...] = whole.log_threshold[...].at[place].set(jnp.log(limits[s]))
        bias = bias.at[ours].add(part.b_dec[...] * (part.out_std[...] / scales.out_std[ours])[:, None])
    whole.b_dec[...] = bias
    return whole


def joint_wiring(parts: Sequence[tuple[str, Wiring]], n_layers: int, offset: int, n_targets: int) -> Wiring:
    """The wiring of several runs (name, wiring) together. UserError for a source that two of them have."""
    taken: dict[int, str] = {}
    for name, wiring in parts:
        for source in wiring.sources:
            if source in taken:
                raise UserError(f"source {source} is in {taken[source]} and in {name}: name it once")
            taken[source] = name
    return wire(spell_layers(tuple(sorted(taken))), n_layers, offset, n_targets)


# ---------------------------------------------------------------------------------------------------- moments


@dataclass
class Moments:
    """Sums over rows, by fold, from which the squared error of any gains follows. float64, normalised units."""

    count: Any = 0  # [K]
    c: Any = 0  # [K, T, S, D] contributions, 0 where a source does not write to a target
    y: Any = 0  # [K, T, D]
    cc: Any = 0  # [K, T, S, S]
    cy: Any = 0  # [K, T, S]
    yy: Any = 0  # [K, T]

    def add(self, sums: dict[str, Any]) -> None:
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + np.asarray(value, np.float64))

    def over(self, folds: Sequence[int] | np.ndarray) -> "Moments":
        """The sums over some folds: without the first axis."""
        return Moments(**{name: value[np.asarray(folds)].sum(0) for name, value in vars(self).items()})


@nnx.jit
def moment_sums(clt: CLT, x: jax.Array, y: jax.Array, folds: jax.Array) -> dict[str, jax.Array]:
    """The sums of `Moments` over raw rows x [B, S, D], y [B, T, D]; folds [B, K] of 0 and 1."""
    wiring, target = clt.wiring, clt.normalise_targets(y)
    if clt.activation == "topk":
        values, indices = clt.encode(x)
        written = [
            decode_source(clt.W_dec[str(source)][...], values[s], indices[s]) for s, source in enumerate(wiring.sources)
        ]
    else:
        codes = clt.codes(x)
        written = [
            decode_source_codes(clt.W_dec[str(source)][...], codes[s]) for s, source in enumerate(wiring.sources)
        ]
    blank = jnp.zeros(target.shape)
    c = jnp.stack([blank.at[:, window].set(one) for window, one in zip(wiring.windows, written, strict=True)], 2)
    with jax.default_matmul_precision("highest"):
        return {
            "count": folds.sum(0),
            "c": jnp.einsum("bk,btsd->ktsd", folds, c),
            "y": jnp.einsum("bk,btd->ktd", folds, target),
            "cc": jnp.einsum("bk,btsd,btud->ktsu", folds, c, c),
            "cy": jnp.einsum("bk,btsd,btd->kts", folds, c, target),
            "yy": jnp.einsum("bk,btd,btd->kt", folds, target, target),
        }


def moments_of(clt: CLT, batches: Iterable[tuple[Batch, np.ndarray]]) -> Moments:
    """The moments over batches of (rows, fold of each)."""
    found = Moments()
    for batch, fold in batches:
        folds = jnp.asarray(fold[:, None] == np.arange(FOLDS), jnp.float32)
        found.add(jax.device_get(moment_sums(clt, jnp.asarray(batch.x), jnp.asarray(batch.y), folds)))
    return found


def folds_of(sample: np.ndarray) -> np.ndarray:
    """The fold of each row, given its sample's number: a sample is in one fold, and folds have about as many."""
    return np.unique(sample, return_inverse=True)[1] % FOLDS


def rows_at_once(wiring: Wiring, d_model: int) -> int:
    """Rows of a batch whose contributions take BATCH_BYTES."""
    row = 4 * len(wiring.sources) * len(wiring.targets) * d_model
    return int(np.clip(BATCH_BYTES // row, 1, 2048))


# ---------------------------------------------------------------------------------------------------- gains


@dataclass(frozen=True)
class Gains:
    """gain [T, S], 0 where a source does not write to a target; intercept [T, D], normalised; penalty [T]."""

    gain: np.ndarray
    intercept: np.ndarray
    penalty: np.ndarray


def writers(wiring: Wiring, target: int) -> list[int]:
    """Places among the sources of those that write to a target."""
    return [s for s, source in enumerate(wiring.sources) if (source, target) in wiring.pairs]


def fit_gains(moments: Moments, wiring: Wiring, non_negative: bool = False) -> Gains:
    """Least-squares gains, each target by itself."""
    every = moments.over(np.arange(FOLDS))
    T, S, D = every.c.shape
    gain, intercept, penalty = np.zeros((T, S)), np.zeros((T, D)), np.zeros(T)
    splits = [(moments.over(np.arange(FOLDS) != fold), moments.over([fold])) for fold in range(FOLDS)]
    splits = [(fitted, held_out) for fitted, held_out in splits if fitted.count and held_out.count]
    for t, target in enumerate(wiring.targets):
        own = writers(wiring, target)

        def error(share: float, t: int = t, own: list[int] = own) -> float:
            total = 0.0
            for fitted, held_out in splits:
                g, b = solve(fitted, t, own, share, non_negative)
                total += squared_error(held_out, t, own, g, b)
            return total

        penalty[t] = min(PENALTIES, key=error)
        gain[t, own], intercept[t] = solve(every, t, own, penalty[t], non_negative)
    return Gains(gain, intercept, penalty)


def solve(moments: Moments, t: int, own: list[int], share: float, non_negative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gains [n] of the n sources `own` of target t, and its intercept [D]. A source that writes nothing gets 0."""
    n, c, y = moments.count, moments.c[t, own], moments.y[t]
    power = moments.cc[t][np.ix_(own, own)] - c @ c.T / n
    product = moments.cy[t, own] - c @ y / n
    g = np.zeros(len(own))
    alive = np.diag(power) > 1e-9 * max(np.diag(power).max(), 1e-30)
    if alive.any():
        power, product = power[np.ix_(alive, alive)], product[alive]
        # The smallest penalty keeps sources that write the same from being told apart by their rounding.
        power = power + max(share, 1e-9) * np.trace(power) / len(power) * np.eye(len(power))
        factor = cho_factor(power, lower=True)
        if non_negative:
            triangle = np.tril(factor[0])
            g[alive] = nnls(triangle.T, solve_triangular(triangle, product, lower=True))[0]
        else:
            g[alive] = cho_solve(factor, product)
    return g, (y - g @ c) / n


def squared_error(moments: Moments, t: int, own: list[int], g: np.ndarray, b: np.ndarray) -> float:
    """Sum over rows of |y - b - sum of g c|^2 at target t."""
    c, y = moments.c[t, own], moments.y[t]
    return float(
        moments.yy[t]
        - 2 * g @ moments.cy[t, own]
        + g @ moments.cc[t][np.ix_(own, own)] @ g
        + moments.count * b @ b
        - 2 * b @ (y - g @ c)
    )


def with_gains(clt: CLT, gains: Gains) -> CLT:
    """The same CLT with gains in its decoders."""
    found: CLT = nnx.clone(clt)
    for s, (source, window) in enumerate(zip(clt.wiring.sources, clt.wiring.windows, strict=True)):
        W = found.W_dec[str(source)]
        W[...] = W[...] * jnp.asarray(gains.gain[window, s], jnp.float32)[:, None]
    found.b_dec[...] = jnp.asarray(gains.intercept, jnp.float32)
    return found


def compare(
    val: Moments, test: Moments, wiring: Wiring, bias: np.ndarray, gains: Gains
) -> dict[str, tuple[float, ...]]:
    """FVU on test rows of each target, by way of combining: the naive sum (with the sum of the runs' own `bias`
    [T, D]), the mean of the sources, the best single source (chosen on val; intercepts refitted for both), the gains.
    """
    val, test = val.over(np.arange(FOLDS)), test.over(np.arange(FOLDS))
    found: dict[str, list[float]] = {"naive sum": [], "mean": [], "best single source": [], "gains": []}
    for t, target in enumerate(wiring.targets):
        own = writers(wiring, target)

        def refitted(g: np.ndarray, t: int = t, own: list[int] = own) -> tuple[np.ndarray, np.ndarray]:
            return g, (val.y[t] - g @ val.c[t, own]) / val.count

        singles = [refitted(one) for one in np.eye(len(own))]
        choices = {
            "naive sum": (np.ones(len(own)), bias[t]),
            "mean": refitted(np.full(len(own), 1 / len(own))),
            "best single source": min(singles, key=lambda one: squared_error(val, t, own, *one)),
            "gains": (gains.gain[t, own], gains.intercept[t]),
        }
        for name, (g, b) in choices.items():
            found[name].append(squared_error(test, t, own, g, b) / test.yy[t])
    return {name: tuple(values) for name, values in found.items()}
