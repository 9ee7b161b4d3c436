"""Teacher-forced comparison: what several models predict at the same tokens, against what the original predicts.

    columns = forced(vlm, {"original": nullcontext, "replaced": replaced.active}, prompts, answers)

Counted are predictions of text tokens and of the answer's tokens, its end token included; what stands before an image
token says nothing. The image placeholder is no token to predict, as it is none to generate. Several tokens may end an
answer (Qwen, Gemma 3), and which of them does makes no other answer: its end is predicted by any of them. So an answer
at all of whose tokens, its end included, top-1 is right is the one that greedy decoding gives, and stops. Logits are
reduced batch by batch, and where vocabulary and prompts are large, part by part.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capture.inputs import TEXT, Encoded
from capture.vlm import VLM
from cltjax.replacement.asking import end_ids

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
    the token itself). Where an answer ends, `ce` is of any end token, and `right` is that top-1 is one. (run, "exact"):
    1 where top-1 is right at all tokens of the answer, so that greedy decoding gives just this answer and, where it has
    an end, stops. Groups: `all` tokens, those of the `answer`, its `first`, and those that are `hard`: the
    original is right with a confidence below 0.8; `hard answer`, those in the answer.
    """
    whole = [vlm.extend(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    starts = [prompt["input_ids"].shape[1] for prompt in prompts]
    places = max(
        len(kept(vlm, one["input_ids"].shape[1], counted(vlm, [one], [start])[1]))
        for one, start in zip(whole, starts, strict=True)
    )
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
    position = np.nonzero(chosen)[1]
    first = np.array(starts)[sample.numpy()] - 1  # where the answer's first token is predicted
    ends = torch.tensor(end_ids(vlm), dtype=torch.long)
    ending = torch.isin(following, ends) & torch.from_numpy(position >= first)
    columns: dict[Key, np.ndarray] = {}

    def predicted() -> Tensor:
        found = logits_at(vlm, batch, places)
        found = found[sample.to(found.device), place.to(found.device)]
        if vlm.image_id is not None:
            found[:, vlm.image_id] = -torch.inf
        return found

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(sample.numpy(), weights=values, minlength=len(encoded))

    with runs[ORIGINAL]():
        own = predicted()
    certainty, right = certain(own, following, ending, ends)
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
        for figure, values in compare(own, other, following, ending, ends).items():
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


def logits_at(vlm: VLM, batch: Mapping[str, Tensor], positions: Sequence[int] | np.ndarray) -> Tensor:
    """Logits [B, n, V] at ascending positions [n]; where the model allows it, few others are computed."""
    model, length = vlm.model, batch["input_ids"].shape[1]
    extra: dict[str, Any] = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        some = kept(vlm, length, positions)
        extra["logits_to_keep"] = len(some) if spread(model) else torch.tensor(some, device=vlm.device)
    output = model(**batch, **extra)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.shape[1] == len(positions):
        return logits
    return logits[:, torch.tensor(positions, device=logits.device) - (length - logits.shape[1])]


def kept(vlm: VLM, length: int, positions: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """Where in `length` positions logits are computed for the sake of some [n], where the model takes logits_to_keep.

    These, on one device. Of a model over several, the last positions, as many as it takes: what is kept is chosen on
    the last device, by an index that accelerate moves to the first, so that it has to be a number.
    """
    return range(int(positions[0]), length) if len(positions) and spread(vlm.model) else positions


def spread(model: nn.Module) -> bool:
    """Whether the model's parameters are on several devices (accelerate's device_map), or some offloaded."""
    return len({parameter.device for parameter in model.parameters()}) > 1


def chunks(logits: Tensor) -> list[slice]:
    """Rows [N, V] that are turned into probabilities together."""
    step = max(1, CHUNK // logits.shape[-1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]


def certain(logits: Tensor, following: Tensor, ending: Tensor, ends: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each row's likeliest token [N], and whether that is the one that follows (0 or 1), or at the
    rows `ending` [N] one of `ends`."""
    tops, shares = [], []
    for rows in chunks(logits):
        share, top = logits[rows].float().softmax(-1).max(-1)
        tops.append(top.cpu())
        shares.append(share.cpu())
    return torch.cat(shares).double().numpy(), hits(torch.cat(tops), following, ending, ends).double().numpy()


def hits(top: Tensor, following: Tensor, ending: Tensor, ends: Tensor) -> Tensor:
    """[N] whether a token is the one that follows, or at the rows `ending` any of `ends`."""
    return (top == following) | (ending & torch.isin(top, ends))


def compare(own: Tensor, other: Tensor, following: Tensor, ending: Tensor, ends: Tensor) -> dict[str, np.ndarray]:
    """`agree`, `kl`, `ce`, `right` of each row [N], as `forced` has them, from logits [N, V]; in float32.

    own: the original's; other: the model's; following: ids [N] of the tokens that come; ending: rows [N] at which that
    is an answer's end, which is any of `ends`.
    """
    following, ending, ends = (one.to(own.device) for one in (following, ending, ends))
    found: dict[str, list[Tensor]] = {name: [] for name in ("agree", "kl", "ce", "right")}
    for rows in chunks(own):
        p, q = (logits[rows].float().log_softmax(-1) for logits in (own, other.to(own.device)))
        ids, last = following[rows], ending[rows]
        # the image placeholder has no probability, so none to lose
        lost = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        top = q.argmax(-1)
        found["agree"].append(top == p.argmax(-1))
        found["kl"].append(lost)
        loss = -q.gather(-1, ids[:, None])[:, 0]
        loss[last] = -q[last.nonzero(), ends].logsumexp(-1)
        found["ce"].append(loss)
        found["right"].append(hits(top, ids, last, ends))
    return {name: torch.cat(values).double().cpu().numpy() for name, values in found.items()}
