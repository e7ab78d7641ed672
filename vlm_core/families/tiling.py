"""How each family cuts an image and turns it into tokens: crops, padding, pooling, in the order of its tokens.

One small function per way of cutting (``CUTS``), named by ``Family.layout``; each gives, for one image, the ``Part``s
that its tokens form, each grid of tokens with the vision tower's patches under it (``Patches``). Sizes are recomputed from the processor's own settings with ``transformers``' own functions;
``vlm_core.families.layout`` turns parts into boxes and checks that their number is what the processor wrote.

``whole``         one view: padded to a square, resized, cropped at the centre, cut into patches (LLaVA, PaliGemma)
``native``        one view in its own aspect ratio, its size in ``image_sizes`` (Pixtral, Mistral 3)
``thw``           the same, in ``image_grid_thw`` after spatial merging (Qwen-VL, GLM-4V)
``anyres``        a thumbnail, then tiles stitched to one grid whose rows end with a newline (LLaVA-NeXT, -OneVision)
``canvas``        tiles of a stretched image, then a thumbnail (InternVL, AyaVision)
``split``         the same after resizing to multiples of the tile (Idefics3, SmolVLM)
``pan_and_scan``  the whole image, then crops where asked for (Gemma 3)
``keys``          keys of the cross-attention: tiles of a padded canvas, each led by a CLS, filled up (Mllama)
``queries``       learned queries: no place on the image (Idefics2, BLIP-2, InstructBLIP)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any

import numpy as np

__all__ = ["CUTS", "Part", "Patches", "Source"]

Box = tuple[float, float, float, float]
FULL: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Patches:
    """The vision tower's patches under a grid of image tokens.

    Token (row, column) shows the patches from ``first + step * (row, column)`` on, ``step`` of them down and across, of its
    views laid side by side.

    Parameters
    ----------
    view : (rows, columns)
        Of patches in one view, as the tower sees it.
    views : (rows, columns)
        Of views that make up the grid, in the order in which the tower gets them, row by row.
    first : (row, column)
        Where the first token starts.
    step : (down, across)
        Patches per token; a fraction where tokens are interpolated.
    """

    view: tuple[int, int]
    views: tuple[int, int] = (1, 1)
    first: tuple[int, int] = (0, 0)
    step: tuple[float, float] = (1, 1)


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive image tokens: a grid on the image, read row by row, or tokens without a place.

    Parameters
    ----------
    kind : str
        One of ``vlm_core.families.layout.KINDS``.
    down, across : float arrays ``[row, 2]`` and ``[column, 2]``, or None
        Where each row and each column starts and stops, in shares of the image's height and width; they leave the image
        where it was padded. None: no place on the image.
    tile : int or int array ``[row, column]``
        The crop that the vision tower saw, counted in the order of tokens; -1 for none.
    newline : bool
        Whether each row is followed by a newline token.
    count : int
        How many tokens without a place.
    patches : Patches, optional
        What the vision tower saw of a grid; None where its tokens are no pooled patches.
    """

    kind: str
    down: np.ndarray | None
    across: np.ndarray | None
    tile: Any = 0
    newline: bool = False
    count: int = 0
    patches: Patches | None = None

    def __len__(self) -> int:
        return self.count if self.down is None else len(self.down) * (len(self.across) + self.newline)


@dataclass(frozen=True, eq=False)
class Source:
    """What says how images were cut: processor, model config, processor outputs (numpy) and options of the call."""

    processor: Any
    config: Any
    inputs: Mapping[str, np.ndarray]
    options: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """A setting of image processing: the call's, else the processor's own default, else the image processor's."""
        for known in (self.options, getattr(self.processor, "images_kwargs", None) or {}):
            if name in known:
                return known[name]
        return getattr(self.processor.image_processor, name, default)

    def size(self, name: str = "size") -> dict[str, int]:
        """A size setting as a plain dictionary."""
        value = self.get(name)
        if isinstance(value, int):
            return {"height": value, "width": value}
        return {key: number for key, number in dict(value or {}).items() if number is not None}

    @property
    def cls(self) -> list[Part]:
        """The summary token that leads a view's patches, where the processor counts one."""
        extra = getattr(self.processor, "num_additional_image_tokens", 0)
        dropped = getattr(self.processor, "vision_feature_select_strategy", None) == "default"
        return [_loose("cls", 1)] if extra - dropped > 0 else []


