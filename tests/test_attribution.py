"""cltjax/replacement/local.py and attribution.py: what is taken apart is the VLM, and edges add up."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capture.vlm import VLM, wrap
from cltjax.clt_directory import Activation
from cltjax.errors import UserError
from cltjax.replacement.attribution import attribute
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph
from cltjax.replacement.local import Local, linearise
from cltjax.replacement.targets import contrast, likeliest, of_features, tokens
from families import FAMILIES, IMAGE_ID, processor
from test_replacement import random_clt, without_images

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def family_vlm(name: str) -> VLM:
    return wrap(FAMILIES[name].model(), _Decoding(), name)


class _Decoding:
    """A processor as families.py has it, whose tokenizer can decode."""

    def __init__(self) -> None:
        given = processor()
        self.image_break_token_id, self.image_end_token_id = given.image_break_token_id, given.image_end_token_id
        self.tokenizer = given.tokenizer
        self.tokenizer.decode = lambda ids, **_: " ".join(f"w{one}" for one in ids)


def local_of(name: str, folder: Path, images: bool = True, number: int = 0, **changes: Any) -> Local:
    vlm = family_vlm(name)
    vlm.verify(vlm.collate([FAMILIES[name].sample(number)]))
    encoded = FAMILIES[name].sample(number) if images else without_images(FAMILIES[name])[number]
    return linearise(vlm, random_clt(folder / "clt", vlm, **changes), encoded)


def rows_of(graph: Graph) -> np.ndarray:
    return np.flatnonzero(~np.isnan(graph.total))


def raw_logits(local: Local) -> torch.Tensor:
    """[V] behind the prompt in the VLM as it is, before any soft cap."""
    seen: list[torch.Tensor] = []
    root: Any = local.vlm.model
    handle = root.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        root(**local.batch, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[-1]


CASES: list[dict[str, Any]] = [
    {"site": "mlp_in", "n_targets": 2},
    {"site": "resid_mid", "n_targets": 3},
    {
        "site": "resid_pre",
        "offset": 1,
        "n_targets": 2,
        "sources": (0, 1),
        "activation": Activation("topk", (5, 3), "topk"),
    },
    {"site": "mlp_in", "n_targets": 1, "sources": (0, 2), "activation": Activation("jumprelu", (), "jumprelu")},
]
WANT_IMAGES = [name for name in FAMILIES if name.startswith("paligemma")]


@pytest.mark.parametrize(
    ("name", "images"),
    [(name, images) for name in FAMILIES for images in (True, False) if images or name not in WANT_IMAGES],
)
def test_edges_add_up(name: str, images: bool, tmp_path: Path) -> None:
    case = CASES[list(FAMILIES).index(name) % len(CASES)]
    local = local_of(name, tmp_path, images, **case)
    own = raw_logits(local)
    graph = attribute(local, tokens(local, [3, 7, 11]))
    # the local model is the VLM
    head: Any = local.vlm.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    assert (head(local.read.head) - own).abs().max() <= 1e-4 * own.abs().max()
    # in-edges and the paths of biases are what was there
    rows = rows_of(graph)
    sums = graph.edges.sum(1)[rows] + graph.bias[rows]
    assert np.abs(sums - graph.total[rows]).max() <= 1e-4 * np.abs(graph.total[rows]).max()
    features, logits = graph.of(FEATURE), graph.of(LOGIT)
    assert len(features) > 20 and set(rows) == {*features, *logits}
    np.testing.assert_allclose(graph.total[features], graph.nodes.value[features], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(graph.total[logits], (own - own.mean())[[3, 7, 11]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(graph.weights[logits], local.logits.softmax(-1)[[3, 7, 11]], rtol=1e-4)
    patches = graph.of(EMBEDDING)[graph.nodes.number[graph.of(EMBEDDING)] == IMAGE_ID]
    assert (len(patches) > 0) == images
    if images:
        assert (abs(graph.edges[:, patches]).sum(0) > 0).all()


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_an_edge_is_what_changes(name: str, tmp_path: Path) -> None:
    """Without a source, the frozen model's pre-activations and logits are less by its edges."""
    local = local_of(name, tmp_path, n_targets=3)
    targets = likeliest(local, most=3)
    graph = attribute(local, targets)
    nodes, clt = graph.nodes, local.clt
    rng = np.random.default_rng(0)
    features = graph.of(FEATURE)
    for column in [*rng.choice(features, 5), *rng.choice(graph.of(ERROR), 3), *rng.choice(graph.of(EMBEDDING), 3)]:
        kind, layer, position, number = (int(one[column]) for one in nodes[:4])
        value = float(nodes.value[column])
        without = local.entering.like([one.clone() for one in local.entering.tensors()])
        if kind == FEATURE:
            rows = clt.decoder_rows(layer, torch.tensor([number]))[0]
            for target, row in zip(clt.wiring.targets_of(layer), rows, strict=True):
                without.written[target][position] -= value * row
        elif kind == ERROR:
            without.written[layer][position] -= local.errors[layer][position]
        else:
            for added in without.embedded.values():
                added[position] = 0
        with torch.no_grad():
            left = local.run(without)
        for row in [*rng.choice(features, 20), *graph.of(LOGIT)]:
            if nodes.kind[row] == LOGIT:
                direction = local.head_rows(targets.directions)[row - graph.of(LOGIT)[0]]
                change = direction @ (local.read.head.detach() - left.head)
            else:
                at = int(nodes.layer[row])
                direction = clt.encoder_rows(at, torch.tensor([int(nodes.number[row])]))[0]
                change = direction @ (local.read.sites[at].detach() - left.sites[at])[int(nodes.position[row])]
            assert float(change) == pytest.approx(graph.edges[row, column], rel=1e-3, abs=2e-4)


