"""What a run directory's files say, as PNG: how training went, and what the test rows showed. Imports no jax."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from cltjax.errors import UserError

STYLE: Any = {"figure.dpi": 140, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {"all": "#444444", "text": "#3b6fb6", "image": "#d9822b", "special": "#8aa872", "outlier": "#b5475d"}
MANY = 8  # more lines than these cannot be told apart
Json = dict[str, Any]


def draw(run: Path) -> list[Path]:
    """Draw all plots that the files in a run directory allow, into its `plots/`; returns their paths.

    From metrics.jsonl loss.png and features.png; from metrics.json fvu.png; from metrics_L<l>.json density.png.
    UserError where there is none of these files, or one that cannot be used.
    """
    lines, summary = read_records(run / "metrics.jsonl"), read_json(run / "metrics.json")
    records, measured = ([line for line in lines if name in line] for name in ("loss", "val_fvu"))
    sources = [read_json(path) for path in run.glob("metrics_L*.json")]
    if not (records or summary or sources):
        raise UserError(f"{run} has nothing to plot, no metrics.jsonl and no metrics.json: train.py writes them")
    plots: list[tuple[str, Any, Any]] = []
    if records:
        plots += [("loss", partial(plot_loss, measured=measured), records), ("features", plot_features, records)]
    if summary:
        plots.append(("fvu", plot_fvu, summary))
    if sources:
        plots.append(("density", plot_density, sources))
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, plot, figures in plots:
        path = folder / f"{name}.png"
        try:
            with plt.rc_context(STYLE):
                figure = plot(figures)
                figure.savefig(path)
                plt.close(figure)
        except KeyError as error:
            raise UserError(
                f"{run}: {name}.png needs {error}, which its files do not have: evaluate.py writes metrics*.json again"
            ) from error
        paths.append(path)
    return paths


def read_records(path: Path) -> list[Json]:
    """The whole lines of metrics.jsonl; a run that is still going may have begun another."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    try:
        return [json.loads(line) for line in whole.split(b"\n") if line]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or train again") from error


