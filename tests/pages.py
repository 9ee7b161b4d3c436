"""For tests of pages: a headless Chromium without network, and graphs made up."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

HOSTILE = "<img src=x onerror=\"window.ran='img'\"></script><script>window.ran='script'</script>&amp;\u2028<!--data-->"


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; the test is skipped where either is missing. CLTJAX_CHROMIUM names
    another executable."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="tests of pages need playwright: pip install -e .[dev]"
    )
    names = (os.environ.get("CLTJAX_CHROMIUM", ""), "chromium", "chromium-browser")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip("tests of pages need Chromium: apt-get install chromium, or set CLTJAX_CHROMIUM")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, path: Path, width: int = 1360, height: int = 850, after: str = "", **options: Any
) -> Iterator[Any]:
    """The page of an HTML file, opened from disk (`after`: a #fragment) with the network off.

    Any error that reaches the page or its console fails the test.
    """
    context = browser.new_context(offline=True, viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.resolve().as_uri() + after)
    yield page
    context.close()
    assert errors == []


def png(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(size: int = 224) -> Image.Image:
    """A red disc above a blue square, on grey."""
    image = Image.new("RGB", (size, size), "#c9c9c4")
    draw = ImageDraw.Draw(image)
    draw.ellipse([size * 0.15, size * 0.1, size * 0.5, size * 0.45], fill="#c8332f")
    draw.rectangle([size * 0.55, size * 0.55, size * 0.88, size * 0.88], fill="#2f55c8")
    return image


def node(
    node_id: str, kind: str, layer: str, ctx: int, influence: float | None, share: float, **more: Any
) -> dict[str, Any]:
    """A node of graph.json; `more` overrides or adds fields."""
    found = {"node_id": node_id, "feature": -1, "layer": layer, "ctx_idx": ctx, "feature_type": kind, "token_prob": 0.0}
    found |= {"is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{node_id}-0", "clerp": ""}
    return found | {"influence": influence, "activation": None, "share": share} | more


def graph_data(
    nodes: list[dict[str, Any]],
    links: list[tuple[str, str, float]],
    positions: list[dict[str, Any]],
    n_layers: int,
    **more: Any,
) -> dict[str, Any]:
    """graph.json of these nodes and links; `more` overrides or adds keys."""
    about = {"model": "made-up", "clt": "clt", "n_layers": n_layers, "answer": "yes", "targets": "top logits"}
    about |= {"scores": {"replacement": 0.83, "completeness": 0.91}, "settings": {}}
    tokens = [position["token"] for position in positions]
    metadata = {"slug": "made-up", "scan": "made-up", "transcoder_list": [], "prompt_tokens": tokens}
    metadata |= {"prompt": "".join(tokens), "node_threshold": 0.8, "schema_version": 1, "cltjax": about}
    asked = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    found = {
        "metadata": metadata,
        "qParams": asked,
        "nodes": nodes,
        "positions": positions,
        "features": {},
        "images": {},
    }
    found["links"] = [{"source": source, "target": target, "weight": weight} for source, target, weight in links]
    size = picture().size
    found["image"] = {"src": png(picture()), "width": size[0], "height": size[1]}
    return found | more


def grid(rows: int, columns: int, token: str = "<image>") -> list[dict[str, Any]]:
    """Positions of image patches, row by row."""
    rects = [[c / columns, r / rows, 1 / columns, 1 / rows] for r in range(rows) for c in range(columns)]
    return [{"token": token, "modality": "image", "rect": rect} for rect in rects]


def words(*tokens: str) -> list[dict[str, Any]]:
    """Positions of text."""
    return [{"token": token, "modality": "text", "rect": None} for token in tokens]


def cantor(layer: int, feature: int) -> int:
    """circuit-tracer's number of a feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def small_graph(**more: Any) -> dict[str, Any]:
    """Two layers, 2 x 3 patches at positions 1 to 6, three words. Every weight can be followed by hand.

    patch 1 (position 1) --.6--> A (layer 0) --2--> C (layer 1) --3--> yes
    patch 5 (position 5) -- -.2--> A             word "red" --1--> C,  --.5--> B (layer 0) -- -1--> no
    an error of layer 0 --.25--> C,  and C -- -.5--> no
    """
    positions = [*words("<s>"), *grid(2, 3), *words(" is", " red", "?")]
    clt, error, logit = "cross layer transcoder", "mlp reconstruction error", "logit"
    nodes = [
        *(node(f"E_32_{at}", "embedding", "E", at, 0.9 + at / 100, 0.01) for at in range(1, 7)),
        *(node(f"E_5_{at}", "embedding", "E", at, 0.98, 0.01) for at in (7, 8, 9)),
        node("0_17_6", clt, "0", 6, 0.4, 0.2, feature=cantor(0, 17), activation=2.5, clerp="red disc", panel="0:17"),
        node("0_4_8", clt, "0", 8, 0.75, 0.05, feature=cantor(0, 4), activation=1.25),
        node("1_9_9", clt, "1", 9, 0.2, 0.2, feature=cantor(1, 9), activation=0.5, clerp="answer is yes"),
        node("err_0_8", error, "0", 8, 0.6, 0.1),
        node("2_3_9", logit, "2", 9, None, 0.3, token_prob=0.75, is_target_logit=True, clerp='Output "yes" (p=0.750)'),
        node("2_4_9", logit, "2", 9, None, 0.1, token_prob=0.2, clerp='Output "no" (p=0.200)'),
    ]
    links = [
        ("E_32_1", "0_17_6", 0.6),
        ("E_32_5", "0_17_6", -0.2),
        ("E_5_8", "1_9_9", 1.0),
        ("E_5_8", "0_4_8", 0.5),
        ("0_17_6", "1_9_9", 2.0),
        ("err_0_8", "1_9_9", 0.25),
        ("1_9_9", "2_3_9", 3.0),
        ("1_9_9", "2_4_9", -0.5),
        ("0_4_8", "2_4_9", -1.0),
    ]
    panel = {"layer": 0, "feature": 17, "label": "red disc", "rows": 1009, "density": 0.03, "max": 3.5}
    panel |= {
        "modality": {"text": 0.0, "image": 1.0, "special": 0.0},
        "histogram": {"edges": [0, 1, 2], "counts": [3, 1]},
    }
    panel |= {"decoder_norms": [[1, 0.5]], "promoted": [["red", 0.5]], "suppressed": [["blue", -0.25]], "nearest": []}
    panel |= {"top": [], "random": []}
    return graph_data(nodes, links, positions, 2, features={"0:17": panel}, **more)


def large_graph(n_nodes: int, n_links: int, side: int = 8, n_layers: int = 13, n_words: int = 29) -> dict[str, Any]:
    """A graph at random: features and errors at every position, influence that falls off as in real graphs."""
    random = np.random.default_rng(7)
    positions = [*words("<s>"), *grid(side, side), *words(*(f" word{i}" for i in range(n_words)))]
    logits = 7
    inner = n_nodes - len(positions) - logits
    share = np.sort(random.pareto(1.3, inner))[::-1] + 1e-3
    share /= share.sum()
    layer = random.integers(0, n_layers, inner)
    # More at the last words than in the image.
    at = np.where(random.random(inner) < 0.4, random.integers(1, side * side + 1, inner), len(positions) - 1)
    late = random.random(inner) < 0.7
    at = np.where((at > side * side) & late, random.integers(side * side + 1, len(positions), inner), at)
    nodes = [node(f"E_32_{i}", "embedding", "E", i, 1.0, float(random.random() / 99)) for i in range(len(positions))]
    for i in range(inner):
        error = random.random() < 0.1
        kind = "mlp reconstruction error" if error else "cross layer transcoder"
        name = f"err_{layer[i]}_{at[i]}_{i}" if error else f"{layer[i]}_{i}_{at[i]}"
        more = {} if error else {"feature": cantor(int(layer[i]), i), "activation": float(random.exponential())}
        if not error and i % 3 == 0:
            more["clerp"] = f"{random.choice(['red', 'blue', 'round', 'left of', 'answer is yes'])} {i}"
        nodes.append(node(name, kind, str(layer[i]), int(at[i]), float(share[: i + 1].sum()), float(share[i]), **more))
    for i, token in enumerate(["yes", "no", "Yes", "No", "It", "There", "The"]):
        more = {"token_prob": 0.6 / 2**i, "is_target_logit": i == 0, "clerp": f'Output "{token}" (p={0.6 / 2**i:.3f})'}
        nodes.append(node(f"{n_layers}_{i}_end", "logit", str(n_layers), len(positions) - 1, None, 0.1, **more))
    level = np.array([-1] * len(positions) + layer.tolist() + [n_layers] * logits)
    when = np.array([one["ctx_idx"] for one in nodes])
    importance = np.concatenate([np.full(len(positions), share.mean()), share, np.full(logits, share.max())])
    found: dict[tuple[int, int], float] = {}
    while len(found) < n_links:
        source, target = random.choice(n_nodes, (2, n_links), p=importance**0.5 / (importance**0.5).sum())
        weight = random.standard_t(3, n_links) * np.sqrt(importance[source])
        good = (level[source] < level[target]) & (when[source] <= when[target])
        for one, other, value in zip(source[good], target[good], weight[good], strict=True):
            if len(found) < n_links:
                found[int(one), int(other)] = float(value)
    names = [one["node_id"] for one in nodes]
    links = [(names[source], names[target], value) for (source, target), value in found.items()]
    return graph_data(nodes, links, positions, n_layers)
