"""Edges of an attribution graph: what each feature, error and embedding adds to other features and to logits.

    local = linearise(vlm, clt, vlm.encode(prompt, image))
    graph = attribute(local, likeliest(local), max_nodes=1000)

An edge is a_s W_dec_s . J . w_t: what a source adds, through the frozen model J (cltjax/replacement/local.py), to the
*pre-activation* of a feature t, w_t its encoder row, or to a logit less the mean of all logits. Edges are signed, exact
and add up: in-edges of a node and the paths of biases are its pre-activation or logit.

All edges into a node are one backward pass: the gradient g [P, D] of the node at each layer's write and at the
embeddings, times what is written there. Nodes of a layer are taken many at a time (one batched gradient), and their
edges to the features of a source are one matrix product a position, g [nodes, D] by the decoder vectors [D, K] of what
is active there. Decoder vectors are gathered for a block of positions at a time and never held for all.

Where there are more features than `max_nodes`, nodes are chosen as the graph grows, as in circuit-tracer: the logits
first, then always those with most influence by the edges so far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from cltjax.errors import UserError
from cltjax.replacement.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, Nodes
from cltjax.replacement.local import Local
from cltjax.replacement.targets import Targets

MEMORY = 4.0  # GB that gradients, decoder vectors and edges of the nodes in hand take together
MOST_ROWS = 512  # nodes in a backward pass
GROWTH = 256  # features that are chosen by the same influences

Report = Callable[[int, int], None]
"""Called with how many nodes have their edges, and how many will."""


def attribute(
    local: Local,
    targets: Targets,
    max_nodes: int | None = None,
    memory: float = MEMORY,
    report: Report = lambda done, of: None,
) -> Graph:
    """The graph of what `targets` name, with at most `max_nodes` features; None: with all that are active.

    memory: GB for what is in hand at a time, and as much again for edges while the graph grows: where rows of all
    active features do not fit, each keeps its largest edges, and the sum of the others. Time and memory grow with
    features in the graph x active features.
    """
    if max_nodes is not None and max_nodes < 1:
        raise UserError(f"--max-nodes {max_nodes}: must be at least 1")
    check_memory(memory)
    sources = Sources.of(local)
    backward = Backward(local, sources, memory)
    n_features, top = len(sources.layer), local.vlm.n_layers
    weights = np.zeros(len(sources))
    explained = sources.numbers_of(targets)
    weights[explained] = targets.feature_weights
    if not len(targets.weights):  # what is above the features that are explained plays no part
        top = int(sources.layer[explained].max())
    able = sources.layer < top
    able[explained] = True
    most = min(int(able.sum()), n_features if max_nodes is None else max(max_nodes, len(explained)))
    n_rows = len(targets.weights) + most
    others = (sources.n_layers + 1) * sources.length  # errors and embeddings
    rows = Rows(sources, max(1, int(memory * 1e9 / 8 / n_rows) - others))
    for some in pieces(np.arange(len(targets.weights)), backward.at_once(local.vlm.n_layers)):
        rows.add(local.vlm.n_layers, -1 - some, *backward.of_logits(targets.directions[torch.from_numpy(some)]))
    chosen = np.zeros(n_features, bool)
    while (left := most - int(chosen.sum())) > 0:
        free = able & ~chosen
        new = np.flatnonzero(free)
        if left < len(new):
            found = (rows.influence(weights, targets.weights) + weights)[new]
            new = new[np.argsort(-found, kind="stable")[: min(GROWTH, left)]]
        for layer in np.unique(sources.layer[new])[::-1]:
            ids = np.sort(new[sources.layer[new] == layer])
            for some in pieces(ids, backward.at_once(int(layer))):
                rows.add(int(layer), some, *backward.of_features(int(layer), some))
                report(rows.count, n_rows)
        chosen[new] = True
    return assembled(local, targets, rows, chosen, weights)


def pieces(ids: np.ndarray, most: int) -> list[np.ndarray]:
    """Ids in order, in pieces of about one size, at most so many each."""
    return np.array_split(ids, -(-len(ids) // most)) if len(ids) else []


def check_memory(memory: float) -> None:
    """UserError for what is no amount of memory."""
    if not memory > 0:
        raise UserError(f"--memory {memory}: must be above 0 GB")


@dataclass(frozen=True)
class Sources:
    """All that edges may come from, in the order of columns: active features, errors, embeddings.

    layer, position, number, value [n]: of the active features, by layer, position, number. place: by source layer
    [P, K], the column of each place of `local.features`, -1 where none is active. length, n_layers: P and L.
    """

    layer: np.ndarray
    position: np.ndarray
    number: np.ndarray
    value: np.ndarray
    place: dict[int, Tensor]
    length: int
    n_layers: int

    def __len__(self) -> int:
        return len(self.layer) + (self.n_layers + 1) * self.length

    @classmethod
    def of(cls, local: Local) -> "Sources":
        columns: list[tuple[np.ndarray, ...]] = []
        place, count = {}, 0
        for source in local.clt.sources:
            values, indices = (one.cpu().numpy() for one in local.features[source])
            position, slot = np.nonzero(values > 0)
            number = indices[position, slot]
            order = np.lexsort((number, position))
            position, slot, number = position[order], slot[order], number[order]
            columns.append((np.full(len(order), source), position, number, values[position, slot]))
            found = np.full(values.shape, -1)
            found[position, slot] = count + np.arange(len(order))
            place[source] = torch.from_numpy(found)
            count += len(order)
        layer, position, number, value = (np.concatenate(one) for one in zip(*columns, strict=True))
        return cls(layer, position, number, value, place, local.length, local.vlm.n_layers)

    def numbers_of(self, targets: Targets) -> np.ndarray:
        """Columns of the features that are to be explained. UserError where one is not active."""
        found = []
        for layer, position, number in targets.features:
            at = np.flatnonzero((self.layer == layer) & (self.position == position) & (self.number == number))
            if len(at) == 0:
                raise UserError(f"feature {layer}:{number} is not active at position {position} of this prompt")
            found.append(int(at[0]))
        return np.array(found, dtype=int)

    def error(self, layer: int) -> slice:
        """Columns of a layer's errors, by position."""
        first = len(self.layer) + layer * self.length
        return slice(first, first + self.length)

    @property
    def embeddings(self) -> slice:
        return slice(len(self) - self.length, len(self))


