"""`cltjax graph`: the attribution graph of one prompt, as files and as a page."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capture import vlm as vlms
from capture.inputs import IMAGE
from capture.prompts import resolve_template
from capture.vlm import VLM, Encoded
from cltjax.errors import UserError
from cltjax.replacement import supernodes as groups_of
from cltjax.replacement.answer import open_image
from cltjax.replacement.asking import following_ids
from cltjax.replacement.attribution import MEMORY, attribute
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import FEATURE, KINDS, LOGIT, Graph, Pruned, prune, save_graph
from cltjax.replacement.graph_json import Shown, graph_json, png_uri
from cltjax.replacement.local import Local, linearise
from cltjax.replacement.panels import panels
from cltjax.replacement.patches import Rect, rectangles
from cltjax.replacement.pixels import gradient_times_input, overlay
from cltjax.replacement.targets import Targets, likeliest, parse
from cltjax.replacement.viewer.page import PAGE, write_page
from cltjax.store import ActivationStore

MODALITIES = ("text", "image", "special")


def explain(
    prompt: str,
    clt: Path,
    model: str,
    out: Path,
    image: Path | None = None,
    said: str = "",
    target: str = "",
    max_nodes: int | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    memory: float = MEMORY,
    store: Path | None = None,
    examples: int = 4,
    labels: Path | None = None,
    supernodes: Path | None = None,
    propose_supernodes: bool = False,
    group_patches: bool = False,
    pixels: bool = False,
    title: str = "",
    template: str = "chat",
    device: str = "auto",
    compute_dtype: str = "auto",
    other_revision: bool = False,
) -> Graph:
    """Write out/index.html, graph.json (what is shown), graph.safetensors and about.json (all of the graph); print what
    is in it. Arguments: `cltjax graph`'s options. UserError for what does not fit together.
    """
    names = read_labels(labels)
    picture = None if image is None else open_image(image)
    if pixels and picture is None:
        raise UserError("--pixels is about an image: name one with --image")
    vlm = vlms.load(model, compute_dtype, device)
    loaded = CLT.from_pretrained(clt, vlm.device, lazy=True)
    text = resolve_template(template, vlm.processor).render(prompt, image=picture is not None)
    encoded = vlm.encode(text, picture)
    if said:
        encoded = vlm.extend(encoded, following_ids(vlm, text, said))
    began = time.monotonic()
    local = linearise(vlm, loaded, encoded, other_revision)
    behind = text if not said else f"{text} {said}"
    targets = parse(local, behind, target) if target else likeliest(local)
    with Bar() as bar:
        graph = attribute(local, targets, max_nodes, memory, bar)
    pruned = prune(graph, node_threshold, edge_threshold)
    took = time.monotonic() - began
    scores = graph.scores()
    answer = vlm.decode(vlm.generate([encoded], 16)[0])

    positions = tokens_of(vlm, encoded, picture)
    groups = groups_of.patches(pruned.graph, image_places(positions)) if group_patches else []
    groups += groups_of.read_groups(supernodes, pruned.graph) if supernodes else []
    groups += groups_of.propose(pruned.graph, loaded) if propose_supernodes else []
    found: tuple[Mapping[str, Any], Mapping[str, str]] = ({}, {})
    if store is not None:
        found = panels(vlm, loaded, ActivationStore.open(store), features_of(pruned.graph), examples, labels=names)
    shown = Shown(
        slug=title or prompt[:60],
        prompt=prompt,
        positions=positions,
        about={
            "model": vlm.name,
            "clt": str(clt),
            "answer": answer,
            "targets": ", ".join(targets.names) or target,
            "scores": scores,
            "settings": {
                "max_nodes": max_nodes,
                "node_threshold": node_threshold,
                "edge_threshold": edge_threshold,
                "active_features": graph.about["active_features"],
                "said": said,
                "seconds": round(took, 1),
            },
        },
        image=picture,
        labels={name: spelled(one) for name, one in names.items()},
        panels=found[0],
        images=found[1],
        supernodes=groups,
        pixels=heat_maps(local, targets, pruned, positions, picture) if pixels and picture is not None else {},
    )
    save_graph(graph, out)
    write_page(graph_json(pruned, shown, node_threshold), out)
    say(graph, pruned, shown, took)
    print(f"{out / PAGE}: open it in a browser, or: cltjax view {out}")
    return graph


class Bar:
    """How many nodes have their edges; time left."""

    def __init__(self) -> None:
        columns = (TextColumn("edges"), BarColumn(), MofNCompleteColumn(), TextColumn("nodes"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("edges", total=None)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, of: int) -> None:
        self._bar.update(self._task, completed=done, total=of)


def read_labels(path: Path | None) -> dict[str, Any]:
    """Names of features by 'LAYER:FEATURE', as examples/shapes/labels.py writes them. UserError for another file."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--labels {path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f'--labels {path}: is no JSON object like {{"3:17": "red"}}')
    return found


