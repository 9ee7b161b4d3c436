"""Runs -> CLT directory: weights that take and give raw activations, in safetensors.

    h = W_enc (x - in_mean) / in_std + b_enc          y_hat = out_mean + out_std (b_dec + sum of a W_dec)

so W_enc / in_std, b_enc - W_enc in_mean / in_std, out_std W_dec and out_mean + out_std b_dec do the same without
normalising. h is as it was, and so are thresholds on it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cltjax.checkpoint import read_summary
from cltjax.clt import CLT
from cltjax.clt_directory import Activation, Combined, Description, WeightType
from cltjax.config import as_json
from cltjax.runs import Trained
from cltjax.sparsity import RANKED_BY_NORM


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


def describe(trained: Trained, combined: Combined, dtype: WeightType) -> Description:
    """clt.json of one run."""
    clt, config, data = trained.clt, trained.config, trained.data
    return Description(
        model=data["model"],
        site=data["site"],
        n_features=config.model.features,
        sources=clt.wiring.sources,
        offset=config.offset,
        n_targets=config.n_targets,
        activation=activation_of(clt),
        combined=combined,
        dtype=dtype,
        tokens=as_json(config)["tokens"] | {"outliers_from": data["outliers"]},
        metrics=read_summary(trained.run),
        training=[as_json(config) | {"steps_done": trained.step}],
    )
