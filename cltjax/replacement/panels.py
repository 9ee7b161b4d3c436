"""What a feature is, as data: where it is active in a store and what it writes.

    found, images = panels(vlm, clt, ActivationStore.open("activations"), [(3, 17), (3, 1234)], examples=8)
    found["3:17"]["top"][0]["patches"]

Panels and images are plain JSON; docs/graphs.md says what is in them. Rows that count are those of one split, `test` if
not said (so that what is shown is held out), of the kinds that the CLT was trained on. One pass over them a source.
"""

import base64
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from capture.inputs import IMAGE, SPECIAL, TEXT
from capture.prompts import load_image
from capture.vlm import VLM
from cltjax.clt_directory import CLTDirectory
from cltjax.errors import UserError
from cltjax.replacement.activity import Activity, Seen, chunks, gather, most_active, some_samples
from cltjax.replacement.clt import CLT
from cltjax.replacement.patches import Rect, image_places, rectangles_of_grid
from cltjax.replacement.readout import Feature, decoder_norms, extremes, nearest, unembedding
from cltjax.splits import Split
from cltjax.store import ActivationStore
from cltjax.tokens import rules_of_clt
from examples.shapes.dataset import sample as shapes_sample

THUMBNAIL = 160  # pixels: the longer edge of an image that is shown
TOKENS, NEAREST = 8, 3  # promoted and suppressed; of the same source and of others
KINDS = {"text": TEXT, "image": IMAGE, "special": SPECIAL}


@dataclass(frozen=True)
class Held:
    """The rows of a store that panels are made from."""

    store: ActivationStore
    clt: CLT
    rows: np.ndarray  # ascending
    pieces: list[np.ndarray]


def hold(
    clt: CLT, store: ActivationStore, split: Split = "test", max_rows: int | None = None, where: Path = Path("the CLT")
) -> Held:
    """The rows of a split that count for a CLT; with `max_rows` those of a random choice of its samples.

    where: the CLT's folder, for messages. UserError for a store of another model or site, and without such rows.
    """
    if max_rows is not None and max_rows < 1:
        raise UserError(f"--max-rows {max_rows}: must be at least 1")
    rules = rules_of_clt(CLTDirectory(where, clt.description), store)
    rows = some_samples(store, rules.some_rows(split), max_rows)
    return Held(store, clt, rows, chunks(store, rows))


def strongest(held: Held, n: int) -> list[Feature]:
    """The n features with the largest sum of activation x decoder norm, largest first."""
    norms = {source: decoder_norms(held.clt, source).double().numpy() for source in held.clt.sources}
    return most_active(held.clt, held.store, held.pieces, norms, n)


