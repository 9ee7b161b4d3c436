"""How well a CLT reconstructs: fraction of variance unexplained, calibration, active and dead features.

Sums are taken batch by batch on the device in float32 and added up on the host in float64. M groups of rows (text,
image, special, outlier; cltjax/tokens.py), T targets, S sources. `all` is the groups that the run is trained on
together; the figures of the others are given apart, and are in none of the sums.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cltjax.axes import MESH, total, varying_like
from cltjax.batches import Batch
from cltjax.clt import CLT
from cltjax.distributed import make_mesh, spread
from cltjax.errors import UserError
from cltjax.step import Frozen, predict, specs
from cltjax.tokens import GROUPS

EVERY = "all"
NO_GROUP = 255  # rows that only fill up a batch
ROWS = P(MESH.data)
BINS = 1 << 16  # of the ranks' bits, in each of two passes
# On this share of tokens, all active features of a run take part while another is trained; slots in steps of so many.
ENOUGH, SLOT_STEP = 0.999, 8
ROUNDING = 1e-9  # of sums of weighted counts, by row


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

    def figures(self, targets: Sequence[int], used_groups: Sequence[int]) -> dict[str, dict[str, Any]]:
        """By target layer and by group: rows, FVU and calibration slope. Groups without rows are not there.

        FVU = sum |y - y_hat|^2 / sum |y - mean y|^2 with the mean of the train split; never clamped.
        Calibration slope = <y, y_hat> / <y_hat, y_hat>, both about their means over the group's rows; 1 is right,
        1/S is what S sources give that each predict the whole target. None where the predictions do not vary.
        """

        def group(members: list[int], t: int) -> dict[str, Any]:
            def over(values: Any) -> Any:
                return values[members, t].sum(0)

            count = self.count[members].sum()
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

        named = {EVERY: list(used_groups), **{name: [m] for name, m in GROUPS.items()}}
        there = {name: members for name, members in named.items() if self.count[members].sum() > 0}
        return {str(layer): {name: group(m, t) for name, m in there.items()} for t, layer in enumerate(targets)}


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


def membership_of(group: np.ndarray) -> np.ndarray:
    """[M, B] float32: 1 where a row ([B], values of GROUPS) belongs to a group."""
    return np.stack([group == m for m in GROUPS.values()]).astype(np.float32)


@dataclass
class Firing:
    """How often features are active. Mutable: `add` adds rows."""

    fired: Any = 0  # [S, F] used rows on which a feature is active
    active: Any = 0  # [M, S] active features, summed over a group's rows
    count: Any = 0  # [M] rows

    def add(self, fired: Any, active: Any, count: Any) -> None:
        """Add the sums of some rows."""
        self.fired = self.fired + np.asarray(fired, np.int64)
        self.active = self.active + np.asarray(active, np.float64)
        self.count = self.count + np.asarray(count, np.float64)


@dataclass(frozen=True)
class Measured:
    """What a CLT does on some rows."""

    fit: Fit = field(default_factory=Fit)
    firing: Firing = field(default_factory=Firing)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    graph: nnx.GraphDef,
    frozen: tuple[Frozen, ...],
    mesh: Mesh,
    state: nnx.State,
    arrays: Sequence[nnx.State],
    x: jax.Array,
    y: jax.Array,
    membership: jax.Array,
    used: jax.Array,
):
    def local(state: nnx.State, arrays: Any, x: jax.Array, y: jax.Array, membership: jax.Array, used: jax.Array):
        clt: CLT = nnx.merge(graph, state)
        # Padding rows belong to no group, and fire nothing; nor do rows that are left out.
        used_rows = used @ membership > 0
        active, fired, written = activity(clt, x[:, : len(clt.wiring.sources)], used_rows)
        with jax.default_matmul_precision("highest"):
            per_group = total(membership @ active.T.astype(jnp.float32), MESH.model)
            y_hat = predict(clt, written, x, frozen, arrays, MESH, whole=True)
            sums = fit_sums(clt.normalise_targets(y), y_hat, membership)
        return jax.tree.map(lambda leaf: total(leaf, MESH.data), (sums, fired, per_group))

    inputs = specs(state), specs(arrays), ROWS, ROWS, P(None, *ROWS), P()
    outputs = P(), P(None, MESH.model), P()
    found = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs)(state, arrays, x, y, membership, used)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P()))  # every process reads them all


def activity(clt: CLT, x: jax.Array, used_rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of this shard's features, for raw inputs x [B, S, D]: how many are active [S, B], on how many of the used rows
    [B] each is [S, F], and what they write [B, T, D].

    Under a rule with thresholds a token may have any number of active features: all are counted.
    """
    if clt.activation != "topk":
        codes = clt.codes(x)
        fired = ((codes > 0) & used_rows[None, :, None]).sum(1)
        return (codes > 0).sum(-1), fired, clt.contributions_of_codes(codes)
    values, indices = clt.encode(x, MESH)
    counted = (values > 0) & used_rows[None, :, None]
    fired = varying_like(jnp.zeros(clt.b_enc[...].shape, jnp.int32), counted)
    source = jnp.arange(len(values))[:, None, None]
    fired = fired.at[source, indices].add(counted.astype(jnp.int32), mode="drop")
    return (values > 0).sum(-1), fired, clt.contributions(values, indices)


