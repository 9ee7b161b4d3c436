"""Train the demo VLM from scratch on `train` layouts; about 20 minutes on two cores, same weights every time.

    python examples/shapes/train_vlm.py            # writes examples/shapes/model

Stage 1 teaches the vision tower and the projector, through linear probes, what lies in each patch; then both
are frozen. What reaches the text decoder is therefore *linear* in color, shape, row and column, and whatever
is not linear in them (parity, materials, relations) is left to the decoder's MLPs, which is what a transcoder
replaces. Stage 2 trains the text decoder on packed questions.

The chain color x shape -> material -> use gets one nudge: at the word that ends the phrase naming the thing
("the red thing", which reads the same whether `made of` or `used for` follows), a linear probe on the residual
stream after MATERIAL_DEPTH layers is trained with the model to name the material. `--material-weight 0`
leaves the nudge out; README.md has the figures of both.
"""

import argparse
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from examples.shapes.questions import (
    KINDS,
    MATERIALS,
    ONE_WORD_KINDS,
    Question,
    ask,
    is_unasked,
    material_of,
)
from examples.shapes.scenes import COLORS, GRID, SHAPES, Scene, random_scene_of, render
from examples.shapes.vlm import IMAGE_TOKENS, TEMPLATE, VOCABULARY, build_config, build_processor

SEED = 0
TOWER_STEPS, TOWER_BATCH = 600, 64
TEXT_STEPS, TEXT_BATCH = 5000, 16
POOL = 24_000  # training images whose projected features are computed once
QUESTIONS = 8  # one-word questions an image, and a description
LEARNING_RATE = 1.5e-3
WARMUP = 100
FLAT = 0.35  # share of the steps at the full learning rate; then cosine to zero
WEIGHT = {"</s>": 0.2, "describe": 0.3}
HARD = {"relation": 2.0, "next": 2.0, "made": 2.0, "use": 2.0, "same": 1.5, "parity": 1.5, "exist": 1.5, "fact": 0.4}
MATERIAL_DEPTH = 3  # the probe reads the residual stream after this many layers

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
    probes = PatchProbes(model.config.text_config.hidden_size)
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
    weights = [HARD.get(kind, 1.0) for kind in ONE_WORD_KINDS]
    chosen: list[Question] = []
    while len(chosen) < QUESTIONS:
        question = ask(scene, rng.choices(ONE_WORD_KINDS, weights)[0], rng)
        if question is not None and not is_unasked(question):
            chosen.append(question)
    description = ask(scene, "describe", rng)
    assert description is not None
    return [*chosen, description]


@dataclass
class Packed:
    """Several questions about one image in one sequence; each sees the image and itself."""

    ids: list[int]
    positions: list[int]
    segment: list[int]  # 0 the image prefix, then one number a question
    weight: list[float]  # of predicting the *next* token
    material: list[int]  # class to read off at this position, or -1


def pack(questions: list[Question]) -> Packed:
    before, after = TEMPLATE.split("<image>")
    prefix = [IDS["<s>"], *tokens(before), *[IDS["<image>"]] * IMAGE_TOKENS]
    size = len(prefix)
    packed = Packed(prefix[:], list(range(size)), [0] * size, [0.0] * size, [-1] * size)
    for number, question in enumerate(questions, start=1):
        asked = tokens(after.format(question.text))
        answer = [*tokens(question.answer), IDS["</s>"]]
        scale = WEIGHT["describe"] if question.kind == "describe" else 1.0
        weight = [0.0] * (len(asked) - 1) + [scale] * (len(answer) - 1) + [scale * WEIGHT["</s>"], 0.0]
        material = [-1] * (len(asked) + len(answer))
        if question.kind in ("made", "use") and question.subject is not None:
            end = len(tokens(question.text.partition(question.phrase)[0] + question.phrase)) - 1
            material[end] = MATERIALS.index(material_of(question.subject))
        packed.ids += asked + answer
        packed.positions += range(size, size + len(asked) + len(answer))
        packed.segment += [number] * (len(asked) + len(answer))
        packed.weight += weight
        packed.material += material
    return packed


def collate(rows: list[Packed]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, mask (additive, [images, 1, tokens, tokens]), weight and material, right-padded."""
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
        filled("material", -1, torch.long),
    )


def train_text(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, pool: int, material_weight: float
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
    material_probe = nn.Linear(model.config.text_config.hidden_size, len(MATERIALS))
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
        ids, positions, mask, weight, material = collate(rows)
        embeds = decoder.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == IDS["<image>"])[..., None], features[chosen].float())
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder(
                inputs_embeds=embeds,
                attention_mask=mask.bfloat16(),
                position_ids=positions,
                output_hidden_states=True,
                use_cache=False,
            )
            asked = weight > 0
            logits = model.lm_head(out.last_hidden_state[asked]).float()
            named = material >= 0
            guesses = material_probe(out.hidden_states[MATERIAL_DEPTH][named]).float()
        answers = ids.roll(-1, dims=1)[asked]
        each = functional.cross_entropy(logits, answers, reduction="none")
        loss = (each * weight[asked]).sum() / weight.sum()
        if material_weight:
            loss = loss + material_weight * functional.cross_entropy(guesses, material[named])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        decay.step()
        if step % 100 == 99:
            right = (logits.argmax(-1) == answers)[weight[asked] == 1].float().mean().item()
            probe = (guesses.argmax(-1) == material[named]).float().mean().item()
            minutes = (time.monotonic() - started) / 60
            print(
                f"text {step + 1}/{steps}  loss {loss.item():.4f}  one word {right:.3f}  "
                f"material probe {probe:.3f}  {minutes:.1f} min",
                flush=True,
            )
    return material_probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--material-weight", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--pool", type=int, default=POOL)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)

    processor = build_processor()
    config = build_config()
    model = LlavaForConditionalGeneration(config)
    fan_in_init(model.model.vision_tower, config.vision_config.num_hidden_layers)
    fan_in_init(model.model.multi_modal_projector, 1)
    fan_in_init(model.model.language_model, config.text_config.num_hidden_layers)
    nn.init.normal_(model.lm_head.weight, std=1 / math.sqrt(config.text_config.hidden_size))

    patch_probes = train_tower(model, processor, options.tower_steps)
    for frozen in (model.model.vision_tower, model.model.multi_modal_projector):
        frozen.requires_grad_(False).to(torch.bfloat16).float()  # what will be saved is what stage 2 sees
    material_probe = train_text(model, processor, options.text_steps, options.pool, options.material_weight)

    model.to(torch.bfloat16).save_pretrained(options.out)  # pyright: ignore[reportArgumentType]
    processor.save_pretrained(options.out)
    probes = {f"patch.{name}.{key}": value for name, head in patch_probes.heads.items()
              for key, value in head.state_dict().items()}
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
