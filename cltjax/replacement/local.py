"""The local replacement model: on one prompt, the VLM as an affine map from what enters its residual stream.

    local = linearise(vlm, clt, vlm.encode(prompt, image))
    local.logits                                     the VLM's own
    local.gradients(...)                             of pre-activations and logits, by what enters

Attention patterns and norm scales are those of the prompt (cltjax/replacement/frozen.py). What an MLP writes is taken
apart into what the CLT's features write, `b_dec` and an error, each a constant; so is what enters as embeddings of
words and image patches. All that is left between these and a feature's pre-activation, or a logit before any soft cap,
is linear, and values are exactly the VLM's, whatever the CLT: errors absorb what it lacks. (Anthropic, "Circuit
Tracing", 2025, "local replacement model".)

What a word at position 0 does that sees nothing but itself says nothing about the prompt; norms are huge there, and
CLTs are rarely trained on it. As in circuit-tracer it has no features and no errors: what its MLPs write counts as
constant, like biases. Where position 0 sees what follows (prefixes of paligemma, images of gemma3), or is a patch of an
image, it is like any other.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capture.inputs import IMAGE, Encoded
from capture.sites import hidden_states_in, hidden_states_out
from capture.vlm import VLM
from cltjax.errors import UserError
from cltjax.replacement.clt import CLT, Features
from cltjax.replacement.forced import logits_at
from cltjax.replacement.frozen import Frozen, entered, record, written
from cltjax.replacement.model import check_match


class Entering(NamedTuple):
    """What enters the residual stream: each is added to it, and all of it is the sum of these and of biases.

    embedded: [P, D] by layer before which it is added: 0 the embeddings of words and patches; others where a family
    adds image features between layers (qwen3_vl). written: [P, D] by layer, what the MLP writes.
    """

    embedded: dict[int, Tensor]
    written: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.embedded.values(), *self.written]

    def like(self, tensors: Sequence[Any]) -> "Entering":
        """The same places with other tensors."""
        n = len(self.embedded)
        return Entering(dict(zip(self.embedded, tensors[:n], strict=True)), list(tensors[n:]))


class Read(NamedTuple):
    """What one pass of the frozen model gives, differentiable by what entered.

    sites: the CLT's inputs [P, D] by source. head: what the vocabulary head receives at the last position [D]. logits:
    [V] there, soft-capped where the model does.
    """

    sites: dict[int, Tensor]
    head: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Local:
    """The VLM on one prompt, taken apart; all detached.

    features: of each source [P, K], values 0 where there is none. errors: [P, D] by layer, what the MLP writes less
    what the CLT says; of a layer that it does not cover all of it. constant: what enters where embeddings, features and
    errors are none: `b_dec`, and all that is written at positions that are constant, the first constant_positions (see
    the module). causal: no position sees a later one.
    """

    vlm: VLM
    clt: CLT
    batch: dict[str, Tensor]
    frozen: Frozen
    entering: Entering
    constant: Entering
    features: dict[int, Features]
    errors: list[Tensor]
    constant_positions: int
    causal: bool

    @property
    def length(self) -> int:
        return self.batch["input_ids"].shape[1]

    @property
    def logits(self) -> Tensor:
        """[V] behind the prompt."""
        return self.read.logits.detach()

    @cached_property
    def leaves(self) -> Entering:
        """What entered, as leaves of the graph of `read`."""
        return self.entering.like([one.detach().clone().requires_grad_() for one in self.entering.tensors()])

    @cached_property
    def read(self) -> Read:
        """The frozen model's pass from `leaves`."""
        with torch.enable_grad():
            return self.run(self.leaves)

    @cached_property
    def biases(self) -> Read:
        """The frozen model's pass where only constants enter: what is left are the paths of biases."""
        with torch.no_grad():
            return self.run(self.constant)

    def head_rows(self, directions: Tensor) -> Tensor:
        """Directions over the vocabulary [n, V] as directions of what the head receives: [n, D] float32."""
        head = _head(self.vlm)
        return directions.to(head.weight.device, torch.float32) @ head.weight.float()

    def head_bias(self, directions: Tensor) -> Tensor:
        """[n] what the head's own bias adds along directions [n, V]."""
        bias = getattr(_head(self.vlm), "bias", None)
        return torch.zeros(len(directions)) if bias is None else directions.cpu() @ bias.float().cpu()

    def run(self, entering: Entering) -> Read:
        """What the frozen model gives where this enters; the same tokens and images."""
        sites: dict[int, Tensor] = {}
        heads: list[Tensor] = []
        own = self.entering.embedded

        def reading(source: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                x = hidden_states_in(args, kwargs)
                if x is not None:
                    sites[source] = x.reshape(self.length, -1)

            return hook

        def write(layer: int, its: Tensor) -> Tensor:
            return entering.written[layer].to(its.device, its.dtype).reshape(its.shape)

        def enter(layer: int, x: Tensor) -> Tensor:
            new = entering.embedded[layer].to(x.device, x.dtype)
            # before the first layer there is nothing else; between layers the family has added its own already
            return (new if layer == 0 else x + (new - own[layer].to(x.device, x.dtype))).reshape(x.shape)

        assert self.vlm.sites is not None
        with self.frozen.replayed(), written(self.vlm, write), ExitStack() as stack:
            for layer in entering.embedded:
                stack.enter_context(entered(self.vlm, partial(enter, layer), layer))
            for source in self.clt.sources:
                tap = getattr(self.vlm.sites[source], self.clt.description.site)
                stack.callback(tap.module.register_forward_pre_hook(reading(source), with_kwargs=True).remove)
            head = _head(self.vlm)
            stack.callback(head.register_forward_pre_hook(lambda _, args: heads.append(args[0])).remove)
            logits = _logits(self.vlm, self.batch)
        return Read(sites, heads[0].reshape(-1, heads[0].shape[-1])[-1], logits)


def linearise(vlm: VLM, clt: CLT, encoded: Encoded, other_revision: bool = False) -> Local:
    """Take the VLM apart on one prompt, as `vlm.encode` makes it.

    UserError where the CLT is not of this VLM, where its attention cannot be frozen, and where it has no vocabulary
    head.
    """
    check_match(vlm, clt, other_revision)
    _head(vlm)
    batch = vlm.collate([encoded])
    if batch["input_ids"].shape[0] != 1:
        raise UserError("a graph is of one prompt")
    frozen = record(vlm, batch)
    entering = _observed(vlm, batch)
    sites = vlm.trace(batch, clt.description.site, clt.sources).site
    first = _constant(vlm, frozen)
    features = {source: _without(clt.encode(source, x[0]), first) for source, x in zip(clt.sources, sites, strict=True)}
    errors, constant = [], []
    for layer, write in enumerate(entering.written):
        base = torch.zeros_like(write)
        error = write.clone()
        if layer in clt.targets:
            base += clt.b_dec[layer].to(base.device)
            error -= clt.decode(layer, features).to(error.device)
        base[:first], error[:first] = write[:first], 0.0
        errors.append(error)
        constant.append(base)
    nothing = [torch.zeros_like(one) for one in entering.embedded.values()]
    return Local(
        vlm,
        clt,
        batch,
        frozen,
        entering,
        entering.like([*nothing, *constant]),
        features,
        errors,
        first,
        _causal(frozen),
    )


def _constant(vlm: VLM, frozen: Frozen) -> int:
    """How many of the first positions say nothing about the prompt: one, or none."""
    sees_more = any(bool(pattern[0, :, 0, 1:].any()) for pattern in frozen.patterns.values())
    return 0 if sees_more or vlm.modality(frozen.ids[0, :1].cpu())[0] == IMAGE else 1


def _causal(frozen: Frozen) -> bool:
    return not any(bool(pattern[0].triu(1).any()) for pattern in frozen.patterns.values())


def _without(found: Features, first: int) -> Features:
    """Features [P, K] with none at the first positions; K is the most that are active at another."""
    values = found.values.clone()
    values[:first] = 0.0
    most = max(1, int((values > 0).sum(-1).max()))  # active ones come first
    return Features(values[:, :most], found.indices[:, :most])


@torch.no_grad()
def _observed(vlm: VLM, batch: Mapping[str, Tensor]) -> Entering:
    """What enters in a pass of the VLM as it is, float32."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    writes: dict[int, Tensor] = {}

    def entering(layer: int, args: tuple, kwargs: dict[str, Any]) -> None:
        x = hidden_states_in(args, kwargs)
        assert x is not None
        inputs[layer] = x

    def leaving(layer: int, output: Any) -> None:
        found = hidden_states_out(output)
        assert found is not None
        outputs[layer] = found

    def write(layer: int, own: Tensor) -> Tensor:
        writes[layer] = own.reshape(-1, own.shape[-1]).float()
        return own

    with written(vlm, write), ExitStack() as stack:
        for number, layer in enumerate(vlm.layers):
            enters = layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: entering(number, args, kwargs), with_kwargs=True
            )
            leaves = layer.register_forward_hook(lambda _, args, output, number=number: leaving(number, output))
            stack.callback(enters.remove)
            stack.callback(leaves.remove)
        vlm.forward(batch)
    embedded = {0: inputs[0][0].float()}
    for layer in range(1, vlm.n_layers):
        before = outputs[layer - 1].to(inputs[layer].device)
        if before.shape != inputs[layer].shape or not torch.equal(before, inputs[layer]):
            embedded[layer] = (inputs[layer].float() - before.float())[0]
    return Entering(embedded, [writes[layer] for layer in range(vlm.n_layers)])


def _head(vlm: VLM) -> Any:
    """The map from the last norm's output to logits."""
    model: Any = vlm.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UserError(f"{vlm.class_name} has no vocabulary head to attribute logits to")
    return head


def _logits(vlm: VLM, batch: Mapping[str, Tensor]) -> Tensor:
    """[V] behind the prompt; gradients pass where they are enabled."""
    return logits_at(vlm, batch, [batch["input_ids"].shape[1] - 1])[0, -1]
