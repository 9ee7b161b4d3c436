"""What a processor makes of one sample, and what has to happen to it: batches, answers, kinds of token, grids.

One sample is a dict of tensors whose names are those of the model's forward arguments. Tensors shaped like
`input_ids` [1, P] are one value a token; all others belong to the images (pixels, sizes, grids).
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Encoded = dict[str, Tensor]

TEXT, IMAGE, SPECIAL = 0, 1, 2  # modality of a token

# Tokens that families put around or between image tokens and that their tokenizers do not all list as special.
DELIMITERS = (
    *("<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<start_of_image>", "<end_of_image>", "<img>", "</img>", "[IMG_BREAK]", "[IMG_END]", "<image_newline>"),
    *("<|video_pad|>", "<video>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
)


def is_per_token(name: str, tensor: Tensor, sample: Encoded) -> bool:
    """Whether `tensor` has one value a token: [1, P], and no image input (a [1, 2] image size may look alike)."""
    return tensor.shape == sample["input_ids"].shape and not name.startswith(("pixel_", "image_"))


def collate(samples: list[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> dict[str, Tensor]:
    """One batch: token tensors padded to the longest [B, P], image tensors joined on their first axis.

    Padding is `pad_id` with attention 0 and type 0. Image tensors that differ behind the first axis (tiles, height,
    width) are padded with zeros at the end, which is what the families' own processors do. Samples must have the
    same names: ValueError for images and plain prompts in one batch.
    """
    names = list(samples[0])
    if any(set(sample) != set(names) for sample in samples):
        raise ValueError("samples with and without an image cannot share a batch")
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch: dict[str, Tensor] = {}
    for name in names:
        values = [sample[name] for sample in samples]
        if is_per_token(name, values[0], samples[0]):
            fill = pad_id if name == "input_ids" else 0
            gaps = [longest - value.shape[1] for value in values]
            sides = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            values = [pad(value, where, value=fill) for value, where in zip(values, sides, strict=True)]
        elif any(value.shape[1:] != values[0].shape[1:] for value in values):
            sizes = torch.tensor([value.shape[1:] for value in values]).max(dim=0).values.tolist()
            values = [pad(value, _behind(value, sizes)) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _behind(value: Tensor, sizes: list[int]) -> list[int]:
    """torch's padding list (last axis first) that brings all axes but the first to `sizes`."""
    gaps = [size - now for size, now in zip(sizes, value.shape[1:], strict=True)]
    return [width for gap in reversed(gaps) for width in (0, gap)]


def extend(sample: Encoded, answer: list[int], types: dict[str, int]) -> Encoded:
    """The sample followed by its answer's token ids; `types` says what a token-type tensor has there (else 0)."""
    longer = dict(sample)
    tail = {"input_ids": torch.tensor([answer], dtype=sample["input_ids"].dtype).reshape(1, -1)}
    for name, value in sample.items():
        if not is_per_token(name, value, sample):
            continue
        fill = 1 if name == "attention_mask" else types.get(name, 0)
        new = tail.get(name, torch.full((1, len(answer)), fill, dtype=value.dtype))
        longer[name] = torch.cat([value, new.to(value.device)], dim=1)
    return longer


# Kinds of token ----------------------------------------------------------------------------------------------


