"""cltjax/replacement/fidelity.py on the bundled demo VLM: identities, small counts by hand, and what it refuses."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capture.config import CaptureConfig
from capture.prompts import Sample, load_dataset, resolve_template
from capture.recorder import batches, encoder, record_all, windows
from capture.vlm import VLM, load
from cltjax.errors import UserError
from cltjax.replacement import fidelity
from cltjax.replacement.asking import Asking, capitalised, end_ids, following_ids, held_out, mean_writes
from cltjax.replacement.fidelity import FidelityConfig, evaluate_fidelity
from cltjax.replacement.fidelity_figures import MODELS
from cltjax.replacement.model import AblatedModel
from cltjax.replacement.scores import task_of
from examples.shapes import asking as demo
from examples.shapes.benchmark_files import write
from test_replacement import exact_clt, random_clt

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = "examples/shapes/model"
SAMPLES = 17  # of the test split, one of which is a description


@functools.cache
def model() -> VLM:
    return load(DEMO)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "load", lambda name, dtype, device: model())


def asking(samples: list[Sample], spec: str = "shapes") -> Asking:
    dataset = dataclasses.replace(load_dataset("shapes", None, 1), spec=spec)
    return Asking(model(), resolve_template("chat", model().processor), task_of(dataset, samples), 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "clt"
    vlm = model()
    sample = load_dataset("shapes", None, 1).samples[0]
    encode = encoder(vlm, resolve_template("chat", vlm.processor))
    vlm.verify(vlm.collate([encode(sample)]))
    random_clt(path, vlm)
    return path


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fidelity, "load", lambda name, dtype, device: model())
        return evaluate_fidelity(FidelityConfig(folder, DEMO, max_samples=SAMPLES, batch_size=5, per_layer=True))


# The whole ---------------------------------------------------------------------------------------------------


def test_an_exact_clt_is_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is exact at the tokens of these prompts and their reference answers, which the demo VLM gives."""
    _, samples = held_out("shapes", None, "test", 7, False)
    vlm, one = model(), asking(samples)
    whole = [vlm.extend(one.encode(sample), one.answer_ids(sample)) for sample in samples]
    exact_clt(tmp_path / "clt", vlm, vlm.collate(whole), "mlp_in", tuple(range(6)))
    found = evaluate_fidelity(FidelityConfig(tmp_path / "clt", DEMO, max_samples=7, per_layer=True, generate=32))
    forced = found["teacher_forced"]["replaced"]
    for group in ("all", "answer", "first"):
        assert forced[group]["agree"]["value"] == 1 and abs(forced[group]["kl"]["high"]) < 1e-4
    for group in ("answer", "first"):
        recovered = found["loss_recovered"][group]
        for against in ("mean-ablated", "zero-ablated", "lower"):
            assert recovered[against]["value"] == pytest.approx(1, abs=1e-3)
        losses = {name: found["teacher_forced"][name][group]["ce"]["value"] for name in MODELS[2:]}
        assert recovered["lower is"] == min(losses, key=lambda name: losses[name])
        assert min(losses.values()) > 1
    free = found["generated"]["all"]
    assert free["original"]["exact match"]["value"] == free["replaced"]["exact match"]["value"] == 1
    assert free["replaced"]["whole"]["value"] == 1 and free["mean-ablated"]["whole"]["value"] < 0.5
    assert found["exact_forced"]["replaced"]["value"] == 1
    for which in ("alone", "first"):
        for by in found["per_layer"][which].values():
            assert by["answer"]["agree"]["value"] == 1 and abs(by["first"]["kl"]["value"]) < 1e-4
    assert "7 test samples of shapes" in capsys.readouterr().out


