"""Writing, being killed while writing, and going on: the same bytes, and nothing published is touched or lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.store_format import MANIFEST, block_rows, part_folder
from cltjax.store_writer import Rows, StoreWriter
from store_cases import Case, contents, feed, make_case, write

STEPS = ("_append_samples", "_write_statistics", "_write_manifest", "_publish_as", "_finalise", "_resized")


@pytest.fixture(scope="module")
def case() -> Case:
    found = make_case()
    assert found.rows // found.spec.shard_rows >= 3 and found.rows % found.spec.shard_rows
    return found


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted capture."""
    path = tmp_path_factory.mktemp("whole") / "store"
    write(path, case)
    return contents(path)


def wait_for(writer: StoreWriter, rows: int) -> None:
    """Until the background thread has published `rows`."""
    deadline = time.monotonic() + 60
    while writer.rows < rows:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def break_at(monkeypatch: pytest.MonkeyPatch, step: str, call: int, when: str, error: BaseException) -> None:
    """Let the writer fail at the given call of one of its steps, before or after doing it."""
    real, calls = getattr(StoreWriter, step), [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            raise error
        result = real(*args, **kwargs)
        if calls[0] == call:
            raise error
        return result

    monkeypatch.setattr(StoreWriter, step, broken)


def published_files(path: Path) -> dict[str, tuple[int, int]]:
    """Shard files that the manifest vouches for: inode and time of the last change."""
    store = ActivationStore.open(path)
    shards = store.rows // store.parts[0].spec.shard_rows
    found = {}
    for file in path.glob("*/c/**/*"):
        if file.is_file() and int(file.relative_to(path).parts[2]) < shards:
            found[str(file)] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 3])
def test_broken_off_at_any_step_and_resumed_is_the_same(
    case: Case, whole: dict[str, bytes], tmp_path: Path, step: str, when: str, call: int
) -> None:
    if call == 3 and step == "_finalise":
        pytest.skip("finalised once")
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_at(monkeypatch, step, call, when, RuntimeError("killed"))
        with pytest.raises(RuntimeError, match="killed"):
            write(tmp_path / "s", case)
    before = published_files(tmp_path / "s") if (tmp_path / "s" / MANIFEST).exists() else {}
    write(tmp_path / "s", case)
    assert contents(tmp_path / "s") == whole
    assert before.items() <= published_files(tmp_path / "s").items()


