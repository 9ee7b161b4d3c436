"""Measure a run on a store's test rows, print the table, and write it into the run directory."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cltjax.batches import Batch, read_ahead, split_batches
from cltjax.checkpoint import METRICS, SUMMARY, read_lines
from cltjax.clt import CLT
from cltjax.config import EvaluateConfig, TrainConfig
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.metrics import EVERY, GROUPS, measure, summary
from cltjax.normalisation import Normalisation
from cltjax.plots import plot_fvu, plot_loss
from cltjax.ridge import fit_ridge, measure_ridge, sum_moments
from cltjax.store import ActivationStore
from cltjax.store_format import differences
from cltjax.training import load, train

QUIET = 5.0  # seconds between two lines of progress


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Test FVU by target and modality, L0, dead features; the figures are also written into the run directory."""
    clt, trained, data = load(config.clt)
    store = ActivationStore.open(config.store)
    check_match(config.clt, data, store)
    store.axis_of([*clt.wiring.sources, *clt.wiring.targets])
    rows = len(store.rows_of("test"))
    if rows == 0:
        raise UserError(f"{store.path} has no test rows to measure on: capture more samples")
    figures: dict[str, Any] = {"split": "test", "store": str(store.path)}
    with read_ahead(split_batches(store, clt.wiring, "test")) as batches:
        figures |= summary(measure(clt, progress(batches, rows, "measuring")), clt)
    if config.ridge:
        figures["ridge"] = ridge_figures(clt, store)
    write_figures(config.clt, figures, {"features": trained.model.features, "k": trained.model.k})
    show(figures, clt, Console())
    print("plots: " + "  ".join(str(path) for path in draw(config.clt, figures)))
    return figures


def check_match(run: Path, data: dict[str, Any], store: ActivationStore) -> None:
    """UserError where `store` holds another model's activations, or another site's, than `run` was trained on."""
    trained = {"site": data["site"], "model": data["model"]}
    for name, was, found in differences(trained, {"site": store.site, "model": store.model}):
        raise UserError(f"{run} was trained on a store with {name} {was}, but {store.path} has {found}")


def scales_of(clt: CLT) -> Normalisation:
    """The normalisation inside a CLT."""
    constants = (clt.in_mean, clt.in_std, clt.out_mean, clt.out_std)
    return Normalisation(*(np.asarray(constant[...]) for constant in constants))


def ridge_figures(clt: CLT, store: ActivationStore) -> dict[str, Any]:
    """Ridge regression from the CLT's inputs: fitted on train, penalty chosen on val, measured on test."""
    wiring, scales = clt.wiring, scales_of(clt)
    sums = {}
    for split in ("train", "val"):
        with read_ahead(split_batches(store, wiring, split)) as batches:
            sums[split] = sum_moments(progress(batches, len(store.rows_of(split)), f"ridge, {split}"), scales)
    ridge = fit_ridge(wiring, sums["train"], sums["val"])
    with read_ahead(split_batches(store, wiring, "test")) as batches:
        targets = measure_ridge(ridge, batches, scales).figures(wiring.targets)
    penalties = dict(zip(map(str, wiring.targets), ridge.penalty, strict=True))
    return {"fvu": mean_fvu(targets), "targets": targets, "penalty": penalties}


def mean_fvu(targets: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean over targets, by group."""
    groups = next(iter(targets.values())).keys()
    return {group: float(np.mean([by[group]["fvu"] for by in targets.values()])) for group in groups}


def progress(batches: Iterable[tuple[Batch, np.ndarray]], rows: int, doing: str) -> Iterator[tuple[Batch, np.ndarray]]:
    """The same batches, with a line now and then about how far it is."""
    began = said = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[1])
        now = time.perf_counter()
        if now - said >= QUIET:
            said, speed = now, done / (now - began)
            left = (rows - done) / speed
            print(f"{doing}: {done:,} of {rows:,} rows  {speed:,.0f} rows/s  left {left:.0f} s", flush=True)


def write_figures(run: Path, figures: dict[str, Any], settings: dict[str, Any]) -> None:
    """metrics.json, and metrics_L<l>.json for each source."""
    shared = {name: value for name, value in figures.items() if name != "sources"}
    write_json(run / SUMMARY, shared)
    for layer, by in figures["sources"].items():
        head = {"source": int(layer), "split": figures["split"], "rows": figures["rows"], "settings": settings}
        write_json(run / f"metrics_L{layer}.json", head | by)


def draw(run: Path, figures: dict[str, Any]) -> list[Path]:
    """The plots of a run; returns their paths."""
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    fvu, loss = folder / "fvu.png", folder / "loss.png"
    plot_fvu(figures, fvu)
    records = read_lines(run / METRICS)
    if not records:
        return [fvu]
    plot_loss(records, loss)
    return [loss, fvu]


def show(figures: dict[str, Any], clt: CLT, console: Console) -> None:
    """The table: FVU by target and group beside ridge and the mean-only baseline; L0 and dead features by source."""
    groups = [name for name in (*GROUPS, EVERY) if name in figures["fvu"]]
    title = f"FVU on {figures['rows']:,} test rows (slope: calibration, 1 is right)"
    table = Table("target", "predictor", *groups, "slope", title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"

    def add(target: str, name: str, fvu: dict[str, float], slope: float | None) -> None:
        table.add_row(target, name, *(f"{fvu[g]:.4f}" for g in groups), "" if slope is None else f"{slope:.3f}")

    predictors = {"CLT": figures} | ({"ridge": figures["ridge"]} if "ridge" in figures else {})
    for layer in figures["targets"]:
        for name, found in predictors.items():
            by = found["targets"][layer]
            add(layer if name == "CLT" else "", name, {g: by[g]["fvu"] for g in groups}, by[EVERY]["slope"])
    table.add_section()
    for name, found in predictors.items():
        add("mean" if name == "CLT" else "", name, found["fvu"], None)
    add("any", "mean only", dict.fromkeys(groups, 1.0), None)
    console.print(table)
    features = clt.b_enc[...].shape[1]
    for layer, by in figures["sources"].items():
        shares = ", ".join(f"{name} {value:.1f}" for name, value in by["l0_by_modality"].items())
        dead = f"{by['dead']:.1%} of {features} features never fire on test rows"
        print(f"source {layer}: L0 {by['l0']:.2f} ({shares}); {dead}")


def train_and_measure(config: TrainConfig) -> Path:
    """Train (or go on training) the run of `config`, then measure it on the test rows of the same store."""
    run = train(config)
    evaluate(EvaluateConfig(run, config.store))
    return run
