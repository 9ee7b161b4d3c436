"""Write `shapes` data in the file layouts of AMBER and of POPE, so that code that reads them meets real files.

    python examples/shapes/benchmark_files.py --out shapes_files --images 200

    OUT/amber/image/shapes_1.png ...
    OUT/amber/data/query/query_{all,generative,discriminative}.json
    OUT/amber/data/query/query_discriminative-{attribute,existence,relation}.json     [{id, image, query}, ...]
    OUT/amber/data/annotations.json     [{id, type, truth[, hallu]}, ...], the truth for `id` at index id-1
    OUT/amber/data/relation.json, safe_words.txt     what AMBER's scorer also reads: synonyms, words never counted
    OUT/pope/image/shapes_1.png ...
    OUT/pope/shapes_pope_{random,popular,adversarial}.json     JSON lines {question_id, image, text, label}

The form follows github.com/junyangwang0410/AMBER (commit 5e1fd52) and github.com/AoiDragon/POPE, quirks included:
AMBER numbers its queries generative, attribute, existence, relation; all its existence answers are "no"; a relation
that holds is of type `discriminative-relation`, one that does not is of type `relation`. The questions are put in the
words that the demo VLM knows ("Is there a red circle?"), and the pictures are PNG, since JPEG would blur 48 pixels:

    generative    "Describe the image."; objects are shapes; `truth` those in the picture, `hallu` those that are not
    existence     a shape that is not in the picture                               discriminative-hallucination, "no"
    attribute     the color of a shape that is in the picture, right and wrong     discriminative-attribute-state
                  "Do two things have the same shape?"                             discriminative-attribute-number
    relation      "Do two things have the same color?"                             [discriminative-]relation

Nothing moves in a picture, so there is no discriminative-attribute-action. POPE's objects are color and shape
together; its negatives are drawn at random, or are the most frequent of the absent pairs (popular), or those that
have their color and their shape in the picture, then those often seen beside what is there (adversarial).

Layouts are of one split of the demo VLM (`test` unless told otherwise). A capture of these files splits them anew,
by the image's bytes, as it does with any other data set.
"""

import argparse
import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from cltjax.files import write_json, write_whole
from cltjax.splits import Split
from examples.shapes.questions import ask
from examples.shapes.scenes import COLORS, SHAPES, Scene, random_scene_of, render

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
Pair = tuple[str, str]


def different_scenes(count: int, split: Split, rng: random.Random) -> list[Scene]:
    """`count` scenes of `split`, no layout twice."""
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = random_scene_of(split, rng)
        found.setdefault(scene.layout, scene)
    return list(found.values())


def pairs_of(scene: Scene) -> set[Pair]:
    return {(t.color, t.shape) for t in scene.things}


def is_there(pair: Pair) -> str:
    return f"Is there a {pair[0]} {pair[1]}?"


def shared(scene: Scene, what: str) -> tuple[str, str]:
    """The question whether two things share `what` ("color" or "shape"), and its answer."""
    values = [getattr(t, what) for t in scene.things]
    return f"Do two things have the same {what}?", "yes" if len(set(values)) < len(values) else "no"


def amber_rows(scenes: list[Scene], rng: random.Random) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """By dimension, in AMBER's order: (image name, query, annotation without its id)."""
    rows: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
        "generative": [],
        "attribute": [],
        "existence": [],
        "relation": [],
    }
    for number, scene in enumerate(scenes, start=1):
        image = f"shapes_{number}.png"
        present = pairs_of(scene)
        here = [shape for shape in SHAPES if any(t.shape == shape for t in scene.things)]
        absent = [shape for shape in SHAPES if shape not in here]
        description = ask(scene, "describe", rng)
        assert description is not None
        rows["generative"].append((image, description.text, {"type": "generative", "truth": here, "hallu": absent}))
        for shape in here:
            right = rng.choice([color for color in COLORS if (color, shape) in present])
            wrong = [color for color in COLORS if (color, shape) not in present]
            near = [color for color in wrong if any(t.color == color for t in scene.things)]
            for color, truth in ((right, "yes"), (rng.choice(near or wrong), "no")):
                about = {"type": "discriminative-attribute-state", "truth": truth}
                rows["attribute"].append((image, is_there((color, shape)), about))
        if len(scene.things) > 1:
            query, truth = shared(scene, "shape")
            rows["attribute"].append((image, query, {"type": "discriminative-attribute-number", "truth": truth}))
            query, truth = shared(scene, "color")
            kind = "discriminative-relation" if truth == "yes" else "relation"
            rows["relation"].append((image, query, {"type": kind, "truth": truth}))
        for shape in absent:
            query = is_there((rng.choice(scene.things).color, shape))
            rows["existence"].append((image, query, {"type": "discriminative-hallucination", "truth": "no"}))
    return rows


