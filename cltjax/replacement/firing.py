"""How features and MLP neurons of the original model fire together on held-out tokens: sums over batches, in float64.

Tokens are those of the kinds that the CLT was trained on. Activations are never held beyond one batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from capture.inputs import Encoded
from capture.prompts import Sample, Template
from capture.recorder import Batch, batches, encoder, windows
from capture.sites import Tap, record
from capture.vlm import VLM
from cltjax.replacement.clt import CLT
from cltjax.replacement.down_proj import Neurons
from cltjax.replacement.fidelity import reported
from cltjax.tokens import NormLimits

CONSTANT = 1e-12  # variance over mean square, up to which an activation does not vary


# Held-out tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The n tokens of a batch that count: [n] each."""

    sample: Tensor  # number in the batch
    modality: Tensor
    left_out: int
    x: Callable[[int], Tensor]  # what the site of a source reads [n, D]
    z: Callable[[int], Tensor]  # activations of the neurons of a target [n, N], float64


@dataclass
class HeldOut:
    """Samples as the original model sees them, and which of their tokens count.

    generate: with the model's own answers of at most this many tokens. modalities: those that count. limits: norms at
    the CLT's sources and targets from which on a token does not.
    """

    vlm: VLM
    clt: CLT
    samples: Sequence[Sample]
    template: Template
    batch_size: int
    generate: int
    modalities: Sequence[int]
    limits: NormLimits | None
    _answers: dict[Sample, list[int]] = field(default_factory=dict)

    def first(self) -> dict[str, Tensor]:
        """A batch of one sample."""
        return self.vlm.collate([encoder(self.vlm, self.template)(self.samples[0])])

    def tokens(self, neurons: Mapping[int, Neurons]) -> Iterator[Tokens]:
        """All tokens that count, batch by batch; activations are those of these neurons. `vlm.sites` are known."""
        groups = windows(list(self.samples), self.batch_size)
        for batch in reported(batches(groups, self.batch_size, encoder(self.vlm, self.template)), len(self.samples)):
            yield self._read(self._answered(batch), neurons)

    def _answered(self, batch: Batch) -> list[Encoded]:
        if not self.generate:
            return batch.encoded
        if not all(sample in self._answers for sample in batch.samples):
            said = self.vlm.generate(batch.encoded, self.generate)
            self._answers |= dict(zip(batch.samples, said, strict=True))
        pairs = zip(batch.samples, batch.encoded, strict=True)
        return [self.vlm.extend(one, self._answers[sample]) for sample, one in pairs]

    def _read(self, encoded: list[Encoded], neurons: Mapping[int, Neurons]) -> Tokens:
        vlm, sites, wiring = self.vlm, self.vlm.sites, self.clt.wiring
        assert sites is not None
        taps = {("x", source): getattr(sites[source], self.clt.description.site) for source in wiring.sources}
        taps |= {("write", target): sites[target].mlp_out for target in wiring.targets}
        taps |= {("z", layer): Tap(one.down) for layer, one in neurons.items()}
        taps |= {("before", layer): Tap(one.mlp, True) for layer, one in neurons.items() if one.gain is not None}
        batch = vlm.collate(encoded)
        found = dict(zip(taps, record(list(taps.values()), lambda: vlm.forward(batch)), strict=True))

        modality = torch.full(batch["input_ids"].shape, -1)  # of padding
        for row, one in zip(modality, encoded, strict=True):
            kinds = vlm.modality(one["input_ids"][0].cpu())
            row[: len(kinds)] = torch.from_numpy(kinds)
        chosen = torch.from_numpy(np.flatnonzero(np.isin(modality.numpy(), self.modalities)))

        def at(what: str, layer: int) -> Tensor:
            rows = found[what, layer].flatten(0, -2)
            return rows[chosen.to(rows.device)].to(vlm.device)

        def z(layer: int) -> Tensor:
            activations = at("z", layer).double()
            if neurons[layer].gain is None:
                return activations
            return activations * neurons[layer].scale(at("before", layer), at("write", layer))[:, None]

        if self.limits is not None:
            reached = torch.zeros(len(chosen), dtype=torch.bool)
            places = [*(("x", source) for source in wiring.sources), *(("write", target) for target in wiring.targets)]
            for place, limit in zip(places, (*self.limits.site, *self.limits.mlp_out), strict=True):
                norms = at(*place).float().norm(dim=-1).cpu()
                reached |= (norms >= limit) & (norms > 0)
            chosen = chosen[~reached]
        return Tokens(
            (chosen // modality.shape[1]).to(vlm.device),
            modality.flatten()[chosen].to(vlm.device),
            int((modality >= 0).sum()) - len(chosen),
            lambda source: at("x", source),
            z,
        )


# Firing together -----------------------------------------------------------------------------------------------------


def activations(clt: CLT, source: int, x: Tensor, features: Tensor) -> Tensor:
    """[n, K] float64: of the features [K] of a source, 0 where they are not active, from its inputs x [n, D]."""
    values, indices = clt.encode(source, x)
    column = torch.full((clt.description.n_features,), len(features), device=x.device)
    column[features] = torch.arange(len(features), device=x.device)
    found = torch.zeros(len(x), len(features) + 1, dtype=torch.float64, device=x.device)
    return found.scatter_add_(1, column[indices], values.double())[:, :-1]


def fire_alike(counts: Tensor, feature: int, most: int) -> Tensor:
    """Up to `most` other features, nearest first, by the number of tokens they fire on: counts [M, F] by modality.

    Distance is that of log(1 + count), summed over modalities. Features that never fire are left out.
    """
    logs = counts.double().log1p()
    distance = (logs - logs[:, feature, None]).abs().sum(0)
    distance[counts.sum(0) == 0] = torch.inf
    distance[feature] = torch.inf
    nearest = torch.sort(distance, stable=True)
    return nearest.indices[nearest.values < torch.inf][:most]


@dataclass
class Sums:
    """Sums over n tokens of K features a and, by layer, of N neurons z; float64."""

    a: Tensor  # [K]
    aa: Tensor
    z: dict[int, Tensor]  # [N]
    zz: dict[int, Tensor]
    az: dict[int, Tensor]  # [K, N]
    n: int = 0

    @classmethod
    def zero(cls, n_features: int, n_neurons: Mapping[int, int], device: torch.device | str = "cpu") -> "Sums":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        def by_layer(*shape: int) -> dict[int, Tensor]:
            return {layer: zeros(*shape, n) for layer, n in n_neurons.items()}

        return cls(zeros(n_features), zeros(n_features), by_layer(), by_layer(), by_layer(n_features))

    def add(self, a: Tensor, z: Callable[[int], Tensor]) -> None:
        """Tokens with features a [n, K], and at each layer neurons z [n, N]."""
        self.n += len(a)
        self.a += a.sum(0)
        self.aa += a.square().sum(0)
        for layer, total in self.az.items():
            here = z(layer)
            self.z[layer] += here.sum(0)
            self.zz[layer] += here.square().sum(0)
            total += a.T @ here

    def correlation(self, layer: int) -> Tensor:
        """Pearson's [K, N]; 0 where one of the two does not vary."""
        covariance = self.az[layer] / self.n - torch.outer(self.a, self.z[layer]) / self.n**2
        both = torch.outer(self._variance(self.a, self.aa), self._variance(self.z[layer], self.zz[layer])).sqrt()
        return torch.where(both > 0, covariance / both, 0.0)

    def rise(self, layer: int, feature: int) -> Tensor:
        """[N]: the neurons' mean where a feature of values 0 and 1 is 1, less that where it is 0; 0 where one lacks."""
        on, z = float(self.a[feature]), self.az[layer][feature]
        if on in (0, self.n):
            return torch.zeros_like(z)
        return z / on - (self.z[layer] - z) / (self.n - on)

    def _variance(self, total: Tensor, squares: Tensor) -> Tensor:
        """0 where it is no more than what rounding makes of a constant."""
        found = squares / self.n - (total / self.n).square()
        return torch.where(found > CONSTANT * squares / self.n, found, 0.0)
