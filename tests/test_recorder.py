"""The recorder on the demo VLM: which rows come out, and what they hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capture.config import CaptureConfig
from capture.prompts import load_dataset, resolve_template
from capture.recorder import batches, check_options, encoder, kept_tokens, parse_shard, record_all, windows
from capture.vlm import VLM, load
from cltjax.errors import UserError
from cltjax.store import ActivationStore
from cltjax.store_format import IMAGE, SPECIAL, TEXT

DEMO = "examples/shapes/model"
SAMPLES = 23


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.set_num_threads(2)
    return load(DEMO, "float32", "cpu")


def captured(vlm: VLM, folder: Path, **options) -> ActivationStore:
    """A store of SAMPLES shapes samples in batches of 5; float32 and shards of 101 rows unless said."""
    settings = {"dtype": "float32", "shard_rows": 101, "batch_size": 5, "max_samples": SAMPLES} | options
    config = CaptureConfig(DEMO, out=folder / "store", **settings)
    record_all(vlm, load_dataset("shapes", max_samples=config.max_samples), config)
    return ActivationStore.open(config.out)


def unpadded(vlm: VLM, record: dict) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Token ids, mlp_in and mlp_out [P, L, D] of one sample that goes through the model alone."""
    sample = next(s for s in load_dataset("shapes", max_samples=SAMPLES).samples if s.id == record["id"])
    encoded = encoder(vlm, resolve_template("chat", vlm.processor))(sample)
    trace = vlm.trace(vlm.collate([encoded]), "mlp_in", tuple(range(vlm.n_layers)))
    mlp_in, mlp_out = (torch.stack(tensors, dim=2)[0] for tensors in (trace.site, trace.mlp_out))
    return encoded["input_ids"][0].numpy(), mlp_in, mlp_out


def test_every_token_is_a_row_and_padding_is_none(vlm: VLM, tmp_path: Path):
    store = captured(vlm, tmp_path)
    assert len(store.samples) == SAMPLES
    assert store.rows == sum(record["tokens"] for record in store.samples)
    lengths = {record["tokens"] for record in store.samples}
    assert len(lengths) > 3  # else there would have been no padding to leave out
    every = tuple(range(vlm.n_layers))
    for number, record in enumerate(store.samples):
        rows = np.flatnonzero(store.column("sample") == number)
        ids, mlp_in, mlp_out = unpadded(vlm, record)
        np.testing.assert_array_equal(store.column("token_id")[rows], ids)
        np.testing.assert_array_equal(store.column("position")[rows], np.arange(len(ids)))
        for which, alone in (("site", mlp_in), ("mlp_out", mlp_out)):
            stored = store.read(which, rows, every)
            assert np.abs(stored - alone.numpy()).max() <= 1e-5 * np.abs(stored).max()
    modality, ids = store.column("modality"), store.column("token_id")
    assert set(ids[modality == IMAGE]) == {vlm.image_id}
    assert set(ids[modality == SPECIAL]) == {vlm.tokenizer.bos_token_id}
    assert np.sum(modality == TEXT) == store.rows - SAMPLES * 37
    assert not store.column("generated").any()
    assert all(record["image_grid"] == [[6, 6]] for record in store.samples)
    assert all((tmp_path / "store" / record["image"]).is_file() for record in store.samples)


def test_some_layers_of_another_site(vlm: VLM, tmp_path: Path):
    whole = captured(vlm, tmp_path / "whole", site="resid_pre")
    some = captured(vlm, tmp_path / "some", site="resid_pre", layers="1,4")
    rows = np.arange(some.rows)
    for which in ("site", "mlp_out"):
        np.testing.assert_array_equal(some.read(which, rows, (4, 1)), whole.read(which, rows, (4, 1)))
    # the residual stream moves by attention and MLP, so that the next layer's entry is another tensor
    assert not np.array_equal(whole.read("site", rows, (4,)), whole.read("site", rows, (5,)))


def test_a_share_of_the_image_tokens(vlm: VLM, tmp_path: Path):
    whole = captured(vlm, tmp_path / "whole")
    store = captured(vlm, tmp_path / "share", image_tokens=0.25)
    key = lambda s: list(zip(s.column("sample").tolist(), s.column("position").tolist(), strict=True))  # noqa: E731
    place = {where: row for row, where in enumerate(key(whole))}
    rows = np.array([place[where] for where in key(store)])
    kept = whole.column("modality")[rows] == IMAGE
    assert kept.sum() == SAMPLES * 9
    assert (~kept).sum() == np.sum(whole.column("modality") != IMAGE)
    np.testing.assert_array_equal(store.read("site", np.arange(store.rows), (3,)), whole.read("site", rows, (3,)))
    assert [record["rows"] for record in store.samples] == [record["tokens"] - 27 for record in whole.samples]


