"""Train the demo VLM from scratch on `train` layouts, with fixed step counts and seed.

    python examples/shapes/train_vlm.py            # writes examples/shapes/model; 43 minutes on two busy cores

Stage 1 teaches the vision tower and the projector, through linear probes, what lies in each patch; then both
are frozen. What reaches the text decoder is therefore *linear* in color, shape, row and column, and whatever
is not linear in them (parity, materials, relations) is left to the decoder's MLPs, which is what a transcoder
replaces. Stage 2 trains the text decoder on packed questions.

The chain color x shape -> material -> use is given a middle, at the word that ends the phrase naming the thing
("the red thing", which reads the same whether `made of` or `used for` follows), after MATERIAL_DEPTH layers:

- a linear probe of the residual stream there is trained with the model to name the material;
- interchange interventions (Geiger et al., 2022, "Inducing causal structure for interpretable neural networks"):
  in a share of the questions the component in the probe's subspace is exchanged for that of another question, and
  the answer asked for is the one that follows from the *other* material. What the rest of the residual stream, the
  phrase or the image say then points to a wrong answer, so that `use` has to be read off the material.

Only pairs that are asked `use` in training ever take part in such an exchange. `--exchange-share 0` and
`--material-weight 0` leave either out; README.md has the figures.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from examples.shapes.questions import (
    MATERIALS,
    ONE_WORD_KINDS,
    UNASKED,
    USE_OF,
    Question,
    ask,
    is_unasked,
    material_of,
)
from examples.shapes.scenes import COLORS, GRID, SHAPES, Scene, random_scene_of, render
from examples.shapes.vlm import (
    IMAGE_TOKENS,
    TEMPLATE,
    TEXT_LAYERS,
    VISION_LAYERS,
    VOCABULARY,
    WIDTH,
    build_config,
    build_processor,
)

SEED = 0
TOWER_STEPS, TOWER_BATCH = 600, 64
TEXT_STEPS, TEXT_BATCH = 5400, 16
POOL = 24_000  # training images whose projected features are computed once
QUESTIONS = 8  # one-word questions an image, and a description
LEARNING_RATE = 1.5e-3
WARMUP = 100
FLAT = 0.35  # share of the steps at the full learning rate; then cosine to zero
WEIGHT = {"</s>": 0.2, "describe": 0.3}
# How often a kind is drawn, where not 1: what is learned late is asked often (`next` fits only some scenes).
SHARE = {"next": 4.0, "same": 2.5, "relation": 2.0, "parity": 2.0, "use": 2.0, "made": 1.5, "exist": 1.5, "count": 1.5}
SHARE |= dict.fromkeys(("color", "shape", "food", "corners"), 0.6) | {"fact": 0.4}
MATERIAL_DEPTH = 3  # the probe reads the residual stream after this many layers
EXCHANGE_FROM = 0.15  # share of the steps after which materials are exchanged: the probe has to know them first

IDS = {word: i for i, word in enumerate(VOCABULARY)}
WORDS = re.compile(r"USER:|ASSISTANT:|\w+|[^\w\s]")
ROW_OF_PATCH = torch.arange(IMAGE_TOKENS) // math.isqrt(IMAGE_TOKENS) // 2
COLUMN_OF_PATCH = torch.arange(IMAGE_TOKENS) % math.isqrt(IMAGE_TOKENS) // 2
CELL_OF_PATCH = ROW_OF_PATCH * GRID + COLUMN_OF_PATCH


def tokens(text: str) -> list[int]:
    """The processor's tokens without `<s>`, at the speed a training loop needs."""
    return [IDS[word] for word in WORDS.findall(text)]


def fan_in_init(model: nn.Module, layers: int) -> None:
    """Normal with 1/sqrt(fan in); what writes to the residual stream is scaled down by its depth."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1 / math.sqrt(2 * layers) if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def schedule(step: int, total: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    rest = max(0.0, (step - FLAT * total) / ((1 - FLAT) * total))
    return 0.5 * (1 + math.cos(math.pi * rest))


# Stage 1 -----------------------------------------------------------------------------------------------------


class PatchProbes(nn.Module):
    """Linear readings of each projected patch: color and shape of what its cell holds (last class: nothing),
    and the cell's row and column."""

    def __init__(self, width: int):
        super().__init__()
        sizes = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "row": GRID, "column": GRID}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        return {name: head(patches) for name, head in self.heads.items()}


def patch_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """By probe, the class of every patch: [images, patches]."""
    color = torch.full((len(scenes), GRID * GRID), len(COLORS))
    shape = torch.full((len(scenes), GRID * GRID), len(SHAPES))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            color[i, thing.cell] = COLORS.index(thing.color)
            shape[i, thing.cell] = SHAPES.index(thing.shape)
    rows = ROW_OF_PATCH.expand(len(scenes), -1)
    columns = COLUMN_OF_PATCH.expand(len(scenes), -1)
    return {"color": color[:, CELL_OF_PATCH], "shape": shape[:, CELL_OF_PATCH], "row": rows, "column": columns}


