"""Writing an activation store: whole shards on a background thread, each published before the next.

    with StoreWriter(path, spec, capacity) as writer:
        for batch in batches[writer.resume["batch"] if writer.resume else 0 :]:
            writer.append(rows, records, batch)
        writer.finish()

The order that makes a kill harmless: a shard's arrays, then its lines of samples.jsonl, then the statistics so far
under a name of their own, then the manifest, moved into place, which publishes them all. What a killed writer left
beyond the manifest is removed when the capture goes on. Nothing in a file depends on when, or in how many runs, it was
written.
"""

import errno
import json
import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorstore as ts
from safetensors.numpy import save as save_safetensors

from cltjax.errors import UserError
from cltjax.files import Lock, write_json, write_whole
from cltjax.statistics import N_MODALITIES, Moments, measure_layer
from cltjax.store import PART_NAME, ActivationStore, StorePart
from cltjax.store_format import (
    COLUMNS,
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    SAMPLES,
    SPLIT_RULE,
    SPLITS,
    STATISTICS,
    StoreSpec,
    array_specs,
    brief,
    chunk_file,
    crc32_of,
    dequantise,
    differences,
    quantise,
)

_BUFFERS = 3  # shards in memory: one being filled, one waiting, one being written
_TEMPORARY = re.compile(r"stats(-\d+)?\.safetensors|\.(stats(-\d+)?\.safetensors|manifest\.json)\.tmp")


@dataclass(frozen=True)
class Rows:
    """Consecutive rows as the recorder hands them over; L = captured layers."""

    site: np.ndarray  # [n, L, d] float32, float16 or bfloat16
    mlp_out: np.ndarray  # [n, L, d], the same type
    columns: dict[str, np.ndarray]  # each of COLUMNS, [n]


class _Buffer:
    """Room for one shard in the types the recorder brings."""

    def __init__(self, spec: StoreSpec, dtype: np.dtype) -> None:
        shape = (spec.shard_rows, len(spec.layers), spec.d_model)
        self.site, self.mlp_out = np.empty(shape, dtype), np.empty(shape, dtype)
        self.columns = {name: np.empty(spec.shard_rows, kind) for name, kind in COLUMNS.items()}
        self.train = np.empty(spec.shard_rows, bool)
        self.rows = 0

    def take(self, rows: Rows, train: np.ndarray, start: int) -> int:
        """Copy rows from number `start` on as far as there is room; how many fitted."""
        source = slice(start, start + len(self.train) - self.rows)
        count = len(train[source])
        room = slice(self.rows, self.rows + count)
        self.site[room], self.mlp_out[room] = rows.site[source], rows.mlp_out[source]
        for name, column in self.columns.items():
            column[room] = rows.columns[name][source]
        self.train[room] = train[source]
        self.rows += count
        return count


@dataclass(frozen=True)
class _Sample:
    line: bytes
    name: str
    train: bool


@dataclass(frozen=True)
class _Shard:
    """What the background thread publishes in one go."""

    buffer: _Buffer
    samples: dict[int, _Sample]  # whose records may be needed to name a sample of this shard
    n_samples: int  # records published once this shard is
    resume: dict[str, int]


@dataclass(frozen=True)
class _Published:
    """How far the store is: what the manifest says besides the specification."""

    rows: int = 0
    samples: int = 0
    samples_bytes: int = 0
    samples_crc32: int = 0
    statistics: dict[str, Any] | None = None
    complete: bool = False
    resume: dict[str, int] | None = None


_START = _Published(resume={"batch": 0, "first_sample": 0, "first_row": 0})


