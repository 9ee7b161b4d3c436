"""Rectangles of image tokens, against what the models' own image processors and packing make of changed pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from capture.vlm import VLM, load, wrap
from cltjax.replacement.patches import Rect, rectangles, rectangles_of_grid
from families import BOS, FAMILIES, IMAGE_ID, processor

SQUARE: dict[str, Any] = {"height": 16, "width": 16}
WIDER: dict[str, Any] = {"size": {"height": 18, "width": 18}}
LONGEST: dict[str, Any] = {"size": {"shortest_edge": 16, "longest_edge": 32}, "do_center_crop": False}
STRETCH: dict[str, Any] = {"size": SQUARE, "do_center_crop": False}
CROP: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": SQUARE}
PINPOINTS: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
ONEVISION: dict[str, Any] = {"size": SQUARE, "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]}
QWEN: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 3000},
}
PROCESSORS: dict[str, list[Any]] = {
    "llava": [
        CLIPImageProcessorPil(**CROP),
        CLIPImageProcessorPil(**STRETCH),
        LlavaImageProcessorPil(**CROP, do_pad=True),
    ],
    "paligemma": [SiglipImageProcessorPil(size=SQUARE)],
    "gemma3": [Gemma3ImageProcessorPil(size=SQUARE)],
    "internvl": [GotOcr2ImageProcessorPil(size=SQUARE), GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True)],
    "llava_next": [LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, **PINPOINTS)],
    "llava_onevision": [LlavaOnevisionImageProcessorPil(**ONEVISION)],
    "mistral3": [PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size=16)],
    "qwen2_vl": [Qwen2VLImageProcessorPil(**QWEN)],
    "qwen2_5_vl": [Qwen2VLImageProcessorPil(**QWEN)],
    "qwen3_vl": [Qwen2VLImageProcessorPil(**QWEN)],
}
SIZES = ((101, 149), (211, 67))  # width, height


A_TILE = {"llava": 16, "paligemma": 16, "gemma3": 4, "internvl": 4}  # tokens; those of others follow from the grid
CASES = [(name, number) for name, those in PROCESSORS.items() for number in range(len(those))]

pytestmark = pytest.mark.usefixtures("one_thread")


def vlm_with(name: str, image_processor: Any) -> VLM:
    """A tiny model whose vision attention writes nothing: what a token shows is its own pixels."""
    model = FAMILIES[name].model()
    silent = 0
    for path, module in model.named_modules():
        parts = path.split(".")
        inside = any("vision" in part or part == "visual" for part in parts)
        if (
            inside
            and any("att" in part for part in parts[:-1])
            and parts[-1] in ("out_proj", "o_proj", "proj", "projection_layer")
        ):
            silent += 1
            for parameter in module.parameters():
                parameter.data.zero_()
    assert silent
    made = processor()
    made.image_processor = image_processor
    return wrap(model, made, name)


def encoded(vlm: VLM, image: Image.Image) -> dict[str, Tensor]:
    """What a processor makes of one image and a word."""
    made = vlm.processor.image_processor([image], return_tensors="pt")
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    sample = {name: torch.as_tensor(np.asarray(made[name])) for name in names if name in made}
    tokens = A_TILE.get(vlm.name)
    counts = range(1, 400) if tokens is None else [tokens * len(sample["pixel_values"])]
    for count in counts:
        ids = torch.tensor([[BOS, *[IMAGE_ID] * count, 5]])
        if vlm.image_grid({"input_ids": ids, **sample}):
            break
    else:
        raise AssertionError("no number of tokens fits")
    if types := FAMILIES[vlm.name].types:
        sample[types] = torch.zeros_like(ids) if vlm.name == "paligemma" else (ids == IMAGE_ID).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sample}


def entering(vlm: VLM, image: Image.Image) -> Tensor:
    """[image tokens, D] what the text layers are given for them."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    sample = encoded(vlm, image)
    handle = vlm.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    vlm.forward(vlm.collate([sample]))
    handle.remove()
    return seen[0][0][sample["input_ids"][0] == IMAGE_ID]


def painted(image: Image.Image, rect: Rect) -> Image.Image:
    """The image with the pixels of a rectangle inverted."""
    pixels = np.asarray(image).copy()
    height, width = pixels.shape[:2]
    left, top, across, down = rect
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    inside = ((y >= top) & (y < top + down))[:, None] & ((x >= left) & (x < left + across))[None]
    pixels[inside] = 255 - pixels[inside]
    return Image.fromarray(pixels)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 80, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name, number", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_a_rectangle_is_what_its_token_shows(name: str, number: int, size: tuple[int, int]) -> None:
    vlm, image = vlm_with(name, PROCESSORS[name][number]), picture(*size)
    sample = encoded(vlm, image)
    found = rectangles(vlm, sample, image.size)
    before = entering(vlm, image)
    assert len(found) == len(before)
    blocks, start, tried = vlm.image_grid(sample), 0, 0
    assert blocks
    for rows, columns in blocks:
        here = range(start, start + rows * columns)
        start += len(here)
        areas = [rect[2] * rect[3] if (rect := found[i]) else 0.0 for i in here]
        for i, area in zip(here, areas, strict=True):
            rect = found[i]
            if rect is not None and area > 0.4 * max(areas):  # less of the image is in cells that are mostly padding
                change = (entering(vlm, painted(image, rect)) - before)[here.start : here.stop].norm(dim=-1)
                assert here[int(change.argmax())] == i
                tried += 1
    assert tried >= 3


