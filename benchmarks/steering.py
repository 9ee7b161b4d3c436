"""Does steering do what it says? Features found on `val` pictures, predicted, then tried on `test` pictures.

    python -m benchmarks.steering --clt CLT_DIR [--model examples/shapes/model] [--out benchmarks/results/steering]

1. *Find*, on val. For each kind of question of the demo and each answer to it, cltjax/replacement/contrast.py finds the
   feature with the largest predicted shift towards that answer, among those that are more active where the model gives
   it. The CHOSEN with the largest shifts are taken, one a kind and none twice.
2. *Predict*. Adding STRENGTHS times its typical activation (99th percentile on val) at the text tokens of a question
   that has another answer makes the model say *this* answer, the more so the stronger; setting it to 0 where the answer
   is this one lowers that answer's logit. The list is printed before a test picture is drawn.
3. *Measure*, on test, in the original model (`SteeredModel`): the share of answers that are the predicted one, and the
   change of logit(predicted) - logit(right answer); for ablations, of logit(predicted) - logit(the runner-up).

The control of each feature: CONTROLS other features of its layer, drawn from those that are active at text tokens of
the same kind of question. The same is done to the feature, at the same tokens and as much, but what it writes is the
control's direction at the feature's norm (`contrast.control`). A control is tried on every EVERY-th of the samples.

4. *Together*: the MEMBERS features with the largest shift towards the same answer, at a strength of TOGETHER each; the
   control is as many random features whose summed write has the same norm.

Intervals are 95 %, by the bootstrap: over pictures for a feature, over control features for the control. A feature
steers as predicted where the interval of its share at the largest strength lies above the control's, and that of its
logit change too; its ablation is as predicted where the interval of the change lies below 0 and below the control's.
"""

import argparse
import json
import os
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capture.vlm import VLM, Encoded, load
from cltjax.files import write_json, write_whole
from cltjax.replacement.asking import following_ids
from cltjax.replacement.clt import CLT
from cltjax.replacement.contrast import Contrast, Found, contrast, control, summed_writes
from cltjax.replacement.interventions import Intervention
from cltjax.replacement.model import SteeredModel
from cltjax.replacement.resampling import Figure, Resampled, interval, ratio
from cltjax.splits import Split
from examples.shapes.asking import Item, ask_evenly, pictures, prompt
from examples.shapes.questions import ONE_WORD_KINDS

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
VAL = 160  # questions of a kind
TEST = 640
POOL = {"val": 400, "test": 800}  # pictures
STEER, ABLATE = 200, 100  # test samples of a feature, at most
CHOSEN = 12
STRENGTHS = (2.0, 4.0, 8.0)
CONTROLS, EVERY = 20, 8
MEMBERS, TOGETHER = 10, 1.0
BATCH = 100
KINDS = tuple(kind for kind in ONE_WORD_KINDS if kind != "fact")  # whose answers no picture changes


# Questions -----------------------------------------------------------------------------------------------------------


def questions(split: Split, count: int) -> dict[str, list[Item]]:
    """By kind; `where` asks for a row or for a column, which have no answer in common."""
    rng = random.Random(f"steering {SEED} {split}")
    pool = list(islice(pictures(split, rng), POOL[split]))
    found: dict[str, list[Item]] = defaultdict(list)
    for number, kind in enumerate(KINDS):
        for item in ask_evenly(pool, kind, count * (2 if kind == "where" else 1), number * count, rng):
            which = ("row" if "row" in item.question.text else "column") if kind == "where" else kind
            found[which].append(item)
    return found


def encoded(vlm: VLM, items: Sequence[Item]) -> list[Encoded]:
    return [vlm.encode(prompt(item.question), item.picture.image) for item in items]


# Finding and predicting ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """`one` speaks for `word` as an answer to questions of `kind`; so do the `members`, `one` among them."""

    kind: str
    word: str
    one: Found
    members: list[Found]
    active: list[int]  # features of its layer, to draw controls from
    found: Contrast


