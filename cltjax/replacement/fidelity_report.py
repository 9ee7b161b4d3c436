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

SHORT = {"agree": "top-1 as the original", "kl": "KL, nats per token", "ce": "cross-entropy", "right": "top-1 is right"}
WHERE = {"all": "all tokens", "answer": "answer", "first": "first answer token", "hard": "hard tokens"}
ZERO_KL = 1e-7  # what float32 makes of no divergence: a logarithmic axis ends here


def show(figures: Mapping[str, Any], models: Sequence[str], console: Console | None = None) -> None:
    """Print what was measured on what, and the figures of the models side by side."""
    console = console or Console()
    counted, clt, replaced = figures["counts"], figures["clt"], models[1]
    split, spec = figures["settings"]["split"], figures["dataset"]["spec"]
    title = f"{counted['samples']:,} {split} samples of {spec} about {counted['units']:,} images or prompts"
    table = Table("", title=title, title_justify="left")
    for name in (*models[:2], f"95 % ({replaced})", *models[2:]):
        table.add_column(name, justify="right")

    def add(label: str, of: Callable[[str], Figure | None], form: str = ".4f") -> None:
        cells = {name: spelled(of(name), form) for name in models}
        first, second, *others = (cells[name] for name in models)
        table.add_row(label, first, second, between(of(replaced), form), *others)

    forced = figures["teacher_forced"]
    for group in ("all", "answer", "first", "hard"):
        if not counted["tokens"][group]:
            continue
        for figure in ("agree",) if group == "hard" else ("agree", "kl", "ce"):
            add(f"{WHERE[group]}: {SHORT[figure]}", lambda name, of=(group, figure): forced[name][of[0]][of[1]])
        table.add_section()
    for group, found in figures["loss_recovered"].items():
        against = {name: found[name] for name in models[2:]}
        best = found["lower"]
        label = f"{WHERE[group]}: loss recovered"
        marked = [f"{spelled(one)}{' *' if name == found['lower is'] else ''}" for name, one in against.items()]
        table.add_row(label, "1", spelled(best), between(best), *marked)
    table.add_section()
    for kind, by in figures.get("generated", {}).items():
        for figure in by[models[0]]:
            add(
                f"{GENERATED[figure]}{'' if kind == 'all' else f' ({kind})'}", lambda name, f=figure, by=by: by[name][f]
            )
    table.add_section()
    task = figures["task"]
    for rule, by in ((rule, task[rule]) for rule in task if isinstance(task[rule], dict)):
        for dimension, found in by.items():
            of = rule if dimension == "all" else f"{rule}, {dimension}"
            for figure in found[models[0]] if dimension == "all" else ("accuracy",):
                add(f"{of}: {figure}", lambda name, f=figure, found=found: found[name][f], ".3f")
    console.print(table)
    print("loss recovered: against each ablation; * the one with the lower loss, which stands under 'replaced'")
    answers = ", ".join(f"{n:,} {kind}" for kind, n in counted["answers"].items() if n)
    tokens = ", ".join(f"{n:,} {group}" for group, n in counted["tokens"].items())
    print(f"answers: {answers}; tokens: {tokens}")
    print(f"mean-ablated: the mean over {figures['ablation']['mean of']}")
    real = f"; MLPs {clt['uncovered']} stay real in all four" if clt["uncovered"] else ""
    print(f"replaced or ablated: MLPs {clt['covered']}{real}")


GENERATED = {
    "exact match": "answers freely: exact match",
    "whole": "answers freely: the original's answer",
    "prefix": "answers freely: its tokens, to the first other",
    "equal": "answers freely: its tokens, overall",
}


def spelled(figure: Figure | None, form: str = ".4f") -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['value']:{form}}"


def between(figure: Figure | None, form: str = ".4f") -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"


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
        axes.plot(places, value, marker="o", markersize=4, color=colour, label=WHERE[group])
        axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)
