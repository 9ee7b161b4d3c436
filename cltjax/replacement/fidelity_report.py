"""Fidelity figures as a table and as a plot by layer. Nothing is measured here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from cltjax.files import write_whole
from cltjax.plots import COLOURS, STYLE, log_scale
from cltjax.replacement.resampling import Figure

NAMES = {"agree": "top-1", "kl": "KL", "ce": "CE"}
GENERATED = {"exact match": "exact match", "whole": "same answer", "prefix": "same so far", "equal": "same tokens"}
WHERE = {"all": "all tokens", "first": "first answer"}  # the other groups have short names
LEGEND = """top-1: next tokens as the original's. KL, CE: nats per token. 95 %: of the replaced model.
All tokens: of text and answers, teacher-forced; hard: the original is right, and less sure than 0.8.
Recovered: loss, against each ablation; * has the lower loss, and stands under `replaced`.
Free answers: as the reference, as the original's, its tokens until the first other one, and at all."""
ZERO_KL = 1e-7  # what float32 makes of no divergence: a logarithmic axis ends here


def show(figures: Mapping[str, Any], models: Sequence[str], console: Console | None = None) -> None:
    """Print what was measured on what, and the figures of the models side by side."""
    console = console or Console()
    counted, clt, forced = figures["counts"], figures["clt"], figures["teacher_forced"]
    split, spec = figures["settings"]["split"], Path(figures["dataset"]["spec"]).name
    title = f"{counted['samples']:,} {split} samples of {spec}, {counted['units']:,} images"
    table = Table("", title=title, title_justify="left")
    for name in (*models[:2], "95 %", *(name.replace("-", "-\n") for name in models[2:])):
        table.add_column(name, justify="right")

    def head(label: str) -> None:
        table.add_section()
        table.add_row(f"[bold]{label}")

    def add(label: str, of: Callable[[str], Figure], form: str = ".4f") -> None:
        first, second, *others = (spelled(of(name), form) for name in models)
        table.add_row(f"  {label}", first, second, between(of(models[1]), form), *others)

    for group in (group for group in forced[models[0]] if counted["tokens"][group]):
        head(f"{WHERE.get(group, group)}: {counted['tokens'][group]:,}")
        for figure in ("agree",) if group.startswith("hard") else ("agree", "kl", "ce"):
            add(NAMES[figure], lambda name, group=group, figure=figure: forced[name][group][figure])
        if recovered := figures["loss_recovered"].get(group):
            marks = {name: " *" if name == recovered["lower is"] else "" for name in models[2:]}
            against = [spelled(recovered[name]) + marks[name] for name in models[2:]]
            lower = recovered["lower"]
            table.add_row("  recovered", "1", spelled(lower), between(lower), *against)
    for kind, by in figures.get("generated", {}).items():
        head(f"{'free' if kind == 'all' else kind}: {counted['answers of'][kind]:,}")
        for figure in by[models[0]]:
            add(GENERATED[figure], lambda name, by=by, figure=figure: by[name][figure])
    task = figures["task"]
    for rule in (rule for rule, found in task.items() if isinstance(found, dict)):
        for dimension, by in task[rule].items():
            head(rule if dimension == "all" else dimension)
            for figure in by[models[0]]:
                add(figure, lambda name, by=by, figure=figure: by[name][figure])
    console.print(table)
    print(LEGEND)
    if "positive" in task:
        print(f"precision and recall: of the answer {task['positive']}")
    print("answers: " + ", ".join(f"{n:,} {kind}" for kind, n in counted["answers"].items() if n))
    print(f"mean-ablated: the mean over {figures['ablation']['mean of']}")
    real = f"; MLPs {clt['uncovered']} stay real in all models" if clt["uncovered"] else ""
    print(f"replaced or ablated: MLPs {clt['covered']}{real}")


def spelled(figure: Figure | None, form: str = ".4f") -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['value']:{form}}"


def between(figure: Figure | None, form: str = ".4f") -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['low']:{form}}, {figure['high']:{form}}"


def plot_layers(found: Mapping[str, Any], path: Path) -> Path:
    """KL and top-1 agreement at answer tokens: each MLP replaced alone, and the first n; returns `path`."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(9, 5.4), layout="constrained", sharex="col", sharey="row")
        columns = (("alone", "layer whose MLP alone is replaced"), ("first", "MLPs replaced, from the first"))
        for (which, label), (upper, lower) in zip(columns, panels.T, strict=True):
            line(upper, found[which], "kl", ZERO_KL)
            line(lower, found[which], "agree", 0.0)
            log_scale(upper)
            lower.set(xlabel=label)
            lower.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        panels[0, 0].set(ylabel="KL, nats per token")
        panels[1, 0].set(ylabel="top-1 as the original")
        panels[0, 1].legend(frameon=False)
        figure.suptitle("Replaced MLPs, teacher-forced; bands: 95 %")
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png"), sync=False)
        plt.close(figure)
    return path


def line(axes: Axes, found: Mapping[str, Any], figure: str, least: float) -> None:
    """A line and its band for each group of tokens; values below `least` are drawn there."""
    places = [int(place) for place in found]
    for group, colour in (("answer", COLOURS["text"]), ("first", COLOURS["image"])):
        here = [by[group][figure] for by in found.values() if by[group][figure]["value"] is not None]
        if len(here) < len(places):  # no such token: the same at every layer
            continue
        value, low, high = ([max(one[which], least) for one in here] for which in ("value", "low", "high"))
        axes.plot(places, value, marker="o", markersize=4, color=colour, label=f"{WHERE.get(group, group)} token")
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
