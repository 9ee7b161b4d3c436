"""Held-out samples as they are put to a VLM, the answers they are measured at, and what its MLPs write on average."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from capture.prompts import SHAPES_SAMPLES, Dataset, Sample, Template, load_dataset
from capture.recorder import Batch, batches, encoder, windows
from capture.vlm import VLM, Encoded
from cltjax.errors import UserError
from cltjax.replacement.scores import Task
from cltjax.splits import Split
from cltjax.store import ActivationStore

MEAN_SAMPLES = 256  # train samples that mean writes are taken over without a store
SPELLING_SAMPLES = 8


def held_out(
    spec: str, image_dir: Path | None, split: Split, wanted: int | None, skip_bad: bool
) -> tuple[Dataset, list[Sample]]:
    """The data set, train samples included, and its samples of the split, at most `wanted` of them.

    Of the endless `shapes` as much is made as holds that many. UserError where there are none.
    """
    size = (SHAPES_SAMPLES if wanted is None else 16 * wanted) if spec == "shapes" else None
    while True:
        dataset = load_dataset(spec, image_dir, size, skip_bad=skip_bad)
        samples = [sample for sample in dataset.samples if sample.split == split][:wanted]
        if size is None or wanted is None or len(samples) == wanted:
            break
        size *= 2
    if not samples:
        raise UserError(
            f"--dataset {dataset.spec}: none of its {len(dataset.samples)} samples is of the {split} split, "
            "which is chosen by the images' bytes: take a larger part of it"
        )
    return dataset, samples


@dataclass(frozen=True)
class Asking:
    """How samples are put to the VLM, and what it is to answer."""

    vlm: VLM
    template: Template
    task: Task
    batch_size: int
    capital: bool = False  # of yes and no

    @property
    def encode(self) -> Callable[[Sample], Encoded]:
        return encoder(self.vlm, self.template)

    def reference(self, sample: Sample) -> str | None:
        truth = self.task.truth.get(sample)
        return self.spelled(truth) if truth and self.task.yes_or_no else truth

    def spelled(self, truth: str) -> str:
        return truth.capitalize() if self.capital else truth

    def answer_ids(self, sample: Sample) -> list[int]:
        """The reference's tokens as they follow this prompt, and an end token, which stands for whichever ends it."""
        text = self.template.render(sample.prompt, image=sample.load is not None)
        return following_ids(self.vlm, text, self.reference(sample) or "") + end_ids(self.vlm)[:1]

    def batches(self, samples: Sequence[Sample]) -> Iterator[Batch]:
        """One-word and longer answers apart: a batch generates as long as its longest answer."""
        size = self.batch_size
        brief = [sample for sample in samples if is_brief(self.task.truth.get(sample, ""))]
        rest = [sample for sample in samples if not is_brief(self.task.truth.get(sample, ""))]
        return batches([*windows(brief, size), *windows(rest, size)], size, self.encode)


def is_brief(answer: str) -> bool:
    return len(answer.split()) <= 1


def following_ids(vlm: VLM, prompt: str, answer: str) -> list[int]:
    """The ids of an answer behind a prompt: what the tokenizer makes of both, less what it makes of the prompt.

    A space goes between them unless the prompt ends with white space. Where the two grow together the answer's own.
    """
    tokenizer = vlm.tokenizer
    before, whole = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (prompt, prompt + ("" if prompt[-1:].isspace() else " ") + answer)
    )
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def end_ids(vlm: VLM) -> list[int]:
    """The tokens that end an answer, any of them; as `vlm.generate` has them. None where the model has none."""
    found = getattr(getattr(vlm.model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(vlm.tokenizer, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def capitalised(asking: Asking, samples: Sequence[Sample]) -> bool:
    """Whether the original writes Yes and No, not yes and no: how the reference is spelled is not what is measured."""
    alike = [sample for sample in samples if (sample.load is None) == (samples[0].load is None)]
    said = asking.vlm.generate([asking.encode(sample) for sample in alike[:SPELLING_SAMPLES]], 4)
    return 2 * sum(asking.vlm.decode(answer)[:1].isupper() for answer in said) > len(said)


def mean_writes(
    asking: Asking, dataset: Dataset, layers: Sequence[int], path: Path | None
) -> tuple[dict[int, Tensor], str]:
    """What each layer's MLP writes on average [D], and over what: train rows of the store at `path`, else
    train samples here.

    UserError where the store is of another model, or where there are no train samples.
    """
    vlm, size = asking.vlm, asking.batch_size
    if path is not None:
        store = ActivationStore.open(path)
        its = {name: store.model.get(name) for name in ("class", "n_layers", "d_model")}
        ours = {"class": vlm.class_name, "n_layers": vlm.n_layers, "d_model": vlm.d_model}
        if its != ours:
            raise UserError(f"--store {path} is of another model than {vlm.name}: {its}, not {ours}")
        stats, places = store.stats().mlp_out, store.axis_of(layers)
        means = {layer: torch.tensor(stats.mean[place]) for layer, place in zip(layers, places, strict=True)}
        return means, f"{stats.count:,} train rows of {path}"
    samples = [sample for sample in dataset.samples if sample.split == "train"][:MEAN_SAMPLES]
    if not samples:
        raise UserError(
            f"--dataset {dataset.spec} has no train samples to take the mean writes of: name a store with --store"
        )
    total, count = [torch.zeros(vlm.d_model, dtype=torch.float64) for _ in layers], 0
    for batch in batches(windows(samples, size), size, asking.encode):
        inputs = vlm.collate(batch.encoded)
        lengths = torch.tensor([one["input_ids"].shape[1] for one in batch.encoded], device=vlm.device)
        real = torch.arange(int(lengths.max()), device=vlm.device) < lengths[:, None]
        for one, written in zip(total, vlm.trace(inputs, "mlp_in", layers).mlp_out, strict=True):
            one += written[real].double().sum(0).cpu()
        count += int(real.sum())
    means = {layer: (one / count).float() for layer, one in zip(layers, total, strict=True)}
    return means, f"{count:,} tokens of {len(samples):,} train samples' prompts"