def test_a_random_clt_end_to_end(figures: dict[str, Any], folder: Path) -> None:
    assert json.loads((folder / "fidelity-shapes.json").read_text()) == json.loads(json.dumps(figures)) == figures
    assert (folder / "fidelity-shapes.png").read_bytes()[:4] == b"\x89PNG"
    counted = figures["counts"]
    assert (counted["samples"], counted["units"]) == (SAMPLES, SAMPLES)
    assert counted["answers"] == {"reference": SAMPLES, "the original's own": 0}
    assert counted["tokens"]["first"] == SAMPLES
    assert counted["answers of"]["one word"] + counted["answers of"]["longer"] == SAMPLES
    forced = figures["teacher_forced"]
    assert forced["original"]["all"]["agree"] == {"value": 1, "low": 1, "high": 1}
    assert forced["original"]["all"]["kl"] == {"value": 0, "low": 0, "high": 0}
    for name in MODELS[1:]:
        assert forced[name]["answer"]["kl"]["value"] > 0.5
        assert forced[name]["answer"]["kl"]["low"] < forced[name]["answer"]["kl"]["value"]
    layers = figures["per_layer"]
    assert list(layers["alone"]) == [*"012345"] and list(layers["first"]) == [*"123456"]
    assert layers["alone"]["0"] == layers["first"]["1"]
    # all of them at once is the replacement model itself
    assert layers["first"]["6"]["answer"]["kl"] == forced["replaced"]["answer"]["kl"]
    assert layers["alone"]["5"]["answer"]["kl"] != layers["alone"]["4"]["answer"]["kl"]


def test_figures_do_not_hang_on_batches(figures: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.json"
    again = evaluate_fidelity(FidelityConfig(folder, DEMO, max_samples=SAMPLES, batch_size=3, out=out))
    assert json.loads(out.read_text()) == again and "per_layer" not in again
    for name in MODELS:
        for group in ("all", "answer", "first"):
            for figure in ("agree", "kl", "ce", "right"):
                one, other = (found["teacher_forced"][name][group][figure]["value"] for found in (figures, again))
                assert one == pytest.approx(other, abs=1e-4), (name, group, figure)
    assert again["generated"]["all"]["original"] == figures["generated"]["all"]["original"]
    one, other = (found["loss_recovered"]["answer"] for found in (figures, again))
    loss = {name: figures["teacher_forced"][name]["answer"]["ce"]["value"] for name in MODELS}
    by_hand = (loss["zero-ablated"] - loss["replaced"]) / (loss["zero-ablated"] - loss["original"])
    assert (
        one["zero-ablated"]["value"]
        == pytest.approx(by_hand)
        == pytest.approx(other["zero-ablated"]["value"], abs=1e-3)
    )


def test_exact_match_is_what_the_demos_own_check_says(figures: dict[str, Any]) -> None:
    """Right answers of the original, counted with `generate` and `==`; teacher-forced is the same."""
    _, samples = held_out("shapes", None, "test", SAMPLES, False)
    one, right = asking(samples), 0
    for sample in samples:
        [answer] = model().generate([one.encode(sample)], 64)
        right += model().decode(answer) == sample.answer
    value = right / SAMPLES
    assert figures["generated"]["all"]["original"]["exact match"]["value"] == value
    assert figures["exact_forced"]["original"]["value"] == value


def test_the_ablated_models(figures: dict[str, Any]) -> None:
    dataset, samples = held_out("shapes", None, "test", SAMPLES, False)
    one, vlm = asking(samples), model()
    means, _ = mean_writes(one, dataset, range(6), None)
    for name, constants in (
        ("mean-ablated", means),
        ("zero-ablated", {layer: torch.zeros(vlm.d_model) for layer in range(6)}),
    ):
        ablated, right = AblatedModel(vlm, constants), 0
        for sample in samples:
            logits = ablated.forward(vlm.collate([one.encode(sample)]))[0, -1]
            right += int(logits.argmax()) == one.answer_ids(sample)[0]
        value = figures["teacher_forced"][name]["first"]["right"]["value"]
        assert value == pytest.approx(right / SAMPLES) and 0 < value < 1


# Answers -----------------------------------------------------------------------------------------------------


def test_the_answers_tokens_are_those_the_model_was_trained_on() -> None:
    _, samples = held_out("shapes", None, "test", SAMPLES, False)
    one, tokenizer = asking(samples), model().tokenizer
    assert any(" " in (sample.answer or "") for sample in samples)
    for sample in samples:
        whole = tokenizer(f"{demo.TEMPLATE.format(sample.prompt)} {sample.answer}</s>")["input_ids"]
        ids = one.answer_ids(sample)
        assert whole[-len(ids) :] == ids and model().decode(ids) == sample.answer
        assert len(ids) == len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"]) + 1


def test_an_answer_that_grows_together_with_its_prompt() -> None:
    class Tokenizer:
        """A token a word; a colon takes the word behind it along."""

        eos_token_id = 9

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [sum(map(ord, word)) for word in text.replace(": ", ":").split()]}

    vlm: Any = type("VLM", (), {"tokenizer": Tokenizer(), "model": None})()
    alone = Tokenizer()("red ball")["input_ids"]
    assert following_ids(vlm, "ASSISTANT", "red ball") == alone == following_ids(vlm, "ASSISTANT\n", "red ball")
    assert following_ids(vlm, "ASSISTANT:", "red ball") == alone
    assert end_ids(vlm) == [9]
    vlm.model = type("Model", (), {"generation_config": type("Settings", (), {"eos_token_id": [1, 106]})})()
    assert end_ids(vlm) == [1, 106]


