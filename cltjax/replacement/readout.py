"""What features write, from the weights alone: norms by target layer, tokens they promote, features like them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from capture.sites import hidden_states_in, hidden_states_out
from capture.vlm import VLM
from cltjax.replacement.clt import CLT
from cltjax.replacement.frozen import Norm, find_norm

ELEMENTS = 1 << 25  # of decoders, and of effects on tokens, that are held at a time

Feature = tuple[int, int]  # source layer, number


def decoders(clt: CLT, source: int) -> Iterator[tuple[int, Tensor]]:
    """W_dec of a source in pieces: the first feature's number, and [n, T, D] float32."""
    F, T = clt.description.n_features, len(clt.wiring.targets_of(source))
    step = max(1, ELEMENTS // (T * clt.description.model["d_model"]))
    for first in range(0, F, step):
        yield first, clt.decoder_rows(source, torch.arange(first, min(first + step, F)))


def decoder_norms(clt: CLT, source: int) -> Tensor:
    """[F] norm of each feature's concatenated decoders."""
    return torch.cat([rows.flatten(1).norm(dim=1) for _, rows in decoders(clt, source)]).cpu()


# Tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unembedding:
    """The last norm, None where none was found, and the vocabulary head's weights [V, D]."""

    norm: Norm | None
    weight: Tensor

    def effects(self, written: Tensor) -> Tensor:
        """[n, V] of vectors [n, D] that are added to the residual stream, on logits less their mean over the
        vocabulary, per unit of the last norm's scale: through its weight and the head's.

        Left out: the scale, which is the prompt's; whatever later layers make of the vectors; a bias of the head, a
        factor or a soft cap on logits (the order of tokens is the same with them).
        """
        written = written.to(self.weight.device, torch.float32)
        if self.norm is not None:
            if self.norm.centred:
                written = written - written.mean(-1, keepdim=True)
            written = written * self.norm.weight.to(written)
        found = written @ self.weight.float().T
        return found - found.mean(-1, keepdim=True)


def unembedding(vlm: VLM, ids: Sequence[int]) -> Unembedding | None:
    """Found by running some text tokens; None for a model without a vocabulary head as wide as its stream."""
    model: Any = vlm.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != vlm.d_model:
        return None
    input_ids = torch.tensor([list(ids)])
    batch = vlm.collate([{"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}])
    return Unembedding(final_norm(vlm, batch), weight)


def final_norm(vlm: VLM, batch: dict[str, Tensor]) -> Norm | None:
    """The first module behind the last layer that computes a norm of the residual stream."""
    left: list[Tensor] = []
    found: list[Norm] = []

    def leaving(module: nn.Module, args: tuple, output: Any) -> None:
        out = hidden_states_out(output)
        assert out is not None
        left.append(out)

    def called(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = hidden_states_in(args, kwargs)
        if left and not found and x is not None and isinstance(output, Tensor) and x.numel() == left[0].numel():
            norm = find_norm(module, x, output)
            found.extend([] if norm is None else [norm])

    inside = {part for layer in vlm.layers for part in layer.modules()}
    outside = [
        module
        for module in vlm.model.modules()
        if module not in inside
        and not any(True for _ in module.children())
        and all(parameter.dim() < 2 for parameter in module.parameters())
    ]
    hooks = [vlm.layers[-1].register_forward_hook(leaving)]
    hooks += [module.register_forward_hook(called, with_kwargs=True) for module in outside]
    try:
        vlm.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def extremes(head: Unembedding, written: Tensor, top: int) -> list[tuple[list[tuple[int, float]], ...]]:
    """Of each vector [n, D] the tokens (id, effect) that it promotes most, and that it suppresses most."""
    found = []
    step = max(1, ELEMENTS // len(head.weight))
    for piece in written.split(step):
        effects = head.effects(piece).cpu()
        best, worst = (effects.topk(min(top, effects.shape[1]), largest=largest) for largest in (True, False))
        for row in range(len(piece)):
            found.append(
                tuple(
                    [
                        (i, v)
                        for i, v in zip(of.indices[row].tolist(), of.values[row].tolist(), strict=True)
                        if sign * v > 0
                    ]
                    for of, sign in ((best, 1), (worst, -1))
                )
            )
    return found


# Features ----------------------------------------------------------------------------------------------------


def nearest(clt: CLT, features: Sequence[Feature], top: int) -> list[list[tuple[Feature, float]]]:
    """Of each feature its `top` nearest of the same source, by the cosine of concatenated decoders, then its `top`
    nearest of other sources, by the cosine of decoders summed over targets: all that they write. One piece of all
    decoders is held at a time.
    """
    sources = sorted({source for source, _ in features})
    place = {feature: i for i, feature in enumerate(features)}
    own = {source: [number for layer, number in features if layer == source] for source in sources}
    rows = {source: clt.decoder_rows(source, torch.tensor(numbers)) for source, numbers in own.items()}
    whole = {source: functional.normalize(found.flatten(1), dim=1) for source, found in rows.items()}
    summed = {source: functional.normalize(found.sum(1), dim=1) for source, found in rows.items()}
    same: list[list[tuple[float, Feature]]] = [[] for _ in features]
    other: list[list[tuple[float, Feature]]] = [[] for _ in features]

    def keep(best: list[list[tuple[float, Feature]]], source: int, layer: int, first: int, cosine: Tensor) -> None:
        values, indices = cosine.cpu().topk(min(top + 1, cosine.shape[1]))
        for number, those, at in zip(own[source], values.tolist(), indices.tolist(), strict=True):
            mine = best[place[source, number]]
            mine += [
                (v, (layer, first + i))
                for v, i in zip(those, at, strict=True)
                if (layer, first + i) != (source, number)
            ]
            mine.sort(key=lambda pair: (-pair[0], pair[1]))
            del mine[top:]

    for layer in clt.sources:
        for first, piece in decoders(clt, layer):
            total = functional.normalize(piece.sum(1), dim=1)
            for source in sources:
                if source == layer:
                    keep(same, source, layer, first, whole[source] @ functional.normalize(piece.flatten(1), dim=1).T)
                else:
                    keep(other, source, layer, first, summed[source] @ total.T)
    return [[(feature, value) for value, feature in (*a, *b)] for a, b in zip(same, other, strict=True)]
