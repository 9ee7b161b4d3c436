"""Measure a run or a CLT directory on a store's test rows, print the table, and write it into that folder."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cltjax.batches import Batch, read_ahead, split_batches
from cltjax.checkpoint import SUMMARY, identity
from cltjax.clt import CLT
from cltjax.clt_directory import DESCRIPTION, CLTDirectory
from cltjax.config import EvaluateConfig, TrainConfig
from cltjax.distributed import agree, is_main, make_mesh, say, start, together
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.folding import unfolded
from cltjax.metrics import EVERY, mean_fvu, measure, summary
from cltjax.normalisation import Normalisation, normalisation_of
from cltjax.plots import draw
from cltjax.ridge import fit_ridge, measure_ridge, sum_moments
from cltjax.runs import Trained, check_unchanged, freeze, input_layers, load, load_given
from cltjax.store import ActivationStore
from cltjax.store_format import differences
from cltjax.tokens import NormLimits, TokenRules, rules_of_clt, token_rules
from cltjax.training import train
from cltjax.wiring import Wiring

QUIET = 5.0  # seconds between two lines of progress
RIDGE_SHARE = 0.5  # of the machine's memory that ridge may take


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Test FVU by target and modality, L0, dead features, of a run or a CLT directory; the figures are also written
    into it.

    UserError where it cannot be measured on this store, or a run that it was given is missing or has changed.
    """
    start(config.processes)
    if (config.clt / DESCRIPTION).is_file():
        return evaluate_directory(config)
    with together():
        mesh = make_mesh(config.mesh)
        store = ActivationStore.open(config.store)
    trained = load(config.clt, mesh, config.best)
    given = load_given(config.clt, trained.config.given, mesh)
    clt, tokens = trained.clt, trained.config.tokens
    agree("another store or run", [trained.data, identity(store)])
    with together():
        store.check_trained_on(config.clt, trained.data["site"], trained.data["model"])
        check_unchanged(trained, given)
        sources, targets = input_layers(clt.wiring, given), clt.wiring.targets
        store.axis_of([*sources, *targets])
        if config.ridge:
            check_ridge(trained)
        limits = NormLimits(**{which: tuple(found) for which, found in trained.data["outliers"].items()})
        rules = token_rules(store, sources, targets, tokens, limits)
        rules.some_rows("test")
        frozen, arrays = freeze(clt.wiring, given)
    figures = {"split": "test", "store": str(store.path)} | about(trained, config.best)
    with read_ahead(split_batches(store, sources, targets, rules.group, "test")) as batches:
        rows = len(store.rows_of("test"))
        said = progress(batches, rows, "measuring")
        measured = measure(clt, said, rules.used_groups, frozen, arrays, mesh)
    figures |= summary(measured, clt.wiring.sources, targets, rules.used_groups)
    if config.ridge:
        figures["ridge"] = ridge_figures(clt, store, rules)
    with together():
        if is_main():
            report(trained, store, figures)
    return figures


def evaluate_directory(config: EvaluateConfig) -> dict[str, Any]:
    """`evaluate` of a CLT directory: its weights as they are, rounded and folded."""
    with together():
        if config.best:
            raise UserError(f"--best is for runs: {config.clt} is a CLT directory, which has one set of weights")
        mesh = make_mesh(config.mesh)
        directory, store = CLTDirectory.open(config.clt), ActivationStore.open(config.store)
        described = directory.description
        wiring = described.wiring
        rules = rules_of_clt(directory, store)
        rules.some_rows("test")
        clt = unfolded(directory, normalisation_of(store, wiring.sources, wiring.targets, rules))
    with read_ahead(split_batches(store, wiring.sources, wiring.targets, rules.group, "test")) as batches:
        said = progress(batches, len(store.rows_of("test")), "measuring")
        measured = measure(clt, said, rules.used_groups, mesh=mesh)
    head: dict[str, Any] = {"split": "test", "store": str(store.path)}
    figures = head | summary(measured, wiring.sources, wiring.targets, rules.used_groups)
    if config.ridge:
        figures["ridge"] = ridge_figures(clt, store, rules)
    with together():
        if is_main():
            show(figures, described.n_features, Console())
            write_json(file := beside(config.clt, store), figures)
            print(f"figures: {file}")
    return figures


