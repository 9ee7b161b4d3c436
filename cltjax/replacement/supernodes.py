"""Supernodes: groups of a graph's nodes under one name, proposed or given, and the edges between groups.

Proposed are groups of features that are active together and point the same way: the same feature at several positions,
and features of a layer at one position whose decoder vectors have a cosine of at least ALIKE. Image patches make one
group of their own on request.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch.nn import functional

from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import FEATURE, Graph

ALIKE = 0.6

Groups = list[list[str]]
"""[name, id, id, ...] each, as circuit-tracer's qParams.supernodes."""


def propose(graph: Graph, clt: CLT, alike: float = ALIKE) -> Groups:
    """Groups of at least two features, by layer."""
    nodes, ids, groups = graph.nodes, graph.ids(), []
    for layer in clt.sources:
        here = np.flatnonzero((nodes.kind == FEATURE) & (nodes.layer == layer))
        if len(here) < 2:
            continue
        numbers, position = nodes.number[here], nodes.position[here]
        rows = clt.decoder_rows(layer, torch.from_numpy(numbers).to(clt.device)).flatten(1)
        cosines = functional.normalize(rows, dim=1) @ functional.normalize(rows, dim=1).T
        together = (position[:, None] == position[None]) & (cosines.cpu().numpy() >= alike)
        together |= numbers[:, None] == numbers[None]
        _, group = connected_components(together, directed=False)
        for one in np.unique(group):
            members = here[group == one]
            if len(members) > 1:
                names = dict.fromkeys(f"{layer}:{number}" for number in nodes.number[members].tolist())
                groups.append([" + ".join(names), *(ids[i] for i in members)])
    return groups


def patches(graph: Graph, image_positions: Sequence[int]) -> Groups:
    """All image patches as one group; none where there are fewer than two."""
    ids, places = graph.ids(), set(image_positions)
    found = [one for one in ids if one.startswith("E_") and int(one.rsplit("_", 1)[1]) in places]
    return [["image", *found]] if len(found) > 1 else []


def read_groups(path: Path, graph: Graph) -> Groups:
    """From a JSON file of [[name, id, id, ...], ...]. UserError for another form, ids that the graph does not have, and
    nodes in two groups."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--supernodes {path}: cannot be read: {error}") from error
    if not isinstance(found, list) or not all(
        isinstance(one, list) and len(one) > 1 and all(isinstance(part, str) for part in one) for one in found
    ):
        raise UserError(f"--supernodes {path}: is no list of [name, id, id, ...]")
    known, seen = set(graph.ids()), set()
    for name, *members in found:
        for one in members:
            if one not in known:
                raise UserError(f"--supernodes {path}: '{name}' has {one}, which is no node of the pruned graph")
            if one in seen:
                raise UserError(f"--supernodes {path}: {one} is in two groups")
            seen.add(one)
    return found


def merged(graph: Graph, groups: Groups) -> tuple[list[str], csr_array]:
    """Names [G] and edges [G, G] of groups and of the nodes that are in none: sums over members, signed.

    Edges inside of a group are left out.
    """
    ids = graph.ids()
    of = {one: name for name, *members in groups for one in members}
    names = list(dict.fromkeys(of.get(one, one) for one in ids))
    place = {name: i for i, name in enumerate(names)}
    group = np.array([place[of.get(one, one)] for one in ids])
    edges = graph.edges.tocoo()
    target, source = (group[one] for one in edges.coords)
    apart = target != source
    parts = edges.data[apart], (target[apart], source[apart])
    return names, csr_array(coo_array(parts, shape=(len(names), len(names))))
