"""Between a CLT, which normalises, and its weights for raw activations, which a CLT directory holds.

    h = W_enc (x - in_mean) / in_std + b_enc          y_hat = out_mean + out_std (b_dec + sum of a W_dec)

so W_enc / in_std, b_enc - W_enc in_mean / in_std, out_std W_dec and out_mean + out_std b_dec do the same without
normalising. h is as it was, and so are thresholds on it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cltjax.clt import CLT
from cltjax.clt_directory import Activation, CLTDirectory
from cltjax.config import ModelConfig
from cltjax.normalisation import Normalisation
from cltjax.runs import refold
from cltjax.sparsity import RANKED_BY_NORM
from cltjax.wiring import Wiring


def activation_of(clt: CLT) -> Activation:
    """What decides which features are active, once training is over."""
    if clt.activation == "topk":
        return Activation("topk", clt.k, trained_as="topk")
    kind = "relu" if clt.activation == "relu" else "jumprelu"  # h |W_dec| against a cut is a threshold on h
    return Activation(kind, trained_as=clt.activation)


def folded(clt: CLT) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(file name, tensors) of a CLT in raw units, one file at a time; float32, computed in float64."""

    def exact(array: Any) -> np.ndarray:
        return np.asarray(array[...], np.float64)

    wiring, thresholds = clt.wiring, thresholds_of(clt)
    in_mean, in_std, out_mean, out_std = map(exact, (clt.in_mean, clt.in_std, clt.out_mean, clt.out_std))
    for s, (source, window) in enumerate(zip(wiring.sources, wiring.windows, strict=True)):
        W_enc = exact(clt.W_enc[...][s]) / in_std[s]
        encoder = {f"W_enc_{source}": W_enc, f"b_enc_{source}": exact(clt.b_enc[...][s]) - W_enc @ in_mean[s]}
        if thresholds is not None:
            encoder[f"threshold_{source}"] = thresholds[s]
        yield f"W_enc_{source}.safetensors", as_float32(encoder)
        W_dec = exact(clt.W_dec[str(source)]) * out_std[window, None]
        yield f"W_dec_{source}.safetensors", as_float32({f"W_dec_{source}": W_dec})
    b_dec = out_mean + out_std[:, None] * exact(clt.b_dec)
    yield "b_dec.safetensors", as_float32({f"b_dec_{t}": row for t, row in zip(wiring.targets, b_dec, strict=True)})


def as_float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def thresholds_of(clt: CLT) -> np.ndarray | None:
    """[S, F] what h must exceed, for rules with a threshold; else None."""
    if clt.activation == "jumprelu":
        return np.asarray(clt.thresholds(), np.float32)
    if clt.activation in RANKED_BY_NORM:
        norms = np.asarray(clt.decoder_norms(), np.float64)
        at = (np.asarray(clt.cut[...], np.float64)[:, None] / norms).astype(np.float32)
        # Active at the cut, too: `above` is strict. What is not above 0 has no value.
        return np.maximum(np.nextafter(at, np.float32(-np.inf)), 0)
    return None


def unfolded(directory: CLTDirectory, scales: Normalisation | None = None) -> CLT:
    """A CLT directory as a CLT that normalises with `scales` (its sources and targets), by default not at all, and
    predicts the same from raw activations. float32."""
    described = directory.description
    wiring, kind = described.wiring, described.activation.kind
    S, T, D = len(wiring.sources), len(wiring.targets), described.d_model
    none = Normalisation(
        *(
            np.full(shape, value, np.float32)
            for shape, value in (
                ((S, D), 0),
                (S, 1),
                ((T, D), 0),
                (T, 1),
            )
        )
    )
    clt = empty(wiring, kind, described.activation.k, described.n_features, none)
    tensors = {name: value for _, found in directory for name, value in found.items()}

    def stacked(name: str, layers: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(np.stack([tensors[f"{name}_{layer}"] for layer in layers]), jnp.float32)

    clt.W_enc[...], clt.b_enc[...] = stacked("W_enc", wiring.sources), stacked("b_enc", wiring.sources)
    clt.b_dec[...] = stacked("b_dec", wiring.targets)
    if kind == "jumprelu":
        clt.log_threshold[...] = jnp.log(stacked("threshold", wiring.sources))
    for source in wiring.sources:
        clt.W_dec[str(source)][...] = jnp.asarray(tensors[f"W_dec_{source}"], jnp.float32)
    return clt if scales is None else renormalised(clt, scales)


def empty(wiring: Wiring, activation: str, k: tuple[int, ...], features: int, scales: Normalisation) -> CLT:
    """A CLT of some kind whose weights are to be set; no bound on the number of active features."""
    slots = None if activation == "topk" else features
    model = ModelConfig(features, tuple(map(float, k)) or 1, activation, slots)  # type: ignore[arg-type]
    return CLT(wiring, model, scales, jax.random.key(0))


def renormalised(clt: CLT, scales: Normalisation) -> CLT:
    """The same function of raw activations with another normalisation inside."""
    graph, parameters, constants = nnx.split(nnx.clone(clt), nnx.Param, ...)
    to = [jnp.asarray(part) for part in (scales.in_mean, scales.in_std, scales.out_mean, scales.out_std)]
    moved: CLT = nnx.merge(graph, refold(graph, parameters, constants, *to), constants)
    for name, value in vars(scales).items():
        getattr(moved, name)[...] = jnp.asarray(value, jnp.float32)
    return moved