def image_token_id(config: Any) -> int | None:
    """The id of the placeholder that each image vector replaces."""
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def special_token_ids(config: Any, processor: Any) -> set[int]:
    """The tokenizer's special tokens and whatever config, processor or tokenizer name as an image delimiter."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found = set(getattr(tokenizer, "all_special_ids", []))
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    found.update(vocabulary[token] for token in DELIMITERS if token in vocabulary)
    for holder in (config, processor, tokenizer):
        for name, value in vars(holder).items() if holder is not None else ():
            if _names_vision(name) and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                found.add(value)
    return found


def _names_vision(name: str) -> bool:
    """boi_token_id, eoi_token_index, vision_start_token_id, image_break_token_id, fake_image_token_id, ..."""
    return name.endswith(("_token_id", "_token_index")) and any(
        part in name for part in ("image", "vision", "video", "boi_", "eoi_")
    )


def modality(input_ids: np.ndarray, image_id: int | None, special_ids: np.ndarray) -> np.ndarray:
    """[P] uint8: 0 text, 1 image, 2 special."""
    kinds = np.where(np.isin(input_ids, special_ids), SPECIAL, TEXT).astype(np.uint8)
    if image_id is not None:
        kinds[input_ids == image_id] = IMAGE
    return kinds


# Grids -------------------------------------------------------------------------------------------------------


def image_blocks(sample: Encoded, config: Any, image_id: int | None) -> list[list[int]] | None:
    """The image tokens as [rows, columns] blocks in reading order, or None where their layout cannot be told.

    The products sum to the number of image tokens. By layout:

    - one block of the image's own shape (llava, paligemma, gemma3), or several of equal size: internvl's tiles
      (row by row, the thumbnail last), gemma3's crops (after the whole image), idefics3's and smolvlm's tiles
      (row by row, the whole image last);
    - qwen: one block for each image, `image_grid_thw` after merging;
    - mistral3 (pixtral): one block for each image; its break tokens are tokens of their own and not counted;
    - llava_next, llava_onevision: the whole image, then all tiles as one block of unpadded rows, whose last
      *column* is the newline vector (it has an image token's id).
    """
    if image_id is None:
        return None
    count = int((sample["input_ids"] == image_id).sum())
    if count == 0:
        return []
    if "image_grid_thw" in sample:
        blocks = _merged_grids(sample["image_grid_thw"], config)
    elif "image_sizes" in sample and hasattr(config, "image_grid_pinpoints"):
        blocks = _whole_and_tiles(sample["image_sizes"], config)
    elif "image_sizes" in sample:
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        blocks = [[height // side, width // side] for height, width in sample["image_sizes"].tolist()]
    else:
        blocks = _equal_blocks(sample, count)
    if blocks is None or sum(rows * columns for rows, columns in blocks) != count:
        return None
    return blocks


def _merged_grids(grids: Tensor, config: Any) -> list[list[int]]:
    merge = config.vision_config.spatial_merge_size
    return [[rows // merge, columns // merge] for times, rows, columns in grids.tolist() for _ in range(times)]


def _whole_and_tiles(sizes: Tensor, config: Any) -> list[list[int]]:
    """The arithmetic of LlavaNextModel / LlavaOnevisionModel.pack_image_features (unpad_image, interpolation)."""
    from transformers.image_processing_utils import select_best_resolution

    edge = config.vision_config.image_size
    side = edge // config.vision_config.patch_size
    blocks = []
    for height, width in sizes.tolist():
        best_height, best_width = select_best_resolution((height, width), config.image_grid_pinpoints)
        rows, columns = best_height // edge * side, best_width // edge * side
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        limit = getattr(config, "vision_aspect_ratio", None)
        if limit is not None:
            ratio = math.sqrt(rows * columns / (int(limit.removeprefix("anyres_max_")) * side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        blocks += [[side, side], [rows, columns + 1]]
    return blocks


def _equal_blocks(sample: Encoded, count: int) -> list[list[int]] | None:
    """Image tensors of one size, each giving the same number of tokens in its own shape."""
    pixels = sample.get("pixel_values")
    if pixels is None or pixels.dim() < 4:
        return None
    tiles = math.prod(pixels.shape[:-3])  # [tiles, C, H, W], or [1, tiles, C, H, W]
    height, width = pixels.shape[-2:]
    each, rest = divmod(count, tiles)
    rows = math.isqrt(each * height // width)
    if rest or rows == 0 or each % rows or rows * width != each // rows * height:
        return None
    return [[rows, each // rows] for _ in range(tiles)]
