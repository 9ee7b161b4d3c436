"""What a graph explains: the likeliest next tokens, given ones, a contrast of two, or features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cltjax.errors import UserError
from cltjax.replacement.asking import following_ids
from cltjax.replacement.local import Local

MASS, MOST = 0.95, 10  # circuit-tracer's: the fewest tokens that have this probability together, at most so many


@dataclass(frozen=True)
class Targets:
    """Directions over the vocabulary [n, V], each with a weight, a name and, where it is a token's, an id (else -1);
    features as (layer, position, number), with weights.

    A logit is taken less the mean of all: directions add up to 0.
    """

    directions: Tensor
    weights: np.ndarray
    names: tuple[str, ...]
    ids: tuple[int, ...]
    features: tuple[tuple[int, int, int], ...] = ()
    feature_weights: tuple[float, ...] = ()


def likeliest(local: Local, mass: float = MASS, most: int = MOST) -> Targets:
    """The likeliest next tokens, by probability, with it for weights."""
    ordered, ids = _chances(local).sort(descending=True)
    n = min(int((ordered.cumsum(0) < mass).sum()) + 1, most, len(ids))
    return tokens(local, ids[:n].tolist())


def tokens(local: Local, ids: Sequence[int]) -> Targets:
    """Given next tokens, each once, with their probabilities for weights."""
    vocabulary, ids = len(local.logits), list(dict.fromkeys(ids))
    for one in ids:
        if not 0 <= one < vocabulary:
            raise UserError(f"there is no token {one}: the vocabulary has {vocabulary:,}")
    directions = torch.zeros(len(ids), vocabulary)
    directions[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)] = 1.0
    directions -= 1 / vocabulary
    names = tuple(local.vlm.tokenizer.decode([one]) for one in ids)
    return Targets(directions, _chances(local)[ids].numpy(), names, tuple(ids))


def contrast(local: Local, one: int, other: int) -> Targets:
    """How much more a token's logit is than another's. UserError where they are the same."""
    if one == other:
        raise UserError("--target: a token less itself is nothing to explain; name two")
    both = tokens(local, [one, other])
    direction = both.directions[:1] - both.directions[1:]
    return Targets(direction, np.ones(1), (f"{both.names[0]} - {both.names[1]}",), (-1,))


def of_features(local: Local, features: Sequence[tuple[int, int, int]]) -> Targets:
    """Features as (layer, position, number), alike."""
    each = tuple(dict.fromkeys(features))
    nothing = torch.zeros(0, len(local.logits))
    return Targets(nothing, np.zeros(0), (), (), each, (1 / max(1, len(each)),) * len(each))


def _chances(local: Local) -> Tensor:
    """[V] of the next token, float64: what is unlikely is not 0."""
    return local.logits.double().cpu().softmax(-1)


def parse(local: Local, prompt: str, text: str) -> Targets:
    """`yes`, `yes,no`, `yes - no`, and features `3:17@44`; the words as they follow the prompt.

    UserError for a word that is several tokens, and for what is none of these.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("--target names nothing: write a word, `yes - no`, or LAYER:FEATURE@POSITION")
    if all("@" in part and ":" in part for part in parts):
        return of_features(local, [_feature(part) for part in parts])

    def token(word: str) -> int:
        ids = following_ids(local.vlm, prompt, word)
        if len(ids) != 1:
            raise UserError(f"--target '{word}' is {len(ids)} tokens behind this prompt: name one that is one token")
        return ids[0]

    if len(parts) == 1 and " - " in parts[0]:
        one, _, other = parts[0].partition(" - ")
        return contrast(local, token(one.strip()), token(other.strip()))
    return tokens(local, [token(part) for part in parts])


def _feature(text: str) -> tuple[int, int, int]:
    try:
        name, position = text.split("@")
        layer, number = name.split(":")
        return int(layer), int(position), int(number)
    except ValueError:
        raise UserError(f"--target '{text}' is no LAYER:FEATURE@POSITION") from None
