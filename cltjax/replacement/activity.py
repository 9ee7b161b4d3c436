"""Where features of one source are active in a store: counts, histograms, and the samples that show them best.

    found = gather(clt, store, layer, features, chunks, examples=8, seed=0)

Rows stream by once, in chunks of whole samples; what is kept is a few samples a feature. A random choice among the
samples that a feature is active in depends on (seed, layer, feature, sample) and nothing else: not on the chunks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cltjax.replacement.clt import CLT
from cltjax.store import ActivationStore

ELEMENTS = 1 << 25  # of inputs that are held at a time
MOST_ROWS = 1 << 15
AT_ONCE = 512  # rows whose pre-activations are: where features have thresholds, the row with the most sets the width
BINS = 64
MODALITIES = 3  # text, image, special


@dataclass(frozen=True, eq=False)
class Seen:
    """A feature in one sample: where it is active, rows of the store [n] ascending, and how much [n]."""

    sample: int
    peak: float
    rows: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Activity:
    """Of W features, in the order that they were asked for."""

    active: np.ndarray  # [MODALITIES, W] rows
    max: np.ndarray  # [W]
    histogram: "Histogram"
    top: list[list[Seen]]  # strongest first, a sample once
    random: list[list[Seen]]  # of the samples that it is active in


def chunks(store: ActivationStore, rows: np.ndarray) -> list[np.ndarray]:
    """Ascending rows cut into pieces of whole samples, as large as memory is meant to be."""
    size = min(MOST_ROWS, max(1, ELEMENTS // store.d_model))
    sample = store.column("sample")[rows]
    starts = np.flatnonzero(np.diff(sample, prepend=-1))
    cuts, first = [], 0
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        if end - first > size and start > first:
            cuts.append(start)
            first = start
    return np.split(rows, cuts)


def some_samples(store: ActivationStore, rows: np.ndarray, most: int | None, seed: int = 0) -> np.ndarray:
    """Those of the rows that are of a random choice of samples, at most `most` rows, but one sample at least."""
    if most is None or len(rows) <= most:
        return rows
    sample = store.column("sample")[rows]
    numbers, counts = np.unique(sample, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    n = max(1, int((np.cumsum(counts[order]) <= most).sum()))
    return rows[np.isin(sample, numbers[order[:n]])]


def encoded(
    clt: CLT, store: ActivationStore, layer: int, pieces: Iterable[np.ndarray], columns: torch.Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each piece: its rows, and the active features as (place in the piece, column, value) [n]; columns [F]: -1 for
    features that are of no interest."""
    for rows in pieces:
        x = torch.from_numpy(store.read("site", rows, [layer])[:, 0].astype(np.float32))
        parts = []
        for first in range(0, len(rows), AT_ONCE):
            values, indices = clt.encode(layer, x[first : first + AT_ONCE])
            column = columns.to(indices.device)[indices]
            place, which = ((values > 0) & (column >= 0)).nonzero(as_tuple=True)
            parts.append(((place + first).cpu(), column[place, which].cpu(), values[place, which].cpu()))
        place, column, value = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        yield rows, place, column, value


def gather(
    clt: CLT,
    store: ActivationStore,
    layer: int,
    features: Sequence[int],
    pieces: Iterable[np.ndarray],
    examples: int,
    seed: int = 0,
) -> Activity:
    """Stream pieces of rows (`chunks`) through one source's encoder; features: W different ones."""
    W, numbers = len(features), np.asarray(features, np.int64)
    columns = torch.full((clt.description.n_features,), -1)
    columns[torch.from_numpy(numbers)] = torch.arange(W)
    samples, modality = store.column("sample"), store.column("modality")
    active, largest, histogram = np.zeros((MODALITIES, W), np.int64), np.zeros(W), Histogram(W)
    top: list[list[Seen]] = [[] for _ in range(W)]
    random: list[list[tuple[int, Seen]]] = [[] for _ in range(W)]
    for rows, place, column, value in encoded(clt, store, layer, pieces, columns):
        if not len(place):
            continue
        active += np.bincount(modality[rows[place]] * W + column, minlength=MODALITIES * W).reshape(-1, W)
        np.maximum.at(largest, column, value)
        histogram.add(column, value)
        order = np.lexsort((place, column))
        row, column, value = rows[place[order]], column[order], value[order]
        sample = samples[row].astype(np.int64)
        begin = np.flatnonzero((np.diff(column, prepend=-1) != 0) | (np.diff(sample, prepend=-1) != 0))
        end = np.append(begin[1:], len(row))
        peak, of, number = np.maximum.reduceat(value, begin), column[begin], sample[begin]
        key = keys(seed, layer, numbers[of], number)

        def seen(i: int, row=row, value=value, begin=begin, end=end, peak=peak, number=number) -> Seen:
            part = slice(begin[i], end[i])
            return Seen(int(number[i]), float(peak[i]), row[part].copy(), value[part].copy())

        for i in _first(np.lexsort((number, -peak, of)), of, examples):
            top[of[i]].append(seen(i))
        for i in _first(np.lexsort((key, of)), of, examples):
            random[of[i]].append((int(key[i]), seen(i)))
        for w in np.unique(of):
            top[w] = sorted(top[w], key=lambda one: (-one.peak, one.sample))[:examples]
            random[w] = sorted(random[w], key=lambda pair: (pair[0], pair[1].sample))[:examples]
    return Activity(active, largest, histogram, top, [[one for _, one in those] for those in random])


