"""Statistics of captured activations, shard by shard: moments by modality and layer, vector norms, outliers.

Everything is float64 and computed from the *stored* values (rounded or quantised), so that the figures describe what a
reader gets. Moments of disjoint sets of rows are joined by the pairwise update of Chan, Golub and LeVeque (1979), which
does not cancel; what is added in the same order gives the same bits, and so a resumed capture the same file.

Letters: N rows, L layers, D model width, M = 3 modalities (text, image, special).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

N_MODALITIES = 3
OUTLIER_FACTOR = 20.0  # an outlier token's norm is at least this many times its layer's mean norm
_TILE_ELEMENTS = 1 << 17  # 1 MiB of float64: a tile stays in the processor's cache through every pass over it


@dataclass
class Moments:
    """Sums over rows from which means, standard deviations and mean norms follow. Mutable: `merge` adds to it."""

    count: np.ndarray  # [M] int64, rows
    mean: np.ndarray  # [M, L, D] per-dimension mean; 0 where count is 0
    m2: np.ndarray  # [M, L] sum over rows and dimensions of (x - mean)^2
    norm_sum: np.ndarray  # [M, L] sum over rows of the vector's L2 norm

    @classmethod
    def zeros(cls, n_layers: int, d_model: int) -> "Moments":
        return cls(
            np.zeros(N_MODALITIES, np.int64),
            np.zeros((N_MODALITIES, n_layers, d_model)),
            np.zeros((N_MODALITIES, n_layers)),
            np.zeros((N_MODALITIES, n_layers)),
        )

    def merge(self, other: "Moments") -> None:
        """Add the rows of `other`, which must be others than those already here."""
        for m in range(N_MODALITIES):
            here, there = int(self.count[m]), int(other.count[m])
            if there == 0:
                continue
            delta = other.mean[m] - self.mean[m]
            self.mean[m] += delta * (there / (here + there))
            self.m2[m] += other.m2[m] + np.square(delta).sum(-1) * (here * there / (here + there))
        self.norm_sum += other.norm_sum
        self.count += other.count

    def total(self) -> "Moments":
        """All modalities as one: the same arrays with M = 1 left out ([], [L, D], [L], [L])."""
        count = int(self.count.sum())
        weight = (self.count / max(count, 1))[:, None, None]
        mean = (weight * self.mean).sum(0)
        spread = np.square(self.mean - mean).sum(-1) * self.count[:, None]
        return Moments(np.asarray(count), mean, (self.m2 + spread).sum(0), self.norm_sum.sum(0))

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """As named tensors of a safetensors file; `of_tensors` is the way back."""
        return {f"{prefix}.by_modality.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, np.ndarray], prefix: str) -> "Moments":
        return cls(*(tensors[f"{prefix}.by_modality.{field.name}"].copy() for field in fields(cls)))


@dataclass(frozen=True)
class SiteStats:
    """Statistics of one site over `train` rows, as a reader gets them: float32, NaN where no row counts."""

    count: int
    mean: np.ndarray  # [L, D]
    std: np.ndarray  # [L] one scalar a layer: sqrt of the mean over rows and dimensions of (x - mean)^2
    mean_norm: np.ndarray  # [L]
    modality_count: np.ndarray  # [M] int64
    modality_mean: np.ndarray  # [M, L, D]
    modality_mean_norm: np.ndarray  # [M, L]
    outliers: np.ndarray  # [L, M] int64: rows whose norm is >= OUTLIER_FACTOR x mean_norm of the layer

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """What stats.safetensors holds beside the moments."""
        names = ("mean", "std", "mean_norm", "outliers")
        return {f"{prefix}.{name}": np.ascontiguousarray(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class Stats:
    """Statistics of both sites of a store; `stats["site"]` and `stats["mlp_out"]` name them as `read` does."""

    site: SiteStats
    mlp_out: SiteStats

    def __getitem__(self, which: str) -> SiteStats:
        return {"site": self.site, "mlp_out": self.mlp_out}[which]


def summarise(moments: Moments, outliers: np.ndarray) -> SiteStats:
    """The figures that follow from `moments`; `outliers` [L, M] are counted by `count_outliers`."""
    total = moments.total()
    count = int(total.count)
    d_model = moments.mean.shape[-1]
    single = np.float32
    with np.errstate(invalid="ignore", divide="ignore"):
        by_modality = moments.count[:, None].astype(np.float64)
        return SiteStats(
            count=count,
            mean=(total.mean if count else np.full_like(total.mean, np.nan)).astype(single),
            std=np.sqrt(total.m2 / np.float64(count * d_model)).astype(single),
            mean_norm=(total.norm_sum / np.float64(count)).astype(single),
            modality_count=moments.count.copy(),
            modality_mean=np.where(by_modality[..., None] > 0, moments.mean, np.nan).astype(single),
            modality_mean_norm=(moments.norm_sum / by_modality).astype(single),
            outliers=outliers,
        )


def outlier_threshold(moments: Moments, factor: float = OUTLIER_FACTOR) -> np.ndarray:
    """[L] the norm from which on a vector is an outlier of its layer; NaN without rows, which nothing reaches."""
    total = moments.total()
    with np.errstate(invalid="ignore"):
        return factor * total.norm_sum / np.float64(total.count)


def is_outlier(norms: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """[N, L] bool: which norms ([N, L]) reach their layer's threshold ([L]). A zero vector never does."""
    return (norms >= threshold) & (norms > 0)


def count_outliers(norms: np.ndarray, modality: np.ndarray, train: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """[L, M] how many of the `train` rows ([N] bool) of each modality ([N]) have norms ([N, L]) >= threshold ([L])."""
    outlier = is_outlier(norms, threshold) & train[:, None]
    return np.stack([(outlier & (modality == m)[:, None]).sum(0) for m in range(N_MODALITIES)], axis=1)


def measure_layer(values: np.ndarray, groups: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple]]:
    """Norms and moments of one layer's vectors.

    values: [N, D], any float type. groups: row numbers of the M modalities' train rows, then of all other rows;
    together every row once. Returns norms [N] float32 (not finite where the vector is not) and for each modality
    (mean [D], m2, norm_sum).
    """
    norms = np.empty(len(values), np.float32)
    tile_rows = max(8, _TILE_ELEMENTS // values.shape[1])
    moments = []
    with np.errstate(invalid="ignore", over="ignore"):
        for group in groups:
            count, mean, m2 = 0, np.zeros(values.shape[1]), 0.0
            for start in range(0, len(group), tile_rows):
                rows = group[start : start + tile_rows]
                tile = values[rows].astype(np.float64)
                norms[rows] = np.sqrt(np.einsum("nd,nd->n", tile, tile))
                tile_mean = tile.mean(0)
                tile -= tile_mean
                delta, new = tile_mean - mean, count + len(rows)
                m2 += float(np.einsum("nd,nd->", tile, tile))
                m2 += float(np.square(delta).sum()) * (count * len(rows) / new)
                mean += delta * (len(rows) / new)
                count = new
            moments.append((mean, m2, float(norms[group].sum(dtype=np.float64))))
    return norms, moments[:N_MODALITIES]
