"""Features that speak for an answer, found by contrast between answers; and a control for steering with them.

    found = contrast(vlm, clt, [vlm.encode(prompt, image) for ...])        prompts that have different answers
    [one] = found.best(answer)                                            answer: the id of its first token
    SteeredModel(vlm, clt, [one.intervention(4.0, "text")])               more of that answer, if `found` is right
    SteeredModel(vlm, control(clt, one, other), [...])                    the same with a random feature's decoder

Two things are asked of a feature, both in the original model, at the positions where it is to be changed:

- It is there with the answer and not without: its *contrast* is the mean of its activation over the prompts that the
  model gives this answer, less the mean over those that it gives another of the answers.
- It does something about it: its *effect* is the first-order change of the difference between the answer's logit and
  that of the model's own answer, for one unit of activation more, mean over the prompts that have another answer,

      effect = E[ sum over targets t and positions p of W_dec_{l->t} . d(logit_answer - logit_own) / d mlp_out_{t,p} ],

  through all later layers, attention and norms included: a gradient in place of an intervention, as in attribution
  patching (Nanda, 2023) and in Sparse Feature Circuits (Marks et al., 2024).

Effect times *typical* activation (the 99th percentile where it is active) is the predicted `shift`, in logits, of an
addition of strength 1. `best` ranks by it, among features whose contrast is at least a quarter of their typical
activation. A gradient says what a small change does; a large one has to be tried.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capture.inputs import Encoded
from capture.vlm import VLM
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT
from cltjax.replacement.forced import logits_at
from cltjax.replacement.interventions import Intervention, Positions, Tokens
from cltjax.replacement.model import OnFeatures, Pass

TYPICAL = 0.99  # quantile
LEAST_CONTRAST = 0.25  # of the typical activation
CHUNK = 4096  # features whose decoders are held at a time


@dataclass(frozen=True)
class Found:
    """A feature that speaks for an answer (the id of a token), in numbers of the module's definitions."""

    layer: int
    feature: int
    answer: int
    contrast: float
    effect: float  # logits per unit of activation
    typical: float

    @property
    def shift(self) -> float:
        """Logits that an addition of strength 1 is predicted to move the answer against the others."""
        return self.effect * self.typical

    def intervention(self, strength: float, positions: Positions = "text") -> Intervention:
        """`strength` times its typical activation is added."""
        return Intervention(self.layer, self.feature, "add", strength * self.typical, positions)

    def ablation(self, positions: Positions = "text") -> Intervention:
        return Intervention(self.layer, self.feature, "set", 0.0, positions)


@dataclass(frozen=True)
class Contrast:
    """What was seen on prompts, by source layer. C answers, F features."""

    answers: tuple[int, ...]  # ids, ascending
    counts: tuple[int, ...]  # prompts that have each
    contrast: dict[int, Tensor]  # [C, F]
    effect: dict[int, Tensor]  # [C, F]
    typical: dict[int, Tensor]  # [F], 0 where a feature is never active

    def active(self, layer: int) -> list[int]:
        """The features that are active at one of the positions of one of the prompts."""
        return self.typical[layer].nonzero()[:, 0].tolist()

    def best(self, answer: int, top: int = 1) -> list[Found]:
        """The features with the largest predicted shift towards the answer, at most `top`, largest first."""
        row, found = self.answers.index(answer), []
        for layer, typical in self.typical.items():
            contrast, effect = self.contrast[layer][row], self.effect[layer][row]
            speaks = (typical > 0) & (effect > 0) & (contrast >= LEAST_CONTRAST * typical)
            for feature in speaks.nonzero()[:, 0].tolist():
                numbers = (float(of[feature]) for of in (contrast, effect, typical))
                found.append(Found(layer, feature, answer, *numbers))
        return sorted(found, key=lambda one: -one.shift)[:top]


def contrast(
    vlm: VLM,
    clt: CLT,
    prompts: Sequence[Encoded],
    positions: Positions = "text",
    least: int = 8,
    batch_size: int = 64,
    other_revision: bool = False,
) -> Contrast:
    """Contrast and effect of every feature, for every first token that answers at least `least` of the prompts.

    prompts: encoded samples, all with images or all without. positions: where activations are looked at (a prompt's is
    the largest among them) and where the change is to be made (all of them alike). Prompts with rarer answers are left
    out. Memory: an activation a prompt and feature, and two forward passes' graph for a batch.

    UserError where there are not two such answers, and where the CLT is not of this VLM.
    """
    watched = _Watched(vlm, clt, positions, other_revision)
    own = torch.cat([watched.answers(some) for some in _batches(prompts, batch_size)])
    counts = {answer: n for answer, n in sorted(Counter(own.tolist()).items()) if n >= least}
    if len(counts) < 2:
        raise UserError(
            f"no two answers that are given to {least} of the {len(prompts)} prompts each: there is nothing to contrast"
        )
    answers = tuple(counts)
    used = [i for i, answer in enumerate(own.tolist()) if answer in counts]
    rows = torch.tensor([answers.index(int(own[i])) for i in used])
    seen = [
        watched.seen(some, answers, rows_of)
        for some, rows_of in zip(_batches([prompts[i] for i in used], batch_size), rows.split(batch_size), strict=True)
    ]
    others = torch.tensor([len(used) - n for n in counts.values()])
    pulls = {target: sum(pull[target] for _, pull in seen) / others[:, None] for target in clt.targets}
    found = Contrast(answers, tuple(counts.values()), {}, {}, {})
    for layer in clt.sources:
        activations = torch.cat([activations[layer] for activations, _ in seen])
        of = torch.stack([rows == row for row in range(len(answers))])
        found.contrast[layer] = torch.stack([activations[one].mean(0) - activations[~one].mean(0) for one in of])
        effects, typical = [], []
        for features in torch.arange(clt.description.n_features).split(CHUNK):
            written = clt.decoder_rows(layer, features.to(clt.device)).cpu()  # [chunk, T, D]
            pull = torch.stack([pulls[target] for target in clt.wiring.targets_of(layer)], 1)  # [C, T, D]
            effects.append(torch.einsum("ctd,ftd->cf", pull, written))
            some = activations[:, features]
            quantile = torch.nanquantile(torch.where(some > 0, some, torch.nan), TYPICAL, dim=0)
            typical.append(quantile.nan_to_num(0.0))
        found.effect[layer], found.typical[layer] = torch.cat(effects, 1), torch.cat(typical)
    return found


