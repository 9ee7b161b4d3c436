"""Fidelity figures from sums over samples, each with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from cltjax.replacement.forced import GROUPS, ORIGINAL
from cltjax.replacement.resampling import Figure, Resampled, interval, ratio
from cltjax.replacement.scores import Task, yes_no_figures

REPLACED, MEAN, ZERO = "replaced", "mean-ablated", "zero-ablated"
MODELS = (ORIGINAL, REPLACED, MEAN, ZERO)
LENGTHS = ("all", "one word", "longer")  # kinds of answer
Stated = Mapping[str, Any]


def alone(layer: int) -> str:
    """The run in which one MLP is replaced."""
    return f"layer {layer}"


def up_to(n: int) -> str:
    """The run in which the first n of the covered MLPs are."""
    return f"first {n}"


def counts(drawn: Resampled) -> Stated:
    """Samples, `units` (images, or prompts without one: what the bootstrap draws), answers, tokens by group."""
    samples, given = (int(drawn[which, "all"][0]) for which in ("samples", "references"))
    return {
        "samples": samples,
        "units": drawn.units,
        "answers": {"reference": given, "the original's own": samples - given},
        "answers of": {kind: int(drawn["samples", kind][0]) for kind in LENGTHS},
        "tokens": {group: int(drawn["tokens", group][0]) for group in GROUPS},
    }


def teacher_forced(drawn: Resampled) -> Stated:
    """By model and group of tokens: `agree`, `kl`, `ce`, `right`, each a mean over tokens."""
    return {
        name: {
            group: {
                figure: interval(ratio(drawn[name, group, figure], drawn["tokens", group]))
                for figure in ("agree", "kl", "ce", "right")
            }
            for group in GROUPS
        }
        for name in MODELS
    }


def loss_recovered(drawn: Resampled) -> Stated:
    """By group of tokens: against each ablation, and `lower`, the one of the two whose loss is lower (`lower is`)."""
    found: dict[str, Any] = {}
    for group in ("all", "answer", "first"):
        loss = {name: drawn[name, group, "ce"] for name in MODELS}
        shares = {
            name: interval(ratio(loss[name] - loss[REPLACED], loss[name] - loss[ORIGINAL])) for name in (MEAN, ZERO)
        }
        lower = min((MEAN, ZERO), key=lambda name: loss[name][0])
        found[group] = shares | {"lower": shares[lower], "lower is": lower}
    return found


def generated(drawn: Resampled, task: Task) -> Stated:
    """By kind of answer and model: exact match, and what of the original's answers is the same.

    `prefix` and `equal`: share of tokens equal until the first difference, and overall; `whole`: share of answers.
    """

    def figures_of(name: str, kind: str) -> dict[str, Figure]:
        tokens, samples = drawn[name, kind, "match tokens"], drawn["samples", kind]
        found = {
            "prefix": interval(ratio(drawn[name, kind, "match prefix"], tokens)),
            "equal": interval(ratio(drawn[name, kind, "match equal"], tokens)),
            "whole": interval(ratio(drawn[name, kind, "match whole"], samples)),
        }
        if task.kind == "exact match":
            found["exact match"] = interval(ratio(drawn[name, kind, "exact"], drawn["references", kind]))
        return found

    return {kind: {name: figures_of(name, kind) for name in MODELS} for kind in LENGTHS if drawn["samples", kind][0]}


def yes_or_no(drawn: Resampled, task: Task) -> Stated:
    """By rule of reading, dimension and model: accuracy, precision, recall, F1, yes-ratio."""
    found: dict[str, Any] = {}
    for rule in task.rules:
        found[rule] = {}
        for dimension in task.dimensions:
            found[rule][dimension] = {
                name: {
                    figure: interval(values)
                    for figure, values in yes_no_figures(
                        lambda truth, say, of=(name, rule, dimension): drawn[(*of, truth, say)], task.positive
                    ).items()
                }
                for name in MODELS
            }
    return found


def by_layer(drawn: Resampled, covered: Sequence[int]) -> Stated:
    """`alone` by layer, `first` by how many: KL and agreement at answer tokens and at the first of them."""

    def figures_of(run: str) -> dict[str, dict[str, Figure]]:
        return {
            group: {
                figure: interval(ratio(drawn[run, group, figure], drawn["tokens", group])) for figure in ("agree", "kl")
            }
            for group in ("answer", "first")
        }

    return {
        "alone": {str(layer): figures_of(alone(layer)) for layer in covered},
        "first": {str(n): figures_of(up_to(n)) for n in range(1, len(covered) + 1)},
    }


def exact_forced(drawn: Resampled) -> Stated:
    """By model: the share of answers at all of whose tokens top-1 is right: greedy decoding gives just those."""
    return {name: interval(ratio(drawn[name, "exact"], drawn["samples", "all"])) for name in MODELS}