@pytest.mark.parametrize(("said", "capital"), [("Yes", True), ("no", False), ("It is", True)])
def test_yes_and_no_as_the_model_spells_them(said: str, capital: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = dataclasses.replace(load_dataset("shapes", None, 1).samples[0], answer="no")
    one = asking([sample], "pope.json")
    monkeypatch.setattr(VLM, "decode", lambda vlm, ids: said)
    assert one.task.kind == "pope" and one.reference(sample) == "no"
    assert capitalised(one, [sample]) == capital
    assert dataclasses.replace(one, capital=True).reference(sample) == "No"


def test_the_originals_own_answers_where_there_is_no_reference(folder: Path, tmp_path: Path) -> None:
    dataset = load_dataset("shapes", None, 41)
    rows = []
    for number, sample in enumerate(dataset.samples):
        assert sample.load is not None
        sample.load().save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": sample.prompt} | ({"answer": "red"} if number % 2 else {}))
    spec = tmp_path / "rows.json"
    spec.write_text(json.dumps(rows))
    config = FidelityConfig(folder, DEMO, str(spec), split="train", max_samples=11, generate=8)
    found = evaluate_fidelity(config)
    assert (folder / "fidelity-rows.json").exists()
    samples = held_out(str(spec), None, "train", 11, False)[1]
    known = sum(sample.answer is not None for sample in samples)
    assert found["counts"]["answers"] == {"reference": known, "the original's own": 11 - known} and 0 < known < 11
    own = [model().generate([asking(samples).encode(sample)], 8)[0] for sample in samples]
    references = [model().tokenizer("red", add_special_tokens=False)["input_ids"]] * 11
    lengths = [len(said) if sample.answer is None else 2 for sample, said in zip(samples, own, strict=True)]
    assert len(references[0]) == 1 and found["counts"]["tokens"]["answer"] == sum(lengths)
    right = [model().decode(said) == "red" for sample, said in zip(samples, own, strict=True) if sample.answer]
    assert found["generated"]["all"]["original"]["exact match"]["value"] == pytest.approx(np.mean(right))
    with pytest.raises(UserError, match=f"{11 - known} of 11 samples have no reference answer: with --generate"):
        evaluate_fidelity(dataclasses.replace(config, generate=0))


def test_benchmarks(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, 5, "train")
    vlm = model()
    for spec, kind, positive in (
        ("amber/data/query/query_discriminative.json", "amber", "no"),
        ("pope/shapes_pope_popular.json", "pope", "yes"),
    ):
        path = str(tmp_path / spec)
        found = evaluate_fidelity(FidelityConfig(folder, DEMO, path, split="train", generate=3))
        task = found["task"]
        assert (task["kind"], task["positive"], task["spelled"]) == (kind, positive, "yes")  # the demo VLM's spelling
        rule = "any case" if kind == "amber" else "pope"
        samples = held_out(path, None, "train", None, False)[1]
        truth = task_of(load_dataset(path), samples).truth
        one = asking([])
        said = [vlm.decode(vlm.generate([one.encode(sample)], 3)[0]) for sample in samples]
        right = np.mean([text == truth[sample] for text, sample in zip(said, samples, strict=True)])
        assert task[rule]["all"]["original"]["accuracy"]["value"] == pytest.approx(right) and right > 0.8
        ratio = np.mean([text == "yes" for text in said])
        assert task[rule]["all"]["original"]["yes ratio"]["value"] == pytest.approx(ratio)
        assert found["counts"]["units"] == len({sample.image for sample in samples}) < len(samples)
        assert found["teacher_forced"]["original"]["first"]["right"]["value"] == pytest.approx(right)
        if kind == "amber":  # which takes nothing but Yes and No
            assert task["amber"]["all"]["original"]["accuracy"]["value"] == 0
            assert task["amber"]["all"]["original"]["neither"]["value"] == 1
            of = task_of(load_dataset(path), samples).dimension
            for dimension in sorted(set(of.values())):
                its = [
                    text == truth[sample] for text, sample in zip(said, samples, strict=True) if of[sample] == dimension
                ]
                value = task[rule][dimension]["original"]["accuracy"]["value"]
                assert value == pytest.approx(np.mean(its)) and len(its) < len(samples)
            assert {"attribute", "existence"} <= set(of.values())


# Mean writes -------------------------------------------------------------------------------------------------


def test_mean_writes_are_those_of_a_store(folder: Path, tmp_path: Path) -> None:
    dataset = load_dataset("shapes", None, 19)
    one = asking(dataset.samples)
    config = CaptureConfig(DEMO, max_samples=19, out=tmp_path / "store", dtype="float32", shard_rows=512, batch_size=4)
    record_all(model(), dataset, config)
    here, said = mean_writes(one, dataset, (1, 4), None)
    stored, where = mean_writes(one, dataset, (1, 4), tmp_path / "store")
    train = [sample for sample in dataset.samples if sample.split == "train"]
    assert f"{len(train)} train samples" in said and "store" in where and list(stored) == list(here) == [1, 4]
    rows: dict[int, list[torch.Tensor]] = {1: [], 4: []}
    for batch in batches(windows(train, 1), 1, one.encode):
        trace = model().trace(model().collate(batch.encoded), "mlp_in", (1, 4))
        for layer, written in zip((1, 4), trace.mlp_out, strict=True):
            rows[layer].append(written[0])
    for layer in (1, 4):
        mean = torch.cat(rows[layer]).mean(0)
        assert torch.allclose(here[layer], mean, atol=1e-4) and torch.allclose(stored[layer], mean, atol=1e-4)
        assert float(mean.abs().max()) > 0.1


# Refusals ----------------------------------------------------------------------------------------------------


def test_shapes_until_there_are_enough() -> None:
    for split, wanted in (("test", 31), ("val", 23)):
        _, samples = held_out("shapes", None, split, wanted, False)  # pyright: ignore[reportArgumentType]
        assert len(samples) == wanted and {sample.split for sample in samples} == {split}
    assert [sample.id for sample in held_out("shapes", None, "test", 7, False)[1]] == [
        sample.id for sample in load_dataset("shapes", None, 400).samples if sample.split == "test"
    ][:7]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_samples": 0}, "--max-samples 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"generate": -1}, "--generate -1"),
        ({"clt": Path("nowhere")}, "nowhere"),
        ({"dataset": "nowhere.json"}, "no such file"),
        ({"store": Path("nowhere")}, "no activation store at nowhere"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=said) as raised:
        evaluate_fidelity(dataclasses.replace(FidelityConfig(folder, DEMO, max_samples=2), **changes))
    assert "\n" not in str(raised.value)


