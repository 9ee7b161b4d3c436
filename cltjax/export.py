"""Runs -> CLT directory: one run as it is, or several as one CLT."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from cltjax.batches import Batch, read_ahead, row_batches, split_batches
from cltjax.checkpoint import identity, read_summary
from cltjax.clt import CLT
from cltjax.clt_directory import Combined, Description, WeightType, write_clt
from cltjax.combine import (
    Gains,
    Moments,
    compare,
    fit_gains,
    folds_of,
    joined,
    joint_wiring,
    moments_of,
    rows_at_once,
    with_gains,
    writers,
)
from cltjax.config import as_json
from cltjax.errors import UserError
from cltjax.folding import activation_of, folded
from cltjax.metrics import EVERY, measure, summary
from cltjax.runs import Trained, check_same_model, load
from cltjax.store import ActivationStore
from cltjax.tokens import NormLimits, TokenRules, token_rules
from cltjax.wiring import Wiring

Way = Literal["gains", "backfit", "none"]


def export(
    runs: Sequence[Path],
    out: Path,
    combine: Way | None = None,
    store: Path | None = None,
    dtype: WeightType = "float32",
    non_negative: bool = False,
    best: bool = False,
) -> None:
    """Write runs as one CLT directory; the arguments are the options of `cltjax export`.

    UserError where the runs do not make one CLT.
    """
    if not runs:
        raise UserError("name a run directory: cltjax export runs/L0-5 --out clt")
    if out.exists():
        raise UserError(f"{out} exists already: name another --out, or delete it")
    loaded = [load(run, best=best) for run in dict.fromkeys(runs)]
    check_alike(loaded)
    if len(loaded) == 1:
        (one,) = loaded
        if combine:
            raise UserError(f"--combine {combine} is for several runs, and {one.run} is one: leave it out")
        if store is not None:
            raise UserError(f"--store is what several runs are combined on, and {one.run} is one: leave it out")
        if one.config.given:
            others = " ".join(map(str, one.config.given))
            raise UserError(f"{one.run} was trained on what other runs leave: name these too, {others}")
        check_non_negative(non_negative, "joint")
        whole, way, found = one.clt, "joint", {"metrics": figures_of(one)}
    else:
        way, loaded = way_of(loaded, combine)
        check_non_negative(non_negative, way)
        whole, found = several(loaded, way, ActivationStore.open(store or loaded[0].config.store), non_negative)
    write_clt(out, describe(loaded, whole, way, dtype, found), folded(whole, dtype))
    print(f"{out}: {way}, sources {whole.wiring.name[1:]}, {len(whole.wiring.pairs)} pairs, {dtype}")


def several(
    runs: Sequence[Trained], way: Combined, store: ActivationStore, non_negative: bool
) -> tuple[CLT, dict[str, Any]]:
    """Several runs as one CLT, and what clt.json says about it. Prints the figures."""
    first = runs[0]
    wiring = joint_wiring(
        [(str(one.run), one.clt.wiring) for one in runs],
        first.data["model"]["n_layers"],
        first.config.offset,
        first.config.n_targets,
    )
    for one in runs:
        check_same_model(str(one.run), one.data, identity(store))
    rules = rules_of(first, wiring, store)
    whole = joined([one.clt for one in runs], wiring)
    found: dict[str, Any] = {}
    if way == "gains":
        val, test = (moments(whole, store, rules, split) for split in ("val", "test"))
        gains = fit_gains(val, wiring, non_negative)
        show(compare(val, test, wiring, np.asarray(whole.b_dec[...]), gains), wiring)
        found["combination"] = as_dict(gains, wiring, non_negative, len(rules.rows("val")))
        whole = with_gains(whole, gains)
    with read_ahead(split_batches(store, wiring.sources, wiring.targets, rules.group, "test")) as batches:
        measured = measure(whole, batches, rules.used_groups)
    figures = summary(measured, wiring.sources, wiring.targets, rules.used_groups)
    slopes = [by[EVERY]["slope"] for by in figures["targets"].values()]
    print(f"{way}: test FVU {figures['fvu'][EVERY]:.4f}, calibration slopes {min(slopes):.3f} to {max(slopes):.3f}")
    return whole, found | {"metrics": {"split": "test"} | figures}


def figures_of(one: Trained) -> dict[str, Any]:
    """The test figures of exactly these weights; empty, with a word about it, where they were not measured."""
    found = read_summary(one.run)
    if found.get("digest") == one.digest:
        return found
    print(f"clt.json has no test figures: these weights of {one.run} were not measured (evaluate.py)")
    return {}


def way_of(runs: list[Trained], asked: Way | None) -> tuple[Combined, list[Trained]]:
    """How runs are combined, and the runs, one that was trained on what all others leave first. UserError for `backfit`
    where there is none."""
    digests = {one.digest for one in runs}
    for one in runs:
        pinned = {pin["digest"] for pin in one.data.get("given_runs", {}).values()}
        if pinned == digests - {one.digest}:
            return asked or "backfit", [one, *(other for other in runs if other is not one)]
    if asked == "backfit":
        raise UserError(
            "--combine backfit: none of these runs was trained with --given all of the others as they are now: train "
            "one so, or use gains"
        )
    return asked or "gains", runs


def check_non_negative(non_negative: bool, way: Combined) -> None:
    """UserError where gains are asked for that are not negative, and there are no gains."""
    if non_negative and way != "gains":
        raise UserError(f"--non-negative is about gains, and there are none with combined = {way}: leave it out")


def check_alike(runs: Sequence[Trained]) -> None:
    """UserError where runs cannot be parts of one CLT."""
    first = runs[0]
    for other in runs[1:]:
        check_same_model(str(other.run), other.data, first.data)
        for option, get in (
            ("--offset", lambda one: one.config.offset),
            ("--n-targets", lambda one: one.config.n_targets),
            ("--model.features", lambda one: one.config.model.features),
            ("activation", lambda one: activation_of(one.clt).kind),
            ("--tokens options", lambda one: dataclasses.asdict(one.config.tokens)),
        ):
            if get(first) != get(other):
                raise UserError(
                    f"{first.run} has {option} {get(first)} and {other.run} {get(other)}: they are no parts of one CLT"
                )


def rules_of(trained: Trained, wiring: Wiring, store: ActivationStore) -> TokenRules:
    """Which rows several runs are combined on and measured on, with limits of the store itself."""
    rules = token_rules(store, wiring.sources, wiring.targets, trained.config.tokens)
    for split in ("val", "test"):
        rules.some_rows(split)
    return rules


def moments(clt: CLT, store: ActivationStore, rules: TokenRules, split: str) -> Moments:
    """The moments of a split's used rows."""
    wiring, rows = clt.wiring, rules.some_rows(split)
    fold, size = folds_of(store.column("sample")[rows]), rows_at_once(clt.wiring, store.d_model)

    def batches() -> Iterator[tuple[Batch, np.ndarray]]:
        found = row_batches(store, wiring.sources, wiring.targets, rules.group, rows, size)
        for number, (batch, _) in enumerate(found):
            yield batch, fold[number * size : (number + 1) * size]

    with read_ahead(batches()) as ahead:
        return moments_of(clt, ahead)


