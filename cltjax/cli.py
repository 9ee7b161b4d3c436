"""The console script `cltjax`: what is in a store, and whether all of it can be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cltjax.command import run
from cltjax.store import ActivationStore
from cltjax.store_format import COLUMNS, SPLITS, STATISTICS
from cltjax.wiring import spell_layers

MODALITIES = ("text", "image", "special")


@dataclass(frozen=True)
class Info:
    """Show what a store holds: model, site, rows by split and modality, outliers."""

    store: tyro.conf.Positional[Path] = Path("activations")
    """The activation store."""


@dataclass(frozen=True)
class Verify:
    """Read a whole store and check it against its checksums."""

    store: tyro.conf.Positional[Path] = Path("activations")
    """The activation store."""


Command = Annotated[Info, tyro.conf.subcommand("info")] | Annotated[Verify, tyro.conf.subcommand("verify")]


def show(path: Path) -> None:
    """Print a store's manifest, its rows and its statistics."""
    store = ActivationStore.open(path)
    manifest, console = store.manifest, Console()
    model, dataset = store.model, manifest["dataset"]
    state = "complete" if store.complete else "unfinished: only published rows are counted"
    layers = f"layers {spell_layers(store.layers)} of {store.n_layers}"
    print(f"{path}: {store.rows:,} rows of {len(store.samples):,} samples, {state}")
    print(f"model    {model['id']} ({model['class']}, revision {model['revision']})")
    print(f"arrays   {store.site} and mlp_out, {layers}, width {store.d_model}, {store.dtype}")
    print(f"data     {dataset['spec']}, {len(dataset['skipped'])} rows skipped")
    print(f"template {manifest['template']!r}")
    rows = Table("rows", *MODALITIES, "all")
    modality = store.column("modality")
    for code, split in enumerate(SPLITS):
        counts = np.bincount(modality[store.split == code], minlength=len(MODALITIES))
        rows.add_row(split, *(f"{n:,}" for n in counts), f"{counts.sum():,}")
    console.print(rows)
    stats = store.stats()
    figures = Table("layer", f"{store.site} std", "mean norm", "outliers", "mlp_out std", "mean norm", "outliers")
    for i, layer in enumerate(store.layers):
        cells = [
            text
            for one in (stats.site, stats.mlp_out)
            for text in (f"{one.std[i]:.4g}", f"{one.mean_norm[i]:.4g}", f"{one.outliers[i].sum():,}")
        ]
        figures.add_row(str(layer), *cells)
    console.print(figures)
    print(f"over train rows, from {STATISTICS}; an outlier's norm is at least 20 times its layer's mean norm")


def verify(path: Path) -> None:
    """Read a whole store once; the first damaged or missing chunk ends it with an error that names it."""
    store = ActivationStore.open(path)
    shard_rows = store.manifest["shard_rows"]
    starts = range(0, store.rows, shard_rows)
    for start in track(starts, "reading", console=Console(stderr=True)):
        rows = slice(start, min(start + shard_rows, store.rows))
        for layer in store.layers:
            for which in ("site", "mlp_out"):
                store.read(which, rows, (layer,))
    for name in COLUMNS:
        store.column(name)
    for which in ("site", "mlp_out"):
        store.norms(which)
    samples = len(store.samples)
    store.summary()
    print(f"{path}: all {store.rows:,} rows of {samples:,} samples and {len(store.layers)} layers can be read")


def execute(command: Command) -> None:
    """Look into activation stores."""
    if isinstance(command, Info):
        show(command.store)
    else:
        verify(command.store)


def main() -> None:
    run(Command, execute)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