def rows_of(split: str, folder: Path) -> str:
    """Prompts without images, all of one split."""
    prompts = [f"prompt {i}" for i in range(99)]
    spec = folder / "prompts.json"
    spec.write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    samples = load_dataset(str(spec)).samples
    spec.write_text(
        json.dumps([{"prompt": sample.prompt, "answer": "red"} for sample in samples if sample.split == split])
    )
    return str(spec)


@pytest.mark.parametrize(
    ("split", "said"),
    [("train", "none of its .* samples is of the test split"), ("test", "no train samples .* --store")],
)
def test_samples_that_are_not_there(split: str, said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        evaluate_fidelity(FidelityConfig(folder, DEMO, rows_of(split, tmp_path)))


def test_a_clt_or_a_store_of_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(model(), revision="another")
    monkeypatch.setattr(fidelity, "load", lambda name, dtype, device: other)
    config = FidelityConfig(folder, DEMO, max_samples=1, generate=0)
    with pytest.raises(UserError, match="at revision"):
        evaluate_fidelity(config)
    assert evaluate_fidelity(dataclasses.replace(config, other_revision=True))["counts"]["samples"] == 1
    dataset = load_dataset("shapes", None, 3)
    record_all(model(), dataset, CaptureConfig(DEMO, max_samples=3, out=tmp_path / "store", shard_rows=512))
    manifest = tmp_path / "store/manifest.json"
    manifest.write_text(manifest.read_text().replace('"LlavaForConditionalGeneration"', '"Other"'))
    with pytest.raises(UserError, match="is of another model"):
        mean_writes(asking(dataset.samples), dataset, (0,), tmp_path / "store")


def test_no_jax() -> None:
    code = "import sys, cltjax.replacement.fidelity; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