def projected(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the text decoder is given for an image: [images, patches, width]."""
    patches = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(patches)


def pixel_values(processor: LlavaProcessor, scenes: list[Scene], rng: random.Random) -> Tensor:
    return processor.image_processor([render(s, rng) for s in scenes], return_tensors="pt")["pixel_values"]


def train_tower(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int) -> PatchProbes:
    rng = random.Random(SEED)
    probes = PatchProbes(WIDTH)
    learned = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    learned += list(probes.parameters())
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for step in range(steps):
        scenes = [random_scene_of("train", rng) for _ in range(TOWER_BATCH)]
        with torch.autocast("cpu", torch.bfloat16):
            guesses = probes(projected(model, pixel_values(processor, scenes, rng)))
        labels = patch_labels(scenes)
        loss = sum(
            (functional.cross_entropy(guesses[name].float().flatten(0, 1), labels[name].flatten()) for name in labels),
            torch.zeros(()),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        decay.step()
        if step % 100 == 99:
            right = {name: (guesses[name].argmax(-1) == labels[name]).float().mean().item() for name in labels}
            print(f"tower {step + 1}/{steps}  loss {loss.item():.4f}  {right}", flush=True)
    return probes


# Stage 2 -----------------------------------------------------------------------------------------------------


def training_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """QUESTIONS one-word questions and a description; never the end of the chain about an unasked pair."""
    weights = [SHARE.get(kind, 1.0) for kind in ONE_WORD_KINDS]
    chosen: list[Question] = []
    while len(chosen) < QUESTIONS:
        question = ask(scene, rng.choices(ONE_WORD_KINDS, weights)[0], rng)
        if question is not None and not is_unasked(question):
            chosen.append(question)
    description = ask(scene, "describe", rng)
    assert description is not None
    return [*chosen, description]


@dataclass(frozen=True)
class Link:
    """Where a `made` or `use` question names its thing and where it is answered, as positions of one sequence."""

    kind: str
    subject: int
    answer: int  # the position whose next token is the answer
    material: int
    asked: bool  # whether the pair of color and shape is one that training asks `use` about


@dataclass
class Packed:
    """Several questions about one image in one sequence; each sees the image and itself."""

    ids: list[int]
    positions: list[int]
    segment: list[int]  # 0 the image prefix, then one number a question
    weight: list[float]  # of predicting the *next* token
    links: list[Link]


def pack(questions: list[Question]) -> Packed:
    before, after = TEMPLATE.split("<image>")
    prefix = [IDS["<s>"], *tokens(before), *[IDS["<image>"]] * IMAGE_TOKENS]
    size = len(prefix)
    packed = Packed(prefix[:], list(range(size)), [0] * size, [0.0] * size, [])
    for number, question in enumerate(questions, start=1):
        asked = tokens(after.format(question.text))
        answer = [*tokens(question.answer), IDS["</s>"]]
        scale = WEIGHT["describe"] if question.kind == "describe" else 1.0
        weight = [0.0] * (len(asked) - 1) + [scale] * (len(answer) - 1) + [scale * WEIGHT["</s>"], 0.0]
        if question.kind in ("made", "use") and question.subject is not None:
            thing, start = question.subject, len(packed.ids)
            named = tokens(question.text.partition(question.phrase)[0] + question.phrase)
            packed.links.append(
                Link(
                    question.kind,
                    subject=start + len(named) - 1,
                    answer=start + len(asked) - 1,
                    material=MATERIALS.index(material_of(thing)),
                    asked=(thing.color, thing.shape) not in UNASKED,
                )
            )
        packed.ids += asked + answer
        packed.positions += range(size, size + len(asked) + len(answer))
        packed.segment += [number] * (len(asked) + len(answer))
        packed.weight += weight
    return packed


def collate(rows: list[Packed]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, mask (additive, [images, 1, tokens, tokens]) and weight, right-padded."""
    length = max(len(row.ids) for row in rows)

    def filled(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*getattr(r, name), *[fill] * (length - len(r.ids))] for r in rows], dtype=dtype)

    segment = filled("segment", -1, torch.long)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    visible = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    return (
        filled("ids", 0, torch.long),
        filled("positions", 0, torch.long),
        mask,
        filled("weight", 0.0, torch.float32),
    )


Place = tuple[int, Link]  # a link and the row of the batch it is in


def places(found: list[Place], what: str) -> tuple[Tensor, Tensor]:
    """Rows and positions of all links' `what` (subject or answer), to index [images, tokens, ...] with."""
    return torch.tensor([row for row, _ in found]), torch.tensor([getattr(link, what) for _, link in found])


def draw_exchanges(found: list[Place], share: float, rng: random.Random) -> list[tuple[Place, Place]]:
    """(receiver, donor) pairs with different materials; both are pairs that training asks `use` about."""
    able = [place for place in found if place[1].asked]
    pairs = ((receiver, rng.choice(able)) for receiver in able if rng.random() < share)
    return [(receiver, donor) for receiver, donor in pairs if receiver[1].material != donor[1].material]


def answer_after(receiver: Link, donor: Link) -> int:
    """The token that answers the receiver's question once its thing is made of the donor's material."""
    material = MATERIALS[donor.material]
    return IDS[material if receiver.kind == "made" else USE_OF[material]]


