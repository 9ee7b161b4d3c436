"""Batches of made-up rows for the tests of the store, and what a folder holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cltjax.store_format import StoreSpec
from cltjax.store_writer import Rows, StoreWriter

LAYERS, D = (1, 3, 4), 11
SPLITS = ("train", "test", "train", "val")  # of samples, in turn
Batch = tuple[Rows, list[dict[str, Any]], int]


@dataclass(frozen=True)
class Case:
    """A capture: what the recorder would append, and the same as whole arrays."""

    spec: StoreSpec
    batches: list[Batch]

    @property
    def rows(self) -> int:
        return len(self.column("sample"))

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([rows.columns[name] for rows, _, _ in self.batches])

    def values(self, which: str) -> np.ndarray:
        return np.concatenate([getattr(rows, which) for rows, _, _ in self.batches])

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for _, records, _ in self.batches for record in records]


def make_case(
    dtype: str = "bfloat16",
    shard_rows: int = 23,
    samples_by_batch: Sequence[int] = (3, 1, 2, 0, 4, 2, 1),
    *,
    brought: Any = ml_dtypes.bfloat16,
    seed: int = 0,
    longest: int = 13,
    layers: tuple[int, ...] = LAYERS,
    d: int = D,
    splits: Sequence[str] = SPLITS,
    **fields: Any,
) -> Case:
    """Samples of 0 to `longest` tokens in batches; layers of quite different scale and mean, and a few outliers."""
    rng = np.random.default_rng(seed)
    dataset = {"spec": "made-up", "fingerprint": "f0", "samples": sum(samples_by_batch), "skipped": []}
    model = {"id": "m", "revision": None, "class": "c", "n_layers": 7, "d_model": d}
    options = {"generate": 0, "batch_size": 4}
    spec = StoreSpec(model, "mlp_in", layers, dtype, shard_rows, "<image>", dataset, options)
    spec = replace(spec, **fields)
    batches: list[Batch] = []
    number = 0
    for batch, count in enumerate(samples_by_batch):
        lengths = rng.integers(0, longest + 1, count)
        total = int(lengths.sum())
        shape = (total, len(layers), d)
        scale = (10.0 ** np.arange(len(layers)))[:, None]
        site, mlp_out = (rng.normal(2, 1, shape) * scale, rng.normal(-0.1, 1, shape) * scale)
        site[rng.random(total) < 0.02] *= 100
        columns = {
            "sample": np.repeat(np.arange(number, number + count), lengths).astype(np.int32),
            "position": np.concatenate([np.arange(n) for n in lengths] or [np.zeros(0)]).astype(np.int32),
            "token_id": rng.integers(0, 32000, total).astype(np.int32),
            "modality": rng.integers(0, 3, total).astype(np.uint8),
            "generated": rng.integers(0, 2, total).astype(np.uint8),
        }
        records = []
        for i in range(number, number + count):
            record = {"id": f"s{i}", "split": splits[i % len(splits)], "image": f"images/{i}.png"}
            records.append(record | {"prompt": f"what\u2028is\n{i} é?"})
        batches.append((Rows(site.astype(brought), mlp_out.astype(brought), columns), records, batch))
        number += count
    return Case(spec, batches)


def feed(writer: StoreWriter, case: Case, stop: int | None = None) -> None:
    """Append from where the writer is to go on, up to batch `stop`."""
    for rows, records, number in case.batches[writer.resume["batch"] if writer.resume else 0 : stop]:
        writer.append(rows, records, number)


def write(path: Path, case: Case) -> None:
    """Write the whole case, or what is still to come of it."""
    with StoreWriter(path, case.spec, capacity=case.rows + 5) as writer:
        if not writer.complete:
            feed(writer, case)
            writer.finish()


def contents(path: Path) -> dict[str, bytes]:
    """Every file below `path` and its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def as_read(values: np.ndarray, dtype: str) -> np.ndarray:
    """What a store of `dtype` (not int8) gives back for `values`."""
    return values.astype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype])
