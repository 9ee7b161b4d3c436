"""From image patches on to pixels: gradient x input through the projector and the vision tower.

Unlike a graph's edges this is no exact account. The vision tower is not linear, and its attention is not frozen: it is
the gradient, which says what a small change of a pixel would do, times the pixel's value as the model gets it (centred
and scaled).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cltjax.errors import UserError
from cltjax.replacement.frozen import entered
from cltjax.replacement.local import Local


def gradient_times_input(local: Local, directions: Tensor) -> np.ndarray:
    """Of logits, [n, height, width] summed over colours, for directions over the vocabulary [n, V].

    UserError where the model's pixels are not one image of three colours.
    """
    pixels = local.batch.get("pixel_values")
    if pixels is None or pixels.dim() < 4 or pixels[..., 0, 0].numel() != 3:
        raise UserError("--pixels is for models that get one image as pixels, not as tiles or patches: leave it out")
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
