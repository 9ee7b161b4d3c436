"""Ask the demo VLM many questions at once, read its residual stream, and interfere with it; used by check_vlm.py."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cltjax.splits import Split
from examples.shapes.questions import Question, ask
from examples.shapes.scenes import Scene, random_scene_of, render
from examples.shapes.vlm import IMAGE_TOKENS, TEMPLATE

BATCH = 96


@dataclass(frozen=True)
class Picture:
    scene: Scene
    image: Image.Image


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    picture: Picture
    question: Question


@dataclass(frozen=True)
class Encoded:
    """Prompts with their answers and `</s>`, right-padded; N items, P positions."""

    ids: Tensor  # [N, P]
    mask: Tensor  # [N, P]
    pixels: Tensor  # [N, 3, 48, 48]
    start: Tensor  # [N] position of the answer's first token: the prompt's length
    end: Tensor  # [N] one past `</s>`
    subject: Tensor  # [N] position of the last token of the phrase that names the subject; -1 without one

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self) -> Iterator["Encoded"]:
        for i in range(0, len(self), BATCH):
            yield Encoded(*(getattr(self, name)[i : i + BATCH] for name in self.__dataclass_fields__))

    def showing(self, pixels: Tensor) -> "Encoded":
        """The same questions about other pictures."""
        return replace(self, pixels=pixels)


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The way a user loads it, in float32."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    return model.eval(), processor


def pictures(split: Split, rng: random.Random) -> Iterator[Picture]:
    """Pictures of `split`, without end, no layout twice."""
    seen: set[str] = set()
    while True:
        scene = random_scene_of(split, rng)
        if scene.layout not in seen:
            seen.add(scene.layout)
            yield Picture(scene, render(scene, rng))


def ask_evenly(pool: list[Picture], kind: str, count: int, first: int, rng: random.Random) -> list[Item]:
    """`count` questions of `kind`, a picture each, going around the pool from picture `first`.

    Pictures that cannot be asked this are passed over; where they are too few they come again.
    """
    found: list[Item] = []
    for step in range(100 * count):
        picture = pool[(first + step) % len(pool)]
        question = ask(picture.scene, kind, rng)
        if question is not None:
            found.append(Item(picture, question))
        if len(found) == count:
            return found
    raise ValueError(f"{len(pool)} pictures are too few to ask `{kind}` {count} times")


def prompt(question: Question) -> str:
    return TEMPLATE.format(question.text)


def _options(**options: Any) -> dict[str, Any]:
    """The processor's options, which its signature types in a way that pyright cannot follow."""
    return options


def encode(processor: LlavaProcessor, items: list[Item]) -> Encoded:
    texts = [f"{prompt(item.question)} {item.question.answer}</s>" for item in items]
    images = [item.picture.image for item in items]
    inputs = processor(images=images, text=texts, **_options(padding=True, padding_side="right", return_tensors="pt"))
    end = inputs["attention_mask"].sum(1)

    def length(text: str) -> int:
        return len(processor.tokenizer(text.replace("<image>", "<image>" * IMAGE_TOKENS)).input_ids)

    def subject(question: Question) -> int:
        if not question.phrase:
            return -1
        before, phrase, _ = prompt(question).partition(question.phrase)
        return length(before + phrase) - 1

    return Encoded(
        ids=inputs["input_ids"],
        mask=inputs["attention_mask"],
        pixels=inputs["pixel_values"],
        start=torch.tensor([length(prompt(item.question)) for item in items]),
        end=end,
        subject=torch.tensor([subject(item.question) for item in items]),
    )


@torch.no_grad()
def forward(model: LlavaForConditionalGeneration, batch: Encoded) -> Tensor:
    """Logits [N, P, vocabulary]."""
    return model(input_ids=batch.ids, attention_mask=batch.mask, pixel_values=batch.pixels, use_cache=False).logits


@dataclass(frozen=True)
class Answers:
    first: Tensor  # [N] the token that greedy decoding puts first
    exact: Tensor  # [N] whether greedy decoding gives the answer, all of it, and then stops


def graded(logits: Tensor, batch: Encoded) -> Answers:
    """Teacher-forced: greedy decoding repeats an answer exactly when the argmax before each of its tokens is right."""
    says = logits.argmax(-1)
    position = torch.arange(1, batch.ids.shape[1])
    asked = (position >= batch.start[:, None]) & (position < batch.end[:, None])
    exact = ((says[:, :-1] == batch.ids[:, 1:]) | ~asked).all(1)
    return Answers(says[torch.arange(len(batch)), batch.start - 1], exact)