def spelled(label: Any) -> str:
    """A label of a file, which may come with a score."""
    return str(label.get("label", "") if isinstance(label, dict) else label)


def tokens_of(vlm: VLM, encoded: Encoded, picture: Image.Image | None) -> list[dict[str, Any]]:
    """Of each position: its token, modality, and the rectangle of the image that it stands for."""
    ids = encoded["input_ids"][0].tolist()
    modality = vlm.modality(encoded["input_ids"])[0]
    rects: list[Rect | None] = [] if picture is None else rectangles(vlm, encoded, picture.size)
    left = iter(rects)
    return [
        {
            "token": vlm.tokenizer.decode([token]),
            "modality": MODALITIES[kind],
            "rect": next(left, None) if token == vlm.image_id else None,
        }
        for token, kind in zip(ids, modality, strict=True)
    ]


def image_places(positions: Sequence[Mapping[str, Any]]) -> list[int]:
    return [place for place, one in enumerate(positions) if one["modality"] == MODALITIES[IMAGE]]


def features_of(graph: Graph) -> list[tuple[int, int]]:
    """(layer, number) of a graph's features, each once."""
    chosen = graph.of(FEATURE)
    pairs = zip(graph.nodes.layer[chosen].tolist(), graph.nodes.number[chosen].tolist(), strict=True)
    return list(dict.fromkeys(pairs))


def heat_maps(
    local: Local, targets: Targets, pruned: Pruned, positions: Sequence[Mapping[str, Any]], picture: Image.Image
) -> dict[str, str]:
    """Pictures of gradient x input by the ids of logits, over the part of the image that patches cover."""
    rects = np.array([one["rect"] for one in positions if one["rect"] is not None])
    if not len(rects) or not len(targets.weights):
        raise UserError("--pixels is for logits, and images whose patches are known: leave it out")
    low, high = rects[:, :2].min(0), (rects[:, :2] + rects[:, 2:]).max(0)
    covered = (float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1]))
    ids = pruned.graph.ids()
    heat = gradient_times_input(local, targets.directions)
    return {
        ids[node]: png_uri(overlay(one, covered, picture.size))
        for node, one in zip(pruned.graph.of(LOGIT), heat, strict=True)
    }


def say(graph: Graph, pruned: Pruned, shown: Shown, took: float) -> None:
    """What the graph holds, in a few lines."""
    about = shown.about
    left = np.bincount(pruned.graph.nodes.kind, minlength=len(KINDS))
    kept = ", ".join(f"{n:,} {kind}s" for n, kind in zip(left, KINDS, strict=True))
    rows = len(graph.of(FEATURE))
    print(f"answer: {about['answer']}   explained: {about['targets']}")
    print(
        f"{rows:,} of {about['settings']['active_features']:,} active features have their edges, {graph.edges.nnz:,} "
        f"in all, in {took:.1f} s; after pruning: {kept}, {pruned.graph.edges.nnz:,} edges"
    )
    print(
        f"replacement {about['scores']['replacement']:.3f}   completeness {about['scores']['completeness']:.3f}   "
        "(unpruned; see docs/graphs.md)"
    )
