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
from cltjax.clt_directory import Activation, CLTDirectory, tensor_type
from cltjax.config import ModelConfig
from cltjax.normalisation import Normalisation
from cltjax.runs import rescale
from cltjax.sparsity import RANKED_BY_NORM
from cltjax.wiring import Wiring


def activation_of(clt: CLT) -> Activation:
    """What decides which features are active, once training is over."""
    if clt.activation == "topk":
        return Activation("topk", clt.k, trained_as="topk")
    kind = "relu" if clt.activation == "relu" else "jumprelu"  # h |W_dec| against a cut is a threshold on h
    return Activation(kind, trained_as=clt.activation)


def folded(clt: CLT, dtype: str = "float32") -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(file name, tensors) of a CLT in raw units, one file at a time; float32, computed in float64.

    dtype: what weights will be stored as. Encoders are rounded to it here, before their product with the inputs' mean
    goes into b_enc: in residual streams means are large, and so would be rounding times the mean.
    """

    def exact(array: Any) -> np.ndarray:
        return np.asarray(array[...], np.float64)

    wiring, thresholds = clt.wiring, thresholds_of(clt)
    in_mean, in_std, out_mean, out_std = map(exact, (clt.in_mean, clt.in_std, clt.out_mean, clt.out_std))
    for s, (source, window) in enumerate(zip(wiring.sources, wiring.windows, strict=True)):
        W_enc = exact((exact(clt.W_enc[...][s]) / in_std[s]).astype(tensor_type("W_enc", dtype)))
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
    encoders = [directory.tensors(f"W_enc_{source}.safetensors") for source in wiring.sources]
    biases = directory.tensors("b_dec.safetensors")

    def stacked(name: str) -> jax.Array:
        by_source = [found[f"{name}_{source}"] for source, found in zip(wiring.sources, encoders, strict=True)]
        return jnp.asarray(np.stack(by_source), jnp.float32)

    clt.W_enc[...], clt.b_enc[...] = stacked("W_enc"), stacked("b_enc")
    clt.b_dec[...] = jnp.asarray(np.stack([biases[f"b_dec_{target}"] for target in wiring.targets]), jnp.float32)
    if kind == "jumprelu":
        clt.log_threshold[...] = jnp.log(stacked("threshold"))
    encoders.clear()
    for source in wiring.sources:  # one at a time: decoders are most of a CLT
        W_dec = directory.tensors(f"W_dec_{source}.safetensors")[f"W_dec_{source}"]
        clt.W_dec[str(source)][...] = jnp.asarray(W_dec, jnp.float32)
    if scales is not None:
        renormalise(clt, scales)
    return clt


def empty(wiring: Wiring, activation: str, k: tuple[int, ...], features: int, scales: Normalisation) -> CLT:
    """A CLT of some kind whose weights are to be set; no bound on the number of active features."""
    slots = None if activation == "topk" else features
    model = ModelConfig(features, tuple(map(float, k)) or 1, activation, slots)  # type: ignore[arg-type]
    return CLT(wiring, model, scales, jax.random.key(0))


def renormalised(clt: CLT, scales: Normalisation) -> CLT:
    """The same function of raw activations with another normalisation inside."""
    moved: CLT = nnx.clone(clt)
    renormalise(moved, scales)
    return moved


def renormalise(clt: CLT, scales: Normalisation) -> None:
    """`renormalised` in place, an array at a time: a CLT may take much of the memory."""
    rescale(clt, *map(jnp.asarray, (scales.in_mean, scales.in_std, scales.out_mean, scales.out_std)))
    for name, value in vars(scales).items():
        getattr(clt, name)[...] = jnp.asarray(value, jnp.float32)
