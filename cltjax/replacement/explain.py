"""`cltjax graph`: the attribution graph of one prompt, as files and as a page."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capture import vlm as vlms
from capture.prompts import resolve_template
from cltjax.errors import UserError
from cltjax.replacement import supernodes as groups_of
from cltjax.replacement.answer import open_image
from cltjax.replacement.asking import following_ids
from cltjax.replacement.attribution import MEMORY, attribute, check_memory
from cltjax.replacement.clt import CLT
from cltjax.replacement.graph import FEATURE, KINDS, Graph, Pruned, check_shares, prune, save_graph
from cltjax.replacement.graph_json import Shown, graph_json, image_places, tokens_of
from cltjax.replacement.labels import read_labels, texts
from cltjax.replacement.local import linearise
from cltjax.replacement.panels import hold, panels
from cltjax.replacement.pixels import check_pixels, heat_maps
from cltjax.replacement.targets import likeliest, parse
from cltjax.replacement.viewer.page import PAGE, write_page
from cltjax.store import ActivationStore


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
    image_dir: Path | None = None,
    examples: int = 4,
    max_rows: int | None = None,
    labels: Path | None = None,
    supernodes: Path | None = None,
    propose_supernodes: bool = False,
    group_patches: bool = False,
    pixels: bool = False,
    title: str = "",
    template: str = "chat",
    device: str = "auto",
    compute_dtype: str = "float32",
    lazy: bool = False,
    clt_dtype: str = "float32",
    other_revision: bool = False,
) -> Graph:
    """Write out/index.html, graph.json (what is shown), graph.safetensors and about.json (all of the graph); print what
    is in it. Arguments: `cltjax graph`'s options.

    UserError for what does not fit together: as far as it can be known before edges are computed. What is known only
    then (the ids of --supernodes) finds the whole graph saved.
    """
    check_shares(node_threshold, edge_threshold)
    check_memory(memory)
    names = read_labels(labels)
    given = groups_of.read_groups(supernodes) if supernodes else []
    picture = None if image is None else open_image(image)
    if pixels and picture is None:
        raise UserError("--pixels is about an image: name one with --image")
    vlm = vlms.load(model, compute_dtype, device)
    loaded = CLT.from_pretrained(clt, vlm.device, vlms.DTYPES[clt_dtype], lazy)
    held = None if store is None else hold(loaded, ActivationStore.open(store), max_rows=max_rows, where=clt)
    text = resolve_template(template, vlm.processor).render(prompt, image=picture is not None)
    encoded = vlm.encode(text, picture)
    if said:
        encoded = vlm.extend(encoded, following_ids(vlm, text, said))
    positions = tokens_of(vlm, encoded, picture)

    began = time.monotonic()
    local = linearise(vlm, loaded, encoded, other_revision)
    targets = parse(local, f"{text} {said}".rstrip(), target) if target else likeliest(local)
    if pixels:
        check_pixels(local, targets, positions)
    with Bar() as bar:
        graph = attribute(local, targets, max_nodes, memory, bar)
    answer = " ".join(part for part in (said, vlm.decode(vlm.generate([encoded], 16)[0])) if part)
    graph.about.update(
        {
            "clt": str(clt),
            "prompt": prompt,
            "text": text,
            "image": None if image is None else str(image),
            "said": said,
            "tokens": [one["token"] for one in positions],
            "answer": answer,
            "settings": {
                "target": target,
                "max_nodes": max_nodes,
                "memory": memory,
                "template": template,
                "dtype": str(vlm.dtype)[6:],
                "clt_dtype": clt_dtype,
            },
            "seconds": round(time.monotonic() - began, 1),
        }
    )
    save_graph(graph, out)
    pruned = prune(graph, node_threshold, edge_threshold)
    groups = groups_of.patches(pruned.graph, image_places(positions)) if group_patches else []
    groups += groups_of.check_groups(given, pruned.graph, groups)
    if propose_supernodes:
        groups += groups_of.propose(pruned.graph, loaded, texts(names), groups)
    found: tuple[Mapping[str, Any], Mapping[str, str]] = ({}, {})
    if held is not None:
        features = pruned.graph.features()
        found = panels(vlm, loaded, held.store, features, examples, labels=names, image_dir=image_dir, held=held)
    shown = Shown(
        slug=title or prompt[:60],
        prompt=prompt,
        positions=positions,
        about={
            "model": vlm.name,
            "clt": str(clt),
            "answer": answer,
            "targets": ", ".join(targets.names) or target,
            "scores": graph.scores(),
            "settings": graph.about["settings"]
            | {"node_threshold": node_threshold, "edge_threshold": edge_threshold, "said": said},
        },
        image=picture,
        labels=texts(names),
        panels=found[0],
        images=found[1],
        supernodes=groups,
        pixels=heat_maps(local, targets, pruned.graph, positions, picture) if pixels and picture else {},
    )
    write_page(graph_json(pruned, shown, node_threshold), out)
    say(graph, pruned, shown)
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


def say(graph: Graph, pruned: Pruned, shown: Shown) -> None:
    """What the graph holds, in a few lines."""
    about, scores = shown.about, shown.about["scores"]
    left = np.bincount(pruned.graph.nodes.kind, minlength=len(KINDS))
    kept = ", ".join(f"{n:,} {kind}s" for n, kind in zip(left, KINDS, strict=True))
    print(f"answer: {about['answer']}   explained: {about['targets']}")
    print(
        f"{len(graph.of(FEATURE)):,} of {graph.about['active_features']:,} active features have their edges, "
        f"{graph.edges.nnz:,} in all, in {graph.about['seconds']} s; after pruning: {kept}, "
        f"{pruned.graph.edges.nnz:,} edges"
    )
    print(
        f"replacement {scores['replacement']:.3f}   completeness {scores['completeness']:.3f}   "
        "(unpruned; see docs/graphs.md)"
    )
