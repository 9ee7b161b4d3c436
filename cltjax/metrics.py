"""How well a CLT reconstructs: fraction of variance unexplained, calibration, active and dead features.

Sums are taken batch by batch on the device in float32 and added up on the host in float64. Modality M is a group of
rows: text, image, special, and `all` of them; T targets, S sources.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cltjax.batches import Batch
from cltjax.clt import CLT
from cltjax.store_format import IMAGE, SPECIAL, TEXT

GROUPS = {"text": TEXT, "image": IMAGE, "special": SPECIAL}
EVERY = "all"


@dataclass
class Fit:
    """Sums over rows from which FVU and calibration of predictions follow: [M, T] each, [M, T, D] for vectors.

    Values are normalised targets: the train mean is their origin. Mutable: `add` adds rows.
    """

    count: Any = 0  # [M]
    error: Any = 0  # |y - y_hat|^2
    power: Any = 0  # |y|^2: about the *train* mean, which is the origin
    y_hat_power: Any = 0  # |y_hat|^2
    product: Any = 0  # <y, y_hat>
    y_sum: Any = 0
    y_hat_sum: Any = 0

    def add(self, sums: dict[str, Any]) -> None:
        """Add the sums of some rows, as `fit_sums` gives them."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + np.asarray(value, np.float64))

    def figures(self, targets: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """By target layer and by group: rows, FVU and calibration slope. Groups without rows are left out.

        FVU = sum |y - y_hat|^2 / sum |y - mean y|^2 with the mean of the train split; never clamped.
        Calibration slope = <y, y_hat> / <y_hat, y_hat>, both about their means over the group's rows; 1 is right,
        1/S is what S sources give that each predict the whole target. None where the predictions do not vary.
        """

        def group(m: Any, t: int) -> dict[str, Any]:
            def over(values: Any) -> Any:
                return values[:, t].sum(0) if m == EVERY else values[m, t]

            count = self.count.sum() if m == EVERY else self.count[m]
            y_sum, y_hat_sum = over(self.y_sum), over(self.y_hat_sum)
            covariance = over(self.product) - y_sum @ y_hat_sum / count
            variance = over(self.y_hat_power) - y_hat_sum @ y_hat_sum / count
            # Constant predictions leave only rounding of float32 sums here.
            varies = variance > 1e-6 * over(self.y_hat_power)
            return {
                "rows": int(count),
                "fvu": float(over(self.error) / over(self.power)),
                "slope": float(covariance / variance) if varies else None,
            }

        groups = {EVERY: EVERY, **{name: m for name, m in GROUPS.items() if self.count[m] > 0}}
        return {str(layer): {name: group(m, t) for name, m in groups.items()} for t, layer in enumerate(targets)}


def fit_sums(y: Any, y_hat: Any, membership: Any) -> dict[str, Any]:
    """The sums of `Fit` over some rows: y, y_hat [B, T, D] normalised, membership [M, B] of 0 and 1. jax or numpy."""
    return {
        "count": membership.sum(1),
        "error": membership @ ((y - y_hat) ** 2).sum(-1),
        "power": membership @ (y**2).sum(-1),
        "y_hat_power": membership @ (y_hat**2).sum(-1),
        "product": membership @ (y * y_hat).sum(-1),
        "y_sum": (membership @ y.reshape(len(y), -1)).reshape(len(membership), *y.shape[1:]),
        "y_hat_sum": (membership @ y_hat.reshape(len(y), -1)).reshape(len(membership), *y.shape[1:]),
    }


def membership_of(modality: np.ndarray) -> np.ndarray:
    """[M, B] float32: 1 where a row belongs to a group."""
    return np.stack([modality == m for m in GROUPS.values()]).astype(np.float32)


@dataclass
class Firing:
    """How often each feature is active: counts [S, F], and active features per group [M, S]. Mutable."""

    fired: Any = 0
    active: Any = 0
    count: Any = 0

    def add(self, fired: Any, active: Any, count: Any) -> None:
        self.fired = self.fired + np.asarray(fired, np.int64)
        self.active = self.active + np.asarray(active, np.float64)
        self.count = self.count + np.asarray(count, np.float64)


@dataclass(frozen=True)
class Measured:
    """What a CLT does on some rows."""

    fit: Fit = field(default_factory=Fit)
    firing: Firing = field(default_factory=Firing)


@partial(jax.jit, static_argnums=0)
def _measure(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, y: jax.Array, membership: jax.Array):
    clt: CLT = nnx.merge(graph, state)
    values, indices = clt.encode(x)
    active = values > 0
    S, F = clt.b_enc[...].shape
    source = jnp.arange(S)[:, None, None]
    # Padding rows belong to no group, and fire nothing.
    counted = active & (membership.sum(0) > 0)[None, :, None]
    fired = jnp.zeros((S, F), jnp.int32).at[source, indices].add(counted.astype(jnp.int32))
    with jax.default_matmul_precision("highest"):
        per_group = membership @ active.sum(-1).T.astype(jnp.float32)
        return fit_sums(clt.normalise_targets(y), clt.decode(values, indices), membership), fired, per_group


def measure(clt: CLT, batches: Iterable[tuple[Batch, np.ndarray]]) -> Measured:
    """Run `clt` over batches of (rows, modality). A shorter last one is filled up with rows of no group."""
    graph, state = nnx.split(clt)
    found, size = Measured(), 0
    for batch, modality in batches:
        membership = membership_of(modality)
        size = max(size, len(modality))
        if short := size - len(modality):
            batch = Batch(*(np.pad(part, ((0, short), (0, 0), (0, 0)), mode="edge") for part in batch))
            membership = np.pad(membership, ((0, 0), (0, short)))
        sums, fired, active = jax.device_get(_measure(graph, state, batch.x, batch.y, membership))
        found.fit.add(sums)
        found.firing.add(fired, active, sums["count"])
    return found


def summary(measured: Measured, clt: CLT) -> dict[str, Any]:
    """The figures as JSON: by target and group, by source, and their means over targets and sources."""
    wiring, fit, firing = clt.wiring, measured.fit, measured.firing
    targets = fit.figures(wiring.targets)
    rows = int(firing.count.sum())
    groups = [name for name in (EVERY, *GROUPS) if name in targets[str(wiring.targets[0])]]
    sources = {}
    for s, layer in enumerate(wiring.sources):
        dead = firing.fired[s] == 0
        sources[str(layer)] = {
            "l0": float(firing.active[:, s].sum() / rows),
            "l0_by_modality": {
                name: float(firing.active[m, s] / firing.count[m]) for name, m in GROUPS.items() if firing.count[m]
            },
            "dead": float(dead.mean()),
            "density": density(firing.fired[s], rows),
        }
    return {
        "rows": rows,
        "fvu": {name: float(np.mean([by[name]["fvu"] for by in targets.values()])) for name in groups},
        "l0": float(np.mean([by["l0"] for by in sources.values()])),
        "dead": float(np.mean([by["dead"] for by in sources.values()])),
        "targets": targets,
        "sources": sources,
    }


def density(fired: np.ndarray, rows: int) -> dict[str, Any]:
    """Histogram of log10 firing rate over the features that fire: 10 bins a decade from 1e-7 to 1."""
    edges = np.linspace(-7, 0, 71)
    rates = np.log10(fired[fired > 0] / rows)
    return {"log10_from": -7, "log10_to": 0, "counts": np.histogram(rates, edges)[0].tolist()}