def write_images(scenes: list[Scene], folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        render(scene, rng).save(folder / f"shapes_{number}.png")


def write_amber(scenes: list[Scene], out: Path, seed: int) -> None:
    rng = random.Random(f"amber {seed}")
    queries: dict[str, list[dict[str, Any]]] = {}
    annotations: list[dict[str, Any]] = []
    for dimension, rows in amber_rows(scenes, rng).items():
        queries[dimension] = []
        for image, query, annotation in rows:
            number = len(annotations) + 1
            queries[dimension].append({"id": number, "image": image, "query": query})
            annotations.append({"id": number, **annotation})
    discriminative = [*queries["attribute"], *queries["existence"], *queries["relation"]]
    files = {
        "all": [*queries["generative"], *discriminative],
        "generative": queries["generative"],
        "discriminative": discriminative,
        **{f"discriminative-{name}": queries[name] for name in ("attribute", "existence", "relation")},
    }
    (out / "data" / "query").mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_json(out / "data" / "query" / f"query_{name}.json", rows)
    write_json(out / "data" / "annotations.json", annotations)
    write_json(out / "data" / "relation.json", {shape: [] for shape in SHAPES})
    (out / "data" / "safe_words.txt").write_text("")
    write_images(scenes, out / "image", random.Random(f"images {seed}"))


def negatives(scene: Scene, scenes: list[Scene], rng: random.Random) -> dict[str, list[Pair]]:
    """For each of POPE's ways, as many absent pairs as `scene` has things."""
    seen = Counter(pair for other in scenes for pair in pairs_of(other))
    together = Counter(
        both for other in scenes for pair in combinations(sorted(pairs_of(other)), 2) for both in (pair, pair[::-1])
    )
    present = pairs_of(scene)
    absent = [pair for pair in PAIRS if pair not in present]
    colors = {color for color, _ in present}
    shapes = {shape for _, shape in present}

    def tempting(pair: Pair) -> tuple[bool, int]:
        return pair[0] in colors and pair[1] in shapes, sum(together[there, pair] for there in present)

    count = len(present)
    return {
        "random": rng.sample(absent, count),
        "popular": sorted(absent, key=lambda pair: seen[pair], reverse=True)[:count],
        "adversarial": sorted(absent, key=tempting, reverse=True)[:count],
    }


def write_pope(scenes: list[Scene], out: Path, seed: int) -> None:
    rng = random.Random(f"pope {seed}")
    lines: dict[str, list[str]] = {"random": [], "popular": [], "adversarial": []}
    for number, scene in enumerate(scenes, start=1):
        for way, absent in negatives(scene, scenes, rng).items():
            questions = [(pair, "yes") for pair in sorted(pairs_of(scene))] + [(pair, "no") for pair in absent]
            for pair, label in questions:
                row = {
                    "question_id": len(lines[way]),
                    "image": f"shapes_{number}.png",
                    "text": is_there(pair),
                    "label": label,
                }
                lines[way].append(json.dumps(row) + "\n")
    write_images(scenes, out / "image", random.Random(f"images {seed}"))
    for way, rows in lines.items():
        write_whole(out / f"shapes_pope_{way}.json", lambda file, rows=rows: file.write_text("".join(rows)))


def write(out: Path, images: int, split: Split = "test", seed: int = 0) -> None:
    """Both layouts, of the same pictures, under `out`."""
    scenes = different_scenes(images, split, random.Random(f"scenes {seed}"))
    write_amber(scenes, out / "amber", seed)
    write_pope(scenes, out / "pope", seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, options.images, options.split, options.seed)
    print(f"wrote {options.images} images: AMBER's layout in {options.out}/amber, POPE's in {options.out}/pope")


if __name__ == "__main__":
    main()
