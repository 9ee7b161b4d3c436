"""Figures of a run as PNG: the loss on the way, and FVU at the end."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

STYLE: Any = {"figure.dpi": 140, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {"all": "#444444", "text": "#3b6fb6", "image": "#d9822b", "special": "#8aa872"}


def log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers: 1, 2, 5 within few decades, else one a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Loss of the training batches and the share of silent features, by tokens seen."""
    tokens = [record["tokens"] / 1e3 for record in records]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
        left.plot(tokens, [record["loss"] for record in records], color=COLOURS["text"])
        left.set(xlabel="thousand tokens", ylabel="loss", title="Loss: squared error / variance, sum over targets")
        log_scale(left)
        left.grid(alpha=0.3, which="both")
        right.plot(tokens, [record["dead"] for record in records], color=COLOURS["image"], clip_on=False)
        right.set(xlabel="thousand tokens", ylabel="share of features", title="Features silent for 1000 F/k tokens")
        right.set_ylim(0, max(0.05, 1.1 * max(record["dead"] for record in records)))
        right.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def plot_fvu(summary: dict[str, Any], path: Path) -> None:
    """Test FVU by target and group as bars, beside the mean-only baseline and, where it was fitted, ridge.

    Special tokens are left to the table: hardly varying, they would stretch the axis over decades that say nothing.
    """
    targets, ridge = summary["targets"], summary.get("ridge")
    groups = [group for group in summary["fvu"] if group != "special"]
    width = 0.8 / len(groups)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(max(5.0, 1.2 + 0.9 * len(targets)), 3.6))
        lows = []
        for g, group in enumerate(groups):
            places = [t - 0.4 + (g + 0.5) * width for t in range(len(targets))]
            bars = [by[group]["fvu"] for by in targets.values()]
            lows += bars
            axes.bar(places, bars, width, color=COLOURS[group], label=group)
            if ridge:
                linear = [by[group]["fvu"] for by in ridge["targets"].values()]
                lows += linear
                label = "ridge, same input" if g == 0 else None
                axes.scatter(places, linear, s=26, marker="_", linewidths=2, color="black", label=label, zorder=3)
        axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="mean only")
        axes.set_ylim(min(lows) / 2, max(*lows, 1.0) * 1.3)
        log_scale(axes)
        axes.set_xticks(range(len(targets)), list(targets))
        axes.set(xlabel="target layer", ylabel="fraction of variance unexplained", title="Held-out (test) tokens")
        axes.grid(alpha=0.3, axis="y", which="both")
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.set_layout_engine("constrained")
        figure.savefig(path)
        plt.close(figure)