@contextmanager
def exchanged(layer: nn.Module, probe: nn.Linear, pairs: list[tuple[Place, Place]]) -> Iterator[None]:
    """What enters `layer` at each receiver's subject has, within the probe's subspace, the donor's component."""
    if not pairs:
        yield
        return
    to, of = (places([pair[side] for pair in pairs], "subject") for side in (0, 1))
    basis = torch.linalg.qr(probe.weight.detach().T)[0]  # [D, materials]

    def exchange(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0].clone()
        hidden[to] = args[0][to] + ((args[0][of] - args[0][to]) @ basis) @ basis.T
        return (hidden, *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def train_text(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    pool: int,
    material_weight: float,
    exchange_share: float,
) -> nn.Linear:
    rng = random.Random(SEED + 1)
    scenes = [random_scene_of("train", rng) for _ in range(pool)]
    with torch.no_grad():
        features = torch.cat(
            [
                projected(model, pixel_values(processor, scenes[i : i + 256], rng)).bfloat16()
                for i in range(0, pool, 256)
            ]
        )
    decoder = model.model.language_model
    material_probe = nn.Linear(WIDTH, len(MATERIALS))
    learned = [*decoder.parameters(), *model.lm_head.parameters(), *material_probe.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    started = time.monotonic()
    order: list[int] = []
    for step in range(steps):
        if len(order) < TEXT_BATCH:
            order = rng.sample(range(pool), pool)
        chosen = [order.pop() for _ in range(TEXT_BATCH)]
        rows = [pack(training_questions(scenes[i], rng)) for i in chosen]
        ids, positions, mask, weight = collate(rows)
        links = [(row, link) for row, packed in enumerate(rows) for link in packed.links]
        exchanges = draw_exchanges(links, exchange_share, rng) if step >= EXCHANGE_FROM * steps else []
        embeds = decoder.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == IDS["<image>"])[..., None], features[chosen].float())
        exchange = exchanged(decoder.layers[MATERIAL_DEPTH], material_probe, exchanges)
        with torch.autocast("cpu", torch.bfloat16), exchange:
            out = decoder(
                inputs_embeds=embeds,
                attention_mask=mask.bfloat16(),
                position_ids=positions,
                output_hidden_states=True,
                use_cache=False,
            )
            asked = weight > 0
            logits = model.lm_head(out.last_hidden_state[asked]).float()
            guesses = material_probe(out.hidden_states[MATERIAL_DEPTH][places(links, "subject")]).float()
        materials = torch.tensor([link.material for _, link in links])
        answers = ids.roll(-1, dims=1)
        for (row, receiver), (_, donor) in exchanges:
            answers[row, receiver.answer] = answer_after(receiver, donor)
        answers = answers[asked]
        each = functional.cross_entropy(logits, answers, reduction="none")
        loss = (each * weight[asked]).sum() / weight.sum()
        if material_weight:
            loss = loss + material_weight * functional.cross_entropy(guesses, materials)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        decay.step()
        if step % 100 == 99:
            right = (logits.argmax(-1) == answers)[weight[asked] == 1].float().mean().item()
            probe = (guesses.argmax(-1) == materials).float().mean().item()
            minutes = (time.monotonic() - started) / 60
            print(
                f"text {step + 1}/{steps}  loss {loss.item():.4f}  one word {right:.3f}  "
                f"material probe {probe:.3f}  {minutes:.1f} min",
                flush=True,
            )
    return material_probe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--material-weight", type=float, default=0.2)
    parser.add_argument("--exchange-share", type=float, default=0.35)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--pool", type=int, default=POOL)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)

    processor = build_processor()
    model = LlavaForConditionalGeneration(build_config())
    fan_in_init(model.model.vision_tower, VISION_LAYERS)
    fan_in_init(model.model.multi_modal_projector, 1)
    fan_in_init(model.model.language_model, TEXT_LAYERS)
    nn.init.normal_(model.lm_head.weight, std=1 / math.sqrt(WIDTH))

    patch_probes = train_tower(model, processor, options.tower_steps)
    for frozen in (model.model.vision_tower, model.model.multi_modal_projector):
        frozen.requires_grad_(False).to(torch.bfloat16).float()  # what will be saved is what stage 2 sees
    material_probe = train_text(
        model, processor, options.text_steps, options.pool, options.material_weight, options.exchange_share
    )

    model.to(torch.bfloat16).save_pretrained(options.out)  # pyright: ignore[reportArgumentType]
    processor.save_pretrained(options.out)
    probes = {
        f"patch.{name}.{key}": value
        for name, head in patch_probes.heads.items()
        for key, value in head.state_dict().items()
    }
    probes |= {f"material.{key}": value for key, value in material_probe.state_dict().items()}
    save_file(
        {name: value.contiguous() for name, value in probes.items()},
        options.out / "probes.safetensors",
        metadata={
            "patch.color": ",".join((*COLORS, "nothing")),
            "patch.shape": ",".join((*SHAPES, "nothing")),
            "material": ",".join(MATERIALS),
            "material_depth": str(MATERIAL_DEPTH),
        },
    )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
