"""The neurons of an MLP: inputs of its last linear map (`down_proj`), found by watching one batch go through.

Token by token, with z_i the input of the map, c_i its column i and s = 1,

    write = bias + s * sum over i of z_i c_i

Where a norm follows the map (Gemma 2 and 3), c_i is the column times the norm's weight, and s the norm's scale at that
token. Either form is verified on the batch; MLPs of another form (experts, a norm that centres) are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capture.sites import Tap, hidden_states_out, record
from capture.vlm import VLM
from cltjax.errors import UserError

TOLERANCE = 0.01  # of a write, that may be left over by its form: bfloat16 rounds by up to 0.4 %


@dataclass(frozen=True)
class Neurons:
    """The neurons of one layer: the linear map they write through, and the gain [D] of a norm behind it."""

    mlp: nn.Module
    down: nn.Linear
    gain: Tensor | None

    @property
    def columns(self) -> Tensor:
        """[D, N] float32: c_i of the module's docstring."""
        weight = self.down.weight.float()
        return weight if self.gain is None else self.gain[:, None] * weight

    def scale(self, before: Tensor, write: Tensor) -> Tensor:
        """[n] float64: s of the module's docstring, at tokens with the map's output and the write [n, D]."""
        assert self.gain is not None
        scaled, smallest = self.gain.to(before.device).double() * before.double(), torch.finfo(torch.float64).tiny
        return (scaled * write.double()).sum(-1) / scaled.square().sum(-1).clamp_min(smallest)


def locate(vlm: VLM, layers: Sequence[int], batch: Mapping[str, Tensor]) -> dict[int, Neurons]:
    """The neurons of each layer, found and checked by one forward pass; no family is known by its name.

    The map is the linear module inside the MLP whose output is the MLP's. UserError for a layer without one, and where
    what follows it is no gain and scale.
    """
    if vlm.sites is None:
        vlm.verify(batch)
    assert vlm.sites is not None
    sites = [vlm.sites[layer] for layer in layers]
    mlps = [site.mlp_in.module for site in sites]
    linears = [
        [one for one in mlp.modules() if isinstance(one, nn.Linear) and is_readable(one, vlm.d_model)] for mlp in mlps
    ]
    returned: dict[nn.Module, list[Tensor]] = {one: [] for some in linears for one in some}

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        returned[module].append(output.clone())  # llama4 adds its experts' output in place

    handles = [one.register_forward_hook(note) for one in returned]
    try:
        taps = [Tap(mlp, True) for mlp in mlps] + [site.mlp_out for site in sites]
        tensors = [one.reshape(-1, vlm.d_model) for one in record(taps, lambda: vlm.forward(batch))]
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer, site, some, own, write in zip(
        layers, sites, linears, tensors[: len(sites)], tensors[len(sites) :], strict=True
    ):
        mlp, what = site.mlp_in.module, f"layer {layer}: {type(site.mlp_in.module).__name__}"
        runs = [(one, returned[one][0]) for one in some if len(returned[one]) == 1]
        maps = [one for one, output in runs if torch.equal(output.reshape(-1, vlm.d_model), own)]
        if len(maps) != 1:
            raise UserError(
                f"{what} does not write the output of one of its linear maps, in weights that can be read: with "
                "experts, or quantised, it has no neurons to name here"
            )
        found[layer] = Neurons(mlp, maps[0], None if torch.equal(own, write) else gain(site.mlp_out.module, own))
        if found[layer].gain is not None and not fits(found[layer], own, write, batch):
            raise UserError(f"{what} is followed by {type(site.mlp_out.module).__name__}, which is no gain and scale")
    return found


def is_readable(linear: nn.Linear, d_model: int) -> bool:
    """Whether it maps to the residual stream with weights that are there as numbers, neither packed nor offloaded."""
    weight = linear.weight
    return weight.is_floating_point() and not weight.is_meta and weight.shape == (d_model, linear.in_features)


def gain(norm: nn.Module, like: Tensor) -> Tensor:
    """[D] float32: what a norm makes of a vector of ones, whose root mean square is 1."""
    with torch.no_grad():
        output = hidden_states_out(norm(torch.ones_like(like[None, :1])))
    assert output is not None
    return output.reshape(-1).float()


def fits(neurons: Neurons, before: Tensor, write: Tensor, batch: Mapping[str, Tensor]) -> bool:
    """Whether the write is a scale a token times the gain times the map's output, at real tokens."""
    assert neurons.gain is not None
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    real = mask.bool().reshape(-1).to(write.device)
    before, write = before[real].double(), write[real].double()
    left = write - neurons.scale(before, write)[:, None] * neurons.gain.double() * before
    return float(left.norm()) <= TOLERANCE * float(write.norm())