class StoreWriter:
    """Writes one part of a store, or goes on with one that an earlier run left unfinished.

    path: the part's folder. spec: what the store is; a store of another specification there is a UserError that names
    the field. capacity: an upper bound of the rows to come.

    resume: None for a store without published rows, else
        batch          the first batch that has to be appended; the recorder recomputes it wholly
        first_sample   number of that batch's first sample
        first_row      number of that batch's first row; the writer itself drops those already published
        rows_done      rows published
        samples_written  sample records published
    complete: an earlier run finished the store; there is nothing to append.

    A failure on the background thread (a full disk, an activation that is not finite) is raised by the next `append`
    or by `finish`, and what is published stays published.
    """

    def __init__(self, path: Path, spec: StoreSpec, capacity: int) -> None:
        self._path, self._spec = Path(path), spec
        self._arrays = array_specs(spec)
        self._published = _START  # replaced by the background thread
        self.resume: dict[str, int] | None = None
        self._capacity = capacity
        self._failure: BaseException | None = None
        self._stopped = False
        self._lock: Lock | None = None
        with self._explained("opening"):
            _refuse_mixture(self._path)
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self._path, "another capture")
            try:
                self._start()
            except BaseException:
                self._unlock()
                raise

    @property
    def rows(self) -> int:
        """Rows published so far; all of them once `finish` has returned."""
        return self._published.rows

    @property
    def complete(self) -> bool:
        return self._published.complete

    def append(self, rows: Rows, samples: Sequence[dict[str, Any]], batch: int) -> None:
        """All rows of one batch and the records of its samples; returns before they are on disk.

        Samples are numbered through the store in the order they come, and the column `sample` refers to these numbers,
        ascending. A record needs "split" (train, val or test) and should have "id". The arrays may be used again
        afterwards. Batches come in ascending order, from `resume["batch"]` on.
        """
        self._raise_failure()
        if self.complete or self._lock is None:
            raise ValueError("the store is finished or closed")
        if batch < self._next_batch:
            raise ValueError(f"batch {batch} where batch {self._next_batch} or a later one should come")
        first_sample, first_row = self._next_sample, self._next_row
        train = self._check(rows, samples, first_sample)
        end_row, end_sample = first_row + len(train), first_sample + len(samples)
        if end_row > self._capacity:
            raise ValueError(f"{end_row} rows in a store made for {self._capacity}")
        for number, record in enumerate(samples, first_sample):
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            self._pending[number] = _Sample(line, str(record.get("id", number)), record["split"] == "train")
        taken = max(0, self._filled_to - first_row)  # published by an earlier run
        if taken < len(train) and self._filling is None and self._filled_to % self._spec.shard_rows:
            raise ValueError("rows after the last shard: an earlier run had appended all there are")
        while taken < len(train):
            buffer = self._filling or self._free_buffer(rows.site.dtype)
            self._filling = buffer
            taken += buffer.take(rows, train, taken)
            self._filled_to = first_row + taken
            if buffer.rows == self._spec.shard_rows:
                if taken < len(train):
                    n_samples = int(rows.columns["sample"][taken - 1]) + 1
                    cursor = {"batch": batch, "first_sample": first_sample, "first_row": first_row}
                else:
                    n_samples = end_sample
                    cursor = {"batch": batch + 1, "first_sample": end_sample, "first_row": end_row}
                self._hand_over(n_samples, cursor)
        self._next_batch, self._next_sample, self._next_row = batch + 1, end_sample, end_row

    def finish(self) -> None:
        """Publish the last, short shard, write the statistics, and declare the store complete."""
        self._raise_failure()
        if self.complete:
            return
        if self._next_row < self._filled_to:
            raise ValueError(f"{self._next_row} rows were appended where {self._filled_to} were published before")
        end = {"batch": self._next_batch, "first_sample": self._next_sample, "first_row": self._next_row}
        if self._filling is not None:
            self._hand_over(self._next_sample, end)
        self._join()
        self._raise_failure()
        with self._explained("finishing"):
            self._finalise(end)
        self._unlock()

    def close(self) -> None:
        """Stop without publishing what is not yet published. Nothing to do after `finish`."""
        self._stopped = True
        self._join()
        self._unlock()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Opening

    def _start(self) -> None:
        if (self._path / MANIFEST).exists():
            self._resume()
        else:
            if found := [name for name in self._arrays if (self._path / name).exists()]:
                raise UserError(
                    f"{self._path} has no {MANIFEST} but has '{found[0]}': it is no store, or a damaged one; "
                    "delete it or choose another folder"
                )
            self._moments = self._no_moments()
            self._publish_as(_START)
        self._clean()
        cursor = self._published.resume or {}
        self._next_batch, self._next_sample = cursor.get("batch", 0), cursor.get("first_sample", 0)
        self._next_row, self._filled_to = cursor.get("first_row", 0), self.rows
        self._filling: _Buffer | None = None
        self._pending: dict[int, _Sample] = {}
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._buffers = 0
        self._shards: queue.SimpleQueue[_Shard | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if not self.complete:
            self._open = {name: self._open_array(name) for name in self._arrays}
            self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "store-statistics")
            self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
            self._thread.start()

    def _resume(self) -> None:
        part = StorePart(self._path)
        for field, stored, given in differences(part.spec.as_json(), self._spec.as_json()):
            raise UserError(
                f"{self._path} was begun with {field} = {brief(stored)}, now it is {brief(given)}: "
                "use the same options to go on, or delete it or choose another folder to start afresh"
            )
        self._published = _Published(**{field: part.manifest[field] for field in PROGRESS})
        if self.complete:
            return
        self._moments = part.moments()
        samples = len(part.samples)  # read, and so checked, before anything is added
        if self.rows and self._published.resume:
            self.resume = {**self._published.resume, "rows_done": self.rows, "samples_written": samples}

    def _no_moments(self) -> dict[str, Moments]:
        return {which: Moments.zeros(len(self._spec.layers), self._spec.d_model) for which in ("site", "mlp_out")}

    def _clean(self) -> None:
        """Remove what a killed run left beyond what it published."""
        shards = -(-self.rows // self._spec.shard_rows)
        for name, array in self._arrays.items():
            kept = {self._path / chunk_file(name, array, shard) for shard in range(shards)}
            kept.add(self._path / name / "zarr.json")
            for file in (self._path / name).rglob("*"):
                if file.is_file() and file not in kept:
                    file.unlink()
        current = self._published.statistics["file"] if self._published.statistics else None
        for file in self._path.iterdir():
            if _TEMPORARY.fullmatch(file.name) and file.name != current:
                file.unlink()

    def _open_array(self, name: str) -> ts.TensorStore:
        kvstore = {"driver": "file", "path": str((self._path / name).resolve())}
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore}
        if self.rows == 0:
            spec["metadata"] = self._arrays[name].metadata(self._spec.shard_rows, self._capacity)
            return ts.open(spec, create=True, delete_existing=True).result()
        spec["metadata"] = self._arrays[name].metadata(self._spec.shard_rows)
        array = ts.open(spec, open=True).result()
        return self._resized(array, self._capacity)

    def _resized(self, array: ts.TensorStore, rows: int) -> ts.TensorStore:
        return array.resize(exclusive_max=[rows] + [None] * (array.rank - 1), resize_metadata_only=True).result()

    # Filling shards, on the caller's thread

    def _check(self, rows: Rows, samples: Sequence[dict[str, Any]], first_sample: int) -> np.ndarray:
        """[n] bool: which rows are `train` rows. ValueError for what no recorder should bring."""
        if missing := COLUMNS.keys() - rows.columns.keys():
            raise ValueError(f"columns {sorted(missing)} are missing")
        sample = np.asarray(rows.columns["sample"])
        shape = (len(sample), len(self._spec.layers), self._spec.d_model)
        if rows.site.shape != shape or rows.mlp_out.shape != shape:
            raise ValueError(f"activations of shape {rows.site.shape} and {rows.mlp_out.shape}, not {shape}")
        if rows.site.dtype != rows.mlp_out.dtype or rows.site.dtype not in list(DTYPES.values())[:3]:
            raise ValueError(f"activations of type {rows.site.dtype} and {rows.mlp_out.dtype}")
        for name in COLUMNS:
            column = np.asarray(rows.columns[name])
            if column.shape != sample.shape or (len(column) and column.min() < 0):
                raise ValueError(f"column {name} has shape {column.shape} or negative values")
        if len(sample):
            if rows.columns["modality"].max() >= N_MODALITIES:
                raise ValueError("a modality above 2")
            if np.any(np.diff(sample) < 0) or sample[0] < first_sample or sample[-1] >= first_sample + len(samples):
                raise ValueError(f"samples {sample[0]} to {sample[-1]}, not ascending from {first_sample}")
        if unknown := [record.get("split") for record in samples if record.get("split") not in SPLITS]:
            raise ValueError(f"split {unknown[0]!r} is none of {SPLITS}")
        train = np.array([record["split"] == "train" for record in samples], bool)
        return train[sample - first_sample] if len(sample) else np.zeros(0, bool)

    def _free_buffer(self, dtype: np.dtype) -> _Buffer:
        if self._buffers < _BUFFERS:
            self._buffers += 1
            return _Buffer(self._spec, dtype)
        buffer = self._free.get()  # waits for the disk: this is what bounds the memory
        self._raise_failure()
        buffer.rows = 0
        return buffer

    def _hand_over(self, n_samples: int, cursor: dict[str, int]) -> None:
        assert self._filling is not None
        self._shards.put(_Shard(self._filling, dict(self._pending), n_samples, cursor))
        self._filling = None
        self._pending = {number: sample for number, sample in self._pending.items() if number >= n_samples - 1}

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        if self._thread is not None:
            self._shards.put(None)
            self._thread.join()
            self._thread = None
            self._pool.shutdown()

    # Publishing, on the background thread

    def _work(self) -> None:
        while (shard := self._shards.get()) is not None:
            if self._failure is None and not self._stopped:
                try:
                    self._publish(shard)
                except BaseException as error:  # raised on the caller's thread
                    self._failure = error
            self._free.put(shard.buffer)

    def _publish(self, shard: _Shard) -> None:
        stored, moments = self._encode(shard)
        start, stop = self.rows, self.rows + shard.buffer.rows
        with self._explained(f"rows {start} to {stop - 1}"):
            futures = [self._open[name][start:stop].write(values) for name, values in stored.items()]
            failures = [error for future in futures if (error := future.exception()) is not None]
            if failures:
                raise failures[0]
            lines = [shard.samples[i].line for i in range(self._published.samples, shard.n_samples)]
            size, crc32 = self._append_samples(lines)
            for which in self._moments:
                self._moments[which].merge(moments[which])
            if self._stopped:
                return
            statistics = self._write_statistics(f"stats-{stop}.safetensors", {})
            self._publish_as(_Published(stop, shard.n_samples, size, crc32, statistics, False, shard.resume))

    def _encode(self, shard: _Shard) -> tuple[dict[str, np.ndarray], dict[str, Moments]]:
        """The shard's arrays as they are stored, and its moments. UserError where an activation is not finite."""
        buffer, spec = shard.buffer, self._spec
        columns = {name: column[: buffer.rows] for name, column in buffer.columns.items()}
        train, modality = buffer.train[: buffer.rows], columns["modality"]
        groups = [np.flatnonzero(train & (modality == m)) for m in range(N_MODALITIES)] + [np.flatnonzero(~train)]
        stored, found = dict(columns), self._no_moments()
        jobs = []
        for which, name in (("site", spec.site), ("mlp_out", "mlp_out")):
            values = getattr(buffer, which)[: buffer.rows]
            same = values.dtype == DTYPES[spec.dtype]
            stored[name] = values if same else np.empty(values.shape, DTYPES[spec.dtype])
            stored[f"{name}_norm"] = np.empty(values.shape[:2], np.float32)
            if spec.dtype == "int8":
                stored[f"{name}_scale"] = np.empty(values.shape[:2], np.float32)
            found[which].count[:] = [len(group) for group in groups[:N_MODALITIES]]
            jobs += [(name, values, found[which], layer) for layer in range(len(spec.layers))]

        def encode_layer(name: str, values: np.ndarray, moments: Moments, layer: int) -> None:
            as_stored = values[:, layer]
            if spec.dtype == "int8":
                codes, scale = quantise(as_stored)
                stored[name][:, layer], stored[f"{name}_scale"][:, layer] = codes, scale
                as_stored = dequantise(codes, scale)
            elif stored[name] is not values:
                with np.errstate(over="ignore"):
                    stored[name][:, layer] = as_stored
                as_stored = stored[name][:, layer]
            norms, of_modality = measure_layer(as_stored, groups)
            stored[f"{name}_norm"][:, layer] = norms
            if not np.isfinite(norms).all():
                row = int(np.flatnonzero(~np.isfinite(norms))[0])
                number, position = int(columns["sample"][row]), columns["position"][row]
                where = f"sample {number} (id {shard.samples[number].name}), position {position}"
                fits = np.isfinite(values[row, layer].astype(np.float32)).all()
                what = f"does not fit {spec.dtype}: capture with another --dtype" if fits else "is not finite"
                raise UserError(
                    f"{name} of layer {spec.layers[layer]} at {where} {what}; "
                    f"the {self.rows} rows published before are kept in {self._path}"
                )
            for m, (mean, m2, norm_sum) in enumerate(of_modality):
                moments.mean[m, layer], moments.m2[m, layer], moments.norm_sum[m, layer] = mean, m2, norm_sum

        for done in [self._pool.submit(encode_layer, *job) for job in jobs]:
            done.result()
        return stored, found

    def _append_samples(self, lines: Sequence[bytes]) -> tuple[int, int]:
        """Add lines to samples.jsonl; its size and checksum with them."""
        data = b"".join(lines)
        with (self._path / SAMPLES).open("ab") as file:
            file.truncate(self._published.samples_bytes)  # what a killed run wrote beyond its manifest
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return self._published.samples_bytes + len(data), crc32_of(data, self._published.samples_crc32)

    def _write_statistics(self, name: str, more: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write the moments so far and `more`; what the manifest says of the file."""
        tensors = dict(more)
        for which, array in (("site", self._spec.site), ("mlp_out", "mlp_out")):
            tensors |= self._moments[which].tensors(array)
        data = save_safetensors(tensors)
        write_whole(self._path / name, lambda temporary: temporary.write_bytes(data))
        return {"file": name, "crc32": crc32_of(data)}

    def _publish_as(self, state: _Published) -> None:
        """Move a manifest of this state into place, and drop the statistics of the state before."""
        before = self._published.statistics
        self._write_manifest(state)
        self._published = state
        if before is not None:
            (self._path / before["file"]).unlink()

    def _write_manifest(self, state: _Published) -> None:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        write_json(self._path / MANIFEST, head | self._spec.as_json() | {"split_rule": SPLIT_RULE} | asdict(state))

    def _finalise(self, end: dict[str, int]) -> None:
        """Statistics and shapes of the whole, from what is published."""
        n_samples = end["first_sample"]  # some at the end may have no rows, and be unpublished
        size, crc32 = self._append_samples([self._pending[i].line for i in range(self._published.samples, n_samples)])
        summary = ActivationStore.open(self._path).summary()
        more = summary.site.tensors(self._spec.site) | summary.mlp_out.tensors("mlp_out")
        statistics = self._write_statistics(STATISTICS, more)
        for array in self._open.values():
            self._resized(array, self.rows)
        self._publish_as(_Published(self.rows, n_samples, size, crc32, statistics, True, None))

    # Faults outside the program

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn an error of the file system into one line that says what is safe and how to go on."""
        try:
            yield
        except (OSError, ValueError) as error:
            number = _errno_of(error)
            if number is None:
                raise
            full = number in (errno.ENOSPC, errno.EDQUOT)
            raise UserError(
                f"{'the disk is full' if full else os.strerror(number)} ({self._path}, {doing}): "
                f"{self.rows} rows are published and safe; "
                f"{'free some space' if full else 'mend that'} and run the same command again to go on"
            ) from error

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _errno_of(error: Exception) -> int | None:
    """The operating system's number of an error of Python's or tensorstore's, None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _refuse_mixture(path: Path) -> None:
    """A folder is a whole store or holds the parts of one."""
    siblings = [folder for folder in path.parent.glob("part-*-of-*") if PART_NAME.fullmatch(folder.name)]
    if own := PART_NAME.fullmatch(path.name):
        if (path.parent / MANIFEST).exists():
            raise UserError(f"{path.parent} is a whole store already: choose another folder for the parts of one")
        others = [folder for folder in siblings if folder.name.rsplit("-", 1)[1] != own[2]]
        if others:
            raise UserError(f"{path.parent} has {others[0].name}: use the same number of parts or another folder")
    elif inside := [folder for folder in path.glob("part-*-of-*") if PART_NAME.fullmatch(folder.name)]:
        raise UserError(f"{path} has {inside[0].name}: capture the parts of it (--shard) or choose another folder")
