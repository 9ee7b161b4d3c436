"""The activation store's format: what its manifest says and how its arrays are laid out. docs/store.md explains it.

Shared by the writer (store_writer.py) and the reader (store.py).
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cltjax.errors import UserError

FORMAT = "cltjax activation store"
FORMAT_VERSION = 1
SITES = ("mlp_in", "resid_mid", "resid_pre")
TEXT, IMAGE, SPECIAL = 0, 1, 2  # values of the column `modality`
COLUMNS = {
    "sample": np.dtype(np.int32),  # line of samples.jsonl
    "position": np.dtype(np.int32),  # within the sample's prompt (and generated answer)
    "token_id": np.dtype(np.int32),
    "modality": np.dtype(np.uint8),
    "generated": np.dtype(np.uint8),  # 1: the model's own answer
}
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
SPLITS = ("train", "val", "test")
SPLIT_RULE = "sha256(image bytes | shapes: layout | no image: prompt) mod 16: 0 and 1 test, 2 val, else train"
MANIFEST = "manifest.json"
SAMPLES = "samples.jsonl"
STATISTICS = "stats.safetensors"
MAX_BLOCK_ROWS = 128
SCALE_BYTES = np.dtype(np.float32).itemsize  # of a vector in int8

# What the manifest says besides the specification: how far the capture is.
PROGRESS = ("rows", "samples", "samples_bytes", "samples_crc32", "statistics", "complete", "resume")


@dataclass(frozen=True)
class StoreSpec:
    """What is fixed before the first row. It is written into the manifest; who resumes a store must bring the same."""

    model: dict[str, Any]  # id, revision, class, n_layers, d_model
    site: str
    layers: tuple[int, ...]
    dtype: str
    shard_rows: int
    template: str | None
    dataset: dict[str, Any]  # spec, fingerprint, samples, skipped (list of {row, file, reason})
    options: dict[str, Any]  # whatever else changes the rows: generate, image_tokens, batch_size, seed, ...

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise UserError(f"site '{self.site}' is none of {', '.join(SITES)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype '{self.dtype}' is none of {', '.join(DTYPES)}")
        if self.shard_rows < 1:
            raise UserError(f"shard rows must be at least 1, not {self.shard_rows}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"layers {self.layers} are not ascending layer numbers")

    @property
    def d_model(self) -> int:
        return int(self.model["d_model"])

    def as_json(self) -> dict[str, Any]:
        """As it reads back from the manifest (tuples are lists there)."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))


def block_rows(shard_rows: int) -> int:
    """Rows of an inner chunk, the unit that is read and checksummed: the largest divisor of `shard_rows` up to 128.

    Inner chunks must tile the shard exactly. 128 rows of width 4096 are 1 MiB in bfloat16: large enough that a read is
    not all overhead, small enough that a shuffled batch can be drawn from many places.
    """
    return max(n for n in range(1, min(shard_rows, MAX_BLOCK_ROWS) + 1) if shard_rows % n == 0)


@dataclass(frozen=True)
class ArraySpec:
    """One zarr3 array of a store: [row], [row, layer] or [row, layer, d]."""

    tail: tuple[int, ...]  # shape after the row axis
    dtype: np.dtype
    fill: int | str  # a value that is never stored, so that whatever reads as `fill` was never written
    sharded: bool

    def metadata(self, shard_rows: int, rows: int | None = None) -> dict[str, Any]:
        """zarr.json's content as tensorstore wants it; without `rows` whatever the shape is will do."""
        one_byte = self.dtype.itemsize == 1
        plain: list[dict[str, Any]] = [
            {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        chunk = [block_rows(shard_rows), 1, *self.tail[1:]]
        sharding = {"chunk_shape": chunk, "codecs": plain, "index_codecs": index, "index_location": "end"}
        metadata = {
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *self.tail]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}] if self.sharded else plain,
            "fill_value": self.fill,
            "dimension_names": ["row", "layer", "d"][: 1 + len(self.tail)],
        }
        return metadata if rows is None else metadata | {"shape": [rows, *self.tail]}

    def missing(self, values: np.ndarray) -> np.ndarray:
        """Where `values` hold the fill value."""
        return np.isnan(values) if self.fill == "NaN" else values == self.fill