def predictions(vlm: VLM, clt: CLT) -> tuple[list[Prediction], int]:
    """The chosen ones, largest shift first, and from how many (kind, answer) pairs."""
    able: list[Prediction] = []
    pairs = 0
    for kind, items in questions("val", VAL).items():
        found = contrast(vlm, clt, encoded(vlm, items))
        pairs += len(found.answers)
        for answer in found.answers:
            members = found.best(answer, MEMBERS)
            word = vlm.decode([answer])
            able += [Prediction(kind, word, one, members, found.active(one.layer), found) for one in members[:1]]
    chosen: list[Prediction] = []
    for made in sorted(able, key=lambda made: -made.one.shift):
        name = name_of(made.one)
        if all(made.kind != other.kind and name != name_of(other.one) for other in chosen):
            chosen.append(made)
    return chosen[:CHOSEN], pairs


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Test samples, their logits [N, V] behind the prompt in the original model, and the answer `against`."""

    prompts: list[Encoded]
    pictures: list[str]
    own: Tensor
    against: Tensor  # [N]

    def __getitem__(self, chosen: slice) -> "Asked":
        return Asked(self.prompts[chosen], self.pictures[chosen], self.own[chosen], self.against[chosen])


def logits(vlm: VLM, clt: CLT, prompts: list[Encoded], interventions: Sequence[Intervention]) -> Tensor:
    """[N, V] behind each prompt, in the original model with interventions."""
    model, found = SteeredModel(vlm, clt, interventions), []
    for first in range(0, len(prompts), BATCH):
        batch = vlm.collate(prompts[first : first + BATCH])
        last = batch["attention_mask"].sum(1) - 1
        found.append(model.forward(batch)[torch.arange(len(last)), last])
    return torch.cat(found)


def outcome(asked: Asked, changed: Tensor, answer: int) -> dict[str, np.ndarray]:
    """[N] whether the answer is the predicted one; by how much its logit has risen against `against`."""
    rows = torch.arange(len(changed))

    def margin(values: Tensor) -> Tensor:
        return values[:, answer] - values[rows, asked.against]

    says = changed.argmax(-1) == answer
    return {"share": says.double().numpy(), "change": (margin(changed) - margin(asked.own)).double().numpy()}


def figures(outcomes: dict[str, np.ndarray], units: Sequence[Any]) -> dict[str, Figure]:
    drawn = Resampled(outcomes | {"samples": np.ones(len(units))}, units, SEED)
    return {name: interval(ratio(drawn[name], drawn["samples"])) for name in outcomes}


@dataclass
class Result:
    prediction: Prediction
    samples: dict[str, int]
    unsteered: float  # share of answers that are the predicted one anyway
    steered: dict[str, dict[str, Any]] = field(default_factory=dict)  # by strength: feature, control, controls reaching
    ablated: dict[str, Any] = field(default_factory=dict)
    together: dict[str, Any] = field(default_factory=dict)
    steers: bool = False
    ablates: bool = False


class Bench:
    def __init__(self, vlm: VLM, clt: CLT):
        self.vlm, self.clt = vlm, clt
        self.rng = random.Random(f"steering {SEED} controls")

    def asked(self, items: list[Item], answer: int | None) -> Asked:
        """Against the right answer, or where this is `answer`, against the runner-up of the original."""
        prompts = encoded(self.vlm, items)
        own = logits(self.vlm, self.clt, prompts, [])
        if answer is None:
            against = torch.tensor([self.truth(item) for item in items])
        else:
            against = own.index_fill(-1, torch.tensor([answer]), -torch.inf).argmax(-1)
        return Asked(prompts, [item.picture.scene.layout for item in items], own, against)

    def truth(self, item: Item) -> int:
        return following_ids(self.vlm, prompt(item.question), item.question.answer)[0]

    def result(self, made: Prediction, items: list[Item]) -> Result:
        one, answer = made.one, made.one.answer
        others = [item for item in items if self.truth(item) != answer][:STEER]
        same = [item for item in items if self.truth(item) == answer][:ABLATE]
        asked = self.asked(others, None)
        drawn = self.rng.sample([feature for feature in made.active if feature != one.feature], CONTROLS)
        controls = [control(self.clt, one.layer, one.feature, other) for other in drawn]
        unsteered = float((asked.own.argmax(-1) == answer).double().mean())
        found = Result(made, {"steered": len(others), "ablated": len(same)}, unsteered)
        for strength in STRENGTHS:
            found.steered[f"{strength:g}"] = self.compared(asked, [one.intervention(strength)], controls, answer)
        found.ablated = self.compared(self.asked(same, answer), [one.ablation()], controls, answer)
        found.together = self.together(made, asked)
        strongest, ablated = found.steered[f"{STRENGTHS[-1]:g}"], found.ablated
        found.steers = all(above(strongest, name) for name in ("share", "change"))
        found.ablates = below(ablated, "change") and ablated["feature"]["change"]["high"] < 0
        return found

    def compared(
        self, asked: Asked, interventions: list[Intervention], controls: Sequence[CLT], answer: int
    ) -> dict[str, Any]:
        own = outcome(asked, logits(self.vlm, self.clt, asked.prompts, interventions), answer)
        each = []
        for number, clt in enumerate(controls):
            some = asked[number % EVERY :: EVERY]
            each.append(outcome(some, logits(self.vlm, clt, some.prompts, interventions), answer))
        return against_controls(own, asked.pictures, each)

    def together(self, made: Prediction, asked: Asked) -> dict[str, Any]:
        """The members at once, and random features of their layers whose summed write is as large."""
        interventions = [one.intervention(TOGETHER) for one in made.members]
        answer, size = made.one.answer, self.size(interventions)
        own = outcome(asked, logits(self.vlm, self.clt, asked.prompts, interventions), answer)
        each = []
        for number in range(CONTROLS):
            drawn = [
                Intervention(one.layer, self.rng.choice(made.found.active(one.layer)), "add", one.typical, "text")
                for one in made.members
            ]
            scale = TOGETHER * size / self.size(drawn)
            scaled = [Intervention(one.layer, one.feature, "add", scale * amount(one), "text") for one in drawn]
            some = asked[number % EVERY :: EVERY]
            each.append(outcome(some, logits(self.vlm, self.clt, some.prompts, scaled), answer))
        return against_controls(own, asked.pictures, each)

    def size(self, interventions: Sequence[Intervention]) -> float:
        """The norm of all that is added to the residual stream of a token."""
        written = [amount(one) * summed_writes(self.clt, one.layer, one.feature) for one in interventions]
        return float(torch.stack(written).sum(0).norm())


def amount(one: Intervention) -> float:
    assert isinstance(one.value, float)
    return one.value


def against_controls(
    own: dict[str, np.ndarray], units: Sequence[str], each: Sequence[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Figures of the feature, of the control, and how many controls come as far as the feature, by figure."""
    pooled = {name: np.concatenate([one[name] for one in each]) for name in own}
    numbers = np.repeat(np.arange(len(each)), [len(one["share"]) for one in each])
    return {
        "feature": figures(own, units),
        "control": figures(pooled, numbers.tolist()),
        "controls": {name: [float(one[name].mean()) for one in each] for name in own},
    }


