"""Feature dashboards: `cltjax dashboard` writes the panels of some features as one searchable page.

    write_dashboard(Path("clt"), Path("activations"), "top:200", Path("dashboard"))

The folder gets dashboard.json (panels and images, docs/graphs.md) and index.html, which holds all it shows and opens
from disk.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capture.vlm import DTYPES, load
from cltjax.clt_directory import CLTDirectory
from cltjax.errors import UserError
from cltjax.files import write_whole
from cltjax.replacement.clt import CLT
from cltjax.replacement.labels import read_labels
from cltjax.replacement.model import check_match
from cltjax.replacement.neurons import parse_features
from cltjax.replacement.panels import Held, hold, panels, spell, strongest
from cltjax.replacement.viewer.page import assemble
from cltjax.splits import Split
from cltjax.store import ActivationStore

PAGE, DATA = "index.html", "dashboard.json"
TOP = "top:"


def write_dashboard(
    clt: Path,
    store: Path,
    features: str,
    out: Path,
    model: str | None = None,
    labels: Path | None = None,
    image_dir: Path | None = None,
    examples: int = 8,
    max_rows: int | None = None,
    split: Split = "test",
    device: str = "auto",
    compute_dtype: str = "auto",
    clt_dtype: str = "float32",
    other_revision: bool = False,
) -> dict[str, Any]:
    """Make the panels, write OUT/dashboard.json and OUT/index.html; returns the data. Arguments: `cltjax dashboard`'s.

    UserError for features that the CLT does not have, a model or store that is not the CLT's, a file of labels that
    is none, and without rows to look at.
    """
    if examples < 1:
        raise UserError(f"--examples {examples}: must be at least 1")
    began = time.monotonic()
    directory = CLTDirectory.open(clt)
    wanted = top_of(features) or parse_features(features, directory)
    names = read_labels(labels)
    opened = ActivationStore.open(store)
    vlm = load(model or str(directory.description.model["id"]), compute_dtype, device)
    loaded = CLT.from_pretrained(clt, vlm.device, DTYPES[clt_dtype], lazy=True)
    check_match(vlm, loaded, other_revision)
    held = hold(loaded, opened, split, max_rows, clt)
    chosen = strongest(held, wanted) if isinstance(wanted, int) else wanted
    found, images = panels(vlm, loaded, opened, chosen, examples, labels=names, image_dir=image_dir, held=held)
    data = {
        "title": f"Features of {clt.resolve().name}",
        "about": describe(vlm.name, store, held, split, features),
        "order": [spell(feature) for feature in chosen],
        "features": found,
        "images": images,
    }
    write(data, out)
    seconds = time.monotonic() - began
    print(f"{out / PAGE}: {len(found):,} features, {len(images):,} images, {seconds:.0f} s")
    return data


def describe(model: str, store: Path, held: Held, split: Split, features: str) -> str:
    samples = len(set(held.store.column("sample")[held.rows].tolist()))
    which = f"the {features.removeprefix(TOP)} strongest" if features.startswith(TOP) else "chosen"
    return f"{which}; {len(held.rows):,} tokens of {samples:,} {split} samples of {store.resolve().name}; {model}"


def top_of(features: str) -> int | None:
    """200 of `top:200`; None where features are named. UserError for another number than one above 0."""
    if not features.startswith(TOP):
        return None
    number = features.removeprefix(TOP)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"--features {features}: write top:200 for the 200 strongest")
    return int(number)


def write(data: Mapping[str, Any], out: Path) -> None:
    """OUT/dashboard.json and, when that is whole, OUT/index.html; the folder is made where it is missing."""
    scripts = ("panel.js", "dashboard.js")
    page = assemble("dashboard.html", str(data["title"]), ("panel.css", "dashboard.css"), scripts, data)
    text = json.dumps(data, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / DATA, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_whole(out / PAGE, lambda temporary: temporary.write_text(page, encoding="utf-8"))