def measure(
    clt: CLT,
    batches: Iterable[tuple[Batch, np.ndarray]],
    used_groups: Sequence[int],
    frozen: tuple[Frozen, ...] = (),
    arrays: Sequence[nnx.State] = (),
    mesh: Mesh | None = None,
) -> Measured:
    """Run `clt` over batches of (rows, group of each).

    frozen, arrays: runs whose predictions are added to its own. x has its sources first. mesh: where all these arrays
    are, by default one device; each process needs all rows.
    """
    graph, state = nnx.split(clt)
    mesh = mesh or make_mesh("1x1")
    used = np.isin(list(GROUPS.values()), used_groups).astype(np.float32)
    found = Measured()
    for x, y, group in on_mesh(batches, mesh):
        membership = spread(membership_of(group), mesh, axis=1)
        sums, fired, active = jax.device_get(_measure(graph, frozen, mesh, state, arrays, x, y, membership, used))
        found.fit.add(sums)
        found.firing.add(fired, active, sums["count"])
    return found


def on_mesh(
    batches: Iterable[tuple[Batch, np.ndarray]], mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array, np.ndarray]]:
    """x, y, split over `data`, and groups. A shorter last batch is filled up with rows of no group: all have one shape,
    for which the program is compiled once."""
    data, size = mesh.shape[MESH.data], 0
    for batch, group in batches:
        size = max(size, -(-len(group) // data) * data)
        if short := size - len(group):
            batch = Batch(*(np.pad(part, ((0, short), (0, 0), (0, 0)), mode="edge") for part in batch))
            group = np.pad(group, (0, short), constant_values=NO_GROUP)
        yield spread(batch.x, mesh), spread(batch.y, mesh), group


@partial(jax.jit, static_argnums=(0, 1, 2))
def _histogram(
    graph: nnx.GraphDef, mesh: Mesh, strata: int, state: nnx.State, x: jax.Array, stratum: jax.Array, high: jax.Array
) -> jax.Array:
    """How many ranks there are by the stratum of their row ([B]; rows of none count nowhere) and by their upper 16 bits
    [strata, S, BINS]; or where `high` [S] is not negative, by their lower 16 bits, of the ranks with these upper bits.
    Negative ranks count as 0."""

    def local(state: nnx.State, x: jax.Array, stratum: jax.Array, high: jax.Array) -> jax.Array:
        clt: CLT = nnx.merge(graph, state)
        rank = clt.rank(clt.pre_activations(clt.normalise_inputs(x[:, : len(clt.wiring.sources)])))
        bits = jax.lax.bitcast_convert_type(jnp.maximum(rank, 0.0), jnp.int32)  # in the order of the floats
        upper, lower, high = bits // BINS, bits % BINS, high[:, None, None]
        place = jnp.where(high < 0, upper, jnp.where(upper == high, lower, BINS))
        S = len(rank)
        line = jnp.arange(S)[:, None, None] + S * stratum[None, :, None]
        found = varying_like(jnp.zeros((strata * S, BINS), jnp.int32), place).at[line, place].add(1, mode="drop")
        return total(total(found, MESH.data), MESH.model).reshape(strata, S, BINS)

    inputs = specs(state), ROWS, ROWS, P()
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=P())(state, x, stratum, high)


def calibrate(
    clt: CLT, batches: Callable[[], Iterable[tuple[Batch, np.ndarray]]], shares: Sequence[float], mesh: Mesh
) -> np.ndarray:
    """What h |W_dec| must reach [S] so that a token has as many active features as in training, on average over the mix
    of tokens that is trained on.

    batches: (rows, stratum of each [B]). shares: of the trained tokens, by stratum; what a stratum's rows count follows
    from that and their number. Rows of no stratum do not count.

    For topk_joint one number for all sources, for batchtopk one each: the n-th largest rank of all features on these
    rows, n = k times rows. Found exactly in two passes over `batches()`, without sorting: first its upper bits, then
    its lower ones. UserError where a stratum has no rows.
    """
    graph, state = nnx.split(clt)
    joint = clt.activation == "topk_joint"
    k = np.array([sum(clt.k)] * len(clt.k) if joint else clt.k)

    def histogram(high: np.ndarray) -> tuple[np.ndarray, int]:
        """[S, BINS], each rank with the weight of its row, and the number of rows, which is their weight in all."""
        found, rows = np.zeros((len(shares), len(k), BINS), np.int64), np.zeros(len(shares), np.int64)
        for x, _, stratum in on_mesh(batches(), mesh):
            placed, bins = spread(stratum.astype(np.int32), mesh), jnp.asarray(high, jnp.int32)
            found += np.asarray(_histogram(graph, mesh, len(shares), state, x, placed, bins))
            rows += [(stratum == number).sum() for number in range(len(shares))]
        if not rows.all():
            raise UserError("val rows are lacking, which thresholds are calibrated on: capture more samples")
        weighted = np.tensordot(np.array(shares) * rows.sum() / rows, found, 1)
        return np.broadcast_to(weighted.sum(0), weighted.shape) if joint else weighted, int(rows.sum())

    bits, left, slack = np.zeros(len(k), np.int64), None, 0.0
    for which in ("upper", "lower"):
        counts, rows = histogram(np.full(len(k), -1) if which == "upper" else bits)
        if left is None:
            left, slack = k.astype(float) * rows, ROUNDING * rows
        above = np.cumsum(counts[:, ::-1], 1)[:, ::-1]  # ranks in this bin and higher ones
        place = np.maximum((above >= left[:, None] - slack).sum(1) - 1, 0)
        left = left - (above - counts)[np.arange(len(k)), place]
        bits = bits * BINS + place
    return bits.astype(np.int32).view(np.float32)


@partial(jax.jit, static_argnums=(0, 1))
def _active(one: Frozen, mesh: Mesh, state: nnx.State, x: jax.Array) -> jax.Array:
    """How many features of each token [B] and source are active under a rule with thresholds [S, B]."""

    def local(state: nnx.State, x: jax.Array) -> jax.Array:
        clt: CLT = nnx.merge(one.graph, state)
        return total((clt.codes(x[:, one.inputs]) > 0).sum(-1), MESH.model)

    found = jax.shard_map(local, mesh=mesh, in_specs=(specs(state), ROWS), out_specs=P(None, *ROWS))(state, x)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P()))