def test_stopped_after_every_batch_is_the_same(case: Case, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Abandoned again and again, with shards half filled and some of them written beyond what was published."""
    seen: dict[str, tuple[int, int]] = {}
    shard, runs = case.spec.shard_rows, 0
    for stop in range(1, len(case.batches) + 1):
        with StoreWriter(tmp_path, case.spec, case.rows) as writer:
            feed(writer, case, stop)
            wait_for(writer, sum(len(rows.columns["sample"]) for rows, _, _ in case.batches[:stop]) // shard * shard)
        files = published_files(tmp_path)
        assert seen.items() <= files.items()
        seen, runs = files, runs + 1
        for name in ("mlp_in/c/99/0/0", "sample/c/98", "mlp_out/c/97/0/0.__lock", "stats-7.safetensors"):  # a kill's
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"left over")
        with (tmp_path / "samples.jsonl").open("ab") as file:
            file.write(b'{"half a')
    write(tmp_path, case)
    assert contents(tmp_path) == whole
    assert seen.items() <= published_files(tmp_path).items()


@pytest.mark.parametrize(("step", "call"), [("_append_samples", 2), ("_write_manifest", 3), ("_publish_as", 3)])
def test_a_dead_process_leaves_nothing_in_the_way(
    case: Case, whole: dict[str, bytes], tmp_path: Path, step: str, call: int
) -> None:
    script = f"""
import os, pathlib
from cltjax.store_writer import StoreWriter
from store_cases import make_case, write
real, calls = StoreWriter.{step}, [0]
def dying(*args, **kwargs):
    calls[0] += 1
    return os._exit(9) if calls[0] == {call} else real(*args, **kwargs)
StoreWriter.{step} = dying
write(pathlib.Path({str(tmp_path)!r}), make_case())
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == 9
    write(tmp_path, case)
    assert contents(tmp_path) == whole


def test_resume_says_where_to_go_on(tmp_path: Path) -> None:
    case = make_case(samples_by_batch=(2, 2, 2), shard_rows=5, longest=7)
    ends = np.cumsum([len(rows.columns["sample"]) for rows, _, _ in case.batches])
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        assert writer.resume is None and not writer.complete
        feed(writer, case, 2)
        wait_for(writer, ends[1] // 5 * 5)
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        rows = int(ends[1] // 5 * 5)
        batch = int(np.searchsorted(ends, rows, side="right"))
        assert writer.resume is not None and not writer.complete
        assert (writer.resume["batch"], writer.resume["rows_done"]) == (batch, rows)
        assert writer.resume["first_sample"] == 2 * batch
        assert writer.resume["first_row"] == [0, *ends][batch]
        with pytest.raises(ValueError, match="batch"):
            writer.append(*case.batches[batch - 1])


def test_a_complete_store_is_left_alone(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        assert writer.complete and writer.rows == case.rows
        with pytest.raises(ValueError, match="finished"):
            writer.append(*case.batches[-1])
        writer.finish()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == files


def test_a_reader_sees_published_rows_only(case: Case, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        store = ActivationStore.open(tmp_path)
        assert store.rows == 0 and store.samples == [] and not store.complete
        with pytest.raises(UserError, match="no train rows"):
            store.stats()
        feed(writer, case, 5)
        wait_for(writer, 46)
        store = ActivationStore.open(tmp_path)
        assert store.rows % 23 == 0 and store.rows >= 46 and not store.complete
        assert len(store.samples) == store.column("sample")[-1] + 1
        np.testing.assert_array_equal(store.read("site", slice(None), (4,)), case.values("site")[: store.rows, 2:])
        with pytest.raises(IndexError):
            store.read("site", np.array([store.rows]), (1,))
        assert store.stats().site.count == len(store.rows_of("train"))


def test_append_does_not_wait_for_the_disk_but_memory_is_bounded(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, real = threading.Event(), StoreWriter._publish

    def slow(writer: StoreWriter, shard: Any) -> None:
        assert let_go.wait(60)
        real(writer, shard)

    monkeypatch.setattr(StoreWriter, "_publish", slow)
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        appended: list[int] = []

        def work() -> None:
            for batch in case.batches:
                writer.append(*batch)
                appended.append(batch[2])

        thread = threading.Thread(target=work)
        thread.start()

        def taken() -> int:
            return sum(len(case.batches[i][0].columns["sample"]) for i in appended)

        deadline = time.monotonic() + 60
        while taken() < 23:
            assert time.monotonic() < deadline, "append waited for the disk"
            time.sleep(0.002)
        time.sleep(0.2)
        assert writer.rows == 0
        assert taken() <= 3 * 23 < case.rows, "append took more than its buffers hold"
        let_go.set()
        thread.join()
        writer.finish()
    store = ActivationStore.open(tmp_path)
    np.testing.assert_array_equal(store.read("site", slice(None), (1, 3, 4)), case.values("site"))


def test_the_caller_may_use_its_arrays_again(case: Case, whole: dict[str, bytes], tmp_path: Path) -> None:
    with StoreWriter(tmp_path, case.spec, case.rows + 5) as writer:
        for rows, records, number in case.batches:
            mine = Rows(rows.site.copy(), rows.mlp_out.copy(), {k: v.copy() for k, v in rows.columns.items()})
            writer.append(mine, records, number)
            for array in (mine.site, mine.mlp_out, *mine.columns.values()):
                array[...] = 1
        writer.finish()
    assert contents(tmp_path) == whole


# Faults outside the program


@pytest.mark.parametrize("step", ["_append_samples", "_write_statistics", "_write_manifest"])
@pytest.mark.parametrize("call", [2, 4])
def test_disk_full_in_any_step(case: Case, whole: dict[str, bytes], tmp_path: Path, step: str, call: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        break_at(monkeypatch, step, call, "before", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(UserError, match=r"disk is full.* rows are published and safe; free some space") as found:
            write(tmp_path, case)
    assert "\n" not in str(found.value)
    assert f"{ActivationStore.open(tmp_path).rows} rows" in str(found.value)
    write(tmp_path, case)
    assert contents(tmp_path) == whole


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a small tmpfs: what is published is safe and readable, and the rest follows once there is room."""
    case = make_case(shard_rows=64, samples_by_batch=(4,) * 10, d=257)
    write(tmp_path / "reference", case)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(UserError, match="disk is full") as found:
            write(disk / "store", case)
        store = ActivationStore.open(disk / "store")
        assert f"{store.rows} rows" in str(found.value) and 0 < store.rows < case.rows
        np.testing.assert_array_equal(store.read("site", slice(None), (1, 3, 4)), case.values("site")[: store.rows])
        before = published_files(disk / "store")
        with pytest.raises(UserError, match="disk is full"):
            write(disk / "store", case)
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        write(disk / "store", case)
        assert contents(disk / "store") == contents(tmp_path / "reference")
        assert before.items() <= published_files(disk / "store").items()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": "USER: <image>"}, r'template = "<image>", now it is "USER: <image>"'),
        ({"site": "resid_mid"}, r'site = "mlp_in", now it is "resid_mid"'),
        ({"dtype": "int8"}, r'dtype = "bfloat16", now it is "int8"'),
        ({"shard_rows": 29}, r"shard_rows = 23, now it is 29"),
        ({"layers": (0, 1, 2)}, r"layers = \[1, 3, 4\], now it is \[0, 1, 2\]"),
        ({"options": {"generate": 5, "batch_size": 4}}, r"options.generate = 0, now it is 5"),
        ({"options": {"generate": 0, "batch_size": 4, "seed": 1}}, r"options.seed = null, now it is 1"),
        (
            {"model": {"id": "other", "revision": None, "class": "c", "n_layers": 7, "d_model": 11}},
            r'model.id = "m", now it is "other"',
        ),
    ],
)
def test_another_specification_is_refused_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    StoreWriter(tmp_path, make_case().spec, 100).close()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        StoreWriter(tmp_path, make_case(**change).spec, 100)
    assert contents(tmp_path) == before
    StoreWriter(tmp_path, make_case().spec, 100).close()  # the refused writer holds no lock


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "not the manifest of an activation store"),
        (b'{"format": "cltjax activation store", "format_version": 2}', "format version 2"),
        (b'{"format": "cltjax activation store", "format_version": 1}', "lacks 'model'"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, manifest: bytes, said: str) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest)
    for use in (ActivationStore.open, lambda path: StoreWriter(path, make_case().spec, 100)):
        with pytest.raises(UserError, match=said):
            use(tmp_path)
    assert contents(tmp_path) == {MANIFEST: manifest}


def test_a_manifest_with_a_field_of_the_wrong_kind(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for field, value in [("rows", "7"), ("samples", None)]:
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {field: value}))
        with pytest.raises(UserError, match="manifest.json"):
            ActivationStore.open(tmp_path)


def test_what_is_no_store_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mlp_out").mkdir()
    with pytest.raises(UserError, match=r"has no manifest.json but has 'mlp_out'"):
        StoreWriter(tmp_path, make_case().spec, 100)


def test_two_writers_on_one_folder(case: Case, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, case.spec, 100), pytest.raises(UserError, match="another capture is writing"):
        StoreWriter(tmp_path, case.spec, 100)


def test_whole_stores_and_parts_do_not_mix(case: Case, tmp_path: Path) -> None:
    StoreWriter(part_folder(tmp_path / "p", 1, 2), case.spec, 100).close()
    with pytest.raises(UserError, match="part-1-of-2"):
        StoreWriter(tmp_path / "p", case.spec, 100)
    with pytest.raises(UserError, match="same number of parts"):
        StoreWriter(part_folder(tmp_path / "p", 1, 3), case.spec, 100)
    StoreWriter(tmp_path / "w", case.spec, 100).close()
    with pytest.raises(UserError, match="whole store already"):
        StoreWriter(part_folder(tmp_path / "w", 1, 3), case.spec, 100)


@pytest.mark.parametrize("name", ["site", "mlp_out"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, name: str, dtype: str, value: float) -> None:
    case = make_case(dtype, brought=np.float32, splits=("test",))
    rows = case.batches[4][0]
    getattr(rows, name)[3, 1, 7] = value
    sample, position = rows.columns["sample"][3], rows.columns["position"][3]
    array = "mlp_in" if name == "site" else name
    said = rf"{array} of layer 3 at sample {sample} \(id s{sample}\), position {position} is not finite"
    with pytest.raises(UserError, match=said):
        write(tmp_path, case)
    store = ActivationStore.open(tmp_path)
    assert store.rows <= sum(len(case.batches[i][0].columns["sample"]) for i in range(4)) + 3
    assert np.isfinite(store.read(name, slice(None), (1, 3, 4)).astype(np.float32)).all()


def test_what_does_not_fit_the_type_is_refused(tmp_path: Path) -> None:
    case = make_case("float16", brought=np.float32)
    case.batches[0][0].mlp_out[0, 2, 5] = 1e5
    with pytest.raises(UserError, match=r"mlp_out of layer 4 .* does not fit float16: capture with another --dtype"):
        write(tmp_path, case)


def test_rows_the_recorder_must_not_bring(case: Case, tmp_path: Path) -> None:
    rows, records, number = case.batches[0]
    with StoreWriter(tmp_path, case.spec, 10_000) as writer:
        faults = [("sample", 3, "not ascending"), ("token_id", -1, "negative"), ("modality", 3, "above 2")]
        for column, value, said in faults:
            wrong = rows.columns[column].copy()
            wrong[len(wrong) // 2] = value
            with pytest.raises(ValueError, match=said):
                writer.append(Rows(rows.site, rows.mlp_out, rows.columns | {column: wrong}), records, number)
        with pytest.raises(ValueError, match="shape"):
            writer.append(Rows(rows.site[:, :2], rows.mlp_out[:, :2], rows.columns), records, number)
        with pytest.raises(ValueError, match="split"):
            writer.append(rows, [record | {"split": "held out"} for record in records], number)
        feed(writer, case)
        writer.finish()
    assert ActivationStore.open(tmp_path).rows == case.rows


def test_more_rows_than_made_for(case: Case, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, case.spec, 30) as writer, pytest.raises(ValueError, match="made for 30"):
        feed(writer, case)


def test_nothing_to_capture(tmp_path: Path) -> None:
    case = make_case(samples_by_batch=(2,), longest=0)
    write(tmp_path, case)
    store = ActivationStore.open(tmp_path)
    assert (store.rows, len(store.samples), store.complete) == (0, 2, True)
    assert store.read("mlp_out", slice(None), (3,)).shape == (0, 1, 11)
    assert store.column("token_id").shape == (0,) and store.norms("site").shape == (0, 3)


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("int8", 1)])
def test_bytes_on_disk_a_token(tmp_path: Path, dtype: str, itemsize: int) -> None:
    """2 x layers x width x itemsize and under 1 % more, statistics and sample records (which do not grow so) aside."""
    layers, d, shards = tuple(range(5)), 1024, 2
    case = make_case(dtype, 256, (1,) * 60, d=d, layers=layers, longest=20)
    rows = shards * 256
    assert case.rows > rows
    with StoreWriter(tmp_path, case.spec, case.rows) as writer:
        feed(writer, case)
        wait_for(writer, rows)
    size = sum(file.stat().st_size for file in tmp_path.glob("*/c/**/*") if file.is_file())
    assert 1 <= size / (rows * 2 * len(layers) * d * itemsize) < 1.01


def test_block_rows() -> None:
    sizes = {1: 1, 23: 23, 127: 127, 128: 128, 256: 128, 1000: 125, 4096: 128, 131: 1, 262: 2, 141: 47}
    assert {shard_rows: block_rows(shard_rows) for shard_rows in sizes} == sizes
