"""`cltjax graph` on the demo VLM: graph_json.py, supernodes.py, pixels.py and what they show."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capture.prompts import resolve_template
from capture.vlm import VLM, load
from cltjax.errors import UserError
from cltjax.replacement import supernodes
from cltjax.replacement.asking import following_ids
from cltjax.replacement.clt import CLT
from cltjax.replacement.explain import explain
from cltjax.replacement.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, load_graph
from cltjax.replacement.graph_json import cantor
from cltjax.replacement.local import linearise
from cltjax.replacement.pixels import gradient_times_input
from cltjax.replacement.targets import tokens
from test_replacement import random_clt

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = "examples/shapes/model"
PROMPT = "What color is the circle?"
SIDE = 6  # patches


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def made(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, dict[str, Any], Path]:
    """Of a random CLT, with heat maps, names and proposed groups."""
    folder = tmp_path_factory.mktemp("graph")
    random_clt(folder / "clt", vlm, n_targets=3)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    (folder / "names.json").write_text(json.dumps({f"0:{i}": {"label": f"<b>{i}"} for i in range(31)}))
    graph = explain(
        PROMPT,
        folder / "clt",
        MODEL,
        folder / "out",
        image=folder / "image.png",
        target="red,blue",
        max_nodes=60,
        labels=folder / "names.json",
        propose_supernodes=True,
        group_patches=True,
        pixels=True,
    )
    return graph, json.loads((folder / "out/graph.json").read_text()), folder


def chances(vlm: VLM, folder: Path, said: str = "") -> torch.Tensor:
    """[V] of the token behind the prompt, from the VLM itself."""
    text = resolve_template("chat", vlm.processor).render(PROMPT, image=True)
    encoded = vlm.encode(text, Image.open(folder / "image.png"))
    if said:
        encoded = vlm.extend(encoded, following_ids(vlm, text, said))
    with torch.no_grad():
        return vlm.model(**vlm.collate([encoded])).logits[0, -1].softmax(-1)  # pyright: ignore


def test_the_json_is_the_graph(made: tuple[Graph, dict[str, Any], Path], vlm: VLM) -> None:
    graph, found, folder = made
    likely = chances(vlm, folder)
    again = load_graph(folder / "out")
    np.testing.assert_array_equal(again.edges.toarray(), graph.edges.toarray())
    ids = graph.ids()
    place = {one: i for i, one in enumerate(ids)}
    assert len({node["node_id"] for node in found["nodes"]}) == len(found["nodes"])
    assert len(graph.of(FEATURE)) == 60
    kinds = {
        FEATURE: "cross layer transcoder",
        ERROR: "mlp reconstruction error",
        EMBEDDING: "embedding",
        LOGIT: "logit",
    }
    for node in found["nodes"]:
        i = place[node["node_id"]]
        kind, layer, position, number = (int(one[i]) for one in graph.nodes[:4])
        assert node["feature_type"] == kinds[kind] and node["ctx_idx"] == position
        if kind == FEATURE:
            assert node["feature"] == cantor(layer, number) and node["layer"] == str(layer)
            assert node["activation"] == pytest.approx(float(graph.nodes.value[i]))
            assert node["clerp"] == (f"<b>{number}" if layer == 0 else "")
        elif kind == LOGIT:
            assert node["layer"] == "7" and node["token_prob"] == pytest.approx(float(likely[number]), rel=1e-4)
    assert len(found["links"]) > 100
    for link in found["links"]:
        edge = graph.edges[place[link["target"]], place[link["source"]]]
        assert link["weight"] == pytest.approx(edge) and edge != 0
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [node["clerp"].split('"')[1] for node in logits] == ["red", "blue"]
    assert [node["is_target_logit"] for node in logits] == [True, False]
    total = graph.influence()
    for node in found["nodes"]:
        i = place[node["node_id"]]
        assert node["share"] == pytest.approx(total[i] / total.sum(), abs=1e-6)
        assert node["inputs"] == pytest.approx(abs(graph.edges[[i]]).sum() + graph.rest[i], rel=1e-5)
        if node["influence"] is not None:  # of all that have as much or more
            assert node["influence"] >= total[total > total[i]].sum() / total.sum() - 1e-6
            assert node["influence"] <= total[total >= total[i]].sum() / total.sum() + 1e-6


def test_what_goes_with_it(made: tuple[Graph, dict[str, Any], Path], vlm: VLM) -> None:
    graph, found, folder = made
    positions, about = found["positions"], found["metadata"]["cltjax"]
    assert [one["token"] for one in positions] == found["metadata"]["prompt_tokens"]
    rects = [one["rect"] for one in positions if one["modality"] == "image"]
    assert len(rects) == SIDE**2 and all(len(rect) == 4 for rect in rects)
    assert rects[1] == pytest.approx([1 / SIDE, 0, 1 / SIDE, 1 / SIDE])  # by rows
    assert all(one["rect"] is None for one in positions if one["modality"] != "image")
    assert about["scores"] == graph.scores() and about["targets"] == "red, blue"
    assert about["answer"] and found["metadata"]["prompt"] == PROMPT
    logits = [node["node_id"] for node in found["nodes"] if node["feature_type"] == "logit"]
    assert list(found["pixels"]) == logits and found["pixels"][logits[0]] != found["pixels"][logits[1]]
    groups = found["qParams"]["supernodes"]
    assert groups[0][0] == "image" and len(groups[0]) == 1 + SIDE**2
    clt = CLT.from_pretrained(folder / "clt")
    assert groups[1:] == supernodes.propose(
        load_pruned(found, graph), clt, {f"0:{i}": f"<b>{i}" for i in range(31)}, groups[:1]
    )


def load_pruned(found: dict[str, Any], graph: Graph) -> Graph:
    """The nodes that are shown."""
    shown = {node["node_id"] for node in found["nodes"]}
    return graph.kept(np.array([i for i, name in enumerate(graph.ids()) if name in shown]))


def test_groups(made: tuple[Graph, dict[str, Any], Path], tmp_path: Path) -> None:
    graph, _, _ = made
    ids, path = graph.ids(), tmp_path / "groups.json"
    for content, said in (
        ('{"a": 1}', "is no list"),
        ('[["a"]]', "is no list"),
        (json.dumps([["a", ids[0]], ["b", ids[0]]]), "has ids twice: " + ids[0]),
        (json.dumps([["a", ids[0]], ["a", ids[1]]]), "has groups twice: a"),
        ("[", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            supernodes.read_groups(path)
    groups = [["one", ids[0], ids[1], ids[7]], ["two", ids[3], ids[60]]]
    path.write_text(json.dumps(groups))
    assert supernodes.check_groups(supernodes.read_groups(path), graph, []) == groups
    for wrong, others, said in (
        ([["a", "9_9_9"]], [], "no feature, error or token"),
        ([["a", ids[-1]]], [], "no feature, error or token"),  # a logit
        ([["a", ids[0]]], [["b", ids[0]]], "in another group"),
    ):
        with pytest.raises(UserError, match=said):
            supernodes.check_groups(wrong, graph, others)


def test_features_that_point_the_same_way_are_proposed(made: tuple[Graph, dict[str, Any], Path]) -> None:
    graph, _, folder = made
    clt = CLT.from_pretrained(folder / "clt")
    proposed = supernodes.propose(graph, clt, {}, [])
    again = {tuple(members) for _, *members in proposed}
    nodes, ids = graph.nodes, graph.ids()
    several: dict[tuple[int, int], list[str]] = {}
    for i in graph.of(FEATURE):
        several.setdefault((int(nodes.layer[i]), int(nodes.number[i])), []).append(ids[i])
    repeated = [members for members in several.values() if len(members) > 1]
    assert repeated  # a feature at several positions is one group
    assert all(any(set(members) <= set(group) for group in again) for members in repeated)
    one, other = next(
        (i, j)
        for i in graph.of(FEATURE)
        for j in graph.of(FEATURE)
        if i < j and nodes.layer[i] == nodes.layer[j] and nodes.position[i] == nodes.position[j]
    )
    assert not any({ids[one], ids[other]} <= set(group) for group in again)
    clt._decoders[int(nodes.layer[one])][nodes.number[one]] = clt._decoders[int(nodes.layer[one])][nodes.number[other]]
    assert any({ids[one], ids[other]} <= set(group) for group in supernodes.propose(graph, clt, {}, []))
    # what is in a group already stays there; names are no two alike
    every = {f"{layer}:{number}": "same" for layer, number in graph.features()}
    left = supernodes.propose(graph, clt, every, [["same", *repeated[0]]])
    names = [name for name, *_ in left]
    assert len(set(names)) == len(names) and "same" not in names and "same (2)" in names
    assert not {one for _, *members in left for one in members} & set(repeated[0])


def test_the_token_behind_what_was_said(made: tuple[Graph, dict[str, Any], Path], vlm: VLM, tmp_path: Path) -> None:
    _, _, folder = made
    image = folder / "image.png"
    graph = explain(PROMPT, folder / "clt", MODEL, tmp_path / "out", image=image, said="red", max_nodes=5)
    best = chances(vlm, folder, "red").topk(len(graph.of(LOGIT)))
    assert graph.nodes.number[graph.of(LOGIT)].tolist() == best.indices.tolist()
    np.testing.assert_allclose(graph.weights[graph.of(LOGIT)], best.values, rtol=1e-4)
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert about["tokens"][-1] == "red" and about["said"] == "red" and about["answer"].startswith("red")
    assert about["prompt"] == PROMPT and about["clt"] == str(folder / "clt") and about["image"] == str(image)


def test_heat_maps_are_gradient_times_input(vlm: VLM, tmp_path: Path) -> None:
    """Summed over pixels: how fast the local model's logits grow with the picture."""
    encoded = vlm.encode(
        resolve_template("chat", vlm.processor).render(PROMPT, image=True),
        Image.fromarray(np.random.default_rng(3).integers(0, 255, (48, 48, 3), np.uint8)),
    )
    local = linearise(vlm, random_clt(tmp_path / "clt", vlm), encoded)
    targets = tokens(local, [5, 9])
    heat = gradient_times_input(local, targets.directions)
    assert heat.shape == (2, 48, 48)
    rows = local.head_rows(targets.directions)

    def logits(factor: float) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        keep = vlm.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        vlm.forward(local.batch | {"pixel_values": factor * local.batch["pixel_values"]})
        keep.remove()
        entering = local.entering.like([one.clone() for one in local.entering.tensors()])
        entering.embedded[0] = seen[0][0]
        with torch.no_grad():
            return rows @ local.run(entering).head

    step = 1e-2
    np.testing.assert_allclose(heat.sum((1, 2)), (logits(1 + step) - logits(1 - step)) / (2 * step), rtol=0.02)


def test_what_cannot_be(made: tuple[Graph, dict[str, Any], Path], tmp_path: Path) -> None:
    _, _, folder = made
    image, clt = folder / "image.png", folder / "clt"
    for options, said in (
        ({"pixels": True}, "--pixels is about an image"),
        ({"image": image, "target": "chartreuse stone"}, "--target"),
        ({"image": image, "target": ","}, "names nothing"),
        ({"image": image, "target": "x:1@2"}, "no LAYER:FEATURE@POSITION"),
        ({"image": image, "labels": tmp_path / "none.json"}, "--labels"),
        ({"image": image, "node_threshold": 1.5}, "--node-threshold 1.5"),
        ({"image": image, "memory": float("nan")}, "--memory nan"),
        ({"image": image, "target": "red - red"}, "a token less itself"),
        ({"image": image, "store": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(UserError, match=said):
            explain(PROMPT, clt, MODEL, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