def answers(model: LlavaForConditionalGeneration, encoded: Encoded) -> Answers:
    each = [graded(forward(model, batch), batch) for batch in encoded.batches()]
    return Answers(torch.cat([a.first for a in each]), torch.cat([a.exact for a in each]))


@torch.no_grad()
def generate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: list[Item], tokens: int
) -> list[str]:
    """What the model really says, greedily, decoded."""
    said: list[str] = []
    for i in range(0, len(items), BATCH):
        some = items[i : i + BATCH]
        texts = [prompt(item.question) for item in some]
        images = [item.picture.image for item in some]
        inputs = processor(images=images, text=texts, **_options(padding=True, return_tensors="pt"))
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
        said += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


# The residual stream and the MLPs ----------------------------------------------------------------------------


def layers(model: LlavaForConditionalGeneration) -> list[LlamaDecoderLayer]:
    return list(cast("list[LlamaDecoderLayer]", model.get_decoder().layers))


def keep(kept: dict[int, Tensor], number: int) -> Callable[[nn.Module, object, Tensor], None]:
    """A forward hook that leaves a module's last output in `kept[number]`."""

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        kept[number] = out

    return hook


@contextmanager
def hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mlps_give(model: LlavaForConditionalGeneration, given: Mapping[int, Tensor]) -> AbstractContextManager[None]:
    """Context in which the MLP of each layer in `given` puts out that vector [D] at every position."""

    def instead(vector: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _module, _inputs, out: vector.expand_as(out)

    decoder = layers(model)
    return hooks([decoder[i].mlp.register_forward_hook(instead(vector)) for i, vector in given.items()])


def mlp_means(model: LlavaForConditionalGeneration, encoded: Encoded) -> list[Tensor]:
    """By layer, the mean MLP output [D] over the tokens of the prompts (image tokens too; no padding, no answers)."""
    kept: dict[int, Tensor] = {}
    handles = [layer.mlp.register_forward_hook(keep(kept, i)) for i, layer in enumerate(layers(model))]
    total = [torch.zeros((), dtype=torch.float64) for _ in handles]
    with hooks(handles):
        for batch in encoded.batches():
            forward(model, batch)
            inside = torch.arange(batch.ids.shape[1]) < batch.start[:, None]
            for number, out in kept.items():
                total[number] = total[number] + out[inside].double().sum(0)
    return [(one / encoded.start.sum()).float() for one in total]


def residuals(model: LlavaForConditionalGeneration, encoded: Encoded, at: Tensor) -> Tensor:
    """The residual stream after 0, 1, ..., L layers (before the final norm) at positions `at` [N, K].

    Returns [L+1, N, K, D].
    """
    kept: dict[int, Tensor] = {}
    embedded = layers(model)[0].register_forward_pre_hook(lambda _m, args: kept.__setitem__(0, args[0]))
    handles = [layer.register_forward_hook(keep(kept, i)) for i, layer in enumerate(layers(model), start=1)]
    found: list[Tensor] = []
    with hooks([embedded, *handles]):
        for i, batch in enumerate(encoded.batches()):
            forward(model, batch)
            rows = torch.arange(len(batch))[:, None]
            where = at[i * BATCH : i * BATCH + len(batch)]
            found.append(torch.stack([kept[depth][rows, where] for depth in range(len(kept))]))
    return torch.cat(found, 1)


def patched_answers(model: LlavaForConditionalGeneration, encoded: Encoded, depth: int, stream: Tensor) -> Tensor:
    """First answer tokens [N] with the residual stream after `depth` layers set to `stream` [N, D] at each subject."""
    said: list[Tensor] = []
    for i, batch in enumerate(encoded.batches()):
        given = stream[i * BATCH : i * BATCH + len(batch)]

        def put(_module: nn.Module, _inputs: object, out: Tensor, batch: Encoded = batch, given: Tensor = given):
            out = out.clone()
            out[torch.arange(len(batch)), batch.subject] = given
            return out

        with hooks([layers(model)[depth - 1].register_forward_hook(put)]):
            said.append(graded(forward(model, batch), batch).first)
    return torch.cat(said)