def test_the_first_word_is_constant_where_it_sees_only_itself(tmp_path: Path) -> None:
    for name, constant in (("llava", True), ("paligemma", False)):
        local = local_of(name, tmp_path / name)
        graph = attribute(local, likeliest(local))
        first = graph.nodes.position == 0
        assert (not first[graph.of(FEATURE)].any()) == constant
        assert (abs(graph.edges[:, graph.of(ERROR)[first[graph.of(ERROR)]]]).sum() == 0) == constant


@pytest.mark.parametrize("at_once", [1, 7])
def test_memory_does_not_change_a_graph(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = local_of("llava", tmp_path)
    targets = likeliest(local)
    whole = attribute(local, targets)
    monkeypatch.setattr("cltjax.replacement.attribution.MOST_ROWS", at_once)
    monkeypatch.setattr(
        "cltjax.replacement.attribution.Backward._blocks",
        lambda *given: iter([slice(0, min(5, given[-1])), slice(min(5, given[-1]), given[-1])]),
    )
    parts = attribute(local, targets)
    np.testing.assert_allclose(parts.edges.toarray(), whole.edges.toarray(), atol=1e-5)
    assert all((one == other).all() for one, other in zip(parts.nodes, whole.nodes, strict=True))


def test_a_graph_grows_by_influence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen one by one, each feature is the one with most influence by the edges that are known."""
    local = local_of("llava", tmp_path)
    targets = likeliest(local)
    whole = attribute(local, targets)
    monkeypatch.setattr("cltjax.replacement.attribution.GROWTH", 1)
    few = attribute(local, targets, max_nodes=6)
    n = len(whole.of(FEATURE))
    shares = whole.shares().toarray()
    known = np.zeros(len(whole), bool)
    known[whole.of(LOGIT)] = True
    chosen = []
    for _ in range(6):
        flow = np.zeros(len(whole))
        step = whole.weights.copy()
        while step.any():
            step = (step * known) @ shares
            flow += step
        flow[known] = -1
        best = int(np.argmax(flow[:n]))
        known[best] = True
        chosen.append(best)
    kept = sorted(chosen)
    ours = few.of(FEATURE)
    for name in ("layer", "position", "number"):
        assert (getattr(few.nodes, name)[ours] == getattr(whole.nodes, name)[kept]).all()
    columns = [*kept, *range(n, len(whole))]
    has_row = ~np.isnan(few.total)[:, None]
    expected = whole.edges.toarray()[np.ix_(columns, columns)] * has_row
    np.testing.assert_allclose(few.edges.toarray(), expected, atol=1e-5)
    # what is left out is in the sums
    sums = abs(whole.edges).sum(1)[columns]
    rows = rows_of(few)
    np.testing.assert_allclose((abs(few.edges).sum(1) + few.rest)[rows], sums[rows], rtol=1e-5)
    assert (few.rest[rows] > 0).any()


def test_little_memory_for_edges_keeps_the_largest(tmp_path: Path) -> None:
    local = local_of("llava", tmp_path)
    targets = tokens(local, [5])
    whole = attribute(local, targets)
    n = len(whole.of(FEATURE))
    others = len(whole) - n - 1  # errors and embeddings keep theirs
    few = attribute(local, targets, memory=8 * (others + 9.5) * (n + 1) / 1e9)  # nine a row
    counts = np.diff(few.edges[:, :n].tocsr().indptr)
    assert counts.max() == 9
    sums = abs(whole.edges).sum(1)
    np.testing.assert_allclose(abs(few.edges).sum(1) + few.rest, sums, rtol=1e-5, atol=1e-6)
    row = int(np.argmax(np.diff(whole.edges[:, :n].tocsr().indptr)))
    largest = np.sort(np.abs(whole.edges[[row], :n].toarray()[0]))[-9:]
    np.testing.assert_allclose(np.sort(np.abs(few.edges[[row], :n].toarray()[0]))[-9:], largest, rtol=1e-5)


def test_what_is_explained(tmp_path: Path) -> None:
    local = local_of("llava", tmp_path)
    both = attribute(local, tokens(local, [5, 9]))
    apart = attribute(local, contrast(local, 5, 9))
    first, second = both.of(LOGIT)
    difference = both.edges.toarray()[first] - both.edges.toarray()[second]
    np.testing.assert_allclose(apart.edges.toarray()[apart.of(LOGIT)[0]][: len(both) - 2], difference[:-2], atol=1e-4)
    assert apart.about["logits"] == ["w5 - w9"] and apart.weights[apart.of(LOGIT)] == 1
    top = both.of(FEATURE)[-1]
    name = tuple(int(getattr(both.nodes, part)[top]) for part in ("layer", "position", "number"))
    inner = attribute(local, of_features(local, [name]), max_nodes=3)  # type: ignore[list-item]
    assert len(inner.of(LOGIT)) == 0 and inner.weights[inner.of(FEATURE)].sum() == 1
    assert inner.influence().sum() > 0
    twice = attribute(local, of_features(local, [name, name]), max_nodes=3)  # type: ignore[list-item]
    assert twice.weights.sum() == 1
    assert len(tokens(local, [5, 9, 5]).ids) == 2
    others = both.of(FEATURE)[-3:]
    names = [tuple(int(getattr(both.nodes, part)[i]) for part in ("layer", "position", "number")) for i in others]
    assert attribute(local, of_features(local, names), max_nodes=1).weights.sum() == pytest.approx(1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="less itself"):
        contrast(local, 5, 5)
    with pytest.raises(UserError, match="not active"):
        attribute(local, of_features(local, [(0, 1, 10**6)]))
    with pytest.raises(UserError, match="no token 61"):
        tokens(local, [61])
    with pytest.raises(UserError, match="--max-nodes 0"):
        attribute(local, likeliest(local), max_nodes=0)
    with pytest.raises(UserError, match=r"--memory 0\.0"):
        attribute(local, likeliest(local), memory=0.0)


def test_the_likeliest_tokens(tmp_path: Path) -> None:
    local = local_of("llava", tmp_path)
    chances = local.logits.double().softmax(-1).sort(descending=True)
    for mass, most in ((0.95, 10), (0.3, 10), (0.5, 3), (0.0, 10)):
        n = next(n for n in range(1, 99) if n == most or chances.values[:n].sum() >= mass)
        assert likeliest(local, mass, most).ids == tuple(chances.indices[:n].tolist())


def test_one_token(tmp_path: Path) -> None:
    vlm = family_vlm("llava")
    local = linearise(vlm, random_clt(tmp_path / "clt", vlm), {"input_ids": torch.tensor([[7]])})
    graph = attribute(local, likeliest(local))
    assert len(graph.of(FEATURE)) == 0 and len(graph.of(LOGIT)) == 10  # it is constant
    sums = graph.edges.sum(1) + graph.bias
    np.testing.assert_allclose(sums[graph.of(LOGIT)], graph.total[graph.of(LOGIT)], rtol=1e-4, atol=1e-4)


def test_a_threshold_clt_of_another_model_is_refused(tmp_path: Path) -> None:
    vlm = family_vlm("llava")
    clt = random_clt(tmp_path / "clt", vlm)
    clt.description = dataclasses.replace(clt.description, combined="none")
    with pytest.raises(UserError, match="combined = none"):
        linearise(vlm, clt, FAMILIES["llava"].sample(0))
    assert isinstance(clt, CLT)