def above(found: dict[str, Any], name: str) -> bool:
    return found["feature"][name]["low"] > found["control"][name]["high"]


def below(found: dict[str, Any], name: str) -> bool:
    return found["feature"][name]["high"] < found["control"][name]["low"]


# Report --------------------------------------------------------------------------------------------------------------


def machine() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, {versions}"
    )


def about(clt: CLT) -> dict[str, Any]:
    """Which CLT it is, without paths."""
    said = clt.description
    return {
        "model": said.model,
        "n_features": said.n_features,
        "sources": list(said.sources),
        "offset": said.offset,
        "activation": said.activation.trained_as or said.activation.kind,
        "combined": said.combined,
        "metrics": {
            name: said.metrics[name] for name in ("split", "steps", "fvu", "l0", "dead") if name in said.metrics
        },
    }


def described(about: dict[str, Any]) -> str:
    metrics = about["metrics"]
    measured = f", test FVU {metrics['fvu']['all']:.4f}, L0 {metrics['l0']:.1f}" if metrics else ""
    return (
        f"CLT: {about['combined']}, {about['activation']}, offset {about['offset']}, "
        f"{len(about['sources'])} sources of {about['n_features']} features{measured}"
    )


def show_predictions(made: Sequence[Prediction], pairs: int, console: Console) -> None:
    title = f"Predicted on val pictures, from {pairs} pairs of a kind of question and an answer"
    table = Table(title=title, title_justify="left")
    for name in ("question", "more of", "feature", "contrast", "typical", "logits per unit", "shift at strength 1"):
        table.add_column(name, justify="left" if name in ("question", "more of", "feature") else "right")
    for one in made:
        numbers = (one.one.contrast, one.one.typical, one.one.effect, one.one.shift)
        table.add_row(one.kind, one.word, name_of(one.one), *(f"{number:.2f}" for number in numbers))
    console.print(table)


def name_of(one: Found) -> str:
    return f"{one.layer}:{one.feature}"


