"""Teacher-forced comparison: what several models predict at the same tokens, against what the original predicts.

    columns = forced(vlm, {"original": nullcontext, "replaced": replaced.active}, prompts, answers)

Counted are predictions of text tokens and of the answer's tokens, its end token included; what stands before an image
token says nothing. The image placeholder is no token to predict, as it is none to generate: an answer at all of whose
tokens top-1 is right is the one that greedy decoding gives. Logits are reduced batch by batch, and where vocabulary and
prompts are large, part by part.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from capture.inputs import TEXT, Encoded
from capture.vlm import VLM

ORIGINAL = "original"
GROUPS = ("all", "answer", "first", "hard", "hard answer")
CONFIDENT = 0.8  # below it a right token is a hard one (method.md)
MOST_LOGITS = 1 << 26  # logits of one model that are held at a time: 256 MiB; those of the original beside them
CHUNK = 1 << 23  # logits that are turned into probabilities at a time

Key = tuple[str, ...]
Runs = Mapping[str, Callable[[], AbstractContextManager[None]]]


def forced(vlm: VLM, runs: Runs, prompts: list[Encoded], answers: list[list[int]]) -> dict[Key, np.ndarray]:
    """Sums over the tokens of each sample [B], by key.

    runs: contexts in which the VLM is the model of that name; ORIGINAL is among them. prompts: encoded samples, all
    with images or all without; answers: ids of the tokens behind each.

    ("tokens", group): how many tokens there are; (run, group, figure): sums over them of `agree` (top-1 is the
    original's), `kl` (KL(original || run), nats), `ce` (cross-entropy of the token itself, nats) and `right` (top-1 is
    the token itself). (run, "exact"): 1 where top-1 is right at all tokens of the answer, so that greedy decoding gives
    just this answer. Groups: `all` tokens, those of the `answer`, its `first`, and those that are `hard`: the
    original is right with a confidence below 0.8; `hard answer`, those in the answer.
    """
    whole = [vlm.extend(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [prompt["input_ids"].shape[1] for prompt in prompts]
    places = max(counted(vlm, [one], [start])[1].size for one, start in zip(whole, starts, strict=True))
    at_once = max(1, MOST_LOGITS // (vocabulary(vlm) * max(1, places)))
    parts = [
        _forced(vlm, runs, whole[first : first + at_once], starts[first : first + at_once])
        for first in range(0, len(whole), at_once)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def _forced(vlm: VLM, runs: Runs, encoded: list[Encoded], starts: list[int]) -> dict[Key, np.ndarray]:
    chosen, places = counted(vlm, encoded, starts)
    batch = vlm.collate(encoded)
    if vlm.sites is None:
        vlm.verify(batch)
    sample, place = (torch.from_numpy(found) for found in np.nonzero(chosen[:, places]))
    following = batch["input_ids"][:, 1:].cpu()[torch.from_numpy(chosen)]
    columns: dict[Key, np.ndarray] = {}

    def predicted() -> Tensor:
        found = logits_at(vlm, batch, torch.from_numpy(places).to(vlm.device))
        found = found[sample.to(found.device), place.to(found.device)]
        if vlm.image_id is not None:
            found[:, vlm.image_id] = -torch.inf
        return found

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(sample.numpy(), weights=values, minlength=len(encoded))

    with runs[ORIGINAL]():
        own = predicted()
    position = np.nonzero(chosen)[1]
    first = np.array(starts)[sample.numpy()] - 1  # where the answer's first token is predicted
    certainty, right = certain(own, following)
    groups = {"all": np.ones(len(position)), "answer": position >= first, "first": position == first}
    groups |= {"hard": right * (certainty < CONFIDENT)}
    groups |= {"hard answer": groups["hard"] * groups["answer"]}
    for group in GROUPS:
        columns["tokens", group] = summed(groups[group])
    for name, context in runs.items():
        if name == ORIGINAL:
            other = own
        else:
            with context():
                other = predicted()
        for figure, values in compare(own, other, following).items():
            for group in GROUPS:
                columns[name, group, figure] = summed(values * groups[group])
        columns[name, "exact"] = (columns[name, "answer", "right"] == columns["tokens", "answer"]).astype(float)
        del other
    return columns


def counted(vlm: VLM, encoded: list[Encoded], starts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """[B, P - 1] whether the token behind each position counts, and the positions [n] at which one does.

    starts: where each sample's answer begins, if it has one.
    """
    longest = max(one["input_ids"].shape[1] for one in encoded)
    chosen = np.zeros((len(encoded), longest - 1), bool)
    for row, one, start in zip(chosen, encoded, starts, strict=True):
        modality = vlm.modality(one["input_ids"][0].cpu())[1:]
        row[: len(modality)] = (modality == TEXT) | (np.arange(len(modality)) >= start - 1)
    return chosen, np.flatnonzero(chosen.any(0))


def vocabulary(vlm: VLM) -> int:
    """How many logits a position has; 1 where no config says."""
    config = vlm.config.get_text_config(decoder=True) if hasattr(vlm.config, "get_text_config") else None
    return getattr(config, "vocab_size", 1)


def logits_at(vlm: VLM, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Logits [B, n, V] at positions [n]; where the model allows it, no others are computed."""
    model = vlm.model
    extra = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    output = model(**batch, **extra, **({"logits_to_keep": positions} if keeps else {}))
    logits = output if isinstance(output, Tensor) else output.logits
    return logits if logits.shape[1] == len(positions) else logits[:, positions]


def chunks(logits: Tensor) -> list[slice]:
    """Rows [N, V] that are turned into probabilities together."""
    step = max(1, CHUNK // logits.shape[-1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def certain(logits: Tensor, following: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each row's likeliest token [N], and whether that is the one that follows (0 or 1)."""
    tops, shares = [], []
    for rows in chunks(logits):
        share, top = logits[rows].float().softmax(-1).max(-1)
        tops.append(top.cpu())
        shares.append(share.cpu())
    return torch.cat(shares).double().numpy(), (torch.cat(tops) == following).double().numpy()


def compare(own: Tensor, other: Tensor, following: Tensor) -> dict[str, np.ndarray]:
    """`agree`, `kl`, `ce`, `right` of each row [N], as `forced` has them, from logits [N, V]; in float32.

    own: the original's; other: the model's; following: ids [N] of the tokens that come.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("agree", "kl", "ce", "right")}
    for rows in chunks(own):
        p, q = (logits[rows].float().log_softmax(-1) for logits in (own, other.to(own.device)))
        ids = following[rows].to(own.device)
        # the image placeholder has no probability, so none to lose
        lost = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        top = q.argmax(-1)
        found["agree"].append(top == p.argmax(-1))
        found["kl"].append(lost)
        found["ce"].append(-q.gather(-1, ids[:, None])[:, 0])
        found["right"].append(top == ids)
    return {name: torch.cat(values).double().cpu().numpy() for name, values in found.items()}
