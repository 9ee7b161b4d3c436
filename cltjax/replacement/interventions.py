"""Interventions on feature activations, and how they are written on a command line.

    LAYER:FEATURE[@POSITIONS]CHANGE

    CHANGE      =5.0     set to 5          *2        scale by 2       +1.5  -1.5    add 1.5, take off 1.5
                =0..2    clamp to 0 to 2   =..2      at most 2        =1..          at least 1
    POSITIONS   all (where none are given)  ·  image  ·  text  ·  7  ·  3,5,8  ·  3:9 (3 to 8)  ·  3:  ·  :9

`3:1234=5.0`, `3:1234*2`, `3:1234@image=0`, `3:1234@7+1.5`. `all` are a sample's real tokens; `image` its image tokens,
`text` those that are neither image nor special (modality 0 of the store). Numbers count from the sample's own first
token, which is 0, wherever padding is. Tokens that are being generated count on, and belong to `all` and `text` (if
they are not special) and to whatever numbers they have.

Several interventions on a feature act one after the other. Where a feature is not active, its activation is 0: scaling
leaves it there, setting and adding make it active.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cltjax.errors import UserError
from cltjax.replacement.clt import CLT, Features
from cltjax.store_format import IMAGE, TEXT

How = Literal["set", "scale", "add", "clamp"]
Positions = int | slice | Sequence[int] | Literal["all", "image", "text"]
GRAMMAR = "LAYER:FEATURE[@all|image|text|7|3,5|3:9], then =5.0, *2, +1.5 or -1.5, or =0..2 to clamp"
HOW = "an intervention sets, scales or adds a number, or clamps to (low, high)"
WHERE = "they are all, image or text, or numbers from 0 on, or a slice of step 1 that has some"


@dataclass(frozen=True)
class Intervention:
    """One change of one feature's activation, at some tokens.

    how, value: set to, scale by or add a number (raw units of the CLT's activations), or clamp to (low, high).
    positions: numbers from 0 on, a slice of step 1, or all, image or text. UserError for what is none of these.
    """

    layer: int
    feature: int
    how: How
    value: float | tuple[float, float]
    positions: Positions = "all"

    def __post_init__(self) -> None:
        if not self._has_value:
            raise UserError(f"{self.layer}:{self.feature}: '{self.how}' with {self.value!r}: {HOW}")
        if not self._has_positions:
            raise UserError(f"{self.layer}:{self.feature}: no positions {self.positions!r}: {WHERE}")

    @property
    def _has_value(self) -> bool:
        if self.how == "clamp":
            bounds = self.value if isinstance(self.value, tuple) and len(self.value) == 2 else (math.nan, math.nan)
            return bounds[0] <= bounds[1] and any(math.isfinite(bound) for bound in bounds)
        return self.how in ("set", "scale", "add") and isinstance(self.value, Real) and math.isfinite(self.value)

    @property
    def _has_positions(self) -> bool:
        if isinstance(self.positions, str):
            return self.positions in ("all", "image", "text")
        if isinstance(self.positions, slice):
            start, stop = self.positions.start or 0, self.positions.stop
            return self.positions.step in (None, 1) and start >= 0 and (stop is None or stop > start)
        return len(self.numbers) > 0 and min(self.numbers) >= 0

    @property
    def numbers(self) -> Sequence[int]:
        """The positions where they are given one by one."""
        if isinstance(self.positions, (int, np.integer)):
            return (int(self.positions),)
        return () if isinstance(self.positions, (str, slice)) else self.positions

    @classmethod
    def parse(cls, text: str) -> "Intervention":
        """The command line's form (see the module). UserError for anything else."""
        found = re.fullmatch(r"(\d+):(\d+)(?:@([^=*+-]+))?([=*+-])(.+)", text.replace(" ", ""))
        if found is None:
            raise UserError(f"'{text}' is no intervention: write {GRAMMAR}")
        layer, feature, where, sign, amount = found.groups()
        how: How = "set" if sign == "=" else "scale" if sign == "*" else "add"
        try:
            if sign == "=" and ".." in amount:
                low, _, high = amount.partition("..")
                how, value = "clamp", (float(low or "-inf"), float(high or "inf"))
            else:
                value = -float(amount) if sign == "-" else float(amount)
            return cls(int(layer), int(feature), how, value, _positions(where or "all"))
        except ValueError:
            raise UserError(f"'{text}' is no intervention: write {GRAMMAR}") from None

    def changed(self, activations: Tensor) -> Tensor:
        """What it makes of activations, wherever they are."""
        if isinstance(self.value, tuple):
            return activations.clamp(*self.value)
        if self.how == "set":
            return torch.full_like(activations, self.value)
        return activations * self.value if self.how == "scale" else activations + self.value

    def selects(self, tokens: "Tokens") -> Tensor:
        """[B, P] where it acts."""
        number, where = tokens.number, self.positions
        if isinstance(where, str):
            return (number >= 0) & ((where == "all") | (tokens.modality == (IMAGE if where == "image" else TEXT)))
        if isinstance(where, slice):
            return (number >= (where.start or 0)) & (number < (math.inf if where.stop is None else where.stop))
        return torch.isin(number, torch.tensor(list(self.numbers), device=number.device))


class Tokens(NamedTuple):
    """The tokens of a pass, [B, P] each: their numbers in their own samples, from 0, -1 at padding; modalities."""

    number: Tensor
    modality: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, modality: Callable[[Tensor], np.ndarray]) -> "Tokens":
        """ids [B, P] of the pass; mask [B, before + P], 1 at real tokens, those that a cache holds before them too."""
        number = torch.where(mask.bool(), mask.long().cumsum(1) - 1, -1)[:, -ids.shape[1] :]
        return cls(number, torch.from_numpy(modality(ids.cpu())).to(ids.device))