def array_specs(spec: StoreSpec) -> dict[str, ArraySpec]:
    """Every array of a store, by its folder's name."""
    vectors, scalars = (len(spec.layers), spec.d_model), (len(spec.layers),)
    single = np.dtype(np.float32)
    arrays: dict[str, ArraySpec] = {}
    for name in (spec.site, "mlp_out"):
        # int8 codes are -127..127: -128 is free. No value of any other array is ever NaN or negative.
        arrays[name] = ArraySpec(vectors, DTYPES[spec.dtype], -128 if spec.dtype == "int8" else "NaN", True)
        arrays[f"{name}_norm"] = ArraySpec(scalars, single, "NaN", False)
        if spec.dtype == "int8":
            arrays[f"{name}_scale"] = ArraySpec(scalars, single, "NaN", False)
    for name, dtype in COLUMNS.items():
        arrays[name] = ArraySpec((), dtype, 255 if dtype.itemsize == 1 else -1, False)
    return arrays


def chunk_file(name: str, array: ArraySpec, shard: int) -> str:
    """Where shard number `shard` of an array lies within the store's folder."""
    return "/".join([name, "c", str(shard)] + ["0"] * len(array.tail))


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] floats as int8 codes and a float32 scale [N] = absmax / 127; |code x scale - value| <= scale / 2.

    A row that is not finite gets a scale that is not finite. A row of zeros has scale 0.
    """
    values = values.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        scale = np.abs(values).max(-1) / np.float32(127)
        codes = np.rint(values / np.where(scale > 0, scale, 1)[:, None])
        codes = np.clip(np.nan_to_num(codes), -127, 127).astype(np.int8)
    return codes, scale


def dequantise(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[..., D] int8 codes and their scale [...] as float32."""
    with np.errstate(invalid="ignore"):
        return codes.astype(np.float32) * scale[..., None]


def unpack(packed: np.ndarray) -> np.ndarray:
    """[..., D + 4] int8, codes and then the bytes of their scale, as float32 [..., D]: what `dequantise` returns."""
    scale = np.ascontiguousarray(packed[..., -SCALE_BYTES:]).view(np.float32)
    found = np.empty((*packed.shape[:-1], packed.shape[-1] - SCALE_BYTES), np.float32)
    with np.errstate(invalid="ignore"):
        return np.multiply(packed[..., :-SCALE_BYTES], scale, out=found)


def crc32_of(data: bytes, start: int = 0) -> int:
    return zlib.crc32(data, start)


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(field, stored value, given value) of every field that differs, nested fields as `dataset.fingerprint`."""
    found = []
    for key in [*stored, *(key for key in given if key not in stored)]:
        here, there = stored.get(key), given.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            found.append((prefix + key, here, there))
    return found


def brief(value: Any) -> str:
    """A value in a message: as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest in folder `path`. UserError where it is no JSON, of another version, or lacks fields."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it, or delete {path} and capture again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of an activation store")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = brief(manifest.get("format_version"))
        raise UserError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}: capture again")
    mend = f"restore it, or delete {path} and capture again"
    if lacking := [field for field in (*StoreSpec.__dataclass_fields__, *PROGRESS) if field not in manifest]:
        raise UserError(f"{file} lacks '{lacking[0]}': {mend}")
    if wrong := [field for field in ("rows", "samples", "samples_bytes") if type(manifest[field]) is not int]:
        raise UserError(f"{file}: '{wrong[0]}' is {brief(manifest[wrong[0]])}: {mend}")
    return manifest


def spec_of(manifest: Mapping[str, Any]) -> StoreSpec:
    """The specification in a manifest."""
    values: dict[str, Any] = {field: manifest[field] for field in StoreSpec.__dataclass_fields__}
    values["layers"] = tuple(values["layers"])
    return StoreSpec(**values)


def part_folder(path: Path, part: int, parts: int) -> Path:
    """Where writer number `part` (from 1) of `parts` writes: `path` itself when it is the only one."""
    return path if parts == 1 else path / f"part-{part}-of-{parts}"
