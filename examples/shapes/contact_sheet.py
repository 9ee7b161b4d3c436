"""Draw examples/shapes/contact_sheet.png: pictures of the demo data, each with a question and its answer."""

import argparse
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.shapes.questions import KINDS, ask
from examples.shapes.scenes import IMAGE_SIZE, random_scene_of, render

ZOOM, COLUMNS = 4, 5
WIDTH, PICTURE, TEXT, MARGIN = 250, ZOOM * IMAGE_SIZE, 72, 10  # pixels, of one cell
SEED = 4


def contact_sheet() -> Image.Image:
    """One `test` picture for every kind of question."""
    rng = random.Random(SEED)
    rows = -(-len(KINDS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * WIDTH, rows * (PICTURE + TEXT + 2 * MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for number, kind in enumerate(KINDS):
        question = None
        while question is None:
            scene = random_scene_of("test", rng)
            # One thing alone is a dull picture.
            question = ask(scene, kind, rng) if len(scene.things) > 1 else None
        x = number % COLUMNS * WIDTH + MARGIN
        y = number // COLUMNS * (PICTURE + TEXT + 2 * MARGIN) + MARGIN
        picture = render(scene, rng).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        lines = textwrap.wrap(question.text, 34) + textwrap.wrap(question.answer, 34)
        asked = len(textwrap.wrap(question.text, 34))
        for line, text in enumerate(lines):
            draw.text((x, y + PICTURE + 4 + 16 * line), text, "black" if line < asked else "#0a6", font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "contact_sheet.png")
    options = parser.parse_args()
    contact_sheet().save(options.out, optimize=True)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