def beside(folder: Path, store: ActivationStore) -> Path:
    """Where figures on a store go that are not the run's own: stores of one name may lie in different folders."""
    where = store.path.resolve()
    return folder / f"metrics-{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}.json"


def about(trained: Trained, best: bool) -> dict[str, Any]:
    """Which weights are measured: part of the figures."""
    which = "best" if best else "last"
    return {"checkpoint": which, "step": trained.step, "steps": trained.config.steps, "digest": trained.digest}


def report(trained: Trained, store: ActivationStore, figures: dict[str, Any]) -> None:
    """Write the figures into the run directory, draw the plots, print the table.

    On another store than the run was trained on, the figures are not the run's own: they get a file of their own, and
    no plots.
    """
    run, model = trained.run, trained.config.model
    own = is_own_store(trained, store)
    if own:
        figures |= earlier_ridge(run, figures)
        write_figures(run, figures, dataclasses.asdict(model))
    show(figures, model.features, Console())
    if own:
        print("plots: " + "  ".join(str(path) for path in draw(run)))
    else:
        write_json(file := beside(run, store), figures)
        print(f"{run} was trained on another store than {store.path}: {SUMMARY} is left as it is, see {file}")


def is_own_store(trained: Trained, store: ActivationStore) -> bool:
    """Whether this is the data that the run was trained on."""
    here = json.loads(json.dumps(identity(store)))  # as it is read back from config.json
    return not differences({name: trained.data.get(name) for name in here}, here)


def earlier_ridge(run: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """{"ridge"} of the metrics.json that is about to be replaced, where that has it, of the same weights and store."""
    path = run / SUMMARY
    if "ridge" in figures or not path.exists():
        return {}
    try:
        before = json.loads(path.read_bytes())
    except ValueError:  # damaged: it is replaced by a whole one
        return {}
    return {"ridge": before["ridge"]} if "ridge" in before and before.get("digest") == figures["digest"] else {}


def scales_of(clt: CLT) -> Normalisation:
    """The normalisation inside a CLT."""
    constants = (clt.in_mean, clt.in_std, clt.out_mean, clt.out_std)
    return Normalisation(*(np.asarray(constant[...]) for constant in constants))


def check_ridge(trained: Trained) -> None:
    """UserError where ridge would not be a baseline from the same input, or would not fit into memory."""
    if trained.config.given:
        raise UserError(
            f"--ridge is for runs without given ones: it would see only the sources of {trained.run}, whose figures "
            "include those of the given runs"
        )
    needed = ridge_bytes(trained.clt.wiring, trained.clt.in_mean[...].shape[1])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > RIDGE_SHARE * memory:
        raise UserError(
            f"--ridge from {len(trained.clt.wiring.sources)} sources needs about {needed / 2**30:,.1f} GiB, of "
            f"{memory / 2**30:,.1f} GiB that this machine has: leave it out, or measure a run of fewer sources"
        )


def ridge_bytes(wiring: Wiring, D: int) -> int:
    """About the most memory that ridge takes at a time, all in float64: moments of two splits and a product of one
    batch; or the moments, weights, an eigendecomposition for each set of sources and what the largest is made with."""
    S, T = len(wiring.sources), len(wiring.targets)
    writers = [tuple(s for s, written in wiring.pairs if written == target) for target in wiring.targets]
    sets = [D * len(one) for one in set(writers)]
    moments = 2 * ((S * D) ** 2 + T * S * D**2)
    solving = sum(n**2 for n in sets) + 4 * max(sets) * (max(sets) + D) + len(wiring.pairs) * D**2
    return 8 * (moments + max((S * D) ** 2, solving))


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
    if figures.get("checkpoint") == "best":
        print(f"the checkpoint with the best val FVU: step {figures['step']} of {figures['steps']}")
    elif figures.get("step", 0) < figures.get("steps", 0):
        print(f"unfinished: step {figures['step']} of {figures['steps']}")
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