def test_kept_tokens_depend_on_the_sample_and_the_seed_alone():
    modality = np.array([SPECIAL] + [IMAGE] * 36 + [TEXT] * 5)
    first = kept_tokens(modality, "a", 0.3, 0)
    np.testing.assert_array_equal(first, kept_tokens(modality, "a", 0.3, 0))
    assert first[modality == IMAGE].sum() == round(0.3 * 36)
    assert first[modality != IMAGE].all()
    assert not np.array_equal(first, kept_tokens(modality, "b", 0.3, 0))
    assert not np.array_equal(first, kept_tokens(modality, "a", 0.3, 1))
    assert kept_tokens(modality, "a", 1e-9, 0)[modality == IMAGE].sum() == 1


def test_generated_answers_are_captured_in_one_pass_with_the_prompt(vlm: VLM, tmp_path: Path):
    store = captured(vlm, tmp_path, generate=7)
    generated = store.column("generated").astype(bool)
    counts = np.bincount(store.column("sample")[generated], minlength=SAMPLES)
    assert counts.min() >= 1
    assert counts.max() <= 7
    for number, record in enumerate(store.samples):
        mine = store.column("sample") == number
        answer = store.column("token_id")[mine & generated].tolist()
        assert record["generated"] == vlm.decode(answer)
        prompt = unpadded(vlm, record)[0]
        np.testing.assert_array_equal(store.column("token_id")[mine & ~generated], prompt)
        assert record["tokens"] == len(prompt) + len(answer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_stored_types(vlm: VLM, tmp_path: Path, dtype: str):
    exact = captured(vlm, tmp_path / "exact")
    rounded = captured(vlm, tmp_path / dtype, dtype=dtype)
    rows = np.arange(exact.rows)
    for which in ("site", "mlp_out"):
        truth = exact.read(which, rows, (0, 5))
        error = np.abs(rounded.read(which, rows, (0, 5)).astype(np.float32) - truth)
        if dtype == "int8":
            assert (error <= np.abs(truth).max(axis=-1, keepdims=True) / 127 / 2 * 1.001).all()
        else:
            assert (error <= np.abs(truth) * (2**-8 if dtype == "bfloat16" else 2**-11) + 1e-7).all()


def test_shares_of_several_writers_are_one_store(vlm: VLM, tmp_path: Path):
    whole = captured(vlm, tmp_path / "whole")
    for index in (1, 2, 3):
        config = CaptureConfig(
            DEMO,
            out=tmp_path / "parts",
            dtype="float32",
            shard_rows=101,
            batch_size=5,
            max_samples=SAMPLES,
            shard=f"{index}/3",
        )
        record_all(vlm, load_dataset("shapes", max_samples=SAMPLES), config)
        if index < 3:
            with pytest.raises(UserError, match="part"):
                ActivationStore.open(config.out)
    store = ActivationStore.open(tmp_path / "parts")
    assert store.rows == whole.rows
    assert sorted(r["id"] for r in store.samples) == sorted(r["id"] for r in whole.samples)
    number = {record["id"]: i for i, record in enumerate(whole.samples)}
    for i, record in enumerate(store.samples):
        mine = store.read("mlp_out", np.flatnonzero(store.column("sample") == i), (2,))
        same = whole.read("mlp_out", np.flatnonzero(whole.column("sample") == number[record["id"]]), (2,))
        assert np.abs(mine - same).max() <= 1e-5 * np.abs(same).max()


def test_batches_are_alike_in_length_and_start_anywhere(vlm: VLM):
    samples = load_dataset("shapes", max_samples=61).samples
    encode = encoder(vlm, resolve_template("chat", vlm.processor))
    every = list(batches(windows(samples, 3), 3, encode))
    assert [batch.number for batch in every] == list(range(len(every)))
    assert sorted(s.id for batch in every for s in batch.samples) == [s.id for s in samples]
    later = list(batches(windows(samples, 3), 3, encode, first=17))
    assert [[s.id for s in batch.samples] for batch in later] == [[s.id for s in b.samples] for b in every[17:]]
    spread = [len({one["input_ids"].shape[1] for one in batch.encoded}) for batch in every]
    assert np.mean(spread) < 2


def test_images_and_plain_prompts_never_share_a_batch():
    samples = load_dataset("shapes", max_samples=10).samples
    mixed = [replace(s, image=None, load=None) if i % 3 else s for i, s in enumerate(samples)]
    for window in windows(mixed, 2):
        assert len({s.load is None for s in window}) == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none(text: str):
    with pytest.raises(UserError, match="I/N"):
        parse_shard(text)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"shard_rows": 0}, {"image_tokens": 0.0}, {"generate": -1}])
def test_options_that_cannot_be(options: dict):
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
        check_options(CaptureConfig(DEMO, **options))
