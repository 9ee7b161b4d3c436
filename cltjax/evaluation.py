"""Measure a run on a store's test rows, print the table, and write it into the run directory."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cltjax.batches import Batch, read_ahead, split_batches
from cltjax.checkpoint import SUMMARY, identity, read_config
from cltjax.clt import CLT
from cltjax.config import EvaluateConfig, ModelConfig, TrainConfig
from cltjax.distributed import agree, is_main, make_mesh, say, start, together
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.metrics import EVERY, mean_fvu, measure, summary
from cltjax.normalisation import Normalisation
from cltjax.plots import draw
from cltjax.ridge import fit_ridge, measure_ridge, sum_moments
from cltjax.runs import freeze, load
from cltjax.store import ActivationStore
from cltjax.store_format import differences
from cltjax.tokens import NormLimits, TokenRules, token_rules
from cltjax.training import train

QUIET = 5.0  # seconds between two lines of progress


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Test FVU by target and modality, L0, dead features; the figures are also written into the run directory."""
    start(config.processes)
    with together():
        mesh = make_mesh(config.mesh)
        read_config(config.clt)
        store = ActivationStore.open(config.store)
    trained = load(config.clt, mesh)
    clt, tokens = trained.clt, trained.config.tokens
    agree("another store or checkpoint", [trained.data, trained.step, identity(store)])
    with together():
        check_match(config.clt, trained.data, store)
        sources, targets = trained.sources, clt.wiring.targets
        store.axis_of([*sources, *targets])
        limits = NormLimits(**{which: tuple(found) for which, found in trained.data["outliers"].items()})
        rules = token_rules(store, sources, targets, tokens, limits)
        rules.some_rows("test")
        frozen, arrays = freeze(clt.wiring, trained.family)
    figures: dict[str, Any] = {"split": "test", "store": str(store.path)}
    with read_ahead(split_batches(store, sources, targets, rules.group, "test")) as batches:
        rows = len(store.rows_of("test"))
        said = progress(batches, rows, "measuring")
        measured = measure(clt, said, rules.used_groups, frozen, arrays, mesh)
    figures |= summary(measured, clt.wiring.sources, targets, rules.used_groups)
    if config.ridge:
        figures["ridge"] = ridge_figures(clt, store, rules)
    with together():
        if is_main():
            report(config.clt, trained.config.model, figures)
    return figures


def report(run: Path, model: ModelConfig, figures: dict[str, Any]) -> None:
    """Write the figures into the run directory, draw the plots, print the table."""
    write_figures(run, figures, dataclasses.asdict(model))
    show(figures, model.features, Console())
    print("plots: " + "  ".join(str(path) for path in draw(run)))


def check_match(run: Path, data: dict[str, Any], store: ActivationStore) -> None:
    """UserError where `store` holds another model's activations, or another site's, than `run` was trained on."""
    trained = {"site": data["site"], "model": data["model"]}
    for name, was, found in differences(trained, {"site": store.site, "model": store.model}):
        raise UserError(f"{run} was trained on a store with {name} {was}, but {store.path} has {found}")


def scales_of(clt: CLT) -> Normalisation:
    """The normalisation inside a CLT."""
    constants = (clt.in_mean, clt.in_std, clt.out_mean, clt.out_std)
    return Normalisation(*(np.asarray(constant[...]) for constant in constants))


def ridge_figures(clt: CLT, store: ActivationStore, rules: TokenRules) -> dict[str, Any]:
    """Ridge regression from the CLT's inputs: fitted on train, penalty chosen on val, measured on test."""
    wiring, scales = clt.wiring, scales_of(clt)
    sums = {}
    for split in ("train", "val"):
        with read_ahead(split_batches(store, wiring.sources, wiring.targets, rules.group, split)) as batches:
            said = progress(batches, len(store.rows_of(split)), f"ridge, {split}")
            sums[split] = sum_moments(said, scales, rules.used_groups)
    ridge = fit_ridge(wiring, sums["train"], sums["val"])
    with read_ahead(split_batches(store, wiring.sources, wiring.targets, rules.group, "test")) as batches:
        targets = measure_ridge(ridge, batches, scales).figures(wiring.targets, rules.used_groups)
    penalties = dict(zip(map(str, wiring.targets), ridge.penalty, strict=True))
    return {"fvu": mean_fvu(targets), "targets": targets, "penalty": penalties}


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
            say(f"{doing}: {done:,} of {rows:,} rows  {speed:,.0f} rows/s  left {left:.0f} s")


def write_figures(run: Path, figures: dict[str, Any], settings: dict[str, Any]) -> None:
    """metrics.json, and metrics_L<l>.json for each source."""
    shared = {name: value for name, value in figures.items() if name != "sources"}
    write_json(run / SUMMARY, shared)
    for layer, by in figures["sources"].items():
        head = {"source": int(layer), "split": figures["split"], "rows": figures["rows"], "settings": settings}
        write_json(run / f"metrics_L{layer}.json", head | by)


def show(figures: dict[str, Any], features: int, console: Console) -> None:
    """The table: FVU by target and group beside ridge and the mean-only baseline; L0 and dead features by source.

    Groups that the run was not trained on come last, and are in no other figure.
    """
    used = [name for name in figures["rows_by_group"] if name in figures["fvu"]]
    left = [name for name in figures["left_out"] if name in figures["fvu"]]
    title = f"FVU on {figures['rows']:,} test rows (slope: calibration of all, 1 is right)"
    table = Table("target", "predictor", title=title, title_justify="left")
    for name in (*used, EVERY, "slope", *(f"{name}\n(left out)" for name in left)):
        table.add_column(name, justify="right")

    def add(target: str, name: str, fvu: dict[str, float], slope: float | None) -> None:
        cells = [[f"{fvu[group]:.4f}" for group in groups] for groups in ((*used, EVERY), left)]
        table.add_row(target, name, *cells[0], "" if slope is None else f"{slope:.3f}", *cells[1])

    predictors = {"CLT": figures} | ({"ridge": figures["ridge"]} if "ridge" in figures else {})
    for layer in figures["targets"]:
        for name, found in predictors.items():
            by = found["targets"][layer]
            fvu = {group: by[group]["fvu"] for group in by}
            add(layer if name == "CLT" else "", name, fvu, by[EVERY]["slope"])
    table.add_section()
    for name, found in predictors.items():
        add("mean" if name == "CLT" else "", name, found["fvu"], None)
    add("any", "mean only", dict.fromkeys(figures["fvu"], 1.0), None)
    console.print(table)
    print("rows: " + ", ".join(f"{n:,} {name}" for name, n in figures["rows_by_group"].items() if n), end="")
    print("; left out: " + (", ".join(f"{n:,} {name}" for name, n in figures["left_out"].items()) or "none"))
    for layer, by in figures["sources"].items():
        shares = ", ".join(f"{name} {value:.1f}" for name, value in by["l0_by_group"].items() if name in used)
        dead = f"{by['dead']:.1%} of {features} features never fire on test rows"
        print(f"source {layer}: L0 {by['l0']:.2f} ({shares}); {dead}")


def train_and_measure(config: TrainConfig) -> Path:
    """Train (or go on training) the run of `config`, then measure it on the test rows of the same store and on the
    same mesh."""
    run = train(config)
    evaluate(EvaluateConfig(run, config.store, mesh=config.mesh, processes=config.processes))
    return run
