"""Check the demo VLM against its bars, on `test` layouts; exit status 1 when one is missed.

    python examples/shapes/check_vlm.py                      # examples/shapes/model
    python examples/shapes/check_vlm.py --model DIR --images 800 --json FILE

Answers are graded by exact match. Most are read off one teacher-forced forward pass (the argmax before each token of
the answer and before `</s>`), which is what greedy decoding would give; some are really generated, and the two must
agree. `mean` replaces an MLP's output, at all positions, by its mean over the prompts' tokens on `train` layouts.
"""

import argparse
import operator
import os
import random
import socket
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from cltjax.errors import UserError
from cltjax.files import write_json
from examples.shapes.asking import (
    Encoded,
    Item,
    Picture,
    answers,
    ask_evenly,
    encode,
    forward,
    generate,
    hooks,
    keep,
    load,
    mlp_means,
    mlps_give,
    pictures,
)
from examples.shapes.chain import (
    Probe,
    about_material,
    exchanges,
    links,
    materials,
    probe_by_layer,
    residuals,
    share,
    use_items,
)
from examples.shapes.questions import ONE_WORD_KINDS
from examples.shapes.train_vlm import patch_labels

QUESTIONS_PER_IMAGE = 4.2  # of 14 kinds; 240 of each kind with 800 images
GENERATED, GENERATED_DESCRIPTIONS = 200, 24
PASSES = {">=": operator.ge, "<=": operator.le, "=": operator.eq}


@dataclass(frozen=True)
class Row:
    section: str
    name: str
    value: float
    bar: tuple[str, float] | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        return None if self.bar is None else bool(PASSES[self.bar[0]](self.value, self.bar[1]))


class Report:
    """Rows, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, section: str, name: str, value: float, bar: tuple[str, float] | None = None, note: str = "") -> None:
        row = Row(section, name, value, bar, note)
        if not self.rows or self.rows[-1].section != section:
            print(f"\n{section}")
        mark = {None: "", True: "pass", False: "FAIL"}[row.passed]
        asked = f"{bar[0]} {bar[1]:g}" if bar else ""
        print(f"  {name:<52} {value:>7.3f}  {asked:<8} {mark:<5} {note}".rstrip(), flush=True)
        self.rows.append(row)

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)


def load_offline(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, int]:
    """The model, its processor, and how often loading tried to reach another machine (it could not)."""
    tried: list[object] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def refused(*args: Any, **_: Any) -> Any:
        tried.append(args)
        raise OSError("no network in this check")

    socket.socket.connect = refused
    socket.getaddrinfo = refused
    try:
        model, processor = load(folder)
    finally:
        socket.socket.connect, socket.getaddrinfo = connect, resolve
    return model, processor, len(tried)


def read_probes(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of probes.safetensors, and the depth that the material probe reads at."""
    path = folder / "probes.safetensors"
    with safe_open(path, "pt") as file:
        depth = int(file.metadata()["material_depth"])
    return {name: tensor.float() for name, tensor in load_file(path).items()}, depth


def check_patches(
    report: Report,
    model: LlavaForConditionalGeneration,
    encoded: Encoded,
    pool: list[Picture],
    probes: dict[str, Tensor],
) -> None:
    """`encoded` has one question on each picture of the pool."""
    kept: dict[int, Tensor] = {}
    seen: list[Tensor] = []
    with hooks([model.model.multi_modal_projector.register_forward_hook(keep(kept, 0))]):
        for batch in encoded.batches():
            forward(model, batch)
            seen.append(kept[0])
    projected = torch.cat(seen)  # [images, patches, D]: what the decoder is given
    labels = patch_labels([picture.scene for picture in pool])
    for name, truth in labels.items():
        weight, bias = probes[f"patch.{name}.weight"], probes[f"patch.{name}.bias"]
        said = (projected @ weight.T + bias).argmax(-1)
        report.add("patches, read off the projector by linear probes", name, share(said == truth))


