"""Questions about a scene, their answers, and the facts that some of them need.

Most kinds are answered by looking. Three need facts that are in no picture: `food` (one key: color),
`corners` (one key: shape) and the chain

    color x shape --made--> material --fact--> use        asked from end to end by `use`

`made` is a Latin rectangle (neither color nor shape alone says anything about the material) and `fact` maps
two materials to each use, so that material and use are different variables. The pairs in UNASKED are never
asked `use` in training: to answer for them, a model has to go through the material.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.shapes.scenes import COLORS, COLUMNS, ROWS, SHAPES, Scene, Thing

FOOD = dict(zip(COLORS, ("tomato", "lettuce", "blueberry", "banana", "plum", "carrot"), strict=True))
CORNERS: dict[str, str] = dict(zip(SHAPES, ("0", "4", "3", "12"), strict=True))
MATERIALS = ("wood", "wool", "stone", "clay", "silk", "glass")
USES = ("building", "clothing", "cooking")
USE_OF: dict[str, str] = dict(
    zip(MATERIALS, ("building", "clothing", "building", "cooking", "clothing", "cooking"), strict=True)
)
_SHIFT = (0, 1, 3, 4)  # by shape: one Latin rectangle row each
MATERIAL = {
    (color, shape): MATERIALS[(c + _SHIFT[s]) % len(MATERIALS)]
    for c, color in enumerate(COLORS)
    for s, shape in enumerate(SHAPES)
}
# A third of the pairs: two colors of every shape. Every material, color and shape keeps at least two asked pairs.
UNASKED = frozenset(
    (color, shape) for c, color in enumerate(COLORS) for s, shape in enumerate(SHAPES) if c % 3 == s % 3
)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    subject: Thing | None = None  # the one thing asked about, where there is one
    phrase: str = ""  # how `text` names the subject


def unique(scene: Scene, *, color: str | None = None, shape: str | None = None) -> Thing | None:
    """The only thing of that color (or shape), or None."""
    found = [t for t in scene.things if color in (None, t.color) and shape in (None, t.shape)]
    return found[0] if len(found) == 1 else None


def _phrases(scene: Scene, thing: Thing, *, says: tuple[str, ...] = ("color", "shape", "place")) -> list[str]:
    """The ways to name `thing` that only fit it and only give away what is in `says`."""
    found = []
    if "color" in says and unique(scene, color=thing.color):
        found.append(f"the {thing.color} thing")
    if "shape" in says and unique(scene, shape=thing.shape):
        found.append(f"the {thing.shape}")
    if "place" in says:
        found.append(f"the {thing.place} thing")
    return found


def _about(
    kind: str, form: str, answer: Callable[[Thing], str], says: tuple[str, ...]
) -> Callable[[Scene, random.Random], Question]:
    """A kind that asks one thing of one named thing."""

    def ask(scene: Scene, rng: random.Random) -> Question:
        thing = rng.choice(scene.things)
        phrase = rng.choice(_phrases(scene, thing, says=says))
        return Question(kind, form.format(phrase), answer(thing), thing, phrase)

    return ask


def _exist(scene: Scene, rng: random.Random) -> Question:
    present = {(t.color, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
    else:
        crossed = sorted({(a.color, b.shape) for a in scene.things for b in scene.things} - present)
        absent = sorted(set(MATERIAL) - present)
        color, shape = rng.choice(crossed if crossed and rng.random() < 0.7 else absent)
    answer = "yes" if (color, shape) in present else "no"
    return Question("exist", f"Is there a {color} {shape}?", answer)


def _group(scene: Scene, rng: random.Random) -> tuple[str, int]:
    """A plural and how many things of the scene it covers."""
    which = rng.random()
    if which < 0.4:
        return "things", len(scene.things)
    if which < 0.7:
        color = rng.choice([rng.choice(COLORS), rng.choice(scene.things).color])
        return f"{color} things", sum(t.color == color for t in scene.things)
    shape = rng.choice([rng.choice(SHAPES), rng.choice(scene.things).shape])
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return plural, sum(t.shape == shape for t in scene.things)


def _count(scene: Scene, rng: random.Random) -> Question:
    group, number = _group(scene, rng)
    return Question("count", f"How many {group} are there?", str(number))


def _parity(scene: Scene, rng: random.Random) -> Question:
    group, number = _group(scene, rng)
    return Question("parity", f"Is the number of {group} even or odd?", "odd" if number % 2 else "even")


def _where(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    name = f"the {thing.color} {thing.shape}"
    if rng.random() < 0.5:
        return Question("where", f"Which row is {name} in?", ROWS[thing.row], thing, name)
    return Question("where", f"Which column is {name} in?", COLUMNS[thing.column], thing, name)


def _side(a: Thing, b: Thing) -> str | None:
    """Where `a` is, seen from `b`, if the two share a row or a column."""
    if a.row == b.row:
        return "left" if a.column < b.column else "right"
    if a.column == b.column:
        return "above" if a.row < b.row else "below"
    return None


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(a, b, side) for a in scene.things for b in scene.things if a != b and (side := _side(a, b))]
    if not pairs:
        return None
    a, b, side = rng.choice(pairs)
    text = f"Where is the {a.color} {a.shape} from the {b.color} {b.shape}?"
    return Question("relation", text, side, a, f"the {a.color} {a.shape}")


def _next(scene: Scene, rng: random.Random) -> Question | None:
    side_phrase = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
    found = []
    for a in scene.things:
        for b in scene.things:
            side = _side(a, b)
            if side and abs(a.row - b.row) + abs(a.column - b.column) == 1:
                found += [(a, b, side, phrase) for phrase in _phrases(scene, b, says=("color", "shape"))]
    if not found:
        return None
    a, b, side, phrase = rng.choice(found)
    return Question("next", f"What color is just {side_phrase[side]} {phrase}?", a.color, b, phrase)


def _same(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.things) < 2:
        return None
    what = rng.choice(("color", "shape"))
    values = [getattr(t, what) for t in scene.things]
    answer = "yes" if len(set(values)) < len(values) else "no"
    return Question("same", f"Do two things have the same {what}?", answer)


def _fact(scene: Scene, rng: random.Random) -> Question:
    material = rng.choice(MATERIALS)
    return Question("fact", f"What is {material} used for?", USE_OF[material])


def _describe(scene: Scene, rng: random.Random) -> Question:
    parts = [f"a {t.color} {t.shape} at the {t.place}" for t in scene.things]
    return Question("describe", "Describe the image.", "There is " + ", ".join(parts) + ".")


def material_of(thing: Thing) -> str:
    return MATERIAL[thing.color, thing.shape]


_EVERYTHING = ("color", "shape", "place")
_ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "color": _about("color", "What color is {}?", lambda t: t.color, ("shape", "place")),
    "shape": _about("shape", "What shape is {}?", lambda t: t.shape, ("color", "place")),
    "exist": _exist,
    "count": _count,
    "parity": _parity,
    "where": _where,
    "relation": _relation,
    "next": _next,
    "same": _same,
    "food": _about("food", "What food has the color of {}?", lambda t: FOOD[t.color], ("shape", "place")),
    "corners": _about("corners", "How many corners does {} have?", lambda t: CORNERS[t.shape], ("color", "place")),
    "made": _about("made", "What is {} made of?", material_of, _EVERYTHING),
    "use": _about("use", "What is {} used for?", lambda t: USE_OF[material_of(t)], _EVERYTHING),
    "fact": _fact,
    "describe": _describe,
}
KINDS = tuple(_ASK)
ONE_WORD_KINDS = tuple(kind for kind in KINDS if kind != "describe")


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of `kind` about `scene`, or None where the scene has nothing to ask it about."""
    return _ASK[kind](scene, rng)


def is_unasked(question: Question) -> bool:
    """Whether this is the end-to-end question about a pair for which training never asks it."""
    thing = question.subject
    return question.kind == "use" and thing is not None and (thing.color, thing.shape) in UNASKED
