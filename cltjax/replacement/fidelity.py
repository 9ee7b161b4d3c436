"""How much of a model is left when a CLT writes in place of its MLPs: on held-out samples, beside ablations.

    figures = evaluate_fidelity(FidelityConfig(clt=Path("clt"), model="examples/shapes/model"))

Four models side by side, all from one VLM: the original; the replaced one; and two in which the same MLPs write their
mean, or nothing. Where MLPs hardly matter any replacement looks good: the ablations say how much they matter.

- Teacher-forced (cltjax/replacement/forced.py) on prompt and reference answer, or the original's own greedy answer
  where a sample has no reference: top-1 agreement, KL, cross-entropy (CE), and
      loss recovered = (CE_ablated - CE_replaced) / (CE_ablated - CE_original),
  against the mean, zero, and whichever of the two has the lower loss: against one that is confident and wrong, any
  replacement recovers nearly all.
- Answering freely (cltjax/replacement/scores.py): the task's own score, and how far answers are the original's.
- By layer, where asked: one MLP replaced and all others real, and the first n replaced.

Every figure has a bootstrap interval (cltjax/replacement/resampling.py).
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capture.prompts import Sample, resolve_template
from capture.recorder import Batch
from capture.vlm import DTYPES, load
from cltjax.clt_directory import CLTDirectory
from cltjax.errors import UserError
from cltjax.files import write_json
from cltjax.replacement import fidelity_figures as figures_of
from cltjax.replacement.asking import Asking, capitalised, held_out, is_brief, mean_writes
from cltjax.replacement.clt import CLT
from cltjax.replacement.config import FidelityConfig
from cltjax.replacement.fidelity_figures import LENGTHS, MEAN, MODELS, REPLACED, ZERO, alone, up_to
from cltjax.replacement.fidelity_report import plot_layers, show
from cltjax.replacement.forced import ORIGINAL, Key, Runs, forced
from cltjax.replacement.model import AblatedModel, ReplacementModel, Rewritten
from cltjax.replacement.resampling import RESAMPLES, Resampled
from cltjax.replacement.scores import NO, SAID, YES, Task, task_of, token_match

QUIET = 5.0  # seconds between two lines of progress


def evaluate_fidelity(config: FidelityConfig) -> dict[str, Any]:
    """Measure, print the table, write the figures (and with `per_layer` a plot); returns the figures.

    UserError where there are no samples to measure on or no answers to measure at, and where the CLT is not of this
    model.
    """
    check_options(config)
    began = time.monotonic()
    described = CLTDirectory.open(config.clt).description
    dataset, samples = held_out(config.dataset, config.image_dir, config.split, config.max_samples, config.skip_bad)
    task = task_of(dataset, samples)
    lacking = sum(sample not in task.truth for sample in samples)
    if lacking and not config.generate:
        raise UserError(
            f"--dataset {dataset.spec}: {lacking} of {len(samples)} samples have no reference answer: "
            "with --generate N the original's own answers stand in for them"
        )
    out = config.out or config.clt / f"fidelity-{Path(dataset.spec).stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    vlm = load(config.model, config.compute_dtype, config.device)
    template = resolve_template(config.template, vlm.processor)
    asking = Asking(vlm, template, task, config.batch_size)
    clt = CLT.from_pretrained(config.clt, vlm.device, DTYPES[config.clt_dtype], config.lazy)
    replaced = ReplacementModel(vlm, clt, other_revision=config.other_revision)
    means, of_what = mean_writes(asking, dataset, replaced.covered, config.store)
    models: dict[str, Rewritten | None] = {
        ORIGINAL: None,
        REPLACED: replaced,
        MEAN: AblatedModel(vlm, means),
        ZERO: AblatedModel(vlm, {layer: torch.zeros_like(mean) for layer, mean in means.items()}),
    }
    if task.yes_or_no:
        asking = replace(asking, capital=capitalised(asking, [sample for sample in samples if sample in task.truth]))
    columns, units = measured(asking, models, samples, config.generate, replaced.covered if config.per_layer else ())
    drawn = Resampled(columns, units, config.seed)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    figures: dict[str, Any] = {
        "settings": plain | {"resamples": RESAMPLES},
        "model": {"id": vlm.name, "revision": vlm.revision, "class": vlm.class_name, "dtype": str(vlm.dtype)[6:]},
        "clt": {
            "path": str(config.clt),
            "model": described.model,
            "combined": described.combined,
            "site": described.site,
            "activation": asdict(described.activation) | {"k": list(described.activation.k)},
            "n_features": described.n_features,
            "covered": list(replaced.covered),
            "uncovered": list(replaced.uncovered),
        },
        "dataset": {"spec": dataset.spec, "fingerprint": dataset.fingerprint, "skipped": len(dataset.skipped)},
        "counts": figures_of.counts(drawn),
        "ablation": {"mean of": of_what},
        "task": {"kind": task.kind},
        "teacher_forced": figures_of.teacher_forced(drawn),
        "loss_recovered": figures_of.loss_recovered(drawn),
        "exact_forced": figures_of.exact_forced(drawn),
    }
    if config.generate:
        figures["generated"] = figures_of.generated(drawn, task)
    if task.yes_or_no:
        figures["task"] |= {"spelled": asking.spelled(YES), "positive": task.positive}
        figures["task"] |= figures_of.yes_or_no(drawn, task) if config.generate else {}
    if config.per_layer:
        figures["per_layer"] = figures_of.by_layer(drawn, replaced.covered)
    figures["seconds"] = round(time.monotonic() - began, 1)
    show(figures, MODELS)
    write_json(out, figures)
    print(f"figures: {out}")
    if config.per_layer:
        print(f"plot: {plot_layers(figures['per_layer'], out.with_suffix('.png'))}")
    return figures


def check_options(config: FidelityConfig) -> None:
    for name, value, least in (
        ("batch-size", config.batch_size, 1),
        ("generate", config.generate, 0),
        ("seed", config.seed, 0),
        ("max-samples", config.max_samples, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


# Measuring -----------------------------------------------------------------------------------------------------------


def measured(
    asking: Asking,
    models: Mapping[str, Rewritten | None],
    samples: Sequence[Sample],
    n: int,
    by_layer: Sequence[int] = (),
) -> tuple[dict[Key, np.ndarray], list[str]]:
    """Columns [n] of sums, a number a sample, and the samples' images.

    n: tokens to answer freely with, 0 for no such answers. by_layer: covered layers to replace one at a time, and the
    first one, two, ... of them together.
    """
    parts: list[dict[Key, np.ndarray]] = []
    units: list[str] = []
    replaced = models[REPLACED]
    assert replaced is not None
    runs: dict[str, Any] = {name: nullcontext if model is None else model.active for name, model in models.items()}
    for i, layer in enumerate(by_layer, start=1):
        runs[alone(layer)] = partial(replaced.active, (layer,))
        runs[up_to(i)] = partial(replaced.active, tuple(by_layer[:i]))
    for batch in reported(asking.batches(samples), len(samples)):
        parts.append(measured_batch(asking, models, runs, batch, n))
        units += [sample.image or sample.id for sample in batch.samples]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, units


def measured_batch(
    asking: Asking, models: Mapping[str, Rewritten | None], runs: Runs, batch: Batch, n: int
) -> dict[Key, np.ndarray]:
    """Columns [B] of one batch: those of `forced`; ("samples", kind of answer); where n is not 0, by (model, kind,
    figure) what `token_match` counts and whether the answer is the reference; those of `yes_no_columns`."""
    vlm = asking.vlm
    references = [asking.reference(sample) for sample in batch.samples]
    own = vlm.generate(batch.encoded, n) if n else [[] for _ in references]
    answers = [
        asking.answer_ids(sample) if reference else answer
        for sample, reference, answer in zip(batch.samples, references, own, strict=True)
    ]
    brief = np.array(
        [is_brief(reference or vlm.decode(answer)) for reference, answer in zip(references, own, strict=True)]
    )
    kinds = dict(zip(LENGTHS, (np.ones(len(brief)), brief.astype(float), 1.0 - brief), strict=True))
    columns = forced(vlm, runs, batch.encoded, answers)
    known = np.array([reference is not None for reference in references])
    for kind, of_kind in kinds.items():
        columns |= {("samples", kind): of_kind, ("references", kind): of_kind * known}
    if not n:
        return columns
    # A longer answer is neither the original's nor the reference; what is yes or no may take any number of words.
    most = n if asking.task.yes_or_no else min(n, max(len(one) + 1 for one in (*own, *answers)))
    for name, model in models.items():
        said = own if model is None else model.generate(batch.encoded, most)
        matches = [token_match(one, other) for one, other in zip(own, said, strict=True)]
        texts = [vlm.decode(answer) for answer in said]
        for kind, of_kind in kinds.items():
            for figure in matches[0]:
                columns[name, kind, f"match {figure}"] = of_kind * [match[figure] for match in matches]
            right = [text == reference for text, reference in zip(texts, references, strict=True)]
            columns[name, kind, "exact"] = of_kind * right
        columns |= yes_no_columns(asking.task, name, batch.samples, texts)
    return columns


def yes_no_columns(task: Task, name: str, samples: Sequence[Sample], texts: Sequence[str]) -> dict[Key, np.ndarray]:
    """(model, rule, dimension, truth, said): 1 where a sample is such, for a yes/no benchmark."""
    found: dict[Key, np.ndarray] = {}
    for rule, reads in task.rules.items():
        cells = [
            (task.dimension.get(sample, ""), task.truth.get(sample, ""), reads(text))
            for sample, text in zip(samples, texts, strict=True)
        ]
        for dimension in task.dimensions:
            for truth in (YES, NO):
                for say in SAID:
                    found[name, rule, dimension, truth, say] = np.array(
                        [(dimension in ("all", of), truth, say) == (True, *rest) for of, *rest in cells], float
                    )
    return found


def reported(found: Iterable[Batch], total: int) -> Iterator[Batch]:
    """The same batches, with a line now and then about how far it is."""
    began = last = time.monotonic()
    done = 0
    for batch in found:
        yield batch
        done += len(batch.samples)
        now = time.monotonic()
        if now - last >= QUIET:
            last = now
            left = (total - done) * (now - began) / done
            print(f"measuring: {done:,} of {total:,} samples  left {left:.0f} s", flush=True)
