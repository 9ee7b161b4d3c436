"""perturbed.py and validation.py: features and patches that are taken out, and what is made of the effects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from capture.vlm import load
from cltjax.clt_directory import Activation
from cltjax.errors import UserError
from cltjax.replacement.attribution import attribute
from cltjax.replacement.config import GraphsConfig
from cltjax.replacement.graph import EMBEDDING, FEATURE, influence_of, prune
from cltjax.replacement.interventions import Intervention
from cltjax.replacement.model import SteeredModel
from cltjax.replacement.perturbed import Cut, local_inputs, original_inputs
from cltjax.replacement.targets import likeliest
from cltjax.replacement.validation import (
    by_depth,
    correlations,
    kept_features,
    measured,
    patch_drops,
    pre_activation_changes,
    summary,
    validate,
)
from test_attribution import local_of
from test_replacement import random_clt

pytestmark = pytest.mark.usefixtures("one_thread")

JUMP = {"activation": Activation("jumprelu", (), "jumprelu"), "n_targets": 3}


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_without_a_feature(name: str, tmp_path: Path) -> None:
    local = local_of(name, tmp_path, **JUMP)
    vlm, clt = local.vlm, local.clt
    graph = attribute(local, likeliest(local))
    features = graph.of(FEATURE)
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(features[graph.nodes.layer[features] == 0], 4, replace=False))
    cuts = [
        Cut(*one)
        for one in zip(*(part[chosen].tolist() for part in (*graph.nodes[1:4], graph.nodes.value)), strict=True)
    ]
    real, said = original_inputs(local, cuts), local_inputs(local, cuts)
    for source in clt.sources:  # the last sample is as it was
        own = local.read.sites[source].detach()
        for inputs in (real, said):
            assert (inputs[source][-1] - own).abs().max() <= 1e-4 * own.abs().max()
    # in the original model: as an intervention does it
    for b, cut in enumerate(cuts):
        steered = SteeredModel(vlm, clt, [Intervention(cut.layer, cut.number, "set", 0.0, cut.position)])
        with steered.active():
            trace = vlm.trace(local.batch, clt.description.site, clt.sources)
        for source, x in zip(clt.sources, trace.site, strict=True):
            assert (x[0] - real[source][b]).abs().max() <= 1e-4 * x.abs().max()
    # in the local model: what is read at the next layer is less by the edges, for nothing responds before it
    changes = pre_activation_changes(local, graph, said)
    below = graph.nodes.layer[features] == 1
    edges = graph.edges[features][:, chosen].toarray()
    np.testing.assert_allclose(changes[below], -edges[below], atol=2e-3 * np.abs(edges).max())
    above = graph.nodes.layer[features] == 2  # and there features of layer 1 have responded
    assert np.abs(changes[above] + edges[above]).max() > 2e-2 * np.abs(edges).max()
    assert np.abs(changes[graph.nodes.layer[features] == 0]).max() <= 1e-5


def test_correlations(tmp_path: Path) -> None:
    local = local_of("llava", tmp_path, **JUMP)
    graph = attribute(local, likeliest(local))
    features = graph.of(FEATURE)
    chosen = features[graph.nodes.layer[features] == 0][::3]
    influences = influence_of(graph.shares(), chosen, graph.nodes.layer)[features]
    size = abs(graph.edges).sum(1)[features][:, None]
    for power, expected in ((1, 1.0), (-1, -1.0)):
        with np.errstate(divide="ignore"):
            effects = np.where(influences > 0, influences ** float(power), 0) * size
        found = correlations(graph, chosen, effects, np.random.default_rng(0))
        assert found["spearman", "all"] == pytest.approx(expected, abs=1e-6)
        assert found["of one source"] / found["sources"] == pytest.approx(expected, abs=1e-6)
        assert abs(found["spearman", "permuted"]) < 0.9
    assert found["pairs", "all"] == (influences > 0).sum() == found["pairs", "direct"] + found["pairs", "multi-hop"]
    assert min(found["pairs", "direct"], found["pairs", "multi-hop"]) >= 10
    # effects that follow the edges alone are told apart
    direct = graph.shares()[features][:, chosen].toarray()
    found = correlations(graph, chosen, direct * size, np.random.default_rng(0))
    assert found["spearman", "direct"] > found["spearman", "multi-hop"] + 0.1


def test_depths() -> None:
    rng = np.random.default_rng(0)
    real = {layer: torch.from_numpy(rng.normal(size=(3, 5, 7))) for layer in (0, 1, 3)}
    said = {layer: x[-1:] + 2 * (x - x[-1:]) for layer, x in real.items()}  # twice the change
    found = by_depth([Cut(0, 1, 2, 1.0), Cut(1, 1, 2, 1.0)], real, said)
    assert {key[1] for key in found} == {1, 2, 3}
    for depth, layer, b in ((1, 1, 0), (3, 3, 0), (2, 3, 1)):
        assert found["cosine", depth] == pytest.approx(1.0) and found["cuts", depth] == 1
        square = float(((real[layer][b] - real[layer][-1]) ** 2).sum())
        assert found["square", depth] == pytest.approx(square) == pytest.approx(found["error", depth])


def test_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects are those in the original model, of features that pruning keeps; predictions the local model's."""
    monkeypatch.setattr("cltjax.replacement.validation.AT_ONCE", 2)
    local = local_of("llava", tmp_path, **JUMP)
    graph = attribute(local, likeliest(local))
    found = measured(local, graph, 5, np.random.default_rng(2))
    pruned = prune(graph).graph
    kept = [i for i in graph.of(FEATURE) if graph.ids()[i] in set(pruned.ids())]
    assert kept_features(graph).tolist() == kept
    rng = np.random.default_rng(2)
    chosen = np.sort(rng.choice(kept, 5, replace=False))
    values = zip(*(part[chosen].tolist() for part in (*graph.nodes[1:4], graph.nodes.value)), strict=True)
    cuts = [Cut(*one) for one in values]
    real, said = original_inputs(local, cuts), local_inputs(local, cuts)
    expected = correlations(graph, chosen, pre_activation_changes(local, graph, real), rng)
    assert all(found[key] == pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in expected.items())
    other = correlations(graph, chosen, pre_activation_changes(local, graph, said), np.random.default_rng(0))
    assert abs(other["spearman", "all"] - expected["spearman", "all"]) > 1e-3
    for key, value in by_depth(cuts, real, said).items():
        assert found[key] == pytest.approx(value, rel=1e-3)
    assert found["error", 1] != pytest.approx(by_depth(cuts, said, real)["error", 1] / 2, rel=1e-3)
    assert found["square", 1] == pytest.approx(by_depth(cuts, real, said)["square", 1], rel=1e-3)


