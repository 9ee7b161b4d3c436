"""Supernodes: groups of a graph's nodes under one name, proposed or given. The page adds up the edges between them.

Proposed are groups of features that are active together and point the same way: the same feature at several positions,
and features of a layer at one position whose decoder vectors have a cosine of at least ALIKE. Image patches make one
group of their own on request.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch.nn import functional

from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import FEATURE, LOGIT, Graph

ALIKE = 0.6

Groups = list[list[str]]
"""[name, id, id, ...] each, as circuit-tracer's qParams.supernodes."""


def propose(graph: Graph, clt: CLT, labels: Mapping[str, str], given: Groups, alike: float = ALIKE) -> Groups:
    """Groups of at least two features, by layer, of those that are in none of the given ones; named by the labels (by
    'LAYER:FEATURE') of members that have one, and no two alike."""
    nodes, ids, groups = graph.nodes, graph.ids(), list[list[str]]()
    taken, names = {one for _, *members in given for one in members}, {name for name, *_ in given}
    free = np.array([one not in taken for one in ids])
    for layer in clt.sources:
        here = np.flatnonzero(free & (nodes.kind == FEATURE) & (nodes.layer == layer))
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
                keys = [f"{layer}:{number}" for number in nodes.number[members].tolist()]
                named = dict.fromkeys(labels[key] for key in keys if labels.get(key))
                name = plain = " + ".join(named or dict.fromkeys(keys))
                number = 1
                while name in names:
                    name, number = f"{plain} ({number + 1})", number + 1
                names.add(name)
                groups.append([name, *(ids[i] for i in members)])
    return groups


def patches(graph: Graph, image_positions: Sequence[int]) -> Groups:
    """All image patches as one group; none where there are fewer than two."""
    ids, places = graph.ids(), set(image_positions)
    found = [one for one in ids if one.startswith("E_") and int(one.rsplit("_", 1)[1]) in places]
    return [["image", *found]] if len(found) > 1 else []


def read_groups(path: Path) -> Groups:
    """From a JSON file of [[name, id, id, ...], ...]. UserError for another form, names or ids that are there twice."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--supernodes {path}: cannot be read: {error}") from error
    if not isinstance(found, list) or not all(
        isinstance(one, list) and len(one) > 1 and all(isinstance(part, str) for part in one) for one in found
    ):
        raise UserError(f"--supernodes {path}: is no list of [name, id, id, ...]")
    for what, all_ in (("groups", [name for name, *_ in found]), ("ids", [one for _, *some in found for one in some])):
        if twice := {one for one in all_ if all_.count(one) > 1}:
            raise UserError(f"--supernodes {path}: has {what} twice: {', '.join(sorted(twice))}")
    return found


def check_groups(groups: Groups, graph: Graph, others: Groups) -> Groups:
    """The groups, if their members are features, errors or embeddings of the graph and in none of the others; else
    UserError."""
    nodes = {one for one, kind in zip(graph.ids(), graph.nodes.kind.tolist(), strict=True) if kind != LOGIT}
    taken = {one for _, *members in others for one in members}
    for name, *members in groups:
        for one in members:
            if one not in nodes or one in taken:
                why = (
                    "which is in another group" if one in taken else "which is no feature, error or token that is shown"
                )
                raise UserError(f"--supernodes: '{name}' has {one}, {why}")
    return groups
