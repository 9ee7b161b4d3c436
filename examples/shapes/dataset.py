"""The bundled data set: an endless, seeded stream of pictures with one question each; `--dataset shapes`."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from cltjax.splits import Split
from examples.shapes.questions import KINDS, Question, ask
from examples.shapes.scenes import Scene, random_scene, render

# Two descriptions to every question of another kind (they are what is generated at length); `fact` needs no picture.
_SHARE = {"describe": 2.0, "fact": 0.5}
_WEIGHTS = [_SHARE.get(kind, 1.0) for kind in KINDS]


@dataclass(frozen=True)
class ShapesSample:
    id: str  # "shapes-000123"
    image: Image.Image  # 48x48 RGB
    layout: str  # what the split rule hashes
    split: Split
    prompt: str  # the question alone, without a template
    answer: str
    kind: str


def draw(index: int, seed: int = 0) -> tuple[Scene, Question, random.Random]:
    """What sample `index` of the stream `seed` shows and asks, and the generator that its picture is rendered with.

    The kind is drawn first and then scenes until one can be asked it, so that kinds that do not fit every scene
    (`relation`, `next`, `same`) are not rarer than the others. Scenes are of all splits, and `use` is asked about
    the pairs, too, for which the demo VLM's training never asked it.
    """
    rng = random.Random(f"shapes {seed} {index}")
    kind = rng.choices(KINDS, _WEIGHTS)[0]
    while True:
        scene = random_scene(rng)
        question = ask(scene, kind, rng)
        if question is not None:
            return scene, question, rng


def sample(index: int, seed: int = 0) -> ShapesSample:
    """Sample `index` of the stream `seed`; depends on nothing else."""
    scene, question, rng = draw(index, seed)
    return ShapesSample(
        id=f"shapes-{index:06d}",
        image=render(scene, rng),
        layout=scene.layout,
        split=scene.split,
        prompt=question.text,
        answer=question.answer,
        kind=question.kind,
    )


def samples(n: int, seed: int = 0) -> Iterator[ShapesSample]:
    """The first `n` samples of the stream `seed`: a longer stream begins with a shorter one."""
    return (sample(index, seed) for index in range(n))
