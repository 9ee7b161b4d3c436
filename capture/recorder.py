"""Forward passes become rows: samples -> windows -> batches of similar length -> rows of the store.

Everything here is decided by the data set and the options alone: which samples share a window, which of them
share a batch, which image tokens are kept. A capture that is killed can therefore start again at the batch
that holds the first unpublished row and write the same bytes.
"""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from PIL import Image

from capture.config import CaptureConfig
from capture.progress import Progress
from capture.prompts import Dataset, Sample, Template, load_dataset, resolve_template
from capture.vlm import VLM, Encoded, load
from cltjax.errors import UserError
from cltjax.files import write_whole
from cltjax.layers import parse_layers
from cltjax.store_format import IMAGE, StoreSpec, part_folder
from cltjax.store_writer import Rows, StoreWriter

WINDOW = 16  # batches: how far a sample may move from its place so that lengths in a batch are alike
DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples/shapes/model"
MOST_TOKENS = 1 << 15  # a sample's: only bounds the arrays' declared size before the true one is known


@dataclass(frozen=True)
class Batch:
    """The unit of resuming: samples that go through the model together."""

    number: int
    samples: list[Sample]
    encoded: list[Encoded]


# What goes together ------------------------------------------------------------------------------------------


def windows(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """Consecutive samples that are sorted by length among themselves; images and plain prompts never mix."""
    found = []
    for with_image in (True, False):
        alike = [sample for sample in samples if (sample.load is not None) == with_image]
        size = WINDOW * batch_size
        found += [alike[start : start + size] for start in range(0, len(alike), size)]
    return found


def batches(
    windows: list[list[Sample]], batch_size: int, encode: Callable[[Sample], Encoded], first: int = 0
) -> Iterator[Batch]:
    """Batches from number `first` on; the next window is encoded on a thread while this one is used."""
    todo: list[tuple[int, list[Sample]]] = []  # windows that are not wholly done, each with its first batch's number
    start = 0
    for window in windows:
        end = start + -(-len(window) // batch_size)
        if end > first:
            todo.append((start, window))
        start = end
    if not todo:
        return

    def prepare(window: list[Sample]) -> list[tuple[Sample, Encoded]]:
        pairs = [(sample, encode(sample)) for sample in window]
        return sorted(pairs, key=lambda pair: pair[1]["input_ids"].shape[1])  # stable: ties keep their order

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(prepare, todo[0][1])
        for i, (start, _) in enumerate(todo):
            pairs = ahead.result()
            if i + 1 < len(todo):
                ahead = pool.submit(prepare, todo[i + 1][1])
            for offset in range(0, len(pairs), batch_size):
                number = start + offset // batch_size
                if number >= first:
                    chosen = pairs[offset : offset + batch_size]
                    yield Batch(number, [sample for sample, _ in chosen], [encoded for _, encoded in chosen])


# One batch ---------------------------------------------------------------------------------------------------


def kept_tokens(modality: np.ndarray, sample_id: str, share: float, seed: int) -> np.ndarray:
    """[P] which of one sample's tokens become rows: all but a random 1 - share of its image tokens."""
    keep = np.ones(len(modality), dtype=bool)
    images = np.flatnonzero(modality == IMAGE)
    if share < 1 and len(images):
        rng = np.random.default_rng([seed, *sample_id.encode()])
        dropped = rng.permutation(images)[max(1, round(share * len(images))) :]
        keep[dropped] = False
    return keep


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits; numpy learns bfloat16 from ml_dtypes."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def record(
    vlm: VLM, batch: Batch, config: CaptureConfig, layers: tuple[int, ...], first_sample: int
) -> tuple[Rows, list[dict[str, Any]]]:
    """Run one batch and return its rows (site and mlp_out [rows, layers, D]) and one record a sample.

    Samples of a batch are numbered from `first_sample`, in the batch's order. With `generate`, the model first
    answers, then prompt and answer go through it in one teacher-forced pass.
    """
    asked = [encoded["input_ids"].shape[1] for encoded in batch.encoded]
    encoded = batch.encoded
    answers: list[list[int]] = [[] for _ in encoded]
    if config.generate:
        answers = vlm.generate(encoded, config.generate)
        encoded = [vlm.extend(one, answer) for one, answer in zip(encoded, answers, strict=True)]
    inputs = vlm.collate(encoded)
    if batch.number == 0:
        vlm.verify(inputs)
    trace = vlm.trace(inputs, config.site, layers)

    ids = [to_numpy(one["input_ids"][0]) for one in encoded]
    modality = [vlm.modality(one) for one in ids]
    keep = [
        kept_tokens(kinds, sample.id, config.image_tokens, config.seed)
        for kinds, sample in zip(modality, batch.samples, strict=True)
    ]
    width = inputs["input_ids"].shape[1]
    padded = np.stack([np.pad(mask, (0, width - len(mask))) for mask in keep])
    chosen = torch.from_numpy(np.flatnonzero(padded)).to(vlm.device)
    stored = torch.float32 if config.dtype == "int8" else getattr(torch, config.dtype)

    def rows_of(tensors: list[torch.Tensor]) -> np.ndarray:
        rows = torch.empty(len(chosen), len(tensors), vlm.d_model, dtype=stored, device=vlm.device)
        for i, tensor in enumerate(tensors):
            rows[:, i] = tensor.flatten(0, 1).index_select(0, chosen)
        return to_numpy(rows)

    columns = {
        "sample": [np.full(len(one), first_sample + i) for i, one in enumerate(ids)],
        "position": [np.arange(len(one)) for one in ids],
        "token_id": ids,
        "modality": modality,
        "generated": [np.arange(len(one)) >= start for one, start in zip(ids, asked, strict=True)],
    }
    rows = Rows(
        site=rows_of(trace.site),
        mlp_out=rows_of(trace.mlp_out),
        columns={
            name: np.concatenate([values[mask] for values, mask in zip(column, keep, strict=True)])
            for name, column in columns.items()
        },
    )
    records = [
        {
            "id": sample.id,
            "image": sample.image,
            "split": sample.split,
            "prompt": sample.prompt,
            "tokens": len(one),
            "rows": int(mask.sum()),
            "image_grid": vlm.image_grid(whole),
            "generated": vlm.decode(answer) if config.generate else None,
            "answer": sample.answer,
        }
        for sample, one, mask, whole, answer in zip(batch.samples, ids, keep, encoded, answers, strict=True)
    ]
    return rows, records


# The whole capture -------------------------------------------------------------------------------------------


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` with 1 <= I <= N."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {text}: is not of the form I/N with I from 1 to N, as in 2/4")
    return int(index), int(count)


def check_options(config: CaptureConfig) -> None:
    for name, value in (("batch-size", config.batch_size), ("shard-rows", config.shard_rows)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not 0 < config.image_tokens <= 1:
        raise UserError(f"--image-tokens {config.image_tokens}: is a share, above 0 and at most 1")
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must be 0 or above")
    if config.generate < 0:
        raise UserError(f"--generate {config.generate}: is a number of tokens")


def describe(
    config: CaptureConfig, vlm: VLM, layers: tuple[int, ...], dataset: Dataset, template: Template
) -> StoreSpec:
    """What the store is of; resuming with anything else is refused."""
    return StoreSpec(
        model={
            "id": vlm.name,
            "revision": vlm.revision,
            "class": vlm.class_name,
            "n_layers": vlm.n_layers,
            "d_model": vlm.d_model,
        },
        site=config.site,
        layers=layers,
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        template=template.with_image,
        dataset={
            "spec": dataset.spec,
            "fingerprint": dataset.fingerprint,
            "samples": len(dataset.samples),
            "skipped": dataset.skipped,
        },
        options={
            "compute_dtype": str(vlm.dtype).removeprefix("torch."),
            "batch_size": config.batch_size,
            "generate": config.generate,
            "image_tokens": config.image_tokens,
            "seed": config.seed,
            "patterns": asdict(config.patterns),
        },
    )


def keep_image(sample: Sample, image: Image.Image, folder: Path) -> None:
    """Keep an image that exists nowhere else beside the rows; its file is whole or not there."""
    if not sample.generated_image or sample.image is None:
        return
    path = folder / sample.image
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        image.save(content, "png")
        write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()), sync=False)


def capture(config: CaptureConfig) -> None:
    """Capture what every MLP of a vision-language model reads and writes, token by token, into a store."""
    check_options(config)
    parse_shard(config.shard)
    dataset = load_dataset(config.dataset, config.image_dir, config.max_samples, skip_bad=config.skip_bad)
    vlm = load(config.model, config.compute_dtype, config.device, config.patterns)
    record_all(vlm, dataset, config)


def record_all(vlm: VLM, dataset: Dataset, config: CaptureConfig) -> None:
    """Write this process's share of the store, from wherever it was left."""
    layers = parse_layers(config.layers, vlm.n_layers)
    template = resolve_template(config.template, vlm.processor)
    index, count = parse_shard(config.shard)
    share = dataset.samples[index - 1 :: count]
    if not share:
        raise UserError(f"--shard {config.shard}: the data set has only {len(dataset.samples)} samples")
    folder = part_folder(config.out, index, count)
    spec = describe(config, vlm, layers, dataset, template)

    if dataset.spec == "shapes" and Path(config.model).resolve() != DEMO_MODEL:
        print("note: activations of this model on the bundled shapes are for trying things out, not for research")
    with StoreWriter(folder, spec, capacity=len(share) * MOST_TOKENS) as writer:
        if writer.complete:
            print(f"{folder} is complete: {writer.rows:,} rows of {len(share):,} samples; nothing to do")
            return
        first, done = (writer.resume["batch"], writer.resume["first_sample"]) if writer.resume else (0, 0)
        with Progress(len(share), done, writer.rows) as progress:
            encode = encoder(vlm, template, folder)
            for batch in batches(windows(share, config.batch_size), config.batch_size, encode, first):
                rows, records = record(vlm, batch, config, layers, done)
                writer.append(rows, records, batch.number)
                done += len(records)
                progress.advance(len(records), len(rows.columns["sample"]))
            writer.finish()
    print(f"{folder}: {writer.rows:,} rows of {len(share):,} samples, {len(layers)} layers, {_size(folder)}")


def encoder(vlm: VLM, template: Template, folder: Path | None = None) -> Callable[[Sample], Encoded]:
    """How this model reads a sample; generated images are kept below `folder`. UserError names what it cannot read."""

    def encode(sample: Sample) -> Encoded:
        image = None if sample.load is None else sample.load()
        if image is not None and folder is not None:
            keep_image(sample, image, folder)
        try:
            return vlm.encode(template.render(sample.prompt, image=image is not None), image)
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from error

    return encode


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"
