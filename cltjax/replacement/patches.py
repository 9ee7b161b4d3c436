"""Which part of the original image each image token stands for.

    rectangles(vlm, vlm.encode(prompt, image), image.size)          one [left, top, width, height] or None a token

Rectangles are fractions of the image as it was before the image processor. They are what the patches of a token's cell
are cut from; attention in the vision tower brings more. What a processor does to the image is read off its settings, in
the layouts of `capture.inputs.image_blocks`:

- one block: resizing (by the shortest edge, or to a height and width), padding to a square and centre crops, as far as
  the settings say; pixels behind the last whole patch belong to no token. What the crop cuts off is in no rectangle;
- qwen, mistral3: the image is stretched to whole cells;
- llava_next, llava_onevision: the first block is the whole image, stretched; the second the tiles, to which the image
  is fitted with its aspect ratio and padded, without the rows or columns that are padding alone. Its last column is
  newline vectors, which stand for nothing: None;
- several equal tiles (internvl, gemma3, idefics3, smolvlm): the tile that shows the whole image. The other ones: None.

None is also for image tokens behind a processor whose settings say something else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from capture.inputs import Encoded
from capture.vlm import VLM

Rect = list[float]  # [left, top, width, height], fractions of the image
Span = tuple[float, float] | None  # from, to, along one axis; None: nothing of the image


def rectangles(vlm: VLM, encoded: Encoded, image_size: tuple[int, int]) -> list[Rect | None]:
    """Of each image token of a sample in order; image_size: (width, height) of the original image in pixels."""
    count = int((encoded["input_ids"] == vlm.image_id).sum()) if vlm.image_id is not None else 0
    blocks = vlm.image_grid(encoded)
    if not blocks:
        return [None] * count
    return rectangles_of_grid(vlm, blocks, image_size)


def rectangles_of_grid(vlm: VLM, blocks: Sequence[Sequence[int]], image_size: tuple[int, int]) -> list[Rect | None]:
    """As `rectangles`, from the [rows, columns] blocks that a store's samples.jsonl has as `image_grid`."""
    width, height = image_size
    config, processor = vlm.config, getattr(vlm.processor, "image_processor", None)
    blocks = [(int(rows), int(columns)) for rows, columns in blocks]
    if not blocks or width < 1 or height < 1:
        return _nothing(blocks)
    if hasattr(config, "image_grid_pinpoints"):
        return _whole_and_tiles(config, blocks, width, height)
    if hasattr(config, "spatial_merge_size") or hasattr(_vision(config), "spatial_merge_size"):
        return _grid(*map(_even, blocks[0])) + _nothing(blocks[1:])
    return _equal_tiles(config, processor, blocks, width, height)


def image_places(tokens: int, position: np.ndarray, is_image: np.ndarray) -> np.ndarray:
    """Which of a sample's image tokens its rows in a store are: [n] numbers from 0, -1 for other rows.

    tokens: how many the sample has; position [n], is_image [n]: of the rows. A store may hold only some of the image
    tokens, but holds all other ones: what is between them is the image.
    """
    image = np.ones(tokens, bool)
    image[position[~is_image]] = False
    return np.where(is_image, np.cumsum(image)[position] - 1, -1)


# Layouts -----------------------------------------------------------------------------------------------------


def _equal_tiles(
    config: Any, processor: Any, blocks: Sequence[tuple[int, int]], width: int, height: int
) -> list[Rect | None]:
    """One block, or several of one size of which one shows the whole image."""
    if processor is None or len(set(blocks)) > 1:
        return _nothing(blocks)
    last = hasattr(processor, "crop_to_patches") or hasattr(processor, "do_image_splitting")
    if len(blocks) > 1 and not (last or hasattr(processor, "do_pan_and_scan")):
        return _nothing(blocks)
    rows, columns = blocks[0]
    if hasattr(processor, "do_image_splitting"):  # idefics3, smolvlm: stretched to a tile
        whole = _grid(_even(rows), _even(columns))
    elif frame := _frame(processor, width, height):
        patch_height, patch_width = _patch_size(config)
        whole = _grid(frame[1].cells(rows, patch_height), frame[0].cells(columns, patch_width))
    else:
        return _nothing(blocks)
    others = _nothing(blocks[1:])
    return others + whole if last else whole + others