def test_patches_are_taken_out(tmp_path: Path) -> None:
    local = local_of("llava", tmp_path)
    graph = attribute(local, likeliest(local))

    class Last:
        """Draws the last ones."""

        def choice(self, places: np.ndarray, n: int, replace: bool) -> np.ndarray:
            return places[-n:]

    found = patch_drops(local, graph, Last())  # type: ignore[arg-type]
    places = (local.batch["input_ids"][0] == local.vlm.image_id).nonzero()[:, 0].numpy()
    own = local.logits.log_softmax(-1)
    ranked = places[np.argsort(-graph.influence()[graph.of(EMBEDDING)][places], kind="stable")]
    for key, some in (
        (("drop", "all"), places),
        (("drop", "ranked", 1 / 6), ranked[:3]),
        (("drop", "random", 1 / 6), places[-3:]),
    ):
        entering = local.entering.like([one.clone() for one in local.entering.tensors()])
        entering.embedded[0][some] = entering.embedded[0][places].mean(0)
        encoded = dict(local.batch)
        with torch.no_grad():
            seen = []
            handle = local.vlm.layers[0].register_forward_pre_hook(
                lambda _, args, kwargs, x=entering.embedded[0]: ((x[None], *args[1:]), kwargs), with_kwargs=True
            )
            seen.append(local.vlm.model(**encoded).logits[0, -1].log_softmax(-1))  # pyright: ignore
            handle.remove()
        assert found[key] == pytest.approx(float(own.max() - seen[0][own.argmax()]), abs=1e-4)
    words = local_of("llava", tmp_path / "words", images=False)
    assert patch_drops(words, attribute(words, likeliest(words)), np.random.default_rng(0)) == {}


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "examples/shapes/model"
    random_clt(tmp_path / "clt", load(model, device="cpu"))
    (tmp_path / "names.json").write_text(json.dumps({f"0:{i}": "B=wood" for i in range(31)} | {"1:1": "C"}))
    config = GraphsConfig(
        tmp_path / "clt", model, 3, cuts=5, labels=tmp_path / "names.json", through="B=", device="cpu"
    )
    found = validate(config)
    assert json.loads((tmp_path / "clt/graphs-shapes.json").read_text()) == json.loads(json.dumps(found))
    assert found["counts"]["prompts"] == 3
    for figure in (*found["scores"].values(), found["through"]):
        assert 0 < figure["low"] <= figure["value"] <= figure["high"] < 1
    assert set(found["spearman"]) == {"all", "direct", "multi-hop", "permuted", "of one source"} and set(
        found["perturbed"]
    ) <= set("12345")
    assert all(-1 <= one["cosine"]["value"] <= 1 for one in found["perturbed"].values())
    assert "completeness" in capsys.readouterr().out
    clt, names = tmp_path / "clt", tmp_path / "names.json"
    for refused, said in (
        (GraphsConfig(clt, model, 0), "--graphs 0"),
        (GraphsConfig(clt, model, cuts=1), "--cuts 1"),
        (GraphsConfig(clt, model, through="D=", labels=names), "no feature in --labels"),
        (GraphsConfig(clt, model, through="B="), "with --labels"),
    ):
        with pytest.raises(UserError, match=said):
            validate(refused)


def test_intervals_are_over_images() -> None:
    columns = [{"prompts": 1.0, "features": 3.0, "through": value} for value in (0.1, 0.5, 0.9, 0.2)]
    for column in columns:
        column |= {(kind, name): 1.0 for kind in ("score",) for name in ("replacement", "completeness")}  # type: ignore[misc]
        column |= {
            (kind, name): 1.0
            for kind in ("spearman", "defined", "pairs")
            for name in ("all", "direct", "multi-hop", "permuted")
        }  # type: ignore[misc]
        column |= {"of one source": 1.0, "sources": 1.0}
    apart, together = (summary(columns, units, 0)["through"] for units in ("abcd", "aabb"))
    assert apart["value"] == pytest.approx(0.425) and together["value"] == pytest.approx(0.425)
    assert (together["low"], together["high"]) == (pytest.approx(0.3), pytest.approx(0.55))
    assert apart["low"] < 0.3 and apart["high"] > 0.55