def test_rectangles_by_hand() -> None:
    """A centre crop of an image twice as wide as high; padding to a square; both axes stretched."""
    crop, stretched, padded = (vlm_with("llava", one) for one in PROCESSORS["llava"])
    found = rectangles_of_grid(crop, [[4, 4]], (200, 100))
    assert found[0] == pytest.approx([0.25, 0, 0.125, 0.25])
    assert found[7] == pytest.approx([0.625, 0.25, 0.125, 0.25])  # second row, last column
    assert rectangles_of_grid(stretched, [[4, 4]], (200, 100))[7] == pytest.approx([0.75, 0.25, 0.25, 0.25])
    found = rectangles_of_grid(padded, [[4, 4]], (200, 100))
    assert found[:4] == [None] * 4 == found[12:]
    assert found[4] == pytest.approx([0, 0, 0.25, 0.5])


def test_pixels_behind_the_last_patch_belong_to_no_token() -> None:
    vlm = vlm_with("paligemma", SiglipImageProcessorPil(**WIDER))
    found = rectangles_of_grid(vlm, [[4, 4]], (30, 50))
    assert found[-1] == pytest.approx([12 / 18, 12 / 18, 4 / 18, 4 / 18])


def test_newlines_and_tiles_that_are_not_known_have_none() -> None:
    vlm = vlm_with("llava_next", PROCESSORS["llava_next"][0])
    found = rectangles_of_grid(vlm, [[4, 4], [8, 5]], (24, 40))
    assert [i for i, rect in enumerate(found) if rect is None] == [16 + 5 * row + 4 for row in range(8)]
    # 20 x 32 pixels in the middle of 32 x 32; of 8 columns of patches 4 are kept, from pixel 8 on
    assert found[16] == pytest.approx([0.1, 0, 0.2, 0.125]) and found[53] == pytest.approx([0.5, 0.875, 0.2, 0.125])
    idefics = vlm_with("idefics3", object())
    assert rectangles_of_grid(idefics, [[2, 2]] * 3, (20, 30)) == [None] * 12
    idefics.processor.image_processor = type("Splitting", (), {"do_image_splitting": True})()
    found = rectangles_of_grid(idefics, [[2, 2]] * 3, (20, 30))
    assert found[:8] == [None] * 8 and found[8:] == [
        [0, 0, 0.5, 0.5],
        [0.5, 0, 0.5, 0.5],
        [0, 0.5, 0.5, 0.5],
        [0.5] * 4,
    ]


def test_settings_that_are_not_known_give_none() -> None:
    padding: Any = CLIPImageProcessorPil(**CROP)
    padding.do_pad = True
    longest = CLIPImageProcessorPil(**LONGEST)
    for one in (padding, longest, None):
        assert rectangles_of_grid(vlm_with("llava", one), [[4, 4]], (30, 20)) == [None] * 16


@pytest.mark.parametrize("name", FAMILIES)
def test_one_for_each_image_token_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    vlm = vlm_with(name, PROCESSORS.get(name, [None])[0])
    for sample in family.samples():
        found = rectangles(vlm, sample, (97, 89))
        assert len(found) == int((sample["input_ids"] == IMAGE_ID).sum())
        for rect in filter(None, found):
            assert min(rect[:2]) >= 0 and min(rect[2:]) > 0 and max(rect[0] + rect[2], rect[1] + rect[3]) <= 1 + 1e-9
    words = torch.tensor([[BOS, 5, 7]])
    assert rectangles(vlm, {"input_ids": words, "attention_mask": torch.ones_like(words)}, (97, 89)) == []


def test_patches_of_the_demo() -> None:
    """Pixels of one rectangle reach the vision tower's input patch of that token and no other."""
    vlm, image = load("examples/shapes/model"), picture(48, 48)
    sample = vlm.encode("USER: <image>\nWhat color is the circle? ASSISTANT:", image)
    found = rectangles(vlm, sample, image.size)
    assert len(found) == 36 and found[7] == pytest.approx([1 / 6] * 4)
    model: Any = vlm.model
    embed = model.model.vision_tower.embeddings.patch_embedding

    def patches(image: Image.Image) -> Tensor:
        pixels = vlm.encode("<image>", image)["pixel_values"]
        return embed(pixels).flatten(2)[0].T

    before = patches(image)
    for i, rect in enumerate(found):
        assert rect is not None
        change = (patches(painted(image, rect)) - before).norm(dim=-1)
        assert change.nonzero().flatten().tolist() == [i]
