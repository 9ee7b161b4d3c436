"""Reading an activation store: published rows of the layers asked for, checked, from one part or several.

    store = ActivationStore.open(Path("activations"))
    rows = store.rows_of("train")
    x = store.read("site", rows[:4096], [0])                 # [4096, 1, d_model]
    y = store.read("mlp_out", rows[:4096], [1, 2, 3])        # [4096, 3, d_model]

The format is docs/store.md; it is written by cltjax/store_writer.py. No torch and no jax here.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from safetensors.numpy import load as load_safetensors

from cltjax.errors import UserError
from cltjax.statistics import Moments, SiteStats, Stats, count_outliers, outlier_threshold, summarise
from cltjax.store_format import (
    COLUMNS,
    DTYPES,
    IMAGE,
    MANIFEST,
    SAMPLES,
    SCALE_BYTES,
    SITES,
    SPECIAL,
    SPLITS,
    TEXT,
    StoreSpec,
    array_specs,
    block_rows,
    brief,
    chunk_file,
    crc32_of,
    differences,
    load_manifest,
    spec_of,
    unpack,
)

__all__ = ["COLUMNS", "IMAGE", "SITES", "SPECIAL", "TEXT", "ActivationStore", "SiteStats", "Stats"]

# What may differ between the parts of one store; everything else in their manifests' specifications is the same.
PART_FIELDS = ("dataset.samples", "dataset.skipped", "options.shard")
PART_NAME = re.compile(r"part-([1-9]\d*)-of-([1-9]\d*)")
Region = tuple[slice, ...]
_READ_BYTES = 128 << 20  # about this much, as float32, is asked for at a time
_FEWEST_ROWS = 32  # worth a request of their own


class _Reading(NamedTuple):
    """Regions of one array on their way into memory."""

    name: str
    regions: Sequence[Region]
    targets: Sequence[np.ndarray | None]
    futures: list[Any]  # of tensorstore's, one a region


# Where rows go in the result (rows, layers), and which rows of the region they are; None where they are there already.
_Placement = tuple[slice | np.ndarray, slice, np.ndarray | None]


class StorePart:
    """One folder with a manifest: the published rows of one writer. `ActivationStore` joins one or several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = load_manifest(path)
        self.spec: StoreSpec = spec_of(self.manifest)
        self.rows: int = self.manifest["rows"]
        self.n_samples: int = self.manifest["samples"]
        self.arrays = array_specs(self.spec)
        self._opened: dict[str, ts.TensorStore] = {}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The published records of samples.jsonl, in order."""
        file = self.path / SAMPLES
        size = self.manifest["samples_bytes"]
        data = b""
        if size:
            if not file.exists():
                raise UserError(f"{file} is missing: {self._mend()}")
            with file.open("rb") as stream:
                data = stream.read(size)
        if len(data) != size or crc32_of(data) != self.manifest["samples_crc32"]:
            raise UserError(f"{file} is damaged: {self._mend()}")
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    def moments(self) -> dict[str, Moments]:
        """Moments over the published `train` rows, by which site."""
        if self.manifest["statistics"] is None:
            layers, width = len(self.spec.layers), self.spec.d_model
            return {which: Moments.zeros(layers, width) for which in ("site", "mlp_out")}
        tensors = self.statistics()
        return {which: Moments.of_tensors(tensors, self.name(which)) for which in ("site", "mlp_out")}

    def statistics(self) -> dict[str, np.ndarray]:
        """The tensors of the statistics file that the manifest names."""
        entry = self.manifest["statistics"]
        file = self.path / entry["file"]
        if not file.exists():
            raise UserError(f"{file} is missing: open the store again if a capture is running, else {self._mend()}")
        data = file.read_bytes()
        if crc32_of(data) != entry["crc32"]:
            raise UserError(f"{file} is damaged: {self._mend()}")
        return load_safetensors(data)

    def name(self, which: str) -> str:
        """The array that "site" or "mlp_out" stands for."""
        if which not in ("site", "mlp_out"):
            raise ValueError(f"{which!r} is neither 'site' nor 'mlp_out'")
        return self.spec.site if which == "site" else which

    def read_small(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of a column, or of an array [row, layer]."""
        if stop <= start:
            return np.empty((0, *self.arrays[name].tail), self.arrays[name].dtype)
        return self._read(name, [(slice(start, stop),)])[0]

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._opened:
            array, folder = self.arrays[name], self.path / name
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(folder.resolve())},
                "metadata": array.metadata(self.spec.shard_rows),
            }
            try:
                opened = ts.open(spec, read=True).result()
            except ValueError as error:
                raise UserError(f"{folder} cannot be opened ({reason_of(error)}): {self._mend()}") from error
            if opened.shape[1:] != array.tail or opened.shape[0] < self.rows:
                raise UserError(f"{folder} has shape {opened.shape}, which its manifest contradicts: {self._mend()}")
            self._opened[name] = opened
        return self._opened[name]

    def _read(self, name: str, regions: Sequence[Region]) -> list[np.ndarray]:
        """Regions of one array, read in one batch; UserError for what is damaged or not there."""
        return self.finish(self.begin(name, regions, [None] * len(regions)))

    def begin(self, name: str, regions: Sequence[Region], targets: Sequence[np.ndarray | None]) -> "_Reading":
        """Begin to read regions of one array in one batch, each into its target, or into a new array where it has none.
        `finish` has to follow."""
        array, futures = self._array(name), []
        with ts.Batch() as batch:
            for region, target in zip(regions, targets, strict=True):
                if target is None:
                    futures.append(array[region].read(batch=batch))
                else:
                    futures.append(ts.array(target, copy=False, write=True).write(array[region], batch=batch))
        return _Reading(name, regions, targets, futures)

    def finish(self, reading: "_Reading") -> list[np.ndarray]:
        """What was read, region by region. UserError for what is damaged or not there."""
        name, regions = reading.name, reading.regions
        spec = self.arrays[name]
        try:
            results = [future.result() for future in reading.futures]
        except ValueError as error:
            if damage := self._find_damage(name, regions):
                raise damage from error
            raise
        found = [result if target is None else target for result, target in zip(results, reading.targets, strict=True)]
        # A chunk is there wholly or not at all, so one element of each vector tells.
        if any(spec.missing(values[..., 0] if spec.sharded else values).any() for values in found):
            raise self._find_damage(name, regions) or UserError(f"{self.path / name} changed while it was read")
        return found

    def _find_damage(self, name: str, regions: Sequence[Region]) -> UserError | None:
        """Read again chunk by chunk, and name the first one that is missing or damaged."""
        array, spec, shard_rows = self._array(name), self.arrays[name], self.spec.shard_rows
        step = block_rows(shard_rows) if spec.sharded else shard_rows
        for region in regions:
            layers = range(len(self.spec.layers))[region[1]] if spec.sharded else [None]
            for start in range(region[0].start // step * step, region[0].stop, step):
                stop = min(start + step, self.rows)
                for layer in layers:
                    chunk = slice(start, stop) if layer is None else (slice(start, stop), layer)
                    try:
                        missing = spec.missing(array[chunk].read().result()).any()
                        reason = "missing" if missing else None
                    except ValueError as error:
                        reason = f"damaged: {reason_of(error)}"
                    if reason:
                        file = self.path / chunk_file(name, spec, start // shard_rows)
                        at = "" if layer is None else f" of layer {self.spec.layers[layer]}"
                        return UserError(f"{file}: rows {start} to {stop - 1}{at} are {reason}; {self._mend()}")
        return None

    def _mend(self) -> str:
        return f"restore it from a copy, or delete {self.path} and capture it again"


class ActivationStore:
    """All published rows of a store: one part, or the parts of several writers end to end.

    Rows are numbered from 0 in the order of the parts; the column `sample` counts through all parts. A store whose
    capture is unfinished can be read as far as it is published (`complete` is False then); what is published later
    is seen by opening it again.
    """

    def __init__(self, path: Path, parts: Sequence[StorePart]) -> None:
        self.path = path
        self.parts = tuple(parts)
        first = parts[0].spec
        self.site: str = first.site
        self.layers: tuple[int, ...] = first.layers
        self.d_model: int = first.d_model
        self.n_layers: int = int(first.model["n_layers"])
        self.dtype: str = first.dtype
        self.model: dict[str, Any] = first.model
        self.block_rows: int = block_rows(first.shard_rows)  # the unit of reading: a row costs its whole block
        self.row_starts = np.cumsum([0, *(part.rows for part in parts)])
        self.sample_starts = np.cumsum([0, *(part.n_samples for part in parts)])
        self.rows = int(self.row_starts[-1])
        self.complete: bool = all(part.manifest["complete"] for part in parts)
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: Path | str) -> "ActivationStore":
        """UserError where there is no store, a manifest cannot be used, or the set of parts is not whole or not one."""
        path = Path(path)
        return cls(path, [StorePart(folder) for folder in part_folders(path)])._checked()

    def _checked(self) -> "ActivationStore":
        first = self.parts[0]
        for part in self.parts[1:]:
            for field, here, there in differences(first.spec.as_json(), part.spec.as_json()):
                if field not in PART_FIELDS:
                    raise UserError(
                        f"{part.path} is no part of the same store as {first.path}: {field} is {brief(there)}, "
                        f"there {brief(here)}; capture both with the same options"
                    )
        return self

    @property
    def manifest(self) -> dict[str, Any]:
        """The first part's manifest; its specification holds for all but PART_FIELDS."""
        return self.parts[0].manifest

    @property
    def manifests(self) -> list[dict[str, Any]]:
        return [part.manifest for part in self.parts]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Records of all published samples; the column `sample` indexes them."""
        return [record for part in self.parts for record in part.samples]

    def image_path(self, sample: int) -> Path | None:
        """Where the image of a sample lies: as recorded if absolute, else within its part's folder."""
        part = int(np.searchsorted(self.sample_starts, sample, side="right")) - 1
        image = self.samples[sample].get("image")
        return None if image is None else self.parts[part].path / image

    def column(self, name: str) -> np.ndarray:
        """[rows] one of COLUMNS, read-only."""
        if name not in COLUMNS:
            raise KeyError(f"{name} is none of the columns {', '.join(COLUMNS)}")
        if name not in self._columns:
            pieces = [part.read_small(name, 0, part.rows) for part in self.parts]
            if name == "sample":
                pieces = [piece + start for piece, start in zip(pieces, self.sample_starts[:-1], strict=True)]
            whole = np.concatenate(pieces).astype(COLUMNS[name], copy=False)
            whole.flags.writeable = False
            self._columns[name] = whole
        return self._columns[name]

    def norms(self, which: str) -> np.ndarray:
        """[rows, layers] float32 L2 norm of every stored vector, layers as in `self.layers`."""
        return np.concatenate([part.read_small(f"{part.name(which)}_norm", 0, part.rows) for part in self.parts])

    def norm_pieces(self, which: str) -> Iterator[np.ndarray]:
        """`norms` shard by shard, in order: all of them take gigabytes where rows and layers are many."""
        for part in self.parts:
            step = part.spec.shard_rows
            for start in range(0, part.rows, step):
                yield part.read_small(f"{part.name(which)}_norm", start, min(start + step, part.rows))

    @cached_property
    def split(self) -> np.ndarray:
        """[rows] uint8: the row's split as its place in SPLITS (0 train, 1 val, 2 test)."""
        codes = np.array([SPLITS.index(record["split"]) for record in self.samples], np.uint8)
        return codes[self.column("sample")]

    def rows_of(self, split: str) -> np.ndarray:
        """Row numbers (int64, ascending) of "train", "val" or "test"."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows [N] lie on the disk: row numbers, if every part ended with a whole block. Those of one block are
        the places with one quotient by `block_rows`."""
        whole = [-(-part.rows // self.block_rows) * self.block_rows for part in self.parts]
        part = np.searchsorted(self.row_starts, rows, "right") - 1
        return rows - self.row_starts[part] + np.append(0, np.cumsum(whole))[part]

    def axis_of(self, layers: Sequence[int]) -> list[int]:
        """Places of `layers` on axis 1 of the arrays. UserError for a layer that was not captured."""
        places = {layer: place for place, layer in enumerate(self.layers)}
        if unknown := [layer for layer in layers if layer not in places]:
            raise UserError(f"layer {unknown[0]} is not in {self.path}, which holds layers {brief(self.layers)}")
        return [places[layer] for layer in layers]

    def check_trained_on(self, what: Path, site: str, model: Mapping[str, Any]) -> None:
        """UserError where this store holds another model's activations, or another site's, than `what` was trained on.
        What is not known of that model (an imported CLT's) is not compared."""
        for name, was, here in differences(
            {"site": site, "model": dict(model)}, {"site": self.site, "model": self.model}
        ):
            if was is not None:
                raise UserError(f"{what} was trained on a store with {name} {was}, but {self.path} has {here}")

    def read(self, which: str, rows: np.ndarray | slice, layers: Sequence[int]) -> np.ndarray:
        """[len(rows), len(layers), d] of "site" or "mlp_out" in the order asked for; the stored type, int8 as float32.

        Reads the blocks (`block_rows` rows of one layer) that the rows touch and nothing else. UserError names the
        file and the rows of a block that is damaged or missing. IndexError for rows that are not there.
        """
        packed = self.read_packed(which, rows, layers)
        return unpack(packed) if self.dtype == "int8" else packed

    def packed_shape(self, rows: int, layers: Sequence[int]) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of what `read_packed` returns."""
        dtype = DTYPES[self.dtype]
        return (rows, len(layers), self.d_model + (SCALE_BYTES if self.dtype == "int8" else 0)), dtype

    def read_packed(
        self, which: str, rows: np.ndarray | slice, layers: Sequence[int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """As `read`, but int8 as it is stored: [len(rows), len(layers), d + 4] int8, the codes of a vector and then the
        bytes of its float32 scale (store_format.unpack).

        out: memory to read into, of `packed_shape`; new memory costs a page fault for every page.
        """
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.rows))
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store with {self.rows}")
        if out is None:
            out = np.empty(*self.packed_shape(len(rows), layers))
        name, runs = self.parts[0].name(which), list(_runs(self.axis_of(layers)))
        self._read_into(out[..., : self.d_model], name, rows, runs)
        if self.dtype == "int8":
            scales = np.empty(out.shape[:2], np.float32)
            self._read_into(scales, f"{name}_scale", rows, runs)
            out[..., self.d_model :] = scales[..., None].view(np.int8)
        return out

    def _read_into(self, out: np.ndarray, name: str, rows: np.ndarray, runs: list[tuple[slice, slice]]) -> None:
        """Rows of an array by row and layer, at the runs of layers that `_runs` gives, into `out`.

        While one group of blocks is decoded, the next is read from the disk.
        """
        order = None if np.all(rows[1:] >= rows[:-1]) else np.argsort(rows, kind="stable")
        ascending = rows if order is None else rows[order]
        budget = _READ_BYTES // max(1, 4 * out.shape[1] * self.d_model)
        begun: deque[tuple[StorePart, _Reading, list[_Placement]]] = deque()

        def finish_first() -> None:
            part, reading, placements = begun.popleft()
            for values, (wanted, places, local) in zip(part.finish(reading), placements, strict=True):
                if local is not None:
                    _place(out, wanted, places, values, local)

        try:
            for part, first in zip(self.parts, self.row_starts[:-1], strict=True):
                begin, end = np.searchsorted(ascending, [first, first + part.rows])
                local = ascending[begin:end] - first
                for group in _groups(local, self.block_rows, budget):
                    regions: list[Region] = []
                    targets: list[np.ndarray | None] = []
                    placements: list[_Placement] = []
                    for a, b in group:
                        for c, d, whole in _stretches(local, a, b):
                            start, stop = int(local[c]), int(local[d - 1]) + 1
                            wanted = slice(begin + c, begin + d) if order is None else order[begin + c : begin + d]
                            for places, axis in runs:
                                direct = whole and isinstance(wanted, slice)
                                regions.append((slice(start, stop), axis))
                                targets.append(out[wanted, places] if direct else None)
                                placements.append((wanted, places, None if direct else local[c:d] - start))
                    begun.append((part, part.begin(name, regions, targets), placements))
                    if len(begun) > 1:
                        finish_first()
            while begun:
                finish_first()
        finally:  # of an error: nothing is written to `out` once it is raised
            for _, reading, _ in begun:
                for future in reading.futures:
                    future.exception()

    def stats(self) -> Stats:
        """Statistics over the published `train` rows of all parts. UserError where there are none."""
        found = self.summary()
        if found.site.count == 0:
            raise UserError(f"{self.path} has no train rows, so no statistics: capture more samples")
        return found

    def summary(self) -> Stats:
        """As `stats`, with NaN where there are no `train` rows."""
        found = {}
        for which in ("site", "mlp_out"):
            moments = self.moments(which)
            found[which] = summarise(moments, self._outliers(which, moments))
        return Stats(**found)

    def moments(self, which: str) -> Moments:
        """Moments of "site" or "mlp_out" over the published `train` rows of all parts, float64, by modality."""
        found = Moments.zeros(len(self.layers), self.d_model)
        for part in self.parts:
            found.merge(part.moments()[which])
        return found

    def _outliers(self, which: str, moments: Moments) -> np.ndarray:
        """[L, M] by layer and modality: counted by the writer, or here where parts have a mean norm in common."""
        if len(self.parts) == 1 and self.complete:
            return self.parts[0].statistics()[f"{self.parts[0].name(which)}.outliers"]
        train = self.split == SPLITS.index("train")
        return count_outliers(self.norms(which), self.column("modality"), train, outlier_threshold(moments))


def _place(out: np.ndarray, wanted: slice | np.ndarray, places: slice, values: np.ndarray, rows: np.ndarray) -> None:
    """out[wanted, places] = values[rows] where `rows` ascend from 0 to the last of `values`; one copy if possible."""
    if len(rows) == len(values) and np.all(np.diff(rows) == 1):
        out[wanted, places] = values
    elif isinstance(wanted, slice) and places == slice(0, out.shape[1]):
        np.take(values, rows, axis=0, out=out[wanted], mode="clip")  # any other mode buffers
    else:
        out[wanted, places] = values[rows]


def _stretches(rows: np.ndarray, a: int, b: int) -> Iterator[tuple[int, int, bool]]:
    """Cut places a..b of ascending `rows` where rows are left out, unless the pieces would be short: (begin, end,
    whether all rows between the first and the last are there, once)."""
    cuts = np.flatnonzero(np.diff(rows[a:b]) != 1) + a + 1
    if (len(cuts) + 1) * _FEWEST_ROWS > b - a and len(cuts):
        yield a, b, False
        return
    for c, d in pairwise([a, *cuts.tolist(), b]):
        yield c, d, True


def _runs(axis: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut places on the layer axis into ascending runs: (where in the result, slice of the axis)."""
    start = 0
    for i in range(1, len(axis) + 1):
        if i == len(axis) or axis[i] != axis[i - 1] + 1:
            yield slice(start, i), slice(axis[start], axis[i - 1] + 1)
            start = i


def _groups(rows: np.ndarray, block: int, budget: int) -> Iterator[list[tuple[int, int]]]:
    """Cut ascending `rows` into spans a..b (of its indices) over adjacent blocks; a group reads about `budget` rows."""
    if not len(rows):
        return
    blocks = rows // block
    longest = max(1, budget // block)
    cut = (np.diff(blocks) > 1) | (np.diff(blocks // longest) > 0)
    ends = [*(np.flatnonzero(cut) + 1).tolist(), len(rows)]
    group, read, a = [], 0, 0
    for b in ends:
        size = int(rows[b - 1] - rows[a]) + 1
        if group and read + size > budget:
            yield group
            group, read = [], 0
        group.append((a, b))
        read, a = read + size, b
    yield group


def part_folders(path: Path) -> list[Path]:
    """The folders with a manifest that make up the store at `path`. UserError where there is none or not every part."""
    numbers: dict[int, dict[int, Path]] = {}
    for folder in path.glob("part-*-of-*"):
        if found := PART_NAME.fullmatch(folder.name):
            numbers.setdefault(int(found[2]), {})[int(found[1])] = folder
    single = (path / MANIFEST).exists()
    if not numbers and not single:
        raise UserError(f"no activation store at {path}: run `python capture/run.py --model ... --out {path}` first")
    if single + len(numbers) > 1:
        kinds = ["a whole store"] * single + [f"parts of {n}" for n in sorted(numbers)]
        raise UserError(f"{path} holds {' and '.join(kinds)}: move all but one set elsewhere")
    if single:
        return [path]
    [(n, parts)] = numbers.items()
    missing = [i for i in range(1, n + 1) if i not in parts or not (parts[i] / MANIFEST).exists()]
    if missing:
        names = ", ".join(f"{i} of {n}" for i in missing)
        raise UserError(f"{path} lacks part {names}: run the capture with --shard {missing[0]}/{n} as well")
    return [parts[i] for i in range(1, n + 1)]


def reason_of(error: ValueError) -> str:
    """The telling end of a message of tensorstore's."""
    return str(error).split(" [")[0].rsplit('": ', 1)[-1]