class Backward:
    """Edges into nodes, many at a time: dense [n, columns] float32, with [n] of the nodes' values and of biases."""

    def __init__(self, local: Local, sources: Sources, memory: float):
        self._local, self._sources, self._memory = local, sources, memory * 1e9
        self._leaves, self._read = local.leaves, local.read

    def at_once(self, layer: int) -> int:
        """How many nodes of a layer fit into half of the memory."""
        width = self._local.vlm.d_model
        gradients = self._sources.length * width * (2 * layer + 6)  # by leaf, again inside of attention, and stacked
        return max(1, min(MOST_ROWS, int(self._memory / 2 / 4 / (gradients + 2 * len(self._sources)))))

    def of_features(self, layer: int, columns: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Of features of a source layer, by their columns."""
        clt, site = self._local.clt, self._read.sites[layer]
        numbers = torch.from_numpy(self._sources.number[columns]).to(clt.device)
        position = torch.from_numpy(self._sources.position[columns]).to(site.device)
        rows, b_enc = clt.encoder_rows(layer, numbers).to(site.device), clt.encoder_bias(layer, numbers).cpu()
        start = torch.zeros(len(columns), *site.shape, dtype=site.dtype, device=site.device)
        start[torch.arange(len(columns), device=site.device), position] = rows.to(site.dtype)
        total, bias = (
            (rows * one.sites[layer].detach()[position].float()).sum(-1).cpu() + b_enc for one in self._reads
        )
        return self._edges(site, start, layer, int(position.max()) + 1), total, bias

    def of_logits(self, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of directions [n, V] over the vocabulary."""
        local, head = self._local, self._read.head
        rows, own = local.head_rows(directions).to(head.device), local.head_bias(directions)
        total, bias = ((rows @ one.head.detach().to(rows.dtype)).cpu() + own for one in self._reads)
        return self._edges(head, rows.to(head.dtype), local.vlm.n_layers, local.length), total, bias

    @property
    def _reads(self) -> tuple:
        return self._read, self._local.biases

    def _edges(self, output: Tensor, start: Tensor, layer: int, end: int) -> Tensor:
        """start [n, ...]: gradients of the nodes by `output`, which layers before `layer` make; the nodes are at
        positions before `end`."""
        local, sources = self._local, self._sources
        embedded = {at: leaf for at, leaf in self._leaves.embedded.items() if at <= layer}
        leaves = [*embedded.values(), *self._leaves.written[:layer]]
        gradients = torch.autograd.grad(
            output, leaves, start, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        edges = torch.zeros(len(start), len(sources))
        for at, gradient in zip(embedded, gradients, strict=False):
            edges[:, sources.embeddings] += along(gradient, local.entering.embedded[at])
        writes = gradients[len(embedded) :]
        for at, gradient in enumerate(writes):
            edges[:, sources.error(at)] = along(gradient, local.errors[at])
        for source in local.clt.sources:
            if source + local.clt.description.offset < layer:
                self._from_features(edges, source, writes, end if local.causal else local.length)
        return edges

    def _from_features(self, edges: Tensor, source: int, writes: Sequence[Tensor], end: int) -> None:
        """Fill in the columns of a source's features at positions before `end`; at others they are 0."""
        clt = self._local.clt
        place = self._sources.place[source]
        values, indices = self._local.features[source]
        layers = [target for target in clt.wiring.targets_of(source) if target < len(writes)]
        for some in self._blocks(source, values.shape[1], end):
            shape = values[some].shape
            rows = clt.decoder_rows(source, indices[some].flatten()).unflatten(0, shape)  # [p, K, T, D]
            total: Tensor | None = None
            for slot, target in enumerate(layers):
                gradient = writes[target][:, some].transpose(0, 1)  # [p, n, D]
                vectors = rows[:, :, slot].transpose(1, 2).to(gradient.device, gradient.dtype)  # [p, D, K]
                total = gradient @ vectors if total is None else torch.baddbmm(total.to(gradient), gradient, vectors)
            assert total is not None
            weighed = (total.float() * values[some][:, None].to(total.device)).cpu()
            alive = place[some] >= 0
            edges[:, place[some][alive]] = weighed.transpose(0, 1)[:, alive]

    def _blocks(self, source: int, most: int, end: int) -> Iterator[slice]:
        """Positions before `end`, as many at a time as have decoder vectors that fit into a quarter of the memory."""
        clt = self._local.clt
        each = 8 * max(1, most) * len(clt.wiring.targets_of(source)) * self._local.vlm.d_model
        step = max(1, int(self._memory / 4 / each))
        for first in range(0, end, step):
            yield slice(first, min(first + step, end))


def along(gradients: Tensor, added: Tensor) -> Tensor:
    """gradients [n, P, D] and what was added [P, D] -> [n, P] float32: how much each position adds."""
    return torch.einsum("npd,pd->np", gradients, added.to(gradients.device, gradients.dtype)).float().cpu()


@dataclass
class Rows:
    """Rows of edges so far, by layer of the node that they lead to; logits have the layer above the last.

    limit: most edges of a row from features that are kept, its largest; of what is left out the sum is kept.
    """

    sources: Sources
    limit: int
    count: int = 0
    parts: dict[int, list["Part"]] = field(default_factory=dict)

    def add(self, layer: int, nodes: np.ndarray, edges: Tensor, total: Tensor, bias: Tensor) -> None:
        """nodes: columns of features; -1, -2, ... of logits."""
        dense = edges.numpy()
        sums = np.abs(dense).sum(1, dtype=np.float64)
        n = len(self.sources.layer)
        if self.limit < n:
            size = np.abs(dense[:, :n])
            least = np.partition(size, n - self.limit, axis=1)[:, n - self.limit]
            dense[:, :n][size < least[:, None]] = 0.0
        part = Part(nodes, sparse(dense), sums, total.double().numpy(), bias.double().numpy())
        self.parts.setdefault(layer, []).append(part)
        self.count += len(nodes)

    def influence(self, weights: np.ndarray, logit_weights: np.ndarray) -> np.ndarray:
        """[columns] of each source on what is explained, by the rows there are; weights [columns] of features."""
        found = np.zeros(len(self.sources))
        for layer in sorted(self.parts, reverse=True):
            for part in self.parts[layer]:
                is_logit = layer == self.sources.n_layers
                flow = logit_weights[-1 - part.nodes] if is_logit else weights[part.nodes] + found[part.nodes]
                found += (flow / np.where(part.sums > 0, part.sums, 1.0)) @ abs(part.edges)
        return found


def sparse(dense: np.ndarray) -> csr_array:
    """What csr_array makes of an array [n, m], without its detour over coordinates: half of the time."""
    there = dense != 0
    indptr = np.concatenate([[0], np.cumsum(there.sum(1))])
    columns = np.broadcast_to(np.arange(dense.shape[1], dtype=np.int32), dense.shape)
    return csr_array((dense[there], columns[there], indptr), shape=dense.shape)


class Part(NamedTuple):
    """Some rows: nodes [n], edges [n, columns], sums of all absolute edges, values, and the parts of biases [n]."""

    nodes: np.ndarray
    edges: csr_array
    sums: np.ndarray
    total: np.ndarray
    bias: np.ndarray


def assembled(local: Local, targets: Targets, rows: Rows, chosen: np.ndarray, weights: np.ndarray) -> Graph:
    """The graph of the chosen features [n], of which there are rows, and all errors, embeddings and logits."""
    sources, clt = rows.sources, local.clt
    length, n_layers = sources.length, sources.n_layers
    n_logits, features = len(targets.weights), np.flatnonzero(chosen)
    kept = np.concatenate([features, np.arange(len(sources.layer), len(sources))])
    size = len(kept) + n_logits
    place = np.full(len(sources), -1)
    place[kept] = np.arange(len(kept))

    ids = local.batch["input_ids"][0].cpu().numpy()
    every = np.arange(length)
    nodes = Nodes(
        np.repeat([FEATURE, ERROR, EMBEDDING, LOGIT], [len(features), n_layers * length, length, n_logits]),
        np.concatenate([sources.layer[features], np.repeat(np.arange(n_layers), length), np.full(length, -1),
                        np.full(n_logits, n_layers)]),
        np.concatenate([sources.position[features], np.tile(every, n_layers + 1), np.full(n_logits, length - 1)]),
        np.concatenate([sources.number[features], np.full(n_layers * length, -1), ids, targets.ids]),
        np.concatenate([sources.value[features], np.zeros((n_layers + 1) * length), targets.weights]),
    )  # fmt: skip

    def row_of(part: Part) -> np.ndarray:
        return np.where(part.nodes < 0, len(kept) - 1 - part.nodes, place[np.maximum(part.nodes, 0)])

    parts = sorted((part for some in rows.parts.values() for part in some), key=lambda part: row_of(part)[0])
    at = np.concatenate([row_of(part) for part in parts])
    stacked = csr_array(vstack([part.edges for part in parts], format="csr"))
    if (np.diff(at) < 0).any():  # only where a graph grew: all at once they come in order, and copies are large
        stacked = stacked[np.argsort(at)]
    if len(features) < len(sources.layer):
        stacked = stacked[:, kept]
    counts = np.zeros(size, dtype=np.int64)
    counts[np.sort(at)] = np.diff(stacked.indptr)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    edges = csr_array((stacked.data, stacked.indices, indptr), shape=(size, size))

    def by_node(values: list[np.ndarray], default: float) -> np.ndarray:
        found = np.full(size, default)
        found[at] = np.concatenate(values)
        return found

    sums = by_node([part.sums for part in parts], 0.0)
    rest = np.maximum(sums - abs(edges).sum(1), 0.0)
    rest[rest <= 1e-6 * sums] = 0.0  # rounding of the sums
    about = {
        "model": {"id": local.vlm.name, "revision": local.vlm.revision, "class": local.vlm.class_name},
        "n_layers": n_layers,
        "sources": list(clt.sources),
        "logits": list(targets.names),
        "ids": ids.tolist(),
        "active_features": len(sources.layer),
    }
    return Graph(
        Nodes(
            *(
                one.astype(kind)
                for one, kind in zip(nodes, (np.uint8, np.int16, np.int32, np.int32, np.float32), strict=True)
            )
        ),
        edges,
        rest,
        np.concatenate([weights[kept], targets.weights]),
        by_node([part.total for part in parts], np.nan),
        by_node([part.bias for part in parts], np.nan),
        about,
    )