def always(items: list[Item]) -> str:
    """What giving the commonest answer every time would score."""
    answer, count = Counter(item.question.answer for item in items).most_common(1)[0]
    return f"always `{answer}`: {count / len(items):.2f}"


def check_generation(
    report: Report,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: list[Item],
    exact: Tensor,
    tokens: int,
    name: str,
) -> None:
    """Greedy generation and the forward pass must grade every one of `items` alike."""
    said = generate(model, processor, items, tokens)
    right = torch.tensor([text == item.question.answer for text, item in zip(said, items, strict=True)])
    note = f"n = {len(items)}, generated exact match {share(right):.3f}"
    report.add("answers", f"generated = teacher-forced, {name}", share(right == exact), ("=", 1.0), note)


def check_answers(
    report: Report, model: LlavaForConditionalGeneration, processor: LlavaProcessor, pool: list[Picture]
) -> None:
    rng = random.Random("questions")
    count = round(QUESTIONS_PER_IMAGE * len(pool) / len(ONE_WORD_KINDS))
    items: list[Item] = []
    for number, kind in enumerate(ONE_WORD_KINDS):
        items += ask_evenly(pool, kind, count, number * len(pool) // len(ONE_WORD_KINDS), rng)
    shown = len({item.picture.scene.layout for item in items})
    kinds = [item.question.kind for item in items]
    encoded = encode(processor, items)
    exact = answers(model, encoded).exact
    clean = share(exact)
    report.add("answers", "one word, exact match", clean, (">=", 0.97), f"n = {len(items)}, {shown} images")
    for kind in ONE_WORD_KINDS:
        asked = torch.tensor([k == kind for k in kinds])
        note = always([item for item in items if item.question.kind == kind])
        report.add("answers", f"  {kind}", share(exact[asked]), (">=", 0.90), f"n = {count}; {note}")
    described = ask_evenly(pool, "describe", min(len(pool), 200), 0, rng)
    described_exact = answers(model, encode(processor, described)).exact
    report.add("answers", "describe, exact match", share(described_exact), note=f"n = {len(described)}")
    some = sorted(rng.sample(range(len(items)), min(GENERATED, len(items))))
    check_generation(report, model, processor, [items[i] for i in some], exact[some], 6, "one word")
    few = described[:GENERATED_DESCRIPTIONS]
    check_generation(report, model, processor, few, described_exact[: len(few)], 64, "describe")

    order = list(range(len(pool)))
    rng.shuffle(order)
    following = {pool[a].scene.layout: b for a, b in zip(order, [*order[1:], order[0]], strict=True)}
    image_of = encode(processor, [Item(p, ask_evenly([p], "count", 1, 0, rng)[0].question) for p in pool])
    other = image_of.pixels[torch.tensor([following[item.picture.scene.layout] for item in items])]
    shuffled = answers(model, encoded.showing(other)).exact
    report.add("does it look?", "images shuffled among questions", share(shuffled), ("<=", 0.40))

    means = means_on_train(model, processor)
    zeros = [torch.zeros_like(mean) for mean in means]

    def ablated(given: dict[int, Tensor]) -> float:
        with mlps_give(model, given):
            return share(answers(model, encoded).exact)

    section = "does it need its MLPs?"
    drop = round(clean - 0.30, 6)
    report.add(section, "all MLPs: mean", ablated(dict(enumerate(means))), ("<=", 0.35))
    report.add(section, "all MLPs: zero", ablated(dict(enumerate(zeros))), ("<=", 0.35))
    late = ablated(dict(enumerate(means[1:], start=1)))
    report.add(section, "all MLPs but the first: mean", late, ("<=", drop), "clean - .30")
    report.add(section, "all MLPs but the first: zero", ablated(dict(enumerate(zeros[1:], start=1))))
    for layer, mean in enumerate(means):
        report.add(section, f"  MLP {layer} alone: mean", value := ablated({layer: mean}), note=f"{value - clean:+.3f}")


def means_on_train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: int = 420) -> list[Tensor]:
    """By layer, the mean MLP output over prompts of all one-word kinds about `train` layouts."""
    rng = random.Random("means")
    stream = pictures("train", rng)
    pool = [next(stream) for _ in range(images)]
    count = images // len(ONE_WORD_KINDS)
    items = [
        item
        for number, kind in enumerate(ONE_WORD_KINDS)
        for item in ask_evenly(pool, kind, count, number * count, rng)
    ]
    return mlp_means(model, encode(processor, items))


