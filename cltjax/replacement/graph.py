"""An attribution graph: nodes, signed edges, what matters in it, and its file.

Nodes are active features, errors (layer x position), embeddings (words and image patches) and logits. Row t, column s
of `edges` is what s adds to t's pre-activation or logit. Influence, pruning and scores are circuit-tracer's (graph.py
of decoderesearch/circuit-tracer 0.4.1; Anthropic, "Circuit Tracing", 2025, "graph pruning"):

    A_hat[t, s] = |edges[t, s]| / sum over s of |edges[t, s]|
    influence   = w (A_hat + A_hat^2 + ...)          w: the logits' probabilities
    replacement   share of the influence that ends in embeddings, of what ends in embeddings and in errors
    completeness  mean over nodes, by influence + w, of the share of in-edges that are not from errors

Two things are ours. Edges from features that a graph leaves out (attribution.py, max_nodes) stay in the sums, as
`rest`: what was not looked at is not shared out among what was. And all edges go from a lower layer to a higher one, so
that influence is one pass over the layers, exact.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.sparse import csr_array

from cltjax.errors import UserError
from cltjax.files import write_json, write_whole

FEATURE, ERROR, EMBEDDING, LOGIT = range(4)
KINDS = ("feature", "error", "embedding", "logit")
VERSION = 1
TINY = float(np.finfo(float).tiny)
ARRAYS, ABOUT = "graph.safetensors", "about.json"


class Nodes(NamedTuple):
    """An array [N] a field. Features come first, then errors, embeddings, logits, each by layer, position, number.

    kind: of KINDS. layer: -1 of embeddings, n_layers of logits. number: the feature's within its layer; the token of an
    embedding or logit, -1 for what is not one token; -1 of errors. value: a feature's activation, a logit's weight,
    else 0.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    number: np.ndarray
    value: np.ndarray

    def at(self, chosen: np.ndarray) -> "Nodes":
        return Nodes(*(one[chosen] for one in self))


@dataclass(frozen=True)
class Graph:
    """edges [N, N] float32; rest [N], the sum of |edges| into a node from features that are none of the nodes; weights
    [N], of what the graph explains, else 0; total and bias [N]: a row's pre-activation or logit, and the part of it
    that comes from biases (NaN where a node has no row). about: model, prompt, tokens, settings, names of logits."""

    nodes: Nodes
    edges: csr_array
    rest: np.ndarray
    weights: np.ndarray
    total: np.ndarray
    bias: np.ndarray
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.weights)

    def of(self, kind: int) -> np.ndarray:
        """Indices of the nodes of a kind."""
        return np.flatnonzero(self.nodes.kind == kind)

    def features(self) -> list[tuple[int, int]]:
        """(layer, number) of the features, each once."""
        chosen = self.of(FEATURE)
        pairs = zip(self.nodes.layer[chosen].tolist(), self.nodes.number[chosen].tolist(), strict=True)
        return list(dict.fromkeys(pairs))

    def inputs(self) -> np.ndarray:
        """[N] the sum of each node's absolute in-edges, those from features that are not in the graph included."""
        return abs(self.edges).sum(1) + self.rest

    def shares(self) -> csr_array:
        """A_hat."""
        sums = self.inputs()
        return csr_array(abs(self.edges).multiply((1 / np.where(sums > 0, sums, 1.0))[:, None]))

    def influence(self) -> np.ndarray:
        """[N] of each node on what the graph explains."""
        return influence(self.shares(), self.weights, self.nodes.layer)

    def scores(self) -> dict[str, float]:
        """Replacement and completeness (see the module)."""
        shares = self.shares()
        found = influence(shares, self.weights, self.nodes.layer)
        is_error = self.nodes.kind == ERROR
        words, errors = found[self.nodes.kind == EMBEDDING].sum(), found[is_error].sum()
        from_errors = shares @ is_error.astype(shares.dtype)
        size = found + self.weights
        # what was not looked at is not explained either
        left_out = self._share_left_out() @ size
        return {
            "replacement": _share(words, words + errors + left_out),
            "completeness": _share((1 - from_errors - self._share_left_out()) @ size, size.sum()),
        }

    def _share_left_out(self) -> np.ndarray:
        sums = self.inputs()
        return self.rest / np.where(sums > 0, sums, 1.0)

    def kept(self, nodes: np.ndarray, edges: csr_array | None = None) -> Self:
        """The graph of some of its nodes [n], indices in order, with these edges [N, N] instead of its own."""
        chosen = csr_array((self.edges if edges is None else edges)[nodes][:, nodes])
        parts = {name: getattr(self, name)[nodes] for name in ("rest", "weights", "total", "bias")}
        return replace(self, nodes=self.nodes.at(nodes), edges=chosen, **parts)

    def ids(self) -> list[str]:
        """A name of each node; circuit-tracer's, but for errors, whose names are features' there."""
        last = int(self.about["n_layers"]) + 1
        spelled = []
        logits = iter(range(len(self)))
        for kind, layer, position, number in zip(*(one.tolist() for one in self.nodes[:4]), strict=True):
            if kind == FEATURE:
                spelled.append(f"{layer}_{number}_{position}")
            elif kind == ERROR:
                spelled.append(f"error_{layer}_{position}")
            elif kind == EMBEDDING:
                spelled.append(f"E_{number}_{position}")
            else:
                place = next(logits)
                spelled.append(f"{last}_{number if number >= 0 else f'contrast{place}'}_{position}")
        return spelled


def _share(part: float, whole: float) -> float:
    """0 where there is no whole: nothing flows."""
    return float(part / whole) if whole > 0 else 0.0