def summed_writes(clt: CLT, layer: int, feature: int) -> Tensor:
    """What a unit of a feature adds to the residual stream in all, [D]: the sum of its decoder vectors over targets."""
    return clt.decoder_rows(layer, torch.tensor([feature], device=clt.device))[0].sum(0)


def control(clt: CLT, layer: int, feature: int, other: int) -> CLT:
    """The same CLT, but for one feature: it writes what another of its layer writes, at the norm of its own.

    The norm is that of `summed_writes`. Whatever is done to the feature is thus done at the same tokens with as much
    activation, in another feature's direction. `clt` stays as it is; the layer's decoder is copied.
    """
    scale = summed_writes(clt, layer, feature).norm() / summed_writes(clt, layer, other).norm()
    found, decoder = copy.copy(clt), clt._decoders[layer].clone()
    decoder[feature] = (scale * decoder[other].to(clt.device, torch.float32)).to(decoder.device, decoder.dtype)
    found._decoders = {**clt._decoders, layer: decoder}
    return found


def _batches(prompts: Sequence[Encoded], size: int) -> list[list[Encoded]]:
    return [list(prompts[first : first + size]) for first in range(0, len(prompts), size)]


class _Watched(OnFeatures):
    """The original model, its features read and nothing, to differentiate by, added to each covered MLP's write."""

    def __init__(self, vlm: VLM, clt: CLT, positions: Positions, other_revision: bool):
        super().__init__(vlm, clt, other_revision=other_revision)
        self._where = Intervention(clt.sources[0], 0, "scale", 1.0, positions)
        self._added: dict[int, Tensor] = {}

    @torch.no_grad()
    def answers(self, prompts: list[Encoded]) -> Tensor:
        """[B] the token that greedy decoding answers first."""
        return self._logits(self._prepared(self.vlm.collate(prompts))).argmax(-1).cpu()

    def seen(
        self, prompts: list[Encoded], answers: Sequence[int], rows: Tensor
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By source [B, F], the largest activations at the positions; by target [C, D], the gradients of
        logit_answer - logit_own with respect to its write, summed over the positions, and over the prompts with another
        answer. rows [B]: which of the answers the prompts' own are.
        """
        batch = self._prepared(self.vlm.collate(prompts))
        with self.active():
            logits = self._logits(batch)
            assert self._pass is not None
            now = self._pass
            where = self._where.selects(Tokens.of(now.ids, now.mask, self.vlm.modality))
            activations = {source: self._largest(source, now, where) for source in now.features}
        targets = list(self._added)
        gradients = []  # by answer, by target: [B, D]
        for answer in answers:
            each = torch.autograd.grad(
                logits[:, answer].sum(), [self._added[target] for target in targets], retain_graph=True
            )
            gradients.append([(one * where[..., None].to(one.device)).sum(1).float().cpu() for one in each])
        self._added = {}
        stacked = torch.stack([torch.stack(of_answer) for of_answer in gradients])  # [C, T, B, D]
        own = stacked[rows, :, torch.arange(len(rows))].transpose(0, 1)  # [T, B, D]; 0 against itself
        pull = (stacked - own).sum(2)
        return activations, {target: pull[:, place] for place, target in enumerate(targets)}

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, V] behind each prompt; the image placeholder is no answer."""
        last = batch["attention_mask"].sum(1) - 1
        places, which = last.unique(return_inverse=True)
        logits = logits_at(self.vlm, batch, places.tolist())[torch.arange(len(last)), which.cpu()].float()
        if self.vlm.image_id is not None:
            logits = logits.index_fill(-1, torch.tensor([self.vlm.image_id], device=logits.device), -torch.inf)
        return logits

    def _largest(self, source: int, now: Pass, where: Tensor) -> Tensor:
        values, indices = now.features[source]
        values = values * where[..., None].to(values.device)
        found = torch.zeros(len(values), self.clt.description.n_features, device=values.device)
        return found.scatter_reduce(1, indices.flatten(1), values.flatten(1), "amax").cpu()

    def _read(self, layer: int, x: Tensor, now: Pass) -> None:
        with torch.no_grad():
            super()._read(layer, x, now)

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        self._added[layer] = torch.zeros_like(own).requires_grad_()
        return own + self._added[layer]