def check_chain(
    report: Report,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    probe: Probe,
    depth: int,
    count: int,
) -> None:
    rng = random.Random("chain")
    sets = {name: use_items("test", count, name == "unasked", rng) for name in ("asked", "unasked")}
    for name, items in sets.items():
        got = links(model, processor, items)
        section = f"chain: {name} pairs, n = {count} `use` questions"
        report.add(section, "use, the end asked directly", got.use, note=always(items))
        report.add(section, "made, the first link", got.made)
        report.add(section, "fact, the second link", got.fact)
        report.add(section, "use, where both links are right", got.use_given_links)
        encoded = encode(processor, items)
        stream = residuals(model, encoded, encoded.subject[:, None])[depth, :, 0]
        report.add(
            section,
            f"material named by the model's probe, after {depth} layers",
            share(probe(stream) == materials(items)),
            note="while `use` is asked, at the subject's last token",
        )

    train = [about_material(item) for item in use_items("train", 3 * count, False, rng)]
    section = f"chain: an independent probe of the material (fitted on {len(train)} `made`, train, asked pairs)"
    for layer in probe_by_layer(model, processor, train, sets["asked"], sets["unasked"]):
        for place in ("subject", "final"):
            asked, unasked = getattr(layer, f"{place}_asked"), getattr(layer, f"{place}_unasked")
            name = f"unasked pairs, {place} token, after {layer.depth} layers"
            report.add(section, name, unasked, note=f"asked pairs {asked:.3f}")

    # Twice as many asked pairs as unasked ones, as there are: the same question about another use is found for most.
    more = [*use_items("test", 3 * count, False, rng), *use_items("test", count, True, rng)]
    pairs, found = exchanges(model, processor, [*more, *sets["unasked"]], probe, depth, rng)
    section = f"chain: `use` follows the donor ({pairs} exchanges at the subject's last token)"
    for name, exchange in found.items():
        note = f"stays {exchange.stays:.3f}; follows donors of unasked pairs {exchange.follows_unasked:.3f}"
        report.add(section, f"exchanged: {name}", exchange.follows, note=note)


def check(folder: Path, images: int) -> Report:
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}: train it with `python examples/shapes/train_vlm.py --out {folder}`")
    report = Report()
    model, processor, tried = load_offline(folder)
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors")) / 1e6
    report.add("files", "weights, MB", size, ("<=", 3.0))
    report.add("files", "network connections tried while loading", tried, ("=", 0))
    report.add("files", "parameters, millions", sum(p.numel() for p in model.parameters()) / 1e6)

    stream = pictures("test", random.Random("images"))
    pool = [next(stream) for _ in range(images)]
    probes, depth = read_probes(folder)
    one_each = encode(processor, ask_evenly(pool, "count", images, 0, random.Random("patches")))
    check_patches(report, model, one_each, pool, probes)
    check_answers(report, model, processor, pool)
    material = Probe(probes["material.weight"], probes["material.bias"])
    check_chain(report, model, processor, material, depth, max(8, images // 2))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--images", type=int, default=800, help="test layouts; the bars ask for at least 700")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    options = parser.parse_args()
    print(f"{options.model}: {options.images} pictures of test layouts")
    try:
        report = check(options.model, options.images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.json:
        rows = [{**asdict(row), "passed": row.passed} for row in report.rows]
        result = {"model": os.fspath(options.model), "images": options.images, "passed": report.passed, "rows": rows}
        write_json(options.json, result)
    bars = sum(row.bar is not None for row in report.rows)
    missed = [row.name.strip() for row in report.rows if row.passed is False]
    print(f"\n{bars - len(missed)} of {bars} bars passed" + (f"; missed: {', '.join(missed)}" if missed else ""))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