def most_active(
    clt: CLT, store: ActivationStore, pieces: Sequence[np.ndarray], norms: dict[int, np.ndarray], n: int
) -> list[tuple[int, int]]:
    """The n features (layer, number) with the largest sum of activation x decoder norm over the rows, largest first;
    those that are never active are not among them. norms: by source [F]."""
    found: list[tuple[float, int, int]] = []
    F = clt.description.n_features
    for layer in clt.sources:
        total = np.zeros(F)
        for _, _, number, value in encoded(clt, store, layer, pieces, torch.arange(F)):
            total += np.bincount(number, value, minlength=F)
        total *= norms[layer]
        best = np.argsort(-total, kind="stable")[:n]
        found += [(-float(total[i]), layer, int(i)) for i in best if total[i] > 0]
    return [(layer, number) for _, layer, number in sorted(found)[:n]]


def _first(order: np.ndarray, of: np.ndarray, n: int) -> np.ndarray:
    """Of groups in this order, which is by `of` before all else, the first n of each."""
    sorted_of = of[order]
    start = np.flatnonzero(np.diff(sorted_of, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(start, np.diff(start, append=len(order)))
    return order[rank < n]


class Histogram:
    """Of values above 0, by column: at most BINS bins of a width that doubles when a value is beyond them, so that one
    pass counts exactly. Bin i is i width < value <= (i + 1) width; widths are powers of 2."""

    def __init__(self, columns: int):
        self.width = np.zeros(columns)
        self.counts = np.zeros((columns, BINS), np.int64)

    def add(self, column: np.ndarray, value: np.ndarray) -> None:
        """Values [n] of columns [n]."""
        value = value.astype(np.float64)
        top = np.zeros(len(self.width))
        np.maximum.at(top, column, value)
        first = (self.width == 0) & (top > 0)
        self.width[first] = 2.0 ** np.ceil(np.log2(top[first] / BINS))
        while (beyond := top > self.width * BINS).any():
            pairs = self.counts[beyond].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[beyond] = np.pad(pairs, ((0, 0), (0, BINS // 2)))
            self.width[beyond] *= 2
        bins = np.ceil(value / self.width[column]).astype(np.int64) - 1
        self.counts += np.bincount(column * BINS + bins, minlength=self.counts.size).reshape(self.counts.shape)

    def of(self, column: int) -> tuple[list[float], list[int]]:
        """Edges [n + 1] and counts [n] from 0 to the largest value's bin, n at most BINS / 2; empty without any."""
        counts, width = self.counts[column], float(self.width[column])
        n = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
        if n > BINS // 2:
            counts, width, n = counts.reshape(-1, 2).sum(1), 2 * width, -(-n // 2)
        return [i * width for i in range(n + 1)] if n else [], counts[:n].tolist()


def keys(seed: int, layer: int, feature: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """[n] uint64, as if drawn for each: the n samples with the smallest ones are a fair choice (splitmix64, Steele,
    Lea and Flood, 2014)."""
    found = np.full(len(sample), seed, np.uint64)
    for part in (np.full(len(sample), layer), feature, sample):
        found = _mixed(found + part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return found


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
