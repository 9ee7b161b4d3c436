"""Does the demo VLM go color x shape -> material -> use, or has it learned color x shape -> use by heart?

Three kinds of evidence, all on `test` layouts: the answers about pairs for which training never asked `use`; a linear
probe that names the material while `use` is asked; and what is answered when the residual stream at the word that
ends the subject's phrase is exchanged for that of a thing with another material.
"""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cltjax.splits import Split
from examples.shapes.asking import Item, answers, encode, patched_answers, pictures, residuals
from examples.shapes.questions import MATERIALS, USE_OF, Question, ask, is_unasked, material_of
from examples.shapes.scenes import Thing


@dataclass(frozen=True)
class Probe:
    """material logits = residual @ weight.T + bias, after `depth` layers"""

    weight: Tensor  # [materials, D]
    bias: Tensor  # [materials]

    def __call__(self, stream: Tensor) -> Tensor:
        return (stream @ self.weight.T + self.bias).argmax(-1)

    def span(self) -> Tensor:
        """The orthogonal projection [D, D] on all that the probe's verdict depends on."""
        # A softmax ignores what is common to all classes, so materials - 1 directions are left.
        rows = self.weight - self.weight.mean(0)
        basis = torch.linalg.svd(rows, full_matrices=False).Vh[: len(rows) - 1]
        return basis.T @ basis


def subject(item: Item) -> Thing:
    assert item.question.subject is not None
    return item.question.subject


def materials(items: list[Item]) -> Tensor:
    return torch.tensor([MATERIALS.index(material_of(subject(item))) for item in items])


def use_items(split: Split, count: int, unasked: bool, rng: random.Random) -> list[Item]:
    """`count` questions about a use, one a picture, about pairs that are (not) in UNASKED."""
    found: list[Item] = []
    stream = pictures(split, rng)
    while len(found) < count:
        picture = next(stream)
        question = ask(picture.scene, "use", rng)
        assert question is not None
        if is_unasked(question) == unasked:
            found.append(Item(picture, question))
    return found


def about_material(item: Item) -> Item:
    """The chain's first link about the same subject, named the same way."""
    old = item.question
    text = f"What is {old.phrase} made of?"
    return replace(item, question=replace(old, kind="made", text=text, answer=material_of(subject(item))))


def about_fact(item: Item) -> Item:
    """The chain's second link."""
    material = material_of(subject(item))
    uses: dict[str, str] = {**USE_OF}
    return replace(item, question=Question("fact", f"What is {material} used for?", uses[material]))


def share(right: Tensor) -> float:
    return right.double().mean().item()


@dataclass(frozen=True)
class Links:
    """Exact match of the direct question and of both links, on the same subjects."""

    use: float
    made: float
    fact: float
    use_given_links: float  # share of `use` right where both links are


def links(model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: list[Item]) -> Links:
    use = answers(model, encode(processor, items)).exact
    made = answers(model, encode(processor, [about_material(item) for item in items])).exact
    fact = answers(model, encode(processor, [about_fact(item) for item in items])).exact
    return Links(share(use), share(made), share(fact), share(use[made & fact]))


def fit_probe(stream: Tensor, labels: Tensor) -> Probe:
    """Multinomial logistic regression on standardised inputs, ridge 1e-3, to convergence."""
    mean, scale = stream.mean(0), stream.std(0) + 1e-6
    inputs = (stream - mean) / scale
    weight = torch.zeros(len(MATERIALS), stream.shape[1], requires_grad=True)
    bias = torch.zeros(len(MATERIALS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight.T + bias, labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    with torch.no_grad():
        raw = weight / scale
        return Probe(raw.detach(), (bias - raw @ mean).detach())


@dataclass(frozen=True)
class ProbedLayer:
    """Accuracy of an independent probe, by (place read, pairs): its own at each depth and place."""

    depth: int  # layers before the residual stream that is read
    subject_asked: float
    subject_unasked: float
    final_asked: float
    final_unasked: float


def probe_by_layer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    fit_on: list[Item],
    asked: list[Item],
    unasked: list[Item],
) -> list[ProbedLayer]:
    """Probes fitted while the material is asked, tested while the use is.

    `fit_on`: `made` questions about *asked* pairs only, so that the pairs in `unasked` are new to the probe, too.
    At the subject the two questions read the same so far; at the final token they differ.
    """

    def read(items: list[Item]) -> Tensor:
        encoded = encode(processor, items)
        return residuals(model, encoded, torch.stack([encoded.subject, encoded.start - 1], 1))

    fitted, labels = read(fit_on), materials(fit_on)
    tests = [(read(items), materials(items)) for items in (asked, unasked)]
    found = []
    for depth in range(len(fitted)):
        figures = []
        for place in (0, 1):
            probe = fit_probe(fitted[depth, :, place], labels)
            figures += [share(probe(stream[depth, :, place]) == truth) for stream, truth in tests]
        found.append(ProbedLayer(depth, *figures))
    return found


@dataclass(frozen=True)
class Exchange:
    """What is answered to `use` after an exchange at the subject's last token."""

    follows: float  # the use of the donor's material
    stays: float  # the use of the material in the picture
    follows_unasked: float  # `follows` where the donor is of an unasked pair


def donors(items: list[Item], rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Items, and for each another one with the same question but another use."""
    by_text: dict[str, list[Item]] = {}
    for item in items:
        by_text.setdefault(item.question.text, []).append(item)
    bases, chosen = [], []
    for item in items:
        others = [o for o in by_text[item.question.text] if o.question.answer != item.question.answer]
        if others:
            bases.append(item)
            chosen.append(rng.choice(others))
    return bases, chosen


def exchanges(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: list[Item],
    probe: Probe,
    depth: int,
    rng: random.Random,
) -> tuple[int, dict[str, Exchange]]:
    """The number of exchanges, and what follows: by depth the whole residual; at the probe's depth also what the
    probe reads of it, and the rest. Same question, same position: only the picture differs."""
    bases, chosen = donors(items, rng)
    base, donor = encode(processor, bases), encode(processor, chosen)
    answer = torch.arange(len(bases))
    own, other = base.ids[answer, base.start], donor.ids[answer, donor.start]
    here = residuals(model, base, base.subject[:, None])[:, :, 0]
    there = residuals(model, donor, donor.subject[:, None])[:, :, 0]
    from_unasked = torch.tensor([is_unasked(item.question) for item in chosen])

    def told(at: int, stream: Tensor) -> Exchange:
        said = patched_answers(model, base, at, stream)
        return Exchange(share(said == other), share(said == own), share((said == other)[from_unasked]))

    change = there[depth] - here[depth]
    seen = change @ probe.span()
    found = {"nothing": told(depth, here[depth])}
    found |= {f"all, after {at} layers": told(at, there[at]) for at in range(1, len(here))}
    found[f"what the probe reads, after {depth}"] = told(depth, here[depth] + seen)
    found[f"the rest, after {depth}"] = told(depth, there[depth] - seen)
    return len(bases), found
