"""What becomes of a prompt when single features are taken out: in the original model, and as a graph would have it.

    cuts = [Cut(3, 44, 17, 2.5), ...]
    real = original_inputs(local, cuts)          by source layer [cuts + 1, P, D]; the last without any cut
    said = local_inputs(local, cuts)

In the original model a feature is taken out of what MLPs write, at every layer that it writes to; all else, attention,
norms and MLPs, responds as it will. In the local replacement model attention patterns, norm scales and errors stay as
they were, and features respond: that is what a graph's edges are about, with thresholds and top-k on top.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cltjax.replacement.clt import Features
from cltjax.replacement.local import Local
from cltjax.replacement.model import Pass, ReplacementModel, Rewritten


class Cut(NamedTuple):
    """A feature at a position, and its activation there."""

    layer: int
    position: int
    number: int
    value: float


def original_inputs(local: Local, cuts: Sequence[Cut]) -> dict[int, Tensor]:
    """The CLT's inputs in the original model [cuts + 1, P, D] by source, each cut made in a sample of its own."""
    model = _OriginalCut(local, cuts)
    batch = repeated(local, len(cuts) + 1)
    with model.active():
        local.vlm.forward(batch)
    return model.seen


def local_inputs(local: Local, cuts: Sequence[Cut]) -> dict[int, Tensor]:
    """The same in the local replacement model."""
    model = _LocalCut(local, cuts)
    batch = repeated(local, len(cuts) + 1)
    with local.frozen.repeated(len(cuts) + 1).replayed(), model.active():
        local.vlm.forward(batch)
    return model.seen


def repeated(local: Local, n: int) -> dict[str, Tensor]:
    """The prompt n times in a batch."""
    return local.vlm.collate([local.batch] * n)


class _OriginalCut(Rewritten):
    """In sample b the original model without what cuts[b] writes."""

    def __init__(self, local: Local, cuts: Sequence[Cut]):
        super().__init__(local.vlm, range(local.vlm.n_layers))
        self._clt, self.seen = local.clt, dict[int, Tensor]()
        self._less: dict[int, list[tuple[int, int, Tensor]]] = {}
        for b, cut in enumerate(cuts):
            rows = self._clt.decoder_rows(cut.layer, torch.tensor([cut.number], device=self._clt.device))[0]
            for target, row in zip(self._clt.wiring.targets_of(cut.layer), rows, strict=True):
                self._less.setdefault(target, []).append((b, cut.position, cut.value * row))

    def _reads(self, layers: Sequence[int]) -> list[tuple[str, int]]:
        return [(self._clt.description.site, source) for source in self._clt.sources]

    def _read(self, layer: int, x: Tensor, now: Pass) -> None:
        self.seen[layer] = x.float()

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        changed = own.float().clone()
        for b, position, less in self._less.get(layer, ()):
            changed[b, position] -= less.to(changed.device)
        return changed


class _LocalCut(ReplacementModel):
    """In sample b the local replacement model without the feature of cuts[b]."""

    def __init__(self, local: Local, cuts: Sequence[Cut]):
        super().__init__(local.vlm, local.clt)
        self._local, self._cuts, self.seen = local, cuts, dict[int, Tensor]()

    def _reads(self, layers: Sequence[int]) -> list[tuple[str, int]]:
        return [(self.clt.description.site, source) for source in self.clt.sources]

    def _read(self, layer: int, x: Tensor, now: Pass) -> None:
        super()._read(layer, x, now)
        self.seen[layer] = x.float()
        values, indices = now.features[layer]
        values = values.clone()
        values[:, : self._local.constant_positions] = 0.0
        for b, cut in enumerate(self._cuts):
            if cut.layer == layer:
                values[b, cut.position] *= indices[b, cut.position] != cut.number
        now.features[layer] = Features(values, indices)

    def _write(self, layer: int, own: Tensor, now: Pass) -> Tensor:
        written = super()._write(layer, own, now).to(own.device) + self._local.errors[layer].to(own.device)
        first = self._local.constant_positions
        written[:, :first] = self._local.entering.written[layer][:first].to(written.device)
        return written