def as_dict(gains: Gains, wiring: Wiring, non_negative: bool, rows: int) -> dict[str, Any]:
    """Gains as clt.json has them: by target, then source."""
    by_target = {
        str(target): {str(wiring.sources[s]): float(gains.gain[t, s]) for s in writers(wiring, target)}
        for t, target in enumerate(wiring.targets)
    }
    penalty = dict(zip(map(str, wiring.targets), gains.penalty.tolist(), strict=True))
    return {"gains": by_target, "penalty": penalty, "non_negative": non_negative, "val_rows": rows}


def show(fvu: dict[str, tuple[float, ...]], wiring: Wiring) -> None:
    """The table of ways to combine."""
    table = Table("target", *fvu, title="FVU on test rows, by way of combining", title_justify="left")
    for t, target in enumerate(wiring.targets):
        table.add_row(str(target), *(f"{values[t]:.4f}" for values in fvu.values()))
    table.add_section()
    table.add_row("mean", *(f"{np.mean(values):.4f}" for values in fvu.values()))
    Console().print(table)


def describe(
    runs: Sequence[Trained], whole: CLT, combined: Combined, dtype: WeightType, found: dict[str, Any]
) -> Description:
    """clt.json of a CLT that one or several runs make; `found` has its metrics and combination."""
    first = runs[0]
    return Description(
        model=first.data["model"],
        site=first.data["site"],
        n_features=first.config.model.features,
        sources=whole.wiring.sources,
        offset=first.config.offset,
        n_targets=first.config.n_targets,
        activation=dataclasses.replace(activation_of(whole), trained_as=first.clt.activation),
        combined=combined,
        dtype=dtype,
        tokens=as_json(first.config)["tokens"] | limits_of(runs, whole.wiring),
        training=[as_json(one.config) | {"steps_done": one.step, "digest": one.digest} for one in runs],
        **found,
    )


def limits_of(runs: Sequence[Trained], wiring: Wiring) -> dict[str, Any]:
    """{"limits": {"site", "mlp_out"}}: norms of outliers by source and target layer, as the runs were trained with."""
    found: dict[str, dict[int, float]] = {"site": {}, "mlp_out": {}}
    for one in reversed(runs):  # of several that write to a target, the first one's
        own, limits = one.clt.wiring, NormLimits(**{k: tuple(v) for k, v in one.data["outliers"].items()})
        found["site"] |= dict(zip(own.sources, limits.site, strict=False))  # a run's given sources come behind its own
        found["mlp_out"] |= dict(zip(own.targets, limits.mlp_out, strict=True))
    layers = {"site": wiring.sources, "mlp_out": wiring.targets}
    return {"limits": {which: [found[which][layer] for layer in layers[which]] for which in found}}
