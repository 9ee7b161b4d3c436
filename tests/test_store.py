"""Reading a store: what was written comes back, what was damaged is named, parts are joined, stats are right."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from cltjax import store as store_module
from cltjax.errors import UserError
from cltjax.store import ActivationStore, StorePart
from cltjax.store_format import COLUMNS, MANIFEST, dequantise, part_folder, quantise, unpack
from store_cases import LAYERS, Case, D, as_read, make_case, write

SHARD = 141  # three blocks of 47
WIDTHS = (3, 1, 2, 0, 4, 2, 1, 7, 9, 6)


@pytest.fixture(scope="module")
def case() -> Case:
    found = make_case("float32", SHARD, WIDTHS, brought=np.float32, longest=29)
    assert found.rows > 2 * SHARD and found.rows % SHARD % 47
    return found


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("store") / "s"
    write(found, case)
    return found


@pytest.fixture(scope="module")
def joined(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in three parts of different lengths; every part numbers its samples from 0."""
    found = tmp_path_factory.mktemp("joined") / "s"
    for part, batches in enumerate((case.batches[:3], case.batches[3:8], case.batches[8:]), 1):
        first = sum(len(records) for _, records, _ in case.batches[: batches[0][2]])
        mine = []
        for number, (rows, records, _) in enumerate(batches):
            columns = rows.columns | {"sample": rows.columns["sample"] - np.int32(first)}
            mine.append((dataclasses.replace(rows, columns=columns), records, number))
        dataset = case.spec.dataset | {"samples": part, "skipped": [{"row": part}]}
        write(part_folder(found, part, 3), Case(dataclasses.replace(case.spec, dataset=dataset), mine))
    return found


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """A copy of the store that may be damaged."""
    subprocess.run(["cp", "-r", path, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def read_all(store: ActivationStore) -> None:
    for which in ("site", "mlp_out"):
        store.read(which, slice(None), store.layers)
        store.norms(which)
    for name in COLUMNS:
        store.column(name)
    assert store.samples
    store.stats()


# What was written comes back


def test_a_path_that_goes_up_and_down(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    write(Path("../s"), case)
    read_all(ActivationStore.open("../below/../s"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("brought", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_come_back_rounded_to_the_stored_type(tmp_path: Path, dtype: str, brought: Any) -> None:
    case = make_case(dtype, brought=brought)
    write(tmp_path, case)
    store = ActivationStore.open(tmp_path)
    assert (store.rows, store.site, store.layers, store.d_model, store.n_layers) == (case.rows, "mlp_in", LAYERS, D, 7)
    assert store.complete and store.dtype == dtype and store.model["id"] == "m" and store.samples == case.records
    for which in ("site", "mlp_out"):
        expected = as_read(case.values(which), dtype)
        found = store.read(which, slice(None), LAYERS)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
        np.testing.assert_allclose(store.norms(which), norms, rtol=1e-6)
    for name, kind in COLUMNS.items():
        assert store.column(name).dtype == kind
        np.testing.assert_array_equal(store.column(name), case.column(name))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_rows_of_any_layers(case: Case, path: Path, joined: Path, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, case.rows - 1), max_size=40)), np.int64)
    if data.draw(st.booleans()):  # stretches of neighbours, which are read into their place
        rows = np.unique(np.minimum(rows[:, None] + np.arange(9), case.rows - 1))
    layers = data.draw(st.lists(st.sampled_from(LAYERS), max_size=4))
    folder, which = data.draw(st.sampled_from([path, joined])), data.draw(st.sampled_from(["site", "mlp_out"]))
    budget = data.draw(st.sampled_from([1, 4 * D * 50, 4 * D * 500, 1 << 27]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(store_module, "_READ_BYTES", budget)
        monkeypatch.setattr(store_module, "_FEWEST_ROWS", data.draw(st.sampled_from([1, 5, 32])))
        found = ActivationStore.open(folder).read(which, rows, layers)
    np.testing.assert_array_equal(found, case.values(which)[rows][:, [LAYERS.index(layer) for layer in layers]])


def test_neighbouring_rows_are_read_straight_into_their_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows with gaps, which are picked from what was read, nothing is."""
    store, straight, begin = ActivationStore.open(path), [], StorePart.begin

    def noted(part: StorePart, name: str, regions: Any, targets: Any) -> Any:
        straight.extend(target is not None and np.shares_memory(target, out) for target in targets)
        return begin(part, name, regions, targets)

    monkeypatch.setattr(StorePart, "begin", noted)
    for step, expected in ((1, True), (2, False)):
        rows, straight[:] = np.arange(3, 90, step), []
        out = np.empty(*store.packed_shape(len(rows), (1, 4)))
        store.read_packed("site", rows, (1, 4), out)
        assert straight and set(straight) == {expected}


def test_slices_of_rows(case: Case, joined: Path) -> None:
    store = ActivationStore.open(joined)
    for rows in (slice(3, 300, 7), slice(None, None, -1), slice(5, 5), slice(-4, None)):
        np.testing.assert_array_equal(store.read("site", rows, (4,)), case.values("site")[rows, 2:])


def test_rows_and_layers_that_are_not_there(case: Case, path: Path) -> None:
    store = ActivationStore.open(path)
    for row in (-1, case.rows):
        with pytest.raises(IndexError, match=f"with {case.rows}"):
            store.read("site", np.array([0, row]), (1,))
    with pytest.raises(UserError, match=r"layer 2 is not in .* holds layers \[1, 3, 4\]"):
        store.read("site", np.array([0]), (1, 2))
    with pytest.raises(ValueError, match="neither"):
        store.read("mlp_in", np.array([0]), (1,))


def test_splits(case: Case, path: Path) -> None:
    store = ActivationStore.open(path)
    of_sample = np.array([record["split"] for record in case.records])[case.column("sample")]
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(store.rows_of(split), np.flatnonzero(of_sample == split))
    assert sum(len(store.rows_of(split)) for split in ("train", "val", "test")) == case.rows


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.lists(
            st.floats(-(2.0**127), 2.0**127, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
            min_size=5,
            max_size=5,
        ),
        min_size=1,
        max_size=7,
    )
)
def test_int8_is_off_by_at_most_half_a_scale(values: list[list[float]]) -> None:
    exact = np.array(values, np.float32)
    codes, scale = quantise(exact)
    assert codes.dtype == np.int8 and codes.min() >= -127
    error = np.abs(dequantise(codes, scale).astype(np.float64) - exact)
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()
    assert (scale == np.float32(np.abs(exact).max(1) / np.float32(127))).all()


def test_int8_store(tmp_path: Path) -> None:
    case = make_case("int8", brought=np.float32)
    case.batches[2][0].site[1] = 0
    write(tmp_path, case)
    store = ActivationStore.open(tmp_path)
    exact, found = case.values("site"), store.read("site", slice(None), LAYERS)
    scale = np.abs(exact).max(-1, keepdims=True) / 127
    assert found.dtype == np.float32 and (np.abs(found - exact) <= scale * 0.5001).all()
    zero = len(case.batches[0][0].site) + len(case.batches[1][0].site) + 1
    assert (found[zero] == 0).all() and (store.norms("site")[zero] == 0).all()
    rows = np.array([7, 3, 50])
    np.testing.assert_array_equal(store.read("site", rows, (4, 1)), found[rows][:, [2, 0]])
    codes, scale = quantise(case.values("site").reshape(-1, D))
    packed = store.read_packed("site", rows, LAYERS)
    assert packed.shape == (3, len(LAYERS), D + 4) and packed.dtype == np.int8
    np.testing.assert_array_equal(packed[..., :D], codes.reshape(exact.shape)[rows])
    np.testing.assert_array_equal(unpack(packed), dequantise(codes, scale).reshape(exact.shape)[rows])


# Damage


def test_only_the_layers_and_blocks_asked_for_are_read(copy: Path) -> None:
    """Damage to one layer's block is seen by who reads it and by nobody else."""
    file = copy / "mlp_in/c/1/0/0"
    data = bytearray(file.read_bytes())
    size = 47 * D * 4 + 4
    data[size * (2 * 3 + 1) + 99] ^= 1  # block 2 of the shard, layer 1 of 3
    file.write_bytes(data)
    store = ActivationStore.open(copy)
    store.read("site", slice(None), (1, 4))
    store.read("mlp_out", slice(None), LAYERS)
    store.read("site", np.arange(SHARD + 2 * 47), LAYERS)
    with pytest.raises(UserError, match=rf"{file}: rows 235 to 281 of layer 3 are damaged.*capture it again") as found:
        store.read("site", np.array([3, SHARD + 2 * 47 + 5]), LAYERS)
    assert "\n" not in str(found.value)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_an_error_that_names_the_file(path: Path, data: st.DataObject) -> None:
    files = sorted(str(file) for file in path.glob("*/c/**/*") if file.is_file())
    file = Path(data.draw(st.sampled_from([*files, str(path / "samples.jsonl"), str(path / "stats.safetensors")])))
    original = file.read_bytes()
    damaged = bytearray(original)
    place = data.draw(st.integers(0, len(original) - 1) | st.integers(max(0, len(original) - 40), len(original) - 1))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(file))) as found:
            read_all(ActivationStore.open(path))
    finally:
        file.write_bytes(original)
    if "/c/" in str(file):
        shard = int(file.relative_to(path).parts[2])
        numbers = re.search(r"rows (\d+) to (\d+)", str(found.value))
        assert numbers is not None
        assert shard * SHARD <= int(numbers[1]) <= int(numbers[2]) < (shard + 1) * SHARD


@pytest.mark.parametrize("name", ["mlp_in/c/1/0/0", "mlp_out_norm/c/0/0", "sample/c/2", "modality/c/1"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_shard_file_that_is_missing_or_cut(copy: Path, name: str, how: str) -> None:
    file = copy / name
    data = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    reason = "missing" if how == "missing" else "damaged"
    with pytest.raises(UserError, match=rf"{file}: rows \d+ to \d+.* are {reason}"):
        read_all(ActivationStore.open(copy))


@pytest.mark.parametrize("name", ["mlp_in", "mlp_out"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_block_that_a_shard_lacks_is_not_read_as_zeros(tmp_path: Path, name: str, dtype: str) -> None:
    write(tmp_path, make_case(dtype, SHARD, WIDTHS, longest=29))
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / name)}}).result()
    nothing = np.full((47, D), -128 if dtype == "int8" else np.nan).astype(array.dtype.numpy_dtype)
    array[47:94, 1] = nothing  # tensorstore drops a block of nothing but the fill value
    store = ActivationStore.open(tmp_path)
    which = "site" if name == "mlp_in" else name
    store.read(which, np.array([46, 94]), LAYERS)
    with pytest.raises(UserError, match=rf"{name}/c/0/0/0: rows 47 to 93 of layer 3 are missing"):
        store.read(which, np.array([46, 60]), LAYERS)


def test_zeros_are_stored_like_anything_else(tmp_path: Path) -> None:
    case = make_case(brought=np.float32)
    for rows, _, _ in case.batches:
        rows.site[...] = 0
        rows.columns["generated"][:] = 0
    write(tmp_path, case)
    store = ActivationStore.open(tmp_path)
    assert not store.read("site", slice(None), LAYERS).any() and not store.column("generated").any()
    assert not store.stats().site.outliers.any() and not store.stats().site.std.any()


def test_metadata_that_contradicts_the_manifest(copy: Path) -> None:
    zarr = copy / "mlp_in/zarr.json"
    original = zarr.read_text()
    for text in ("{", original.replace("float32", "int32"), original.replace('"shape":[', '"shape":[1')[:-1], ""):
        zarr.write_text(text)
        with pytest.raises(UserError, match="mlp_in cannot be opened"):
            ActivationStore.open(copy).read("site", slice(0, 1), (1,))
    metadata = json.loads(original)
    metadata["shape"][0] = 100
    zarr.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="contradicts"):
        ActivationStore.open(copy).read("site", slice(0, 1), (1,))
    zarr.unlink()
    with pytest.raises(UserError, match="mlp_in cannot be opened"):
        ActivationStore.open(copy).read("site", slice(0, 1), (1,))


@pytest.mark.parametrize("name", ["samples.jsonl", "stats.safetensors"])
def test_a_small_file_that_is_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_all(ActivationStore.open(copy))


# Parts


def test_parts_read_as_one_store(case: Case, path: Path, joined: Path) -> None:
    one, many = ActivationStore.open(path), ActivationStore.open(joined)
    assert len(many.manifests) == 3 and many.complete and many.rows == one.rows
    assert many.samples == one.samples
    for name in COLUMNS:
        np.testing.assert_array_equal(many.column(name), one.column(name))
    for which in ("site", "mlp_out"):
        np.testing.assert_array_equal(many.norms(which), one.norms(which))
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(many.rows_of(split), one.rows_of(split))
    first_of_part_2 = sum(len(records) for _, records, _ in case.batches[:3])
    assert many.image_path(first_of_part_2) == joined / "part-2-of-3" / f"images/{first_of_part_2}.png"
    assert many.image_path(0) == joined / "part-1-of-3/images/0.png"


def test_places_of_rows_are_by_block(path: Path, joined: Path) -> None:
    """Rows with one quotient by `block_rows` are those of a block, in every part."""
    whole, many = ActivationStore.open(path), ActivationStore.open(joined)
    rows = np.arange(whole.rows)
    assert whole.places(rows).tolist() == rows.tolist()
    block = many.block_rows
    blocks = [(number, row // block) for number, part in enumerate(many.parts) for row in range(part.rows)]
    found = (many.places(rows) // block).tolist()
    assert len(many.parts) == 3 and any(part.rows % block for part in many.parts)
    assert len(set(blocks)) == len(set(found)) == len(set(zip(blocks, found, strict=True)))
    assert (np.diff(many.places(rows)) > 0).all()


def test_statistics_of_parts_are_those_of_the_whole(path: Path, joined: Path) -> None:
    one, many = ActivationStore.open(path).stats(), ActivationStore.open(joined).stats()
    for which in ("site", "mlp_out"):
        for field in dataclasses.fields(one[which]):
            a, b = getattr(one[which], field.name), getattr(many[which], field.name)
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=field.name)
    assert one.site.outliers.sum() > 0


def test_an_incomplete_set_of_parts(joined: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", joined, tmp_path / "s"], check=True)
    (tmp_path / "s/part-3-of-3" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"lacks part 3 of 3: run the capture with --shard 3/3"):
        ActivationStore.open(tmp_path / "s")
    (tmp_path / "s/part-1-of-3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"lacks part 1 of 3, 3 of 3"):
        ActivationStore.open(tmp_path / "s")
    (tmp_path / "s/part-1-of-2").mkdir()
    with pytest.raises(UserError, match=r"holds parts of 2 and parts of 3"):
        ActivationStore.open(tmp_path / "s")
    assert ActivationStore.open(tmp_path / "elsewhere").complete


def test_parts_of_different_captures(joined: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", joined, tmp_path / "s"], check=True)
    file = tmp_path / "s/part-2-of-3" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["dataset"]["fingerprint"] = "f1"
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r'part-2-of-3 is no part .*: dataset.fingerprint is "f1", there "f0"'):
        ActivationStore.open(tmp_path / "s")


def test_an_unfinished_part_shows(case: Case, joined: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", joined, tmp_path / "s"], check=True)
    file = tmp_path / "s/part-3-of-3" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"complete": False}))
    assert not ActivationStore.open(tmp_path / "s").complete


def test_no_store(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no activation store at .*: run `python capture/run.py"):
            ActivationStore.open(folder)


# Statistics


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_statistics_are_those_of_the_stored_train_rows(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, make_case(dtype, 61, WIDTHS, brought=np.float32, longest=29))
    store = ActivationStore.open(tmp_path)
    rows = store.rows_of("train")
    modality = store.column("modality")[rows]
    for which in ("site", "mlp_out"):
        x, found = store.read(which, rows, LAYERS).astype(np.float64), store.stats()[which]
        mean, norms = x.mean(0), np.linalg.norm(x, axis=-1)
        assert found.count == len(rows)
        size = np.sqrt(np.square(x).mean())
        np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-9 * size)
        np.testing.assert_allclose(found.std, np.sqrt(np.square(x - mean).mean((0, 2))), rtol=1e-6)
        np.testing.assert_allclose(found.mean_norm, norms.mean(0), rtol=1e-6)
        for m in range(3):
            mine = modality == m
            assert found.modality_count[m] == mine.sum() > 0
            np.testing.assert_allclose(found.modality_mean[m], x[mine].mean(0), rtol=1e-6, atol=1e-9 * size)
            np.testing.assert_allclose(found.modality_mean_norm[m], norms[mine].mean(0), rtol=1e-6)
            np.testing.assert_array_equal(found.outliers[:, m], (norms[mine] >= 20 * norms.mean(0)).sum(0))
    assert store.stats().site.outliers.sum() > 0


def test_no_train_rows(tmp_path: Path) -> None:
    write(tmp_path, make_case(splits=("test", "val")))
    store = ActivationStore.open(tmp_path)
    assert store.complete and len(store.rows_of("train")) == 0
    with pytest.raises(UserError, match="has no train rows"):
        store.stats()


# Around it


def test_neither_torch_nor_jax_is_needed() -> None:
    heavy = "{'torch', 'jax', 'transformers'}"
    script = f"import sys, cltjax.store, cltjax.store_writer; print(sorted({heavy} & sys.modules.keys()))"
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_documented_way_to_read_with_tensorstore_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs/store.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    for dtype in ("bfloat16", "int8"):
        case = make_case(dtype, 61, WIDTHS, layers=(0, 3, 4), brought=np.float32)
        write(tmp_path / f"{dtype}/activations", case)
        monkeypatch.chdir(tmp_path / dtype)
        for snippet in snippets:
            assert "cltjax" not in snippet or "ActivationStore" in snippet
            names: dict[str, Any] = {}
            exec(snippet, names)
            store = ActivationStore.open(Path("activations"))
            np.testing.assert_array_equal(names["x"], store.read("site", slice(10, 20), (3,))[:, 0])
            np.testing.assert_array_equal(names["train"], store.rows_of("train"))
            np.testing.assert_array_equal(names["mean"], store.stats().site.mean[1])
