"""Data sets: rows of a prompt and an image, checked before the first forward pass, and the text a model is given.

A data set is `shapes` (the bundled generator) or a JSON or JSON-lines file whose rows have an `image` and one of
`query`, `question`, `prompt` or `text`; AMBER's query files and POPE's files are two such. Nothing is repaired:
a row whose image is missing or broken, or whose prompt is empty, stops the run, or with `skip_bad` is left out
and listed in the store's manifest. A data set none of whose rows has an `image`, and a row whose `image` is
null, are prompts without images.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cltjax.errors import UserError
from cltjax.splits import Split, split_of
from examples.shapes.dataset import samples as shapes_samples

PROMPT_KEYS = ("query", "question", "prompt", "text")
ID_KEYS = ("id", "question_id")
ANSWER_KEYS = ("answer", "label")
SHAPES_SAMPLES = 4000  # of the endless `shapes` stream, where --max-samples does not say


@dataclass(frozen=True)
class Sample:
    """One prompt, with or without an image."""

    id: str
    prompt: str
    split: Split
    image: str | None  # the path written into the store: absolute, or below the store for a generated image
    answer: str | None  # the reference answer
    load: Callable[[], Image.Image] | None = field(repr=False)  # None without an image

    @property
    def generated_image(self) -> bool:
        """Whether the image exists nowhere but in memory, so that the store has to keep it."""
        return self.image is not None and not Path(self.image).is_absolute()


@dataclass(frozen=True)
class Dataset:
    spec: str
    samples: list[Sample]
    skipped: list[dict[str, Any]]  # {row, file, reason}
    fingerprint: str  # sha256 over what reaches the model: ids, prompts and image bytes, in order


def load_dataset(
    spec: str, image_dir: Path | None = None, max_samples: int | None = None, *, skip_bad: bool = False
) -> Dataset:
    """Read and check a whole data set; every image is decoded once here, so that a bad one shows now.

    Raises UserError for a file that is missing or not JSON, and for a bad row unless `skip_bad`.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"--max-samples {max_samples}: there is nothing to capture below 1")
    if spec == "shapes":
        return _shapes(max_samples or SHAPES_SAMPLES)
    path = Path(spec)
    rows = _read_rows(path)[:max_samples]
    return _check(path, rows, image_dir, skip_bad)