def _whole_and_tiles(config: Any, blocks: Sequence[tuple[int, int]], width: int, height: int) -> list[Rect | None]:
    """The arithmetic of LLaVA-NeXT's image processor and of `pack_image_features` (capture/inputs.py)."""
    if len(blocks) != 2:
        return _nothing(blocks)
    edge, patch = _vision(config).image_size, _patch_size(config)[0]
    side = edge // patch
    whole = Axis(edge, 0, edge)
    (rows, columns), (tile_rows, tile_columns) = blocks
    target_height, target_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    if target_width / width < target_height / height:
        shown_height, shown_width = min(math.ceil(height * target_width / width), target_height), target_width
    else:
        shown_height, shown_width = target_height, min(math.ceil(width * target_height / height), target_width)
    down = Axis(target_height, (target_height - shown_height) // 2, shown_height)
    across = Axis(target_width, (target_width - shown_width) // 2, shown_width)

    n_rows, n_columns = target_height // edge * side, target_width // edge * side
    cut_rows = cut_columns = 0  # patches at either end that are padding
    if width / height > n_columns / n_rows:
        cut_rows = (n_rows - int(round(height * (n_columns / width), 7))) // 2
    else:
        cut_columns = (n_columns - int(round(width * (n_rows / height), 7))) // 2

    def kept(axis: Axis, patches: int, cut: int, n: int) -> list[Span]:
        """Of n tokens along an axis: one for each patch but those cut, or fewer, interpolated."""
        edges = [cut + (patches - 2 * cut) * i / n for i in range(n + 1)]
        tiles = [(math.floor(first / side), math.ceil(last / side) - 1) for first, last in pairwise(edges)]
        # a tile's patches leave out edge % patch pixels at its end
        starts = [tile * edge + (at - tile * side) * patch for (tile, _), at in zip(tiles, edges[:-1], strict=True)]
        ends = [tile * edge + (at - tile * side) * patch for (_, tile), at in zip(tiles, edges[1:], strict=True)]
        return [axis.part(start, end) for start, end in zip(starts, ends, strict=True)]

    tiles = _grid(
        kept(down, n_rows, cut_rows, tile_rows), [*kept(across, n_columns, cut_columns, tile_columns - 1), None]
    )
    return _grid(whole.cells(rows, patch), whole.cells(columns, patch)) + tiles


# What the settings of an image processor do ------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of the picture that the vision tower is given, in its pixels: the original image begins at `start` and
    takes `extent` of its `length`."""

    length: int
    start: float
    extent: float

    def part(self, first: float, last: float) -> Span:
        """These pixels as a span of the original."""
        begin, end = (min(max((at - self.start) / self.extent, 0.0), 1.0) for at in (first, last))
        return (begin, end) if end > begin else None

    def cells(self, n: int, patch: int) -> list[Span]:
        """Of n cells of whole patches, which leave out what is behind the last one."""
        side = self.length // patch * patch / n
        return [self.part(i * side, (i + 1) * side) for i in range(n)]


def _frame(processor: Any, width: int, height: int) -> tuple[Axis, Axis] | None:
    """Where the image is in the picture, (across, down); None where the settings are not known."""
    lengths, starts, extents = [width, height], [0.0, 0.0], [float(width), float(height)]
    if getattr(processor, "do_pad", None):
        if not hasattr(processor, "pad_to_square"):
            return None
        starts = [(max(lengths) - length) // 2 for length in lengths]
        lengths = [max(lengths)] * 2
    if getattr(processor, "do_resize", None):
        new = _resized(lengths, processor.size)
        if new is None:
            return None
        factors = [now / was for now, was in zip(new, lengths, strict=True)]
        starts = [start * factor for start, factor in zip(starts, factors, strict=True)]
        extents = [extent * factor for extent, factor in zip(extents, factors, strict=True)]
        lengths = new
    if getattr(processor, "do_center_crop", None):
        crop = _both(processor.crop_size)
        if crop is None:
            return None
        starts = [start - (length - one) // 2 for start, length, one in zip(starts, lengths, crop, strict=True)]
        lengths = crop
    across, down = (Axis(*one) for one in zip(lengths, starts, extents, strict=True))
    return across, down


def _resized(lengths: Sequence[int], size: Any) -> list[int] | None:
    """[width, height] after resizing."""
    if fixed := _both(size):
        return fixed
    edge = _of(size, "shortest_edge")
    if edge is None or _of(size, "longest_edge") is not None:
        return None
    return [edge if length == min(lengths) else int(edge * length / min(lengths)) for length in lengths]


def _both(size: Any) -> list[int] | None:
    """[width, height] of a size that fixes both."""
    width, height = _of(size, "width"), _of(size, "height")
    return None if width is None or height is None else [width, height]


def _of(size: Any, name: str) -> int | None:
    """A field of a size, which is a dict or has attributes."""
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _patch_size(config: Any) -> tuple[int, int]:
    """(height, width) of the tower's patches in pixels; 1 where it does not say."""
    found = getattr(_vision(config), "patch_size", 1)
    return (found, found) if isinstance(found, int) else (found[0], found[1])


# Grids -------------------------------------------------------------------------------------------------------


def _even(n: int) -> list[Span]:
    return [(i / n, (i + 1) / n) for i in range(n)]


def _grid(rows: Sequence[Span], columns: Sequence[Span]) -> list[Rect | None]:
    """Every row with every column, in reading order."""
    return [
        None if row is None or column is None else [column[0], row[0], column[1] - column[0], row[1] - row[0]]
        for row in rows
        for column in columns
    ]


def _nothing(blocks: Sequence[tuple[int, int]]) -> list[Rect | None]:
    return [None] * sum(rows * columns for rows, columns in blocks)
