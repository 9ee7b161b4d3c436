"""Panels of features against dense arithmetic on the same store; promoted tokens and near features against weights."""

import base64
import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capture.config import CaptureConfig
from capture.inputs import IMAGE, SPECIAL, TEXT
from capture.recorder import capture
from capture.vlm import VLM, load, wrap
from cltjax.clt_directory import Activation
from cltjax.errors import UserError
from cltjax.replacement import activity, panels, readout
from cltjax.replacement.clt import CLT
from cltjax.replacement.panels import Held, data_uri, hold, spell, strongest
from cltjax.store import ActivationStore
from examples.shapes.dataset import sample as shapes_sample
from families import FAMILIES, processor
from test_replacement import random_clt

F, DEMO = 31, "examples/shapes/model"
FEATURES = [(0, 3), (0, 17), (2, 5), (5, 30), (4, 11)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captured") / "store"
    capture(CaptureConfig(model=DEMO, out=out, max_samples=83, generate=5, dtype="float32", shard_rows=301))
    return out


@pytest.fixture(scope="module")
def store(folder: Path) -> ActivationStore:
    return ActivationStore.open(folder)


@pytest.fixture(scope="module")
def clt(tmp_path_factory: pytest.TempPathFactory, vlm: VLM) -> CLT:
    return random_clt(tmp_path_factory.mktemp("random") / "clt", vlm)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "MOST_ROWS", 113)
    monkeypatch.setattr(activity, "AT_ONCE", 29)
    monkeypatch.setattr(readout, "ELEMENTS", 7 * 2 * 128)


def dense(clt: CLT, store: ActivationStore, layer: int, rows: np.ndarray) -> np.ndarray:
    """[rows, F]"""
    x = torch.from_numpy(store.read("site", rows, [layer])[:, 0])
    values, indices = clt.encode(layer, x)
    return torch.zeros(len(rows), F).scatter_(1, indices, values).numpy()


@pytest.mark.usefixtures("small_pieces")
def test_a_panel_says_what_dense_arithmetic_says(vlm: VLM, clt: CLT, store: ActivationStore) -> None:
    found, images = panels.panels(vlm, clt, store, FEATURES, examples=3, split="train")
    assert list(found) == [spell(feature) for feature in FEATURES]
    rows = store.rows_of("train")
    rows = rows[store.column("modality")[rows] != SPECIAL]
    modality, sample = store.column("modality")[rows], store.column("sample")[rows]
    for layer, number in FEATURES:
        panel, a = found[f"{layer}:{number}"], dense(clt, store, layer, rows)[:, number]
        on = a > 0
        assert panel["rows"] == len(rows) and on.sum() > 20
        assert panel["density"] == pytest.approx(on.mean(), rel=1e-3)
        assert panel["modality"]["image"] == pytest.approx((modality[on] == IMAGE).mean(), rel=1e-3)
        assert panel["modality"]["text"] == pytest.approx((modality[on] == TEXT).mean(), rel=1e-3)
        assert panel["max"] == pytest.approx(a.max(), rel=1e-3)
        edges, counts = panel["histogram"]["edges"], panel["histogram"]["counts"]
        assert counts == np.histogram(-a[on], -np.array(edges)[::-1])[0][::-1].tolist()
        peaks = {number: a[sample == number].max() for number in np.unique(sample).tolist()}
        best = sorted(peaks, key=lambda one: -peaks[one])[:3]
        assert [one["sample"] for one in panel["top"]] == [store.samples[one]["id"] for one in best]
        assert [one["peak"] for one in panel["top"]] == pytest.approx([peaks[one] for one in best], rel=1e-3)
        assert len({one["sample"] for one in panel["random"]}) == 3
        assert all(one["peak"] > 0 and one["image"] in images for one in panel["random"] + panel["top"])


