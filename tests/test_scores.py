"""cltjax/replacement/scores.py: the benchmarks' own rules, on counts made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture.prompts import Dataset, Sample, load_dataset
from cltjax.errors import UserError
from cltjax.replacement.scores import any_case, exactly, said_no, task_of, token_match, yes_no_figures
from examples.shapes.benchmark_files import write


def figures(cells: dict[str, dict[str, int]], positive: str) -> dict[str, float]:
    found = yes_no_figures(lambda truth, said: np.array([float(cells[truth].get(said, 0))]), positive)
    return {name: float(value[0]) for name, value in found.items()}


def test_yes_is_positive() -> None:
    found = figures({"yes": {"yes": 11, "no": 5, "neither": 1}, "no": {"yes": 2, "no": 19, "neither": 3}}, "yes")
    assert found["accuracy"] == pytest.approx(30 / 41)
    assert found["precision"] == pytest.approx(11 / 13)
    assert found["recall"] == pytest.approx(11 / 17)
    p, r = 11 / 13, 11 / 17
    assert found["f1"] == pytest.approx(2 * p * r / (p + r))
    assert found["yes ratio"] == pytest.approx(13 / 41) and found["neither"] == pytest.approx(4 / 41)


def test_no_is_positive() -> None:
    found = figures({"yes": {"yes": 11, "no": 5, "neither": 1}, "no": {"yes": 2, "no": 19, "neither": 3}}, "no")
    assert found["accuracy"] == pytest.approx(30 / 41)
    assert found["precision"] == pytest.approx(19 / 24) and found["recall"] == pytest.approx(19 / 24)
    assert found["f1"] == pytest.approx(19 / 24)
    assert found["yes ratio"] == pytest.approx(13 / 41)


def test_always_no() -> None:
    """On AMBER's existence questions, which are all denied, it scores everything; the yes-ratio gives it away."""
    existence = figures({"yes": {}, "no": {"no": 7}}, "no")
    assert existence == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes ratio": 0, "neither": 0}
    pope = figures({"yes": {"no": 7}, "no": {"no": 7}}, "yes")
    assert np.isnan(pope.pop("precision"))
    assert pope == {"accuracy": 0.5, "recall": 0, "f1": 0, "yes ratio": 0, "neither": 0}


@pytest.mark.parametrize(
    ("text", "amber", "lenient", "pope"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("yes", "neither", "yes", "yes"),
        ("no", "neither", "no", "no"),
        ("No.", "neither", "no", "no"),
        ("No, there is none", "neither", "neither", "no"),
        ("There is not. Yes", "neither", "neither", "no"),
        ("Yes. No", "neither", "neither", "yes"),
        ("nothing", "neither", "neither", "yes"),
        ("", "neither", "neither", "yes"),
    ],
)
def test_what_counts_as_an_answer(text: str, amber: str, lenient: str, pope: str) -> None:
    assert (exactly(text), any_case(text), said_no(text)) == (amber, lenient, pope)


def test_token_match() -> None:
    own = [5, 6, 7, 8, 2]
    assert token_match(own, [5, 6, 9, 8, 2]) == {"tokens": 5, "prefix": 2, "equal": 4, "whole": 0}
    assert token_match(own, own) == {"tokens": 5, "prefix": 5, "equal": 5, "whole": 1}
    assert token_match(own, [5, 6]) == {"tokens": 5, "prefix": 2, "equal": 2, "whole": 0}
    assert token_match(own, [5, 6, 7, 8, 9, 2]) == {"tokens": 5, "prefix": 4, "equal": 4, "whole": 0}
    assert token_match(own, [6, 5]) == {"tokens": 5, "prefix": 0, "equal": 0, "whole": 0}


# Which task it is --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write(folder, 7)
    return folder


def test_amber(files: Path) -> None:
    spec = files / "amber/data/query/query_all.json"
    dataset = load_dataset(str(spec))
    task = task_of(dataset, dataset.samples)
    truths = json.loads((files / "amber/data/annotations.json").read_text())
    kinds = {"discriminative-attribute-number": "attribute", "discriminative-hallucination": "existence"}
    assert (task.kind, task.positive, task.yes_or_no, list(task.rules)) == ("amber", "no", True, ["amber", "any case"])
    assert task.dimensions == ("all", "attribute", "existence", "relation")
    for sample, annotation in zip(dataset.samples, truths, strict=True):
        assert task.truth.get(sample) == (None if annotation["type"] == "generative" else annotation["truth"])
        if expected := kinds.get(annotation["type"]):
            assert task.dimension[sample] == expected
    generative = load_dataset(str(spec.with_name("query_generative.json")))
    assert task_of(generative, generative.samples).kind == "none"
    relation = load_dataset(str(spec.with_name("query_discriminative-relation.json")))
    found = task_of(relation, relation.samples)
    by_id = {str(entry["id"]): entry["truth"] for entry in truths}
    assert found.dimensions == ("all", "relation") and {"yes", "no"} == set(found.truth.values())
    assert [found.truth[sample] for sample in relation.samples] == [by_id[sample.id] for sample in relation.samples]


@pytest.mark.parametrize("damage", [lambda rows: rows[1:], lambda rows: rows[:3], lambda rows: {"rows": rows}])
def test_annotations_of_something_else(damage: Any, files: Path, tmp_path: Path) -> None:
    (tmp_path / "data/query").mkdir(parents=True)
    source = files / "amber/data"
    rows = json.loads((source / "annotations.json").read_text())
    (tmp_path / "data/annotations.json").write_text(json.dumps(damage(rows)))
    spec = tmp_path / "data/query/query_discriminative.json"
    spec.write_text((source / "query/query_discriminative.json").read_text())
    dataset = load_dataset(str(spec), files / "amber/image")
    with pytest.raises(UserError, match="annotations") as raised:
        task_of(dataset, dataset.samples)
    assert "\n" not in str(raised.value)


def test_pope(files: Path) -> None:
    dataset = load_dataset(str(files / "pope/shapes_pope_random.json"))
    task = task_of(dataset, dataset.samples)
    assert (task.kind, task.positive, task.dimensions) == ("pope", "yes", ("all",))
    assert [task.truth[sample] for sample in dataset.samples] == [sample.answer for sample in dataset.samples]


def of_answers(*answers: str | None, spec: str = "rows.json") -> tuple[str, list[str]]:
    samples = [Sample(str(i), "What?", "test", None, answer, None) for i, answer in enumerate(answers)]
    task = task_of(Dataset(spec, samples, [], ""), samples)
    return task.kind, list(task.truth.values())


def test_other_data_sets() -> None:
    assert of_answers("red", " two words ", None, " ") == ("exact match", ["red", "two words"])
    assert of_answers("Yes", "no") == ("pope", ["yes", "no"])
    assert of_answers("yes", "no", "perhaps")[0] == "exact match"
    assert of_answers("yes", spec="shapes") == ("exact match", ["yes"])  # one of many kinds of question
    assert of_answers(None, "") == ("none", [])
