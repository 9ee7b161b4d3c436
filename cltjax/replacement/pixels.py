"""From image patches on to pixels: gradient x input through the projector and the vision tower.

Unlike a graph's edges this is no exact account. The vision tower is not linear, and its attention is not frozen: it is
the gradient, which says what a small change of a pixel would do, times the pixel's value as the model gets it (centred
and scaled).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cltjax.errors import UserError
from cltjax.replacement.frozen import entered
from cltjax.replacement.graph import LOGIT, Graph
from cltjax.replacement.graph_json import png_uri
from cltjax.replacement.local import Local
from cltjax.replacement.targets import Targets


def check_pixels(local: Local, targets: Targets, positions: Sequence[Mapping[str, Any]]) -> None:
    """UserError where there are no heat maps: the model's pixels are not one image of three colours, or it is not known
    which part of the image patches stand for, or no logits are explained."""
    pixels = local.batch.get("pixel_values")
    if pixels is None or pixels.dim() < 4 or pixels[..., 0, 0].numel() != 3:
        raise UserError("--pixels is for models that get one image as pixels, not as tiles or patches: leave it out")
    if not any(one["rect"] for one in positions) or not len(targets.weights):
        raise UserError("--pixels is for logits, and images whose patches are known: leave it out")


def gradient_times_input(local: Local, directions: Tensor) -> np.ndarray:
    """Of logits, [n, height, width] summed over colours, for directions over the vocabulary [n, V]."""
    pixels = local.batch["pixel_values"]
    rows = local.head_rows(directions).to(local.read.head.device, local.read.head.dtype)
    (by_patch,) = torch.autograd.grad(
        local.read.head, [local.leaves.embedded[0]], rows, retain_graph=True, is_grads_batched=True
    )
    leaf = pixels.detach().clone().requires_grad_()
    seen: list[Tensor] = []

    def keep(own: Tensor) -> Tensor:
        seen.append(own)
        return own.detach()  # what comes after plays no part

    batch: Mapping[str, Any] = {**local.batch, "pixel_values": leaf}
    with torch.enable_grad(), entered(local.vlm, keep):
        local.vlm.model(**batch, use_cache=False)
    embedded = seen[0][0]
    found = [
        torch.autograd.grad((embedded * one.to(embedded.dtype)).sum(), leaf, retain_graph=True)[0] for one in by_patch
    ]
    heat = torch.stack([(one * leaf.detach()).reshape(-1, *pixels.shape[-2:]).sum(0) for one in found])
    return heat.float().cpu().numpy()


def heat_maps(
    local: Local, targets: Targets, graph: Graph, positions: Sequence[Mapping[str, Any]], picture: Image.Image
) -> dict[str, str]:
    """Pictures of gradient x input by the ids of logits, over the part of the image that patches cover."""
    rects = np.array([one["rect"] for one in positions if one["rect"] is not None])
    low, high = rects[:, :2].min(0), (rects[:, :2] + rects[:, 2:]).max(0)
    covered = (float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1]))
    ids = graph.ids()
    heat = gradient_times_input(local, targets.directions)
    return {
        ids[node]: png_uri(overlay(one, covered, picture.size)) for node, one in zip(graph.of(LOGIT), heat, strict=True)
    }


def overlay(heat: np.ndarray, covered: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """A transparent picture of the whole image's size: blue where pixels push down, orange where they push up.

    heat [height, width] of the part of the image that is covered (left, top, width, height, fractions).
    """
    strength = np.abs(heat) / max(float(np.abs(heat).max()), 1e-30)
    colour = np.where(heat[..., None] > 0, (230, 120, 0), (0, 100, 220))
    rgba = np.concatenate([colour, (255 * strength[..., None])], -1).astype(np.uint8)
    width, height = size
    left, top, wide, high = (round(one * of) for one, of in zip(covered, (width, height, width, height), strict=True))
    picture = Image.new("RGBA", size)
    picture.paste(Image.fromarray(rgba).resize((max(1, wide), max(1, high))), (left, top))
    return picture