def influence(shares: csr_array, weights: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """w (A + A^2 + ...) [N] of A_hat [N, N] whose edges go from lower layers to higher ones."""
    found = np.zeros(len(weights))
    filled = np.diff(shares.indptr) > 0
    for one in np.unique(layer[filled])[::-1]:
        rows = np.flatnonzero(filled & (layer == one))
        found += (weights[rows] + found[rows]) @ shares[rows]
    return found


def influence_of(shares: csr_array, sources: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """[N, n] of n nodes on all others: columns of A + A^2 + ... of A_hat [N, N]."""
    places = np.arange(len(sources))
    found = np.zeros((len(layer), len(sources)))
    found[sources, places] = 1.0
    filled = np.diff(shares.indptr) > 0
    for one in np.unique(layer[filled]):
        rows = np.flatnonzero(filled & (layer == one))
        found[rows] += shares[rows] @ found
    found[sources, places] -= 1.0
    return found


def share_through(graph: Graph, nodes: np.ndarray) -> float:
    """Of the influence that embeddings have on what is explained, the share that passes through these nodes [n]."""
    shares, words = graph.shares(), graph.of(EMBEDDING)
    past = csr_array(shares.multiply(~np.isin(np.arange(len(graph)), nodes)[:, None]))
    whole, rest = (influence(one, graph.weights, graph.nodes.layer)[words].sum() for one in (shares, past))
    return _share(whole - rest, whole)


class Pruned(NamedTuple):
    """graph: what is left. Of its nodes in the graph that it was, [n] each: share, cumulative, of all nodes' influence
    their own share, and that of them and those with more together; inputs, the sum of their absolute in-edges."""

    graph: Graph
    share: np.ndarray
    cumulative: np.ndarray
    inputs: np.ndarray


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98) -> Pruned:
    """Leave out nodes and edges with little influence, as circuit-tracer does.

    Kept are the nodes that have most influence and node_share of it together, all embeddings and logits; then of the
    edges between these those that carry most, edge_share of it together; then no feature without an edge in and one
    out, and no error without one out. UserError for shares outside of 0 to 1.
    """
    check_shares(node_share, edge_share)
    found = graph.influence()
    kind = graph.nodes.kind
    always = (kind == EMBEDDING) | (kind == LOGIT) | (graph.weights > 0)
    keep = (found >= _least(found, node_share)) | always
    share = found / max(found.sum(), TINY)
    order = np.argsort(-found, kind="stable")
    cumulative = np.empty_like(found)
    cumulative[order] = np.cumsum(share[order])
    mask = csr_array(graph.edges.multiply(keep[:, None]).multiply(keep[None, :]))
    left = replace(graph, edges=mask, rest=np.zeros_like(graph.rest))  # circuit-tracer's: shares of what is kept
    shares = left.shares()
    flow = influence(shares, graph.weights, graph.nodes.layer) + graph.weights
    carried = csr_array(shares.multiply(flow[:, None]))
    carried.eliminate_zeros()
    if carried.nnz:
        carried.data[carried.data < _least(carried.data, edge_share)] = 0
        carried.eliminate_zeros()
    edges = csr_array(graph.edges.multiply(carried > 0))
    while True:
        into, out = (abs(edges).sum(axis) > 0 for axis in (1, 0))
        alive = keep & (always | (out & (into | (kind == ERROR))))
        if (alive == keep).all():
            break
        keep = alive
        edges = csr_array(edges.multiply(keep[:, None]).multiply(keep[None, :]))
    edges.eliminate_zeros()
    nodes = np.flatnonzero(keep)
    return Pruned(graph.kept(nodes, edges), share[nodes], cumulative[nodes], graph.inputs()[nodes])


def check_shares(node_share: float, edge_share: float) -> None:
    """UserError for what are no shares."""
    for name, share in (("node", node_share), ("edge", edge_share)):
        if not 0 <= share <= 1:
            raise UserError(f"--{name}-threshold {share}: must be from 0 to 1")


def _least(values: np.ndarray, share: float) -> float:
    """The smallest of the largest values that make up a share of the sum."""
    ordered = np.sort(values)[::-1]
    sums = np.cumsum(ordered)
    place = np.searchsorted(sums / max(sums[-1], TINY), share)
    return float(ordered[min(place, len(ordered) - 1)])


# Files -------------------------------------------------------------------------------------------------------


def save_graph(graph: Graph, folder: Path) -> None:
    """folder/graph.safetensors and folder/about.json; each is whole or not there."""
    arrays = {f"nodes.{name}": value for name, value in zip(Nodes._fields, graph.nodes, strict=True)}
    arrays |= {f"edges.{name}": getattr(graph.edges, name) for name in ("data", "indices", "indptr")}
    arrays |= {name: getattr(graph, name) for name in ("rest", "weights", "total", "bias")}
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    write_whole(folder / ARRAYS, lambda temporary: temporary.write_bytes(content))
    write_json(folder / ABOUT, {"version": VERSION, **graph.about})


def load_graph(folder: Path) -> Graph:
    """UserError where the folder holds no whole graph."""
    try:
        about: Mapping[str, Any] = json.loads((folder / ABOUT).read_text())
        found = load_file(folder / ARRAYS)
        if about.get("version") != VERSION:
            raise UserError(f"{folder} is a graph of version {about.get('version')}; this program reads {VERSION}")
        nodes = Nodes(*(found[f"nodes.{name}"] for name in Nodes._fields))
        n = len(nodes.kind)
        edges = csr_array(tuple(found[f"edges.{name}"] for name in ("data", "indices", "indptr")), shape=(n, n))
        rest = {name: found[name] for name in ("rest", "weights", "total", "bias")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} holds no whole graph: {error}; cltjax graph makes one") from error
    return Graph(nodes, edges, about={name: value for name, value in about.items() if name != "version"}, **rest)