def read_json(path: Path) -> Json:
    """The content of a file, empty where there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): measure it again with evaluate.py") from error


def log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers: 1, 2, 5 within few decades, else one a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def depth_colours(layers: Sequence[Any]) -> np.ndarray:
    """A colour for each layer, dark to light with depth; the lightest end would not show on white."""
    return plt.get_cmap("viridis")(np.linspace(0.0, 0.88, len(layers)))


def plot_loss(records: list[Json], measured: Sequence[Json] = ()) -> Figure:
    """Loss of the training batches, and their FVU by target, over steps; and FVU on val rows, where it was measured."""
    steps = [record["step"] for record in records]
    by_target = list(zip(*(record["fvu_by_target"] for record in records), strict=True))
    colours = depth_colours(by_target)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    left.plot(steps, [record["loss"] for record in records], color=COLOURS["text"])
    left.set(xlabel="step", ylabel="loss", title="Loss, training batches")
    # The targets' layer numbers are not in the records: from the nearest (dark) to the farthest (light).
    if len(by_target) > 1:
        for values, colour in zip(by_target, colours, strict=True):
            right.plot(steps, values, color=colour, linewidth=0.9)
        right.plot([], [], color=colours[0], linewidth=0.9, label="by target: lowest layer ...")
        right.plot([], [], color=colours[-1], linewidth=0.9, label="... to highest")
    right.plot(steps, [record["fvu"] for record in records], color="black", linewidth=1.6, label="mean over targets")
    right.set(xlabel="step", ylabel="fraction of variance unexplained", title="FVU, training batches")
    if measured:
        places, values = ([line[name] for line in measured] for name in ("step", "val_fvu"))
        right.plot(places, values, "o", color=COLOURS["image"], markersize=3.5, label="mean over targets, val rows")
        right.set_title("FVU, training batches and val rows")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        log_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3, which="both")
    return figure


def plot_features(records: list[Json]) -> Figure:
    """Share of dead features, and active features per token and source, over steps."""
    steps = [record["step"] for record in records]
    dead, l0 = ([record[name] for record in records] for name in ("dead", "l0"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    left.plot(steps, dead, color=COLOURS["image"], clip_on=False)
    left.set(xlabel="step", ylabel="share of features", title="Dead features (silent for long, while training)")
    left.set_ylim(0, max(0.01, 1.1 * max(dead)))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    right.plot(steps, l0, color=COLOURS["text"], clip_on=False)
    right.set(xlabel="step", ylabel="active features", title="L0: active features per token")
    right.set_ylim(0, 1.1 * max(*l0, 1e-3))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    return figure


def plot_fvu(summary: Json) -> Figure:
    """Test FVU and calibration slope by target and group, beside the mean-only baseline and, where fitted, ridge.

    Groups that were not trained on are left to the table, and so are special tokens: hardly varying, they would
    stretch the axis over decades that say nothing.
    """
    targets, ridge = summary["targets"], summary.get("ridge")
    groups = [name for name in summary["fvu"] if name != "special" and name not in summary["left_out"]]
    places = range(len(targets))
    size = (min(14.0, max(6.0, 2.6 + 0.45 * len(targets))), 5.0)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=size, layout="constrained", sharex=True, height_ratios=(2.6, 1))
    drawn = [1.0]
    for group in groups:
        style: Json = {"color": COLOURS[group], "linewidth": 2.2 if group == "all" else 1.2, "markersize": 4.5}
        found = [by[group]["fvu"] for by in targets.values()]
        drawn += found
        upper.plot(places, found, marker="o", label=group, **style)
        slopes = [np.nan if by[group]["slope"] is None else by[group]["slope"] for by in targets.values()]
        lower.plot(places, slopes, marker="o", **style)
        if ridge:
            linear = [by[group]["fvu"] for by in ridge["targets"].values()]
            drawn += linear
            style |= {"linewidth": 0.8, "markerfacecolor": "white"}
            upper.plot(places, linear, marker="s", linestyle=":", label=f"{group}: ridge", zorder=1.5, **style)
    upper.axhline(1.0, color="black", linestyle="--", linewidth=1, label="mean only")
    upper.set_ylim(min(value for value in drawn if value > 0) / 1.5, max(drawn) * 1.3)
    log_scale(upper)
    upper.set(ylabel="fraction of variance unexplained", title=f"Held-out ({summary['split']}) tokens")
    lower.axhline(1.0, color="black", linewidth=0.8)
    low, high = lower.get_ylim()
    lower.set_ylim(min(low, 0.9), max(high, 1.1))
    step = -(-len(targets) // 24)
    lower.set_xticks(places[::step], list(targets)[::step])
    lower.set(xlabel="target layer", ylabel="calibration slope")
    for axes in (upper, lower):
        axes.grid(alpha=0.3, which="both")
        axes.set_axisbelow(True)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def plot_density(sources: list[Json]) -> Figure:
    """How often features fire on test rows, and how many never do: a histogram of log10 firing rate by source."""
    sources = sorted(sources, key=lambda by: by["source"])
    head = sources[0]["density"]
    edges = np.linspace(head["log10_from"], head["log10_to"], len(head["counts"]) + 1)
    # [S, bins] shares of all features, dead ones included.
    shares = np.array([np.array(by["density"]["counts"]) / by["settings"]["features"] for by in sources])
    figure, axes = (density_lines if len(sources) <= MANY else density_map)(sources, edges, shares)
    axes.set_xlim(edges[:-1][shares.any(0)].min(initial=0.0) - 0.2, 0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"1 in {10**-x:,.0f}" if x < 0 else "always")
    axes.set_xlabel(f"a feature fires on ... of {sources[0]['rows']:,} {sources[0]['split']} tokens")
    axes.set_title("Firing rates (bins of a tenth of a decade)")
    return figure


def density_lines(sources: list[Json], edges: np.ndarray, shares: np.ndarray) -> tuple[Figure, Axes]:
    """A line for each of a few sources."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for by, share, colour in zip(sources, shares, depth_colours(sources), strict=True):
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"layer {by['source']}: {by['dead']:.1%} dead")
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_ylabel("share of features")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, title="source")
    return figure, axes


def density_map(sources: list[Json], edges: np.ndarray, shares: np.ndarray) -> tuple[Figure, Axes]:
    """A row for each of many sources, and beside it a bar for its dead features."""
    n = len(sources)
    figure, (axes, bars) = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.15 * n), layout="constrained", sharey=True, width_ratios=(3.2, 1)
    )
    mesh = axes.pcolormesh(edges, np.arange(n + 1) - 0.5, shares, cmap="Blues")
    figure.colorbar(mesh, ax=axes, label="share of features", format=PercentFormatter(1, decimals=None))
    step = -(-n // 24)
    axes.set_yticks(range(0, n, step), [str(by["source"]) for by in sources][::step])
    axes.set_ylabel("source layer")
    bars.barh(range(n), [by["dead"] for by in sources], color=COLOURS["image"])
    bars.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    bars.xaxis.set_major_locator(MaxNLocator(4))
    bars.set(title="Dead: never fire", xlabel="share of features")
    bars.grid(alpha=0.3, axis="x")
    bars.set_axisbelow(True)
    return figure, axes