class Change(NamedTuple):
    """What interventions do to one source: features [n], their activations before and after [B, P, n], float32."""

    features: Tensor
    before: Tensor
    after: Tensor


def intervene(found: Features, interventions: Sequence[Intervention], tokens: Tokens) -> Change:
    """`found` [B, P, K]: all active features of the source that the interventions are about."""
    features = torch.tensor(sorted({one.feature for one in interventions}), device=found.indices.device)
    here = found.indices[..., None, :] == features[:, None]
    before = torch.where(here, found.values[..., None, :], 0.0).sum(-1)
    after = before.clone()
    for one in interventions:
        column = int((features == one.feature).nonzero())
        where = one.selects(tokens).to(after.device)
        after[..., column] = torch.where(where, one.changed(after[..., column]), after[..., column])
    return Change(features, before, after)


def put(found: Features, change: Change) -> Features:
    """The same features, with the changed activations in their places, or behind them where they had none."""
    values, indices = found
    placed = torch.zeros_like(change.after, dtype=torch.bool)
    for column, feature in enumerate(change.features):
        here = indices == feature
        values = torch.where(here, change.after[..., column, None], values)
        placed[..., column] = here.any(-1)
    behind = torch.where(placed, 0.0, change.after)
    return Features(torch.cat([values, behind], -1), torch.cat([indices, change.features.expand(behind.shape)], -1))


def by_source(interventions: Sequence[Intervention], clt: CLT) -> Mapping[int, list[Intervention]]:
    """The interventions of each source layer. UserError for a layer or a feature that the CLT does not have."""
    found: dict[int, list[Intervention]] = {}
    for one in interventions:
        if one.layer not in clt.sources:
            raise UserError(f"{one.layer}:{one.feature}: layer {one.layer} is no source of the CLT: {clt.sources} are")
        if not 0 <= one.feature < clt.description.n_features:
            raise UserError(f"{one.layer}:{one.feature}: a layer has features 0 to {clt.description.n_features - 1}")
        found.setdefault(one.layer, []).append(one)
    return found


def check_positions(interventions: Iterable[Intervention], longest: int, images: bool) -> None:
    """UserError for a position given by its number, or a slice, that not even a sample of `longest` tokens has, and for
    image tokens where no sample has `images`."""
    for one in interventions:
        where = one.positions
        first = where.start or 0 if isinstance(where, slice) else max(one.numbers, default=-1)
        if first >= longest:
            raise UserError(f"{one.layer}:{one.feature}: there is no position {first} in {longest} tokens")
        if isinstance(where, str) and where == "image" and not images:
            raise UserError(f"{one.layer}:{one.feature}: there are no image tokens in a prompt without an image")


def _positions(text: str) -> Positions:
    """Positions in the command line's form; ValueError where they are not."""
    if text in ("all", "image", "text"):
        return text
    if ":" in text:
        start, stop = (int(bound) if bound else None for bound in text.split(":"))
        return slice(start, stop)
    numbers = [int(part) for part in text.split(",")]
    return tuple(numbers) if len(numbers) > 1 else numbers[0]
