"""Small synthetic activation stores, written by the real writer."""

from pathlib import Path

import numpy as np

from cltjax.store import ActivationStore
from cltjax.store_format import IMAGE, SPECIAL, TEXT, StoreSpec
from cltjax.store_writer import Rows, StoreWriter

SPLITS = ("train", "train", "test", "train", "val")  # of samples, in turn


def synthetic_store(
    path: Path,
    rows: int = 2003,
    layers: int = 5,
    d: int = 13,
    seed: int = 0,
    splits: tuple[str, ...] = SPLITS,
    captured: tuple[int, ...] | None = None,
    dtype: str = "bfloat16",
    shard_rows: int = 301,
) -> ActivationStore:
    """A store in which every MLP output is a nonlinear function of sparse causes that the inputs show.

    A token has 3 of 2d causes. Each layer's input is a linear, overcomplete picture of them, and its output is a ReLU
    network of its input: a dictionary of features predicts it far better than a linear map does. Samples have 17
    tokens: two special, ten image, five text.
    """
    every = tuple(range(layers)) if captured is None else captured
    rng = np.random.default_rng(seed)
    causes = 2 * d
    picture = rng.normal(size=(layers, causes, d)) / np.sqrt(3)
    first, second = rng.normal(size=(layers, causes, 4 * d)), rng.normal(size=(layers, 4 * d, d))
    tokens = 17
    modality = np.array([SPECIAL] + [IMAGE] * 10 + [TEXT] * 5 + [SPECIAL], np.uint8)
    samples = -(-rows // tokens)
    model = {"id": "synthetic", "revision": None, "class": "none", "n_layers": layers, "d_model": d}
    dataset = {"spec": "synthetic", "fingerprint": f"{seed}-{rows}", "samples": samples, "skipped": []}
    spec = StoreSpec(model, "mlp_in", every, dtype, shard_rows, None, dataset, {"seed": seed})
    with StoreWriter(path, spec, samples * tokens) as writer:
        for number in range(samples):
            z = np.zeros((tokens, causes))
            for row in z:
                row[rng.choice(causes, 3, replace=False)] = rng.uniform(0.5, 1.5, 3)
            site = np.einsum("nc,lcd->nld", z, picture) + 0.5 * (modality == IMAGE)[:, None, None] + 2
            hidden = np.maximum(np.einsum("nc,lch->nlh", z, first) - 1, 0)
            mlp_out = np.einsum("nlh,lhd->nld", hidden, second) / np.sqrt(d) - 1
            columns = {
                "sample": np.full(tokens, number, np.int32),
                "position": np.arange(tokens, dtype=np.int32),
                "token_id": rng.integers(0, 97, tokens).astype(np.int32),
                "modality": modality,
                "generated": np.zeros(tokens, np.uint8),
            }
            held = [array[:, list(every)].astype(np.float32) for array in (site, mlp_out)]
            record = {"id": str(number), "split": splits[number % len(splits)]}
            writer.append(Rows(held[0], held[1], columns), [record], number)
        writer.finish()
    return ActivationStore.open(path)