def panels(
    vlm: VLM,
    clt: CLT,
    store: ActivationStore,
    features: Sequence[Feature],
    examples: int = 8,
    max_rows: int | None = None,
    labels: Mapping[str, Any] | None = None,
    split: Split = "test",
    image_dir: Path | None = None,
    seed: int = 0,
    held: Held | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """FeaturePanels by 'LAYER:FEATURE', in the order of `features`, and the images of their examples by key.

    examples: samples of each kind, the strongest and random ones (a function of `seed`, feature and sample alone);
    labels: a text, or {"label", "score"}, by 'LAYER:FEATURE'. image_dir: where images are looked for that are not where
    the store says. held: what `hold` gave, in place of split and max_rows.

    UserError as `hold`. An image that is nowhere is left out, and counted in one note on standard error.
    """
    held = held or hold(clt, store, split, max_rows)
    features = list(dict.fromkeys((int(layer), int(number)) for layer, number in features))
    if not features:
        return {}, {}
    shown = Examples(vlm, store, np.unique(store.column("modality")[held.rows]), image_dir)
    found = {
        spell(feature): written for feature, written in zip(features, _written(vlm, clt, features, shown), strict=True)
    }
    for layer in track(
        sorted({layer for layer, _ in features}), "features", console=Console(stderr=True), transient=True
    ):
        numbers = [number for source, number in features if source == layer]
        activity = gather(clt, store, layer, numbers, held.pieces, examples, seed)
        for w, number in enumerate(numbers):
            name = spell((layer, number))
            about = {"layer": layer, "feature": number} | _label((labels or {}).get(name))
            found[name] = about | _figures(activity, w, len(held.rows)) | found[name] | _examples(activity, w, shown)
    if shown.missing:
        print(
            f"note: {len(shown.missing):,} images cannot be read, {shown.missing[0]} for one: examples are without "
            "them (--image-dir names their folder)",
            file=sys.stderr,
        )
    return found, shown.images


def spell(feature: Feature) -> str:
    return f"{feature[0]}:{feature[1]}"


# Parts of a panel --------------------------------------------------------------------------------------------


def _label(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        score = given.get("score")
        return {"label": _text(given.get("label")), "score": score if isinstance(score, int | float) else None}
    return {"label": _text(given), "score": None}


def _text(given: Any) -> str | None:
    return None if given is None else str(given)


def _figures(activity: Activity, w: int, rows: int) -> dict[str, Any]:
    active = activity.active[:, w]
    total = int(active.sum())
    edges, counts = activity.histogram.of(w)
    return {
        "rows": rows,
        "density": short(total / rows),
        "modality": {name: short(int(active[code]) / total) if total else 0.0 for name, code in KINDS.items()},
        "max": short(activity.max[w]),
        "histogram": {"edges": edges, "counts": counts},
    }


def _written(vlm: VLM, clt: CLT, features: Sequence[Feature], shown: "Examples") -> list[dict[str, Any]]:
    """What is known from the weights, of each feature."""
    found: list[dict[str, Any]] = []
    words = [int(i) for i in shown.plain_ids(5)]
    head = unembedding(vlm, words) if words else None
    for feature, alike in zip(features, nearest(clt, features, NEAREST), strict=True):
        layer, number = feature
        rows = clt.decoder_rows(layer, torch.tensor([number]))[0]
        norms = zip(clt.wiring.targets_of(layer), rows.norm(dim=1).tolist(), strict=True)
        promoted, suppressed = extremes(head, rows.sum(0, keepdim=True), TOKENS)[0] if head else ([], [])
        found.append(
            {
                "decoder_norms": [[target, short(norm)] for target, norm in norms],
                "promoted": [[shown.word(i), short(effect)] for i, effect in promoted],
                "suppressed": [[shown.word(i), short(effect)] for i, effect in suppressed],
                "nearest": [[spell(other), short(cosine)] for other, cosine in alike],
            }
        )
    return found


def _examples(activity: Activity, w: int, shown: "Examples") -> dict[str, Any]:
    both = {"top": activity.top[w], "random": activity.random[w]}
    return {name: [shown.example(seen) for seen in those] for name, those in both.items()}


def short(value: float, digits: int = 4) -> float:
    """With as many digits as a reader needs."""
    return float(f"{value:.{digits}g}")


# Examples ----------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Makes examples of samples, and keeps each of their images once. kinds: modalities of the tokens that count."""

    vlm: VLM
    store: ActivationStore
    kinds: np.ndarray
    image_dir: Path | None
    images: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    _keys: dict[str, tuple[str, tuple[int, int]] | None] = field(default_factory=dict)  # by path; None: missing
    _words: dict[int, str] = field(default_factory=dict)
    _before: tuple[int, str] | None = None  # a word and its text

    def example(self, seen: Seen) -> dict[str, Any]:
        """What docs/graphs.md calls an Example."""
        store, record = self.store, self.store.samples[seen.sample]
        column = store.column("sample")
        first, last = np.searchsorted(column, [seen.sample, seen.sample + 1])
        modality = store.column("modality")[first:last]
        values = np.zeros(last - first, np.float32)
        values[seen.rows - first] = seen.values
        text = np.flatnonzero(np.isin(modality, self.kinds) & (modality != IMAGE))
        generated = np.flatnonzero(store.column("generated")[first:last][text])
        key, size = self._image(seen.sample)
        patches, unplaced = [], int((values[modality == IMAGE] > 0).sum())
        if size is not None and unplaced:
            patches = self._patches(record, store.column("position")[first:last], modality, values, size)
            unplaced -= len(patches)
        return {
            "sample": str(record["id"]),
            "image": key,
            "tokens": [self.word(int(i)) for i in store.column("token_id")[first:last][text]],
            "values": [short(value) for value in values[text]],
            "patches": patches,
            "unplaced": unplaced,
            "peak": short(seen.peak),
            "generated": int(generated[0]) if len(generated) else None,
        }

    def _patches(
        self,
        record: dict[str, Any],
        position: np.ndarray,
        modality: np.ndarray,
        values: np.ndarray,
        size: tuple[int, int],
    ) -> list[list[float]]:
        """The active ones whose rectangle is known."""
        places = image_places(int(record["tokens"]), position, modality == IMAGE)
        rects: list[Rect | None] = rectangles_of_grid(self.vlm, record.get("image_grid") or [], size)
        found = []
        for i in np.flatnonzero((places >= 0) & (values > 0)):
            rect = rects[places[i]] if places[i] < len(rects) else None
            if rect is not None:
                found.append([*(round(part, 5) for part in rect), short(values[i])])
        return found

    def _image(self, sample: int) -> tuple[str | None, tuple[int, int] | None]:
        """The key of a sample's image and its size (width, height)."""
        path = self.store.image_path(sample)
        if path is None:
            return None, None
        name = str(path)
        if name not in self._keys:
            image = self._load(sample, path)
            if image is None:
                self.missing.append(name)
                self._keys[name] = None
            else:
                key = f"i{len(self.images)}"
                self.images[key] = data_uri(image)
                self._keys[name] = key, image.size
        return self._keys[name] or (None, None)

    def _load(self, sample: int, path: Path) -> Image.Image | None:
        """From where the store says, from below `image_dir`, or for the bundled data set drawn anew."""
        candidates = [path]
        if self.image_dir is not None:
            candidates += [self.image_dir.joinpath(*path.parts[i:]) for i in range(1, len(path.parts))]
        for candidate in candidates:
            try:
                return load_image(candidate)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue
        number = str(self.store.samples[sample]["id"]).removeprefix("shapes-")
        if self.store.manifest["dataset"]["spec"] == "shapes" and number.isdecimal():
            return shapes_sample(int(number)).image
        return None

    def plain_ids(self, n: int) -> np.ndarray:
        """Up to n ids of text tokens of the store, in its order."""
        text = np.flatnonzero(self.store.column("modality")[:4096] == TEXT)[:n]
        return self.store.column("token_id")[text]

    def word(self, token: int) -> str:
        """A token as it reads behind another one: with the space before it, where there is one."""
        if token not in self._words:
            decode = self.vlm.tokenizer.decode
            if self._before is None:
                ids = self.plain_ids(1)
                self._before = (int(ids[0]), decode([int(ids[0])])) if len(ids) else (-1, "")
            id_before, before = self._before
            both = decode([id_before, token]) if before else ""
            self._words[token] = both[len(before) :] if before and both.startswith(before) else decode([token])
        return self._words[token]


def data_uri(image: Image.Image, most: int = THUMBNAIL) -> str:
    """An image as `data:...`: its pixels as they are where it is small, else a smaller JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= most:
        image.save(buffer, "png", optimize=True)
        kind = "png"
    else:
        small = image.convert("RGB")
        small.thumbnail((most, most), Image.Resampling.LANCZOS)
        small.save(buffer, "jpeg", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