def _loose(kind: str, count: int, tile: int = -1) -> Part:
    return Part(kind, None, None, tile, count=count)


def _blank(height: int, width: int) -> np.ndarray:
    # An image of that size without its memory, for functions that read only the shape.
    return np.broadcast_to(np.uint8(0), (1, height, width))


def _inside(box: Box, part: Box) -> Box:
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    return (x0 + width * part[0], y0 + height * part[1], x0 + width * part[2], y0 + height * part[3])


def _cells(start: float, stop: float, n: int, share: float = 1.0) -> np.ndarray:
    # n equal intervals [n, 2] over the first `share` of an interval.
    edges = start + (stop - start) * share * np.arange(n + 1) / n
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _grid(kind: str, box: Box, pixels: tuple[int, int], patch: int, tile: int = 0, merged: int = 1) -> Part:
    # Cells of `merged` patches a side over a view of `pixels` (height, width); what is left over at its end has no token.
    (height, width), cell = pixels, patch * merged
    rows, columns = height // cell, width // cell
    down = _cells(box[1], box[3], rows, rows * cell / height)
    patches = Patches((height // patch, width // patch), step=(merged, merged))
    return Part(kind, down, _cells(box[0], box[2], columns, columns * cell / width), tile, patches=patches)


def _padded_to_square(height: int, width: int) -> tuple[Box, int]:
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return (-left / width, -top / height, (side - left) / width, (side - top) / height), side


def _tile_boxes(rows: int, columns: int) -> list[Box]:
    return [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)]


def _side(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def _resized(source: Source, height: int, width: int) -> tuple[int, int]:
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
    from transformers.image_utils import ChannelDimension, get_image_size_for_max_height_width

    size = source.size()
    if "shortest_edge" in size and "longest_edge" in size:
        return get_size_with_aspect_ratio((height, width), size["shortest_edge"], size["longest_edge"])
    if "shortest_edge" in size:
        blank = _blank(height, width)
        edge = size["shortest_edge"]
        return get_resize_output_image_size(blank, edge, default_to_square=False, input_data_format=ChannelDimension.FIRST)
    if "max_height" in size:
        return get_image_size_for_max_height_width((height, width), size["max_height"], size["max_width"])
    return size["height"], size["width"]


def whole(source: Source, height: int, width: int, index: int) -> list[Part]:
    """One view of the image, after whatever the image processor pads, resizes and crops."""
    if "image_sizes" in source.inputs:
        return native(source, height, width, index)
    box = FULL
    if source.get("do_pad") and hasattr(source.processor.image_processor, "pad_to_square"):
        box, height = _padded_to_square(height, width)
        width = height
    if source.get("do_resize"):
        height, width = _resized(source, height, width)
    if source.get("do_center_crop"):
        crop = source.size("crop_size")
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        bottom, right = top + crop["height"], left + crop["width"]
        box = _inside(box, (left / width, top / height, right / width, bottom / height))
        height, width = crop["height"], crop["width"]
    return [*source.cls, _grid("patch", box, (height, width), source.config.vision_config.patch_size)]


def native(source: Source, height: int, width: int, index: int) -> list[Part]:
    """One view whose resized size the processor reports."""
    resized = tuple(int(side) for side in source.inputs["image_sizes"][index])
    merged = getattr(source.config, "spatial_merge_size", 1)
    return [_grid("patch", FULL, resized, source.config.vision_config.patch_size, merged=merged)]


def thw(source: Source, height: int, width: int, index: int) -> list[Part]:
    """One view whose patches the processor counts, merged in squares."""
    merge = source.config.vision_config.spatial_merge_size
    _, rows, columns = (int(count) for count in source.inputs["image_grid_thw"][index])
    patches = Patches((rows, columns), step=(merge, merge))
    return [Part("patch", _cells(0, 1, rows // merge), _cells(0, 1, columns // merge), patches=patches)]


def anyres(source: Source, height: int, width: int, index: int) -> list[Part]:
    """A thumbnail and one grid stitched of all tiles, without the rows or columns that are (almost) only padding."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    config = source.config
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = tile // patch
    together = np.repeat(source.inputs.get("batch_num_images", ()), source.inputs.get("batch_num_images", ()))
    if len(together) and together[index] > 1:
        # LLaVA-OneVision pads the images of a prompt that has several to squares instead.
        return [_grid("patch", _padded_to_square(height, width)[0], (tile, tile), patch), _loose("newline", 1)]
    best = select_best_resolution((height, width), [list(map(int, pair)) for pair in source.get("image_grid_pinpoints")])
    resized = get_patch_output_size(_blank(height, width), best, input_data_format=ChannelDimension.FIRST)
    rows, columns = best[0] // tile * n, best[1] // tile * n
    cut_rows = cut_columns = 0
    if width / height > columns / rows:
        cut_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        cut_columns = (columns - int(round(width * (rows / height), 7))) // 2
    n_rows, n_columns = kept_rows, kept_columns = rows - 2 * cut_rows, columns - 2 * cut_columns
    if hasattr(config, "vision_aspect_ratio"):
        # LLaVA-OneVision: a grid of too many tokens is interpolated down.
        ratio = sqrt(kept_rows * kept_columns / (int(config.vision_aspect_ratio.strip("anyres_max_")) * n**2))
        if ratio > 1.1:
            n_rows, n_columns = int(kept_rows // ratio), int(kept_columns // ratio)
    down, tile_row = _stitched(cut_rows, kept_rows, n_rows, (tile, patch), (best[0] - resized[0]) // 2, resized[0])
    across, tile_column = _stitched(
        cut_columns, kept_columns, n_columns, (tile, patch), (best[1] - resized[1]) // 2, resized[1]
    )
    tiles = tile_row[:, None] * (columns // n) + tile_column
    stitched = Patches(
        (n, n), (rows // n, columns // n), (cut_rows, cut_columns), (kept_rows / n_rows, kept_columns / n_columns)
    )
    return [
        *source.cls,
        _grid("thumbnail", FULL, (tile, tile), patch, -1),
        Part("tile", down, across, tiles, newline=True, patches=stitched),
    ]


def _stitched(cut: int, kept: int, n_cells: int, view: tuple[int, int], before: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    # Along one side: patches `cut` to `cut + kept` of tiles in a row, as n_cells, on an image of `length` pixels that
    # follows `before` pixels of padding. Patches need not fill a tile: the rest at its end has no token.
    tile, patch = view
    n = tile // patch
    edges = cut + kept * np.arange(n_cells + 1) / n_cells
    first, last = edges[:-1] // n, np.ceil(edges[1:] / n) - 1
    start = first * tile + (edges[:-1] - first * n) * patch
    stop = last * tile + (edges[1:] - last * n) * patch
    middle = (edges[:-1] + edges[1:]) / 2 // n
    return (np.stack([start, stop], axis=1) - before) / length, middle.astype(int)


def _tiles_then_thumbnail(rows: int, columns: int, pixels: tuple[int, int], patch: int, merged: int) -> list[Part]:
    if rows * columns == 1:
        return [_grid("patch", FULL, pixels, patch, merged=merged)]
    tiles = [_grid("tile", box, pixels, patch, tile, merged) for tile, box in enumerate(_tile_boxes(rows, columns))]
    return [*tiles, _grid("thumbnail", FULL, pixels, patch, -1, merged)]


def canvas(source: Source, height: int, width: int, index: int) -> list[Part]:
    """Tiles of the image stretched to the best-fitting arrangement, then a thumbnail."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    config, size = source.config, source.size()
    pixels = (size["height"], size["width"])
    rows = columns = 1
    if source.get("crop_to_patches") and source.get("max_patches") > 1:
        columns, rows = get_optimal_tiled_canvas(
            (height, width), pixels, source.get("min_patches"), source.get("max_patches")
        )
    merged = getattr(config, "downsample_factor", None) or round(1 / config.downsample_ratio)
    return _tiles_then_thumbnail(rows, columns, pixels, _side(config.vision_config.patch_size), merged)


def split(source: Source, height: int, width: int, index: int) -> list[Part]:
    """Tiles of the image resized to multiples of the tile, then a thumbnail."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    size, tile = source.size(), source.size("max_image_size")["longest_edge"]
    if source.get("do_resize"):
        if "longest_edge" in size:
            height, width = get_resize_output_image_size(_blank(height, width), size["longest_edge"])
        else:
            height, width = size["height"], size["width"]
    rows = columns = 1
    if source.get("do_image_splitting"):
        # `resize_for_vision_encoder`: the longer side up to a multiple, the shorter in proportion, then up as well.
        aspect = width / height
        if width >= height:
            columns = ceil(width / tile)
            rows = ceil(int(columns * tile / aspect) / tile)
        else:
            rows = ceil(height / tile)
            columns = ceil(int(rows * tile * aspect) / tile)
    patch, merged = source.config.vision_config.patch_size, source.config.scale_factor
    return _tiles_then_thumbnail(rows, columns, (tile, tile), patch, merged)


def pan_and_scan(source: Source, height: int, width: int, index: int) -> list[Part]:
    """The whole image, then its crops where pan-and-scan is on and the image long enough."""
    names = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")
    crops = []
    if source.get("do_pan_and_scan"):
        crops = source.processor.image_processor.pan_and_scan(_blank(height, width), *map(source.get, names))
    vision = source.config.vision_config
    merged = vision.image_size // vision.patch_size // int(source.config.mm_tokens_per_image**0.5)
    view = ((vision.image_size,) * 2, vision.patch_size)
    parts = [_grid("thumbnail" if crops else "patch", FULL, *view, -1 if crops else 0, merged)]
    x = y = 0
    for tile, crop in enumerate(crops):
        high, wide = crop.shape[-2:]
        box = (x / width, y / height, (x + wide) / width, (y + high) / height)
        parts.append(_grid("tile", box, *view, tile, merged))
        x, y = (x + wide, 0) if width >= height else (0, y + high)
    return parts


def keys(source: Source, height: int, width: int, index: int) -> list[Part]:
    """Keys of the cross-attention: every tile a CLS and its patches, then tiles that only fill up."""
    from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas, get_optimal_tiled_canvas

    tile, most = source.size()["height"], source.get("max_image_tiles")
    canvas_height, canvas_width = map(int, get_optimal_tiled_canvas(height, width, most, tile))
    high, wide = get_image_size_fit_to_canvas(height, width, canvas_height, canvas_width, tile)
    box = (0.0, 0.0, float(canvas_width / wide), float(canvas_height / high))
    boxes = _tile_boxes(canvas_height // tile, canvas_width // tile)
    parts = []
    for number, share in enumerate(boxes):
        kind = "tile" if len(boxes) > 1 else "patch"
        grid = _grid(kind, _inside(box, share), (tile, tile), source.config.vision_config.patch_size, number)
        parts += [_loose("cls", 1, number), grid]
    filled = (most - len(boxes)) * (1 + len(parts[-1]))
    return [*parts, _loose("padding", filled)] if filled else parts


def queries(source: Source, height: int, width: int, index: int) -> list[Part]:
    """Learned queries, each over a whole view."""
    processor = source.processor
    if hasattr(processor, "num_query_tokens"):
        return [_loose("query", processor.num_query_tokens, 0)]
    views = [0, 1, 2, 3, -1] if source.get("do_image_splitting") else [0]
    return [_loose("query", processor.image_seq_len, tile) for tile in views]


CUTS = {cut.__name__: cut for cut in (whole, native, thw, anyres, canvas, split, pan_and_scan, keys, queries)}