def room(
    frozen: Sequence[Frozen], arrays: Sequence[nnx.State], batches: Iterable[tuple[Batch, np.ndarray]], mesh: Mesh
) -> list[tuple[int, float] | None]:
    """Slots that each frozen run needs for all active features of a token and source, and the share of tokens that they
    are enough for; None for topk, whose number is fixed.

    Enough for ENOUGH of the tokens of each stratum (batches: rows, stratum of each) and source, in steps of SLOT_STEP:
    the few tokens beyond have no bound, and all would pay for them. Those lose the lowest of their ranks.
    """
    clts: list[CLT] = [nnx.merge(one.graph, held) for one, held in zip(frozen, arrays, strict=True)]
    varying = [n for n, clt in enumerate(clts) if clt.activation != "topk"]
    if not varying:
        return [None] * len(clts)
    counts, strata = {n: [] for n in varying}, []
    for x, _, stratum in on_mesh(batches, mesh):
        strata.append(stratum)
        for n in varying:
            counts[n].append(np.asarray(_active(frozen[n], mesh, arrays[n], x)))
    stratum = np.concatenate(strata)

    def enough(n: int) -> tuple[int, float]:
        active = np.concatenate(counts[n], 1)  # [S, rows]
        parts = [active[:, stratum == number] for number in np.unique(stratum[stratum != NO_GROUP])]
        needed = max(int(np.quantile(part, ENOUGH, 1, method="inverted_cdf").max()) for part in parts)
        slots = min(clts[n].b_enc[...].shape[1], max(1, -(-needed // SLOT_STEP)) * SLOT_STEP)
        return slots, min(float((part <= slots).mean(1).min()) for part in parts)

    return [enough(n) if n in counts else None for n in range(len(clts))]


def summary(
    measured: Measured, sources: Sequence[int], targets: Sequence[int], used_groups: Sequence[int]
) -> dict[str, Any]:
    """The figures as JSON: by target and group, by source, and their means over targets and sources.

    `rows`, `l0`, `dead` and `density` are over the rows of `used_groups`, of which there must be some; `left_out` has
    the rows of the other groups, whose `fvu` and `l0_by_group` stand beside the rest.
    """
    firing, by_target = measured.firing, measured.fit.figures(targets, used_groups)
    used = list(used_groups)
    rows = int(firing.count[used].sum())
    counts = {name: int(firing.count[m]) for name, m in GROUPS.items()}
    by_source = {}
    for s, layer in enumerate(sources):
        by_source[str(layer)] = {
            "l0": float(firing.active[used, s].sum() / rows),
            "l0_by_group": {name: float(firing.active[GROUPS[name], s] / n) for name, n in counts.items() if n},
            "dead": float((firing.fired[s] == 0).mean()),
            "density": density(firing.fired[s], rows),
        }
    return {
        "rows": rows,
        "rows_by_group": {name: n for name, n in counts.items() if GROUPS[name] in used},
        "left_out": {name: n for name, n in counts.items() if GROUPS[name] not in used},
        "fvu": mean_fvu(by_target),
        "l0": float(np.mean([by["l0"] for by in by_source.values()])),
        "dead": float(np.mean([by["dead"] for by in by_source.values()])),
        "targets": by_target,
        "sources": by_source,
    }


def mean_fvu(targets: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean over targets, by group."""
    groups = next(iter(targets.values()))
    return {group: float(np.mean([by[group]["fvu"] for by in targets.values()])) for group in groups}


def density(fired: np.ndarray, rows: int) -> dict[str, Any]:
    """Histogram of log10 firing rate over the features that fire: 10 bins a decade from 1e-7 to 1."""
    edges = np.linspace(-7, 0, 71)
    rates = np.log10(fired[fired > 0] / rows)
    return {"log10_from": -7, "log10_to": 0, "counts": np.histogram(rates, edges)[0].tolist()}
