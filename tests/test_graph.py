"""cltjax/replacement/graph.py against circuit-tracer's definitions, written out on dense matrices."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from cltjax.errors import UserError
from cltjax.replacement.graph import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    Nodes,
    influence_of,
    load_graph,
    prune,
    save_graph,
    share_through,
)

LAYERS, POSITIONS = 3, 5


def random_graph(seed: int = 0, rest: bool = False) -> Graph:
    """Thirteen features, every edge that can be, a third of them 0."""
    rng = np.random.default_rng(seed)
    layer = np.sort(rng.integers(0, LAYERS, 13))
    kinds = [FEATURE] * 13 + [ERROR] * LAYERS * POSITIONS + [EMBEDDING] * POSITIONS + [LOGIT] * 2
    layers = [*layer, *np.repeat(np.arange(LAYERS), POSITIONS), *[-1] * POSITIONS, LAYERS, LAYERS]
    n = len(kinds)
    nodes = Nodes(
        np.array(kinds, np.uint8),
        np.array(layers, np.int16),
        np.array([*rng.integers(0, POSITIONS, 13), *np.tile(np.arange(POSITIONS), LAYERS + 1), 4, 4], np.int32),
        np.array([*rng.permutation(99)[:13], *[-1] * LAYERS * POSITIONS, *range(POSITIONS), 7, -1], np.int32),
        rng.random(n).astype(np.float32),
    )
    edges = rng.normal(size=(n, n)) * (rng.random((n, n)) < 2 / 3)
    has_row = (nodes.kind == FEATURE) | (nodes.kind == LOGIT)
    edges *= has_row[:, None] & (nodes.layer[:, None] > nodes.layer[None]) & (nodes.kind != LOGIT)[None]
    weights = np.zeros(n)
    weights[-2:] = 0.7, 0.2
    left_out = rng.random(n) * has_row * rest
    total = np.where(has_row, 1.0, np.nan)
    return Graph(nodes, csr_array(edges.astype(np.float32)), left_out, weights, total, total / 2, {"n_layers": LAYERS})


def circuit_tracers(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """A_hat and the influences, by its power iteration; a node of its own stands for what is left out."""
    matrix = np.abs(graph.edges.toarray()).astype(float)
    matrix /= np.maximum((matrix.sum(1) + graph.rest)[:, None], 1e-10)
    found = np.zeros(len(graph))
    now = graph.weights @ matrix
    while now.any():
        found += now
        now = now @ matrix
    return matrix, found


@pytest.mark.parametrize("rest", [False, True])
def test_influence_and_scores(rest: bool) -> None:
    graph = random_graph(rest=rest)
    matrix, expected = circuit_tracers(graph)
    np.testing.assert_allclose(graph.influence(), expected, rtol=1e-5)
    words, errors = (expected[graph.of(kind)].sum() for kind in (EMBEDDING, ERROR))
    is_row = graph.edges.toarray().any(1)
    open_share = (1 - matrix.sum(1)) * is_row
    flow = expected + graph.weights
    scores = graph.scores()
    assert scores["replacement"] == pytest.approx(words / (words + errors + open_share @ flow), rel=1e-5)
    explained = 1 - matrix[:, graph.of(ERROR)].sum(1) - open_share
    assert scores["completeness"] == pytest.approx(explained @ flow / flow.sum(), rel=1e-5)
    assert 0.2 < scores["replacement"] < 0.9


def threshold(scores: np.ndarray, share: float) -> float:
    ordered = np.sort(scores)[::-1]
    place = np.searchsorted(np.cumsum(ordered) / ordered.sum(), share)
    return ordered[min(place, len(ordered) - 1)]


@pytest.mark.parametrize("shares", [(0.8, 0.98), (0.5, 0.9), (1.0, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize(("seed", "rest"), [(0, False), (1, False), (2, True)])
def test_pruning(seed: int, rest: bool, shares: tuple[float, float]) -> None:
    graph = random_graph(seed, rest)
    _, found = circuit_tracers(graph)
    fixed = graph.nodes.kind >= EMBEDDING
    mask = (found >= threshold(found, shares[0])) | fixed
    left = graph.edges.toarray() * mask[:, None] * mask[None]
    again, flow = circuit_tracers(dataclasses.replace(graph, edges=csr_array(left), rest=np.zeros(len(graph))))
    carried = again * (flow + graph.weights)[:, None]
    edge_mask = (carried >= threshold(carried.flatten(), shares[1])) & (left != 0)
    while True:
        alive = mask.copy()
        alive[~fixed] &= edge_mask[:, ~fixed].any(0)
        features = graph.of(FEATURE)
        alive[features] &= edge_mask[features].any(1)
        if (alive == mask).all():
            break
        mask = alive
        edge_mask = edge_mask & mask[:, None] & mask[None]
    pruned = prune(graph, *shares)
    kept = np.flatnonzero(mask)
    assert [getattr(pruned.graph.nodes, name).tolist() for name in ("kind", "layer", "position", "number")] == [
        getattr(graph.nodes, name)[kept].tolist() for name in ("kind", "layer", "position", "number")
    ]
    np.testing.assert_array_equal(pruned.graph.edges.toarray(), (left * edge_mask)[np.ix_(kept, kept)])
    np.testing.assert_allclose(pruned.share, found[kept] / found.sum(), rtol=1e-5)
    np.testing.assert_allclose(pruned.inputs, (np.abs(graph.edges.toarray()).sum(1) + graph.rest)[kept], rtol=1e-5)
    order = np.argsort(-found, kind="stable")
    cumulative = np.empty(len(found))
    cumulative[order] = np.cumsum(found[order]) / found.sum()
    np.testing.assert_allclose(pruned.cumulative, cumulative[kept], rtol=1e-5)
    assert len(kept) < len(graph) or shares == (1.0, 1.0)


def test_no_two_nodes_share_an_id() -> None:
    graph = random_graph()
    nodes = graph.nodes
    nodes.layer[0], nodes.number[0], nodes.position[0] = 0, 1, 3  # error 1 at 3 is "0_1_3" in circuit-tracer
    ids = graph.ids()
    assert len(set(ids)) == len(ids)
    assert ids[0] == "0_1_3" and ids[-2:] == ["4_7_4", "4_contrast1_4"] and ids[-3] == "E_4_4"


def test_there_and_back(tmp_path: Path) -> None:
    graph = random_graph(rest=True)
    save_graph(graph, tmp_path / "graph")
    again = load_graph(tmp_path / "graph")
    np.testing.assert_array_equal(again.edges.toarray(), graph.edges.toarray())
    for one, other in zip(
        (*again.nodes, again.rest, again.weights, again.total, again.bias),
        (*graph.nodes, graph.rest, graph.weights, graph.total, graph.bias),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert again.about == graph.about
    (tmp_path / "graph/graph.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="holds no whole graph"):
        load_graph(tmp_path / "graph")
    with pytest.raises(UserError, match="cltjax graph makes one"):
        load_graph(tmp_path / "none")


def test_shares_are_shares() -> None:
    for shares in ((1.1, 0.5), (0.5, -0.1)):
        with pytest.raises(UserError, match="must be from 0 to 1"):
            prune(random_graph(), *shares)


def test_influence_of_single_nodes() -> None:
    graph = random_graph()
    matrix, _ = circuit_tracers(graph)
    every = np.linalg.inv(np.eye(len(graph)) - matrix) - np.eye(len(graph))
    chosen = np.array([0, 5, 20, 30])
    np.testing.assert_allclose(influence_of(graph.shares(), chosen, graph.nodes.layer), every[:, chosen], atol=1e-6)


def test_the_share_that_passes_through() -> None:
    """Every path from an embedding to a logit, one by one."""
    graph = random_graph()
    matrix, _ = circuit_tracers(graph)
    features, words = set(graph.of(FEATURE).tolist()), set(graph.of(EMBEDDING).tolist())
    some = {2, 7, 11}

    def paths(node: int, weight: float, through: bool) -> tuple[float, float]:
        if node in words:
            return weight, weight * through
        found = [0.0, 0.0]
        for source in np.flatnonzero(matrix[node] if node in features or graph.weights[node] else []).tolist():
            for i, one in enumerate(paths(source, weight * matrix[node, source], through or node in some)):
                found[i] += one
        return found[0], found[1]

    whole, part = np.sum([paths(int(node), float(graph.weights[node]), False) for node in graph.of(LOGIT)], axis=0)
    assert share_through(graph, np.array(sorted(some))) == pytest.approx(part / whole, rel=1e-5)
    assert 0.05 < part / whole < 0.95
    assert share_through(graph, np.array([], int)) == 0
