"""Means and scales that inputs and targets are normalised with, from a store's statistics over `train` rows."""

from dataclasses import dataclass

import numpy as np

from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.wiring import Wiring


@dataclass(frozen=True)
class Normalisation:
    """Per-dimension train means and one scalar standard deviation per layer, float32.

    in_mean [S, D] and in_std [S] of the sources' inputs, out_mean [T, D] and out_std [T] of the targets.
    """

    in_mean: np.ndarray
    in_std: np.ndarray
    out_mean: np.ndarray
    out_std: np.ndarray


def normalisation_of(store: ActivationStore, wiring: Wiring) -> Normalisation:
    """The statistics of the layers a CLT touches. UserError for a layer whose activations never vary."""
    stats = store.stats()
    sources, targets = store.axis_of(wiring.sources), store.axis_of(wiring.targets)
    site, mlp_out = stats.site, stats.mlp_out
    found = Normalisation(site.mean[sources], site.std[sources], mlp_out.mean[targets], mlp_out.std[targets])
    for name, layers, std in ((store.site, wiring.sources, found.in_std), ("mlp_out", wiring.targets, found.out_std)):
        for layer, scale in zip(layers, std, strict=True):
            if not (np.isfinite(scale) and scale > 0):
                raise UserError(f"{name} of layer {layer} in {store.path} does not vary (standard deviation {scale})")
    return found


def blank(wiring: Wiring, d_model: int) -> Normalisation:
    """Zeros of the right shapes, for a model whose constants are about to be restored."""
    S, T = len(wiring.sources), len(wiring.targets)
    shapes = ((S, d_model), (S,), (T, d_model), (T,))
    return Normalisation(*(np.zeros(shape, np.float32) for shape in shapes))