def _fingerprint(parts: Iterable[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def _shapes(count: int) -> Dataset:
    samples: list[Sample] = []
    prints: list[tuple[str, ...]] = []
    for shape in shapes_samples(count):
        image = f"images/{shape.id}.png"
        samples.append(
            Sample(shape.id, shape.prompt, shape.split, image, shape.answer, load=lambda shape=shape: shape.image)
        )
        prints.append((shape.id, shape.prompt, hashlib.sha256(shape.image.tobytes()).hexdigest()))
    return Dataset("shapes", samples, [], _fingerprint(prints))


def _read_rows(path: Path) -> list[Any]:
    """The rows of a JSON list or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"--dataset {path}: no such file (give `shapes`, or a JSON or JSON-lines file of images and prompts)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset {path}: cannot be read as text: {error}") from None
    rows: list[Any] = []
    number = 0  # of the line being parsed, where the file is JSON lines
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for line in text.split("\n"):  # splitlines would also cut at U+2028, which JSON allows in a string
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"--dataset {path}, line {number or error.lineno}: not JSON ({error.msg})") from None
    if not rows:
        raise UserError(f"--dataset {path}: has no rows")
    return rows


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _image_root(path: Path, rows: list[Any], image_dir: Path | None) -> Path:
    """Where relative image names start: the option, or the usual places around a query file."""
    if image_dir is not None:
        if not image_dir.is_dir():
            raise UserError(f"--image-dir {image_dir}: no such folder")
        return image_dir
    names = [row["image"] for row in rows if isinstance(row, dict) and isinstance(row.get("image"), str)]
    # beside the file, or in AMBER's and POPE's folders
    roots = [path.parent, path.parent / "image", path.parent / "images", path.parent.parent.parent / "image"]
    return next((root for root in roots if names and (root / names[0]).is_file()), path.parent)


def _check(path: Path, rows: list[Any], image_dir: Path | None, skip_bad: bool) -> Dataset:
    root = _image_root(path, rows, image_dir)
    has_images = any(isinstance(row, dict) and "image" in row for row in rows)
    named = {row["image"] for row in rows if isinstance(row, dict) and isinstance(row.get("image"), str)}
    with ThreadPoolExecutor() as pool:
        images = dict(zip(named, pool.map(lambda name: _check_image(root / name), named), strict=True))

    samples: list[Sample] = []
    skipped: list[dict[str, Any]] = []
    prints: list[tuple[str, ...]] = []
    for number, row in enumerate(rows, start=1):
        try:
            sample, image_digest = _check_row(number, row, root, images, has_images)
        except _BadRowError as error:
            if not skip_bad:
                hint = "" if image_dir else " (or name the folder of the images with --image-dir)"
                raise UserError(
                    f"row {number} of {path}: {error}; mend it, or pass --skip-bad to leave such rows out{hint}"
                ) from None
            skipped.append({"row": number, "file": str(path), "reason": str(error)})
            continue
        samples.append(sample)
        prints.append((sample.id, sample.prompt, image_digest))
    if not samples:
        raise UserError(f"--dataset {path}: none of its {len(rows)} rows can be used: {skipped[0]['reason']}")
    return Dataset(str(path), samples, skipped, _fingerprint(prints))


class _BadRowError(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class _CheckedImage:
    split: Split
    digest: str


def _check_image(path: Path) -> _CheckedImage | _BadRowError:
    """Decode the whole image once; a returned error waits for the row that names it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return _BadRowError(f"image {path} cannot be read ({error.strerror})")
    try:
        Image.open(io.BytesIO(content)).load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _BadRowError(f"image {path} is broken ({error})")
    return _CheckedImage(split_of(content), hashlib.sha256(content).hexdigest())


def _check_row(
    number: int, row: Any, root: Path, images: dict[str, _CheckedImage | _BadRowError], has_images: bool
) -> tuple[Sample, str]:
    if not isinstance(row, dict):
        raise _BadRowError("is not a JSON object")
    prompt = _first(row, PROMPT_KEYS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise _BadRowError(f"has no prompt (a non-empty string under one of {', '.join(PROMPT_KEYS)})")
    answer = _first(row, ANSWER_KEYS)
    identity = {
        "id": str(found) if (found := _first(row, ID_KEYS)) is not None else str(number),
        "prompt": prompt.strip(),
        "answer": None if answer is None else str(answer),
    }
    if not has_images or ("image" in row and row["image"] is None):
        split = split_of(identity["prompt"].encode())
        return Sample(**identity, split=split, image=None, load=None), ""
    name = row.get("image")
    if not isinstance(name, str) or not name:
        raise _BadRowError("has no image (a path under `image`, or null for none)")
    image = images[name]
    if isinstance(image, _BadRowError):
        raise image
    path = (root / name).resolve()
    sample = Sample(**identity, split=image.split, image=str(path), load=lambda: load_image(path))
    return sample, image.digest


def load_image(path: Path) -> Image.Image:
    """An image file as it is meant to be seen, in RGB. OSError where it cannot be read."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")  # photographs may lie on their side


# Templates ---------------------------------------------------------------------------------------------------

LLAVA_TEMPLATE = "USER: {image}\n{prompt} ASSISTANT:"
NAMED_TEMPLATES = {"llava-1.5": LLAVA_TEMPLATE}


@dataclass(frozen=True)
class Template:
    """What a model reads, with `{prompt}` where the question goes; the image token is already in its place."""

    with_image: str
    without_image: str

    def render(self, prompt: str, *, image: bool) -> str:
        return (self.with_image if image else self.without_image).replace("{prompt}", prompt)


def resolve_template(choice: str, processor: Any) -> Template:
    """`chat` (the model's own chat template), `llava-1.5`, or text with `{image}` and `{prompt}`.

    In a template given on the command line a backslash and an n stand for a newline. Raises UserError for a
    model without a chat template, and for a text that has no place for the prompt or the image.
    """
    if choice == "chat":
        if not getattr(processor, "chat_template", None):
            raise UserError(
                "the model has no chat template: pass --template llava-1.5, or one with {image} and {prompt}"
            )
        return Template(_chat(processor, image=True), _chat(processor, image=False))
    text = NAMED_TEMPLATES.get(choice, choice).replace("\\n", "\n")
    missing = [place for place in ("{image}", "{prompt}") if place not in text]
    if missing:
        raise UserError(f"--template {choice!r}: has no {' and no '.join(missing)}, and is not chat or llava-1.5")
    token = getattr(processor, "image_token", "<image>")
    return Template(text.replace("{image}", token), text.replace("{image}\n", "").replace("{image}", ""))


def _chat(processor: Any, *, image: bool) -> str:
    content = [{"type": "image"}] * image + [{"type": "text", "text": "{prompt}"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if "{prompt}" not in text:
        raise UserError("the model's chat template leaves the prompt out: pass --template with {image} and {prompt}")
    return text
