"""Names of the demo's features: what is known of tokens, and how a name is chosen."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_array

from capture.config import CaptureConfig
from capture.recorder import capture
from capture.vlm import load
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.store import IMAGE, ActivationStore
from examples.shapes import labels
from examples.shapes.dataset import draw
from examples.shapes.labels import average_precision, column_of, correlations, known, name_features, properties
from examples.shapes.questions import material_of
from stores import synthetic_store
from test_replacement import random_clt

DEMO = "examples/shapes/model"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captured") / "store"
    capture(CaptureConfig(model=DEMO, out=out, max_samples=83, generate=3, dtype="float32", shard_rows=301))
    return out


@pytest.fixture(scope="module")
def store(folder: Path) -> ActivationStore:
    return ActivationStore.open(folder)


@pytest.fixture(scope="module")
def clt(tmp_path_factory: pytest.TempPathFactory) -> CLT:
    return random_clt(tmp_path_factory.mktemp("random") / "clt", load(DEMO))


def test_average_precision_by_hand() -> None:
    rows, truth = np.array([4, 1, 6, 2]), np.array([0, 1, 0, 0, 1, 0, 1], bool)
    values = np.array([3.0, 2.0, 2.0, 5.0])
    # 5: wrong; 3: right, 1 of 2; both at 2: right, 3 of 4
    assert average_precision(rows, values, truth) == pytest.approx((1 / 2 + 2 * 3 / 4) / 3)
    # one that it is not active on comes last, with all others
    assert average_precision(rows[:2], values[:2], truth) == pytest.approx((1 + 1 + 3 / 7) / 3)
    assert average_precision(rows[:0], values[:0], truth) == pytest.approx(3 / 7)
    assert np.isnan(average_precision(rows, values, np.zeros(7, bool)))


def test_correlations_are_pearsons() -> None:
    rng = np.random.default_rng(0)
    activations = np.where(rng.random((211, 5)) < 0.2, rng.random((211, 5)), 0).astype(np.float32)
    activations[:, 3] = 0
    truth = (rng.random((211, 3)) < 0.3).astype(np.float32)
    found = correlations(csc_array(activations), truth)
    for i in (0, 1, 2, 4):
        for j in range(3):
            assert found[i, j] == pytest.approx(np.corrcoef(activations[:, i], truth[:, j])[0, 1], abs=1e-5)
    assert (found[3] == -1).all()
    rows, values = column_of(csc_array(activations), 2)
    assert np.array_equal(rows, np.flatnonzero(activations[:, 2])) and (values == activations[rows, 2]).all()


def test_what_is_known_of_tokens(store: ActivationStore) -> None:
    column, asked = store.column("sample"), 0
    for sample, record in enumerate(store.samples):
        rows = np.flatnonzero(column == sample)
        found = list(properties(store, sample, int(rows[0]), int(rows[-1]) + 1))
        scene, question, _ = draw(int(record["id"].removeprefix("shapes-")))
        assert question.text == record["prompt"]
        image = rows[store.column("modality")[rows] == IMAGE]
        for thing in scene.things:
            name = f"patch thing={thing.color} {thing.shape}"
            [at] = [at for one, at in found if one == name]
            cells = [2 * (i // 12) * 3 // 2 + i % 6 // 2 for i in np.searchsorted(image, at)]
            assert cells == [thing.cell] * 4
        [end] = next(at for one, at in found if one.startswith("kind="))
        words = {int(row): one.removeprefix("word=") for one, at in found if one.startswith("word=") for row in at}
        assert (
            words[int(end)] == "ASSISTANT:"
            and not store.column("generated")[end]
            and store.column("generated")[end + 1]
        )
        following = {int(row): one.removeprefix("next=") for one, at in found if one.startswith("next=") for row in at}
        assert following[int(end)] == words[int(end) + 1] and min(following) == end
        subject = [(one, at) for one, at in found if one.endswith(" (subject)")]
        assert bool(subject) == (question.subject is not None)
        if question.subject is not None:
            asked += 1
            assert f"material B={material_of(question.subject)} (subject)" in [one for one, _ in subject]
            assert words[int(subject[0][1][0])] == question.phrase.split()[-1]
    assert asked > 20


def test_a_planted_property_is_found(
    clt: CLT,
    store: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features made of a property and noise get its name, features of noise alone none; figures are of test."""
    planted = {3: "patch color=nothing", 5: "patch column=left", 8: "patch row=top"}

    def activations_of(_clt: CLT, store: ActivationStore, layer: int, rows: np.ndarray) -> csc_array:
        rng, values = np.random.default_rng(layer), known(store, rows).values
        made = np.where(rng.random((len(rows), 31)) < 0.1, rng.random((len(rows), 31)), 0)
        for feature, name in planted.items():
            made[:, feature] += np.where(values[name], 1 + rng.random(len(rows)), 0)
        return csc_array(made.astype(np.float32))

    monkeypatch.setattr(labels, "activations_of", activations_of)
    found = name_features(clt, store, 0.5)
    assert {key: one["label"] for key, one in found.items()} == {
        f"{layer}:{feature}": name for layer in clt.sources for feature, name in planted.items()
    }
    assert all(one["score"] == one["val"] == 1 for one in found.values())


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_clt(tmp_path / "clt", load(DEMO))
    options = {"--clt": tmp_path / "clt", "--store": folder, "--out": tmp_path / "labels.json", "--least": 0.05}
    monkeypatch.setattr(sys, "argv", ["labels.py", *(str(one) for pair in options.items() for one in pair)])
    labels.main()
    found = json.loads((tmp_path / "labels.json").read_text())
    assert found and all({"label", "score", "val"} <= set(one) and one["val"] >= 0.05 for one in found.values())
    assert "score on test" in capsys.readouterr().out


def test_another_data_set_is_refused(clt: CLT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not of the bundled data set"):
        name_features(clt, synthetic_store(tmp_path / "store", rows=200), 0.5)
