"""Scenes of one to four coloured shapes on a 3x3 grid, and their pictures."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from cltjax.splits import Split, split_of

GRID = 3
CELL = 16  # pixels
IMAGE_SIZE = GRID * CELL
BACKGROUND = (40, 40, 40)

SHAPES = ("circle", "square", "triangle", "cross")
RGB = {
    "red": (215, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
}
COLORS = tuple(RGB)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True, order=True)
class Thing:
    """One shape in one cell; cells are numbered 0-8 in reading order."""

    cell: int
    color: str
    shape: str

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order, no two alike. Size, jitter and shade belong to the rendering."""

    things: tuple[Thing, ...]

    @property
    def layout(self) -> str:
        """What identifies the scene; the split rule hashes this string."""
        return ";".join(f"{t.cell}:{t.color} {t.shape}" for t in self.things)

    @property
    def split(self) -> Split:
        return split_of(self.layout.encode())


def random_scene(rng: random.Random) -> Scene:
    """One to four things; half of the time some share a color or a shape, by a small palette."""
    count = rng.choice((1, 2, 3, 3, 4, 4))
    colors = rng.sample(COLORS, rng.choice((2, 3, 6, 6)))
    shapes = rng.sample(SHAPES, rng.choice((2, 4, 4)))
    pairs = [(color, shape) for color in colors for shape in shapes]
    cells = rng.sample(range(GRID * GRID), count)
    chosen = rng.sample(pairs, min(count, len(pairs)))
    return Scene(tuple(sorted(Thing(cell, *pair) for cell, pair in zip(cells, chosen, strict=False))))


def random_scene_of(split: Split, rng: random.Random) -> Scene:
    """A random scene whose layout belongs to `split`."""
    while (scene := random_scene(rng)).split != split:
        pass
    return scene


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """A 48x48 RGB picture, with size, position and shade jittered by `rng`."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        shade = rng.uniform(0.8, 1.05)
        fill = tuple(min(255, round(shade * channel)) for channel in RGB[thing.color])
        radius = rng.choice((5, 6, 6, 7))
        x = thing.column * CELL + CELL // 2 + rng.randint(-1, 1)
        y = thing.row * CELL + CELL // 2 + rng.randint(-1, 1)
        box = (x - radius, y - radius, x + radius - 1, y + radius - 1)
        if thing.shape == "circle":
            draw.ellipse(box, fill=fill)
        elif thing.shape == "square":
            draw.rectangle(box, fill=fill)
        elif thing.shape == "triangle":
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=fill)
        else:
            draw.rectangle((x - 2, box[1], x + 1, box[3]), fill=fill)
            draw.rectangle((box[0], y - 2, box[2], y + 1), fill=fill)
    return image
