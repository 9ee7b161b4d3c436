"""The JSON that circuit-tracer's front end and Neuronpedia read (schema 1), and what this project's page reads besides.

Nodes and links are circuit-tracer's (frontend/graph_models.py of decoderesearch/circuit-tracer 0.4.1). `influence` is
cumulative there; `share` is a node's own, `inputs` the sum of its absolute in-edges, shown or not. More additions,
which other readers pass over: `positions` with the rectangles of image patches, `image`, `pixels`, `features` and
`images` (panels.py), `metadata.cltjax`.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from capture.inputs import IMAGE, Encoded
from capture.vlm import VLM
from cltjax.replacement.graph import EMBEDDING, ERROR, FEATURE, LOGIT, Pruned
from cltjax.replacement.patches import Rect, rectangles

MODALITIES = ("text", "image", "special")
TYPES = {
    FEATURE: "cross layer transcoder",
    ERROR: "mlp reconstruction error",
    EMBEDDING: "embedding",
    LOGIT: "logit",
}
LARGEST = 768  # pixels: the longer edge of the image that is shown beside a graph


@dataclass(frozen=True)
class Shown:
    """What a page shows besides a graph: tokens by position, with modality and rectangle (contract of positions), the
    image, labels of features by 'LAYER:FEATURE', their panels and the images of these; supernodes as (name, ids); heat
    maps of nodes by id; and whatever is to be said of model, answer, scores and settings."""

    slug: str
    prompt: str
    positions: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]
    image: Image.Image | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    panels: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    supernodes: Sequence[Sequence[str]] = ()
    pixels: Mapping[str, str] = field(default_factory=dict)


def graph_json(pruned: Pruned, shown: Shown, node_threshold: float) -> dict[str, Any]:
    """As a dict; numbers are finite."""
    graph, ids = pruned.graph, pruned.graph.ids()
    nodes = [
        _node(pruned, i, ids[i], shown) | {"share": float(pruned.share[i]), "inputs": float(pruned.inputs[i])}
        for i in range(len(graph))
    ]
    links = graph.edges.tocoo()
    found: dict[str, Any] = {
        "metadata": {
            "slug": shown.slug,
            "scan": f"cltjax-{graph.about['model']['id']}",
            "transcoder_list": [],
            "prompt_tokens": [one["token"] for one in shown.positions],
            "prompt": shown.prompt,
            "node_threshold": node_threshold,
            "schema_version": 1,
            "cltjax": {"n_layers": graph.about["n_layers"], **shown.about},
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [list(one) for one in shown.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[source], "target": ids[target], "weight": float(weight)}
            for target, source, weight in zip(*(one.tolist() for one in (*links.coords, links.data)), strict=True)
        ],
        "positions": [dict(one) for one in shown.positions],
        "image": None if shown.image is None else _image(shown.image),
        "features": dict(shown.panels),
        "images": dict(shown.images),
    }
    return found | ({"pixels": dict(shown.pixels)} if shown.pixels else {})


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


def _node(pruned: Pruned, i: int, name: str, shown: Shown) -> dict[str, Any]:
    graph = pruned.graph
    kind, layer, position, number = (int(one[i]) for one in graph.nodes[:4])
    value, last = float(graph.nodes.value[i]), int(graph.about["n_layers"]) + 1
    found: dict[str, Any] = {
        "node_id": name,
        "feature": -1,
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{name}-0",
        "clerp": "",
        "influence": min(1.0, float(pruned.cumulative[i])),
        "activation": None,
    }
    if kind == FEATURE:
        key = f"{layer}:{number}"
        found |= {"feature": cantor(layer, number), "activation": value, "jsNodeId": f"{layer}_{number}-0"}
        found["clerp"] = shown.labels.get(key, "")
        if key in shown.panels:
            found["panel"] = key
    elif kind == EMBEDDING:
        found |= {"feature": position, "layer": "E", "jsNodeId": f"E_{number}-{position}"}
        found["clerp"] = str(shown.positions[position]["token"])
    elif kind == LOGIT:
        place = int((graph.of(LOGIT) < i).sum())
        said = graph.about["logits"][place]
        found |= {"feature": number, "layer": str(last), "token_prob": value, "is_target_logit": place == 0}
        found |= {"jsNodeId": f"L_{number}-{position}", "influence": None}
        found["clerp"] = f'Output "{said}" (p={value:.3f})' if number >= 0 else f"Output {said}"
    return found


def cantor(x: int, y: int) -> int:
    """One number for two: circuit-tracer's name of a feature."""
    return (x + y) * (x + y + 1) // 2 + y


def _image(image: Image.Image) -> dict[str, Any]:
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    return {"src": png_uri(small), "width": image.width, "height": image.height}


def png_uri(image: Image.Image) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
