"""A cross-layer transcoder in PyTorch, from a CLT directory.

    clt = CLT.from_pretrained("clt-dir", device="cuda", dtype=torch.bfloat16)
    features = {layer: clt.encode(layer, x[layer]) for layer in clt.sources}        x [..., D], raw activations
    y_hat = clt.decode(target, features)                                            [..., D], float32

Features are sparse: values and indices of the active ones. No dense code is decoded.
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from cltjax.clt_directory import CLTDirectory, Description
from cltjax.errors import UserError

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Features(NamedTuple):
    """Active features of one source: values [..., K] float32, 0 where a place is not taken; indices [..., K]."""

    values: Tensor
    indices: Tensor


class CLT:
    """Encoders, decoders and biases of a CLT directory.

    description: what clt.json says. Weights are held as `dtype`; pre-activations and sums are float32.
    """

    def __init__(self, directory: CLTDirectory, device: torch.device, dtype: torch.dtype, lazy: bool):
        self.description: Description = directory.description
        self.device, self.dtype = device, dtype
        self.wiring = self.description.wiring
        self._encoders: dict[int, dict[str, Tensor]] = {}
        self._decoders: dict[int, Tensor] = {}
        for layer in self.sources:
            found = load_file(directory.path / f"W_enc_{layer}.safetensors")
            names = ("W_enc", "b_enc", "threshold")
            encoder = {name: found[f"{name}_{layer}"] for name in names if f"{name}_{layer}" in found}
            self._encoders[layer] = {
                name: value.to(device, torch.float32) for name, value in encoder.items() if name != "W_enc"
            }
            self._encoders[layer]["W_enc"] = held(encoder["W_enc"], device, dtype, f"W_enc_{layer}")
            path, name = directory.path / f"W_dec_{layer}.safetensors", f"W_dec_{layer}"
            self._decoders[layer] = mapped(path, name) if lazy else held(load_file(path)[name], device, dtype, name)
        biases = load_file(directory.path / "b_dec.safetensors")
        self.b_dec = {t: biases[f"b_dec_{t}"].to(device, torch.float32) for t in self.targets}

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        lazy: bool = False,
    ) -> "CLT":
        """Load a CLT directory. UserError where it is not whole, and where `dtype` cannot hold its weights (of decoders
        that are read lazily, once they are needed).

        lazy: leave the decoders in their files and read the rows of active features as they are needed, for CLTs that
        are larger than memory.
        """
        return cls(CLTDirectory.open(path), torch.device(device), dtype, lazy)

    @property
    def sources(self) -> tuple[int, ...]:
        return self.wiring.sources

    @property
    def targets(self) -> tuple[int, ...]:
        """The layers whose MLP writes are predicted."""
        return self.wiring.targets

    def pre_activations(self, layer: int, x: Tensor) -> Tensor:
        """Raw inputs x [..., D] of a source layer -> h [..., F], float32."""
        encoder = self._encoders[layer]
        return functional.linear(x.to(self.device, torch.float32), encoder["W_enc"].float(), encoder["b_enc"])

    def encode(self, layer: int, x: Tensor) -> Features:
        """The active features of a source layer for raw inputs x [..., D]."""
        return self.select(layer, self.pre_activations(layer, x))

    def select(self, layer: int, h: Tensor) -> Features:
        """The active ones among pre-activations h [..., F]; ties go to the lowest index."""
        activation = self.description.activation
        if activation.kind == "topk":
            rank, most = h, activation.k[self.sources.index(layer)]
        else:
            above = h > self._encoders[layer].get("threshold", 0.0)
            rank = torch.where(above, h, -torch.inf)
            most = max(1, int(above.sum(-1).max())) if h.numel() else 1
        best, indices = largest(rank, most)
        values = h.gather(-1, indices).relu()
        return Features(torch.where(best > -torch.inf, values, 0.0), indices)

    def decode(self, target: int, features: Mapping[int, Features]) -> Tensor:
        """The predicted MLP write [..., D] at a target layer, float32, from the features of all its sources.

        KeyError where a source that writes to this target is not among `features`.
        """
        total = None
        for source in self.sources:
            if target in self.wiring.targets_of(source):
                written = self.contribution(source, target, features[source])
                total = written if total is None else total + written
        assert total is not None, f"{target} is no target"
        return total + self.b_dec[target]

    def contribution(self, source: int, target: int, features: Features) -> Tensor:
        """What one source's features write at one target [..., D], float32, without b_dec."""
        W, slot = self._decoders[source], target - source - self.description.offset
        values, indices = features
        shape = (*values.shape[:-1], W.shape[2])
        values, indices = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
        if W.device != self.device or W.dtype != self.dtype:  # in its file: only the rows that are needed
            used, indices = indices.unique(return_inverse=True)
            rows = held(W[used.to(W.device), slot], self.device, self.dtype, f"W_dec_{source}")
        else:
            rows, indices = W.view(-1, W.shape[2]), indices * W.shape[1] + slot
        return weighted_sum(rows, values, indices).reshape(shape)

    def decoder_rows(self, source: int, indices: Tensor) -> Tensor:
        """W_dec of the features at `indices` [n]: [n, T_l, D] float32, rounded to `dtype`, nearest target first."""
        W = self._decoders[source]
        return held(W[indices.to(W.device)], self.device, self.dtype, f"W_dec_{source}").float()

    def encoder_rows(self, source: int, indices: Tensor) -> Tensor:
        """W_enc of the features at `indices` [n]: [n, D] float32."""
        return self._encoders[source]["W_enc"][indices].float()

    def encoder_bias(self, source: int, indices: Tensor) -> Tensor:
        """b_enc of the features at `indices` [n]: [n] float32."""
        return self._encoders[source]["b_enc"][indices]


def held(weights: Tensor, device: torch.device, dtype: torch.dtype, name: str) -> Tensor:
    """The weights there, as `dtype`. UserError where they are too large for float16."""
    found = weights.to(device, dtype)
    if dtype == torch.float16 and not found.isfinite().all():
        raise UserError(f"{name} has weights too large for float16: hold the CLT in bfloat16 or float32")
    return found


def largest(rank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis, descending [..., k]; of equal ones the lowest index, unlike torch.topk."""
    best, indices = torch.topk(rank, k)
    last = best[..., -1:]
    tied = ((rank == last).sum(-1) > (best == last).sum(-1)) & (last[..., 0] > -torch.inf)
    if tied.any():
        ordered = torch.sort(rank[tied], dim=-1, descending=True, stable=True)
        best[tied], indices[tied] = ordered.values[..., :k], ordered.indices[..., :k]
    return best, indices


def weighted_sum(rows: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """sum over k of values[n, k] rows[indices[n, k]]: [N, D] float32."""
    if rows.dtype == torch.float32:
        return functional.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
    total = torch.zeros(len(values), rows.shape[1], device=rows.device)
    for k in range(values.shape[1]):  # products and sums in float32, without [N, K, D] in memory
        total.addcmul_(values[:, k, None], rows[indices[:, k]].float())
    return total


def mapped(path: Path, name: str) -> Tensor:
    """A tensor that stays in its safetensors file and is read where it is indexed."""
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header = int.from_bytes(memory[:8], "little")
    entry = json.loads(memory[8 : 8 + header])[name]
    first, last = entry["data_offsets"]
    kind = TYPES[entry["dtype"]]
    found = torch.frombuffer(memory, dtype=kind, offset=8 + header + first, count=(last - first) // kind.itemsize)
    return found.reshape(entry["shape"])
