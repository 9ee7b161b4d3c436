"""Task scores of generated answers: exact match, yes/no benchmarks (AMBER, POPE), and agreement token by token.

    task = task_of(dataset, samples)      what the answers are judged by
    task.truth[sample]                    the reference answer, where there is one

AMBER's and POPE's rules are those of their own code: AMBER/inference.py (commit 5e1fd52) and POPE/evaluate.py (commit
f3ec604). AMBER's F1 has 0.0001 added below the line; here it has not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from capture.prompts import Dataset, Sample
from cltjax.errors import UserError
from cltjax.replacement.resampling import ratio

YES, NO, NEITHER = "yes", "no", "neither"
SAID = (YES, NO, NEITHER)
ANNOTATIONS = "annotations.json"
# AMBER's types of question by the dimension that its scores are printed for; `relation` is one that does not hold.
DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}


@dataclass(frozen=True)
class Task:
    """How answers are judged."""

    kind: Literal["amber", "pope", "exact match", "none"]
    truth: Mapping[Sample, str]  # reference answers, of the samples that have one
    dimension: Mapping[Sample, str]  # AMBER's

    @property
    def yes_or_no(self) -> bool:
        return self.kind in ("amber", "pope")

    @property
    def rules(self) -> dict[str, Callable[[str], str]]:
        """By name, what turns an answer into yes, no or neither."""
        return {"amber": {"amber": exactly, "any case": any_case}, "pope": {"pope": said_no}}.get(self.kind, {})

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What yes/no scores are given for."""
        return ("all", *sorted(set(self.dimension.values())))

    @property
    def positive(self) -> str:
        """The answer that precision and recall are about: AMBER asks whether what is not there is denied."""
        return NO if self.kind == "amber" else YES


def task_of(dataset: Dataset, samples: Sequence[Sample]) -> Task:
    """The task that these samples of a data set are.

    An AMBER query file is known by its annotations.json in the folder above it, POPE by references that are all yes or
    no. UserError where AMBER's annotations are of other queries.
    """
    annotations = amber_annotations(dataset.spec)
    if annotations is not None:
        truth, dimension = {}, {}
        for sample in samples:
            entry = annotation_of(sample, annotations, dataset.spec)
            if entry.get("type") in DIMENSIONS:
                truth[sample], dimension[sample] = entry["truth"], DIMENSIONS[entry["type"]]
        return Task("amber" if truth else "none", truth, dimension)
    truth = {sample: sample.answer.strip() for sample in samples if sample.answer and sample.answer.strip()}
    if dataset.spec != "shapes" and truth and all(answer.lower() in (YES, NO) for answer in truth.values()):
        return Task("pope", {sample: answer.lower() for sample, answer in truth.items()}, {})
    return Task("exact match" if truth else "none", truth, {})


def amber_annotations(spec: str) -> list[Any] | None:
    """AMBER's annotations beside its query file (data/query/query_*.json), else None."""
    path = Path(spec)
    file = path.parent.parent / ANNOTATIONS
    if spec == "shapes" or not path.name.startswith("query_") or not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): get it from AMBER again") from error
    if not isinstance(found, list):
        raise UserError(f"{file} is no list of annotations: get it from AMBER again")
    return found


def annotation_of(sample: Sample, annotations: list[Any], spec: str) -> dict[str, Any]:
    """The truth about query `id` is at index id - 1."""
    number = int(sample.id) if sample.id.isdecimal() else 0
    entry = annotations[number - 1] if 0 < number <= len(annotations) else None
    if not isinstance(entry, dict) or entry.get("id") != number:
        raise UserError(f"{spec}: query {sample.id} is not in the {ANNOTATIONS} of the folder above: they go together")
    return entry


# Yes or no ---------------------------------------------------------------------------------------------------


def exactly(text: str) -> str:
    """AMBER: nothing but "Yes" and "No" counts."""
    return {"Yes": YES, "No": NO}.get(text, NEITHER)


def any_case(text: str) -> str:
    """The same with any case and with a full stop, for models that answer so."""
    word = text.strip().rstrip(".").lower()
    return word if word in (YES, NO) else NEITHER


def said_no(text: str) -> str:
    """POPE: an answer is no if its first sentence has one of the words No, no, not; everything else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def yes_no_figures(cell: Callable[[str, str], np.ndarray], positive: str) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall, F1, yes-ratio and the share of answers that are neither.

    cell(truth, said): how often what is true (yes or no) was answered so (yes, no or neither).
    """
    truths = (YES, NO)

    def total(truths: Sequence[str], said: Sequence[str]) -> np.ndarray:
        return np.sum([cell(truth, answer) for truth in truths for answer in said], axis=0)

    everything, hit = total(truths, SAID), cell(positive, positive)
    claimed, there = total(truths, (positive,)), total((positive,), SAID)
    return {
        "accuracy": ratio(cell(YES, YES) + cell(NO, NO), everything),
        "precision": ratio(hit, claimed),
        "recall": ratio(hit, there),
        "f1": ratio(2 * hit, claimed + there),  # 2 PR / (P + R), and 0 where nothing is claimed
        "yes ratio": ratio(total(truths, (YES,)), everything),
        "neither": ratio(total(truths, (NEITHER,)), everything),
    }


# Token by token ----------------------------------------------------------------------------------------------


def token_match(own: list[int], other: list[int]) -> dict[str, int]:
    """Of the original's answer: tokens, those of `other` equal until the first difference, and at all; 1 where all is.

    Both answers end with their end token, where one came.
    """
    equal = [a == b for a, b in zip(own, other, strict=False)]
    prefix = next((i for i, same in enumerate(equal) if not same), len(equal))
    return {"tokens": len(own), "prefix": prefix, "equal": sum(equal), "whole": int(own == other[: len(own)])}