def spelled(figure: Figure, form: str) -> str:
    return f"{figure['value']:{form}} ({figure['low']:{form}}, {figure['high']:{form}})"


def show_results(results: Sequence[Result], console: Console) -> None:
    last = f"{STRENGTHS[-1]:g}"
    table = Table(title="Share of answers that are it, on test pictures that have another answer", title_justify="left")
    table.add_column("question: more of")
    table.add_column("feature")
    for name in ("n", "as is", *(f"{s:g}x" for s in STRENGTHS), f"95 % at {last}x", "control's"):
        table.add_column(name, justify="right")
    for name in (f"logits at {last}x", "control's", "as predicted"):
        table.add_column(name, justify="right")
    for one in results:
        strongest = one.steered[last]
        share = strongest["feature"]["share"]
        table.add_row(
            f"{one.prediction.kind}: {one.prediction.word}",
            name_of(one.prediction.one),
            str(one.samples["steered"]),
            f"{one.unsteered:.2f}",
            *(f"{found['feature']['share']['value']:.2f}" for found in one.steered.values()),
            f"{share['low']:.2f}, {share['high']:.2f}",
            spelled(strongest["control"]["share"], ".2f"),
            spelled(strongest["feature"]["change"], "+.1f"),
            spelled(strongest["control"]["change"], "+.1f"),
            "yes" if one.steers else "NO",
        )
    console.print(table)
    table = Table(
        title=f"Set to 0 where it is the answer; and {MEMBERS} features of the answer at once where it is not",
        title_justify="left",
    )
    table.add_column("question: answer")
    table.add_column("feature")
    names = ("n", "still said", "logits", "control's", "as predicted")
    for name in (*names, f"{MEMBERS} at {TOGETHER:g}x", "control's", "logits at that"):
        table.add_column(name, justify="right")
    for one in results:
        ablated, together = one.ablated, one.together
        table.add_row(
            f"{one.prediction.kind}: {one.prediction.word}",
            name_of(one.prediction.one),
            str(one.samples["ablated"]),
            f"{ablated['feature']['share']['value']:.2f}",
            spelled(ablated["feature"]["change"], "+.2f"),
            spelled(ablated["control"]["change"], "+.2f"),
            "yes" if one.ablates else "NO",
            spelled(together["feature"]["share"], ".2f"),
            spelled(together["control"]["share"], ".2f"),
            f"{together['feature']['change']['value']:+.1f}",
        )
    console.print(table)
    console.print(
        f"{sum(one.steers for one in results)} of {len(results)} steer as predicted, "
        f"{sum(one.ablates for one in results)} are ablated as predicted",
        highlight=False,
    )


def as_json(one: Result) -> dict[str, Any]:
    made = one.prediction
    numbers = asdict(made.one) | {"shift": made.one.shift}
    return {
        "kind": made.kind,
        "answer": made.word,
        "feature": numbers,
        "members": [name_of(member) for member in made.members],
        **{name: getattr(one, name) for name in ("samples", "unsteered", "steered", "ablated", "together")},
        "steers as predicted": one.steers,
        "ablates as predicted": one.ablates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clt", type=Path, required=True)
    parser.add_argument("--model", default="examples/shapes/model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/steering")
    options = parser.parse_args()
    began = time.monotonic()
    vlm = load(options.model, device="cpu")
    clt = CLT.from_pretrained(options.clt, vlm.device)
    console = Console(width=165, record=True)
    console.print(f"{machine()}\n{described(about(clt))}", highlight=False)
    made, pairs = predictions(vlm, clt)
    show_predictions(made, pairs, console)
    items = questions("test", TEST)
    bench, results = Bench(vlm, clt), []
    for prediction in made:
        results.append(bench.result(prediction, items[prediction.kind]))
        said = f"{prediction.kind}: {prediction.word}  {time.monotonic() - began:.0f} s"
        print(said, flush=True)
    show_results(results, console)
    seconds = round(time.monotonic() - began)
    console.print(f"{seconds} s", highlight=False)
    found = {"machine": machine(), "clt": about(clt), "pairs": pairs, "seconds": seconds}
    settings = {"strengths": STRENGTHS, "controls": CONTROLS, "every": EVERY, "members": MEMBERS, "together": TOGETHER}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results_json = [as_json(one) for one in results]
    write_json(options.out.with_suffix(".json"), json.loads(json.dumps(found | settings | {"features": results_json})))
    text = console.export_text()
    write_whole(options.out.with_suffix(".txt"), lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