def test_an_example_has_its_tokens_its_patches_and_its_answer(vlm: VLM, clt: CLT, store: ActivationStore) -> None:
    found, images = panels.panels(vlm, clt, store, [(0, 17)], examples=83, split="train")
    ids = [record["id"] for record in store.samples]
    placed = 0
    for example in found["0:17"]["top"]:
        number = ids.index(example["sample"])
        rows = np.flatnonzero(store.column("sample") == number)
        a, modality = dense(clt, store, 0, rows)[:, 17], store.column("modality")[rows]
        record = store.samples[number]
        start = example["generated"]
        whole, answer = "".join(example["tokens"]).strip(), "".join(example["tokens"][start:]).strip()
        assert whole == f"USER: {record['prompt']} ASSISTANT: {record['generated']}" and answer == record["generated"]
        assert example["values"] == pytest.approx(a[modality == TEXT], rel=1e-3)
        on = a[modality == IMAGE]
        assert [patch[4] for patch in example["patches"]] == pytest.approx(on[on > 0], rel=1e-3)
        corners = [[int(i) % 6 / 6, int(i) // 6 / 6] for i in np.flatnonzero(on > 0)]
        assert np.allclose([patch[:2] for patch in example["patches"]], corners, atol=1e-4)
        assert example["unplaced"] == 0
        placed += len(corners)
        shown = Image.open(io.BytesIO(base64.b64decode(images[example["image"]].partition(",")[2])))
        drawn = shapes_sample(int(example["sample"].removeprefix("shapes-"))).image
        assert np.array_equal(np.asarray(shown), np.asarray(drawn))
    assert placed > 20


def test_random_examples_are_a_function_of_the_seed(
    vlm: VLM, clt: CLT, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(seed: int, features: list[tuple[int, int]] = FEATURES) -> list[list[str]]:
        found, _ = panels.panels(vlm, clt, store, features, examples=4, split="train", seed=seed)
        return [[one["sample"] for one in found[spell(feature)]["random"]] for feature in features]

    first = chosen(0)
    monkeypatch.setattr(activity, "MOST_ROWS", 113)
    assert chosen(0) == first and chosen(0, FEATURES[:2]) == first[:2]
    assert chosen(1) != first and first[0] != first[1]


def test_keys_choose_fairly() -> None:
    n = 2003
    keys = activity.keys(0, 3, np.full(n, 17), np.arange(n)).astype(np.float64) / 2.0**64
    assert abs(keys.mean() - 0.5) < 0.03 and abs(np.corrcoef(keys[1:], keys[:-1])[0, 1]) < 0.08
    firsts = [int(activity.keys(seed, 3, np.full(7, 17), np.arange(7)).argmin()) for seed in range(700)]
    assert np.bincount(firsts).min() > 60


def test_histograms_count_exactly_however_values_arrive() -> None:
    rng = np.random.default_rng(0)
    histogram = activity.Histogram(5)
    seen: list[list[float]] = [[] for _ in range(5)]
    for scale in (0.01, 3.0, 0.2, 700.0):
        column = rng.integers(0, 4, 211)
        value = (rng.exponential(scale, 211) * 2.0 ** column.clip(0, 2)).astype(np.float32)
        histogram.add(column, value)
        for c, v in zip(column.tolist(), value.tolist(), strict=True):
            seen[c].append(v)
    for c, values in enumerate(seen[:4]):
        edges, counts = histogram.of(c)
        assert 16 < len(counts) <= 32 and edges[-2] < max(values) <= edges[-1]
        assert counts == [sum(low < v <= high for v in values) for low, high in pairwise(edges)]
    assert histogram.of(4) == ([], [])


def test_the_strongest_features(clt: CLT, store: ActivationStore) -> None:
    held = hold(clt, store, "train")
    total = {
        (layer, i): float(sums[i] * clt.decoder_rows(layer, torch.tensor([i])).norm())
        for layer in clt.sources
        for sums in [dense(clt, store, layer, held.rows).sum(0)]
        for i in range(F)
    }
    assert strongest(held, 11) == sorted(total, key=lambda one: -total[one])[:11]


def test_fewer_rows_are_those_of_whole_samples(clt: CLT, store: ActivationStore) -> None:
    held = hold(clt, store, "train", max_rows=400)
    whole = hold(clt, store, "train")
    assert 300 < len(held.rows) <= 400 and np.isin(held.rows, whole.rows).all()
    samples = store.column("sample")
    chosen = np.unique(samples[held.rows])
    assert len(held.rows) == np.isin(samples[whole.rows], chosen).sum()
    assert not np.array_equal(chosen, np.unique(samples[whole.rows])[: len(chosen)])  # not just the first ones
    assert len(hold(clt, store, "train", max_rows=1).rows) > 1  # one sample at least


def test_what_a_clt_was_not_trained_on_does_not_count(vlm: VLM, store: ActivationStore, tmp_path: Path) -> None:
    """A norm limit takes the image out."""
    norms = store.norms("site")[:, 0]
    image = store.column("modality") == IMAGE
    limit = float(np.median(norms[image]))
    limits = {"site": [limit] + [1e9] * 5, "mlp_out": [1e9] * 6}
    clt = random_clt(tmp_path / "clt", vlm, tokens={"special": True, "limits": limits})
    held = hold(clt, store, "train")
    expected = store.rows_of("train")[norms[store.rows_of("train")] < limit]
    assert np.array_equal(held.rows, expected)
    found, _ = panels.panels(vlm, clt, store, [(0, 3)], held=held)
    example = found["0:3"]["top"][0]
    assert example["tokens"][0].strip() == "<s>"  # special tokens count here


def test_a_feature_that_is_never_active(vlm: VLM, store: ActivationStore, tmp_path: Path) -> None:
    clt = random_clt(tmp_path / "clt", vlm, activation=Activation("jumprelu", (), "jumprelu"))
    clt._encoders[1]["threshold"][:] = 1e9
    found, images = panels.panels(vlm, clt, store, [(1, 4)], labels={"1:4": {"label": "<b>", "score": 0.5}})
    panel = found["1:4"]
    assert panel["density"] == panel["max"] == 0 and panel["top"] == panel["random"] == [] and images == {}
    assert panel["histogram"] == {"edges": [], "counts": []} and panel["label"] == "<b>" and panel["score"] == 0.5
    assert panel["promoted"] and panel["nearest"]
    json.dumps(panel, allow_nan=False)


# Images --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(folder: Path, tmp_path: Path) -> Path:
    """The store without its images, of a data set that cannot be drawn anew."""
    shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("images"))
    manifest = json.loads((tmp_path / "moved/manifest.json").read_text())
    manifest["dataset"]["spec"] = "pictures.json"
    (tmp_path / "moved/manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "moved"


def test_missing_images_are_counted_once(vlm: VLM, clt: CLT, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, images = panels.panels(vlm, clt, ActivationStore.open(moved), [(0, 17)], examples=5, split="train")
    examples = found["0:17"]["top"] + found["0:17"]["random"]
    assert images == {} and all(one["image"] is None and one["patches"] == [] for one in examples)
    assert sum(one["unplaced"] for one in examples) > 0 and examples[0]["peak"] > 0
    said = capsys.readouterr().err
    n = len({one["sample"] for one in examples})
    assert f"note: {n} images cannot be read" in said and said.count("note:") == 1


def test_images_are_looked_for_in_another_folder(vlm: VLM, clt: CLT, folder: Path, moved: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "elsewhere/deep/images")
    store = ActivationStore.open(moved)
    for place in ("elsewhere/deep", "elsewhere/deep/images"):
        found, images = panels.panels(vlm, clt, store, [(0, 17)], split="train", image_dir=tmp_path / place)
        assert images and all(one["image"] in images for one in found["0:17"]["top"])


def test_images_of_the_bundled_data_set_are_drawn_anew(vlm: VLM, clt: CLT, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store", ignore=shutil.ignore_patterns("images"))
    both = [
        panels.panels(vlm, clt, ActivationStore.open(path), [(0, 17)], split="train")
        for path in (folder, tmp_path / "store")
    ]
    assert both[0] == both[1] and both[0][1]


def test_a_store_that_holds_some_image_tokens(vlm: VLM, clt: CLT, store: ActivationStore, tmp_path: Path) -> None:
    out = tmp_path / "some"
    capture(
        CaptureConfig(
            model=DEMO, out=out, max_samples=29, generate=5, dtype="float32", shard_rows=301, image_tokens=0.4
        )
    )
    some, whole = (
        panels.panels(vlm, clt, one, [(0, 17)], examples=83, split="train")[0]["0:17"]["top"]
        for one in (ActivationStore.open(out), store)
    )
    full = {one["sample"]: one["patches"] for one in whole}
    shown = 0
    for example in some:
        assert all(
            any(np.allclose(one, other, rtol=1e-3) for other in full[example["sample"]]) for one in example["patches"]
        )
        shown += len(example["patches"])
    assert 0 < shown < sum(map(len, full.values()))


def test_thumbnails() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (37, 160, 3), dtype=np.uint8))
    large = Image.fromarray(rng.integers(0, 256, (400, 161, 3), dtype=np.uint8))
    kinds = []
    for image in (small, large):
        kind, _, content = data_uri(image).partition(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        kinds.append((kind, shown.size))
        if image is small:
            assert np.array_equal(np.asarray(shown), np.asarray(small))
    assert kinds == [("data:image/png", (160, 37)), ("data:image/jpeg", (64, 160))]


# Weights -------------------------------------------------------------------------------------------------------------


def test_promoted_tokens_are_what_the_head_makes_of_the_decoder(vlm: VLM, clt: CLT, store: ActivationStore) -> None:
    found, _ = panels.panels(vlm, clt, store, [(2, 5)], split="train")
    model: Any = vlm.model
    d = clt.decoder_rows(2, torch.tensor([5]))[0].sum(0)
    x, norm = torch.randn(vlm.d_model), model.model.language_model.norm
    scale = (x.pow(2).mean() + norm.variance_epsilon).rsqrt()
    held = [model.lm_head(norm.weight * (x + t * d) * scale) for t in (0, 1)]  # with the scale of x
    change = (held[1] - held[0]) / scale
    change = change - change.mean()
    best, worst = change.argsort(descending=True)[:8], change.argsort()[:8]
    for name, ids in (("promoted", best), ("suppressed", worst)):
        assert [token.strip() for token, _ in found["2:5"][name]] == [vlm.tokenizer.decode([int(i)]) for i in ids]
        assert [effect for _, effect in found["2:5"][name]] == pytest.approx(change[ids].tolist(), rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_final_norm_of_every_family(name: str) -> None:
    vlm = wrap(FAMILIES[name].model(), processor(), name)
    head = readout.unembedding(vlm, [5, 7, 11])
    model: Any = vlm.model
    decoder = model.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.model.norm
    x = torch.randn(3, vlm.d_model)
    assert head is not None and head.norm is not None and head.weight.shape[1] == vlm.d_model
    assert torch.allclose(head.norm.apply(x, head.norm.scale(x)), norm(x), atol=1e-4)


@pytest.mark.usefixtures("small_pieces")
def test_near_features(clt: CLT) -> None:
    wanted = [(0, 3), (2, 5), (2, 6), (5, 30)]
    every = torch.arange(F)
    rows = {layer: clt.decoder_rows(layer, every) for layer in clt.sources}
    for (layer, number), found in zip(wanted, readout.nearest(clt, wanted, 3), strict=True):
        own = rows[layer][number]
        same = {
            (layer, i): float(torch.cosine_similarity(own.flatten(), rows[layer][i].flatten(), 0))
            for i in range(F)
            if i != number
        }
        other = {
            (source, i): float(torch.cosine_similarity(own.sum(0), rows[source][i].sum(0), 0))
            for source in clt.sources
            if source != layer
            for i in range(F)
        }
        expected = [sorted(of.items(), key=lambda pair: -pair[1])[:3] for of in (same, other)]
        assert [feature for feature, _ in found] == [feature for of in expected for feature, _ in of]
        assert [value for _, value in found] == pytest.approx([value for of in expected for _, value in of], abs=1e-5)


def test_decoder_norms_by_layer(vlm: VLM, clt: CLT, store: ActivationStore) -> None:
    found, _ = panels.panels(vlm, clt, store, [(4, 11), (5, 30)], split="train")
    rows = clt.decoder_rows(4, torch.tensor([11]))[0]
    assert found["4:11"]["decoder_norms"] == [
        [4, pytest.approx(float(rows[0].norm()), rel=1e-3)],
        [5, pytest.approx(float(rows[1].norm()), rel=1e-3)],
    ]
    assert [layer for layer, _ in found["5:30"]["decoder_norms"]] == [5]


def test_a_store_of_something_else_is_refused(vlm: VLM, store: ActivationStore, tmp_path: Path) -> None:
    other = random_clt(tmp_path / "clt", vlm, site="resid_mid")
    with pytest.raises(UserError, match="trained on a store with site resid_mid"):
        panels.panels(vlm, other, store, [(0, 3)])
    with pytest.raises(UserError, match="--max-rows 0: must be at least 1"):
        hold(other, store, max_rows=0)
    assert isinstance(hold(random_clt(tmp_path / "own", vlm), store), Held)
