"""Image token <-> place on the image, for every family.

``image_layouts(...)``             one ``Layout`` per prompt: which tokens are the image's and what each one covers
``coverage(layout, mask)``         how much of each token's box an object's mask covers
``object_tokens(layout, mask)``    the tokens of an object, with 0, 1 or 2 rings of neighbours (Neo et al., ICLR 2025)
``heatmap(layout, values, size)``  a value per image token drawn on the original image

Places are boxes ``(x0, y0, x1, y1)`` in shares (0 to 1) of the *original* image's width and height, whatever was
resized, padded, cropped, tiled, pooled or merged in between. A box is what the token's own patches show; through
attention a token knows about the rest of its view as well. How families cut images is data in ``vlm_core.families.tiling``.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_core.errors import NotMeasurable, SubjectError
from vlm_core.families.family import Family
from vlm_core.families.tiling import CUTS, Part, Patches, Source

__all__ = ["KINDS", "Layout", "coverage", "heatmap", "image_layouts", "object_tokens"]

KINDS = {
    "patch": "a place on an image that is seen whole and once",
    "tile": "a place on a crop of the image",
    "thumbnail": "a place on the whole image, seen beside its crops",
    "newline": "the end of a row",
    "cls": "the summary token of a view",
    "padding": "a place outside the image, or a tile that only fills up",
    "query": "a learned query",
}
_COARSE = "thumbnail"
_NO_BOX = {
    "queries": "its image tokens are learned queries that each attend over a whole view, so none has a place on the image"
}


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the image tokens of one prompt lie.

    Parameters
    ----------
    positions : int array ``[image token]``
        Index in the prompt's tokens; among the keys of the cross-attention where ``where`` says so.
    image : int array ``[image token]``
        Which of the prompt's images; -1 for keys that belong to none.
    kind : str array ``[image token]``
        One of ``KINDS``.
    tile : int array ``[image token]``
        The crop that the vision tower saw, counted in the order of tokens; -1 for thumbnails and tokens of no crop.
    grid, row, column : int array ``[image token]``
        Grids of the prompt counted from 0 and the token's place in its own; -1 for tokens of no grid. Every tile and
        every thumbnail is a grid; the tiles of LLaVA-NeXT and LLaVA-OneVision are stitched to one.
    corners : float array ``[image token, 4]``
        Boxes, NaN where a token has none.
    sizes : tuple of (height, width)
        The prompt's images.
    where : {"sequence", "cross_attention"}
    reason : str
        Why no token has a box, if none has; else empty.
    patches : tuple of Patches
        What the vision tower saw of each grid, in the order in which it saw them; empty where tokens are no pooled patches.
    """

    positions: np.ndarray
    image: np.ndarray
    kind: np.ndarray
    tile: np.ndarray
    grid: np.ndarray
    row: np.ndarray
    column: np.ndarray
    corners: np.ndarray
    sizes: tuple[tuple[int, int], ...]
    where: str = "sequence"
    reason: str = ""
    patches: tuple[Patches, ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(self.kind.tolist()).items())
        images = ", ".join(f"{width} x {height}" for height, width in self.sizes)
        return f"Layout({len(self)} image tokens: {kinds}; images of {images} pixels)"

    @property
    def boxes(self) -> np.ndarray:
        """Float array ``[image token, 4]``: x0, y0, x1, y1 of each token's box, NaN for tokens without a place.

        Raises
        ------
        ValueError
            With the reason, where a family's tokens have no place on the image.
        """
        if self.reason:
            raise NotMeasurable(self.reason)
        return self.corners

    @property
    def spans(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per image the runs ``(start, stop)`` of its tokens; separators the prompt writes between them are outside."""
        runs = []
        for image in range(len(self.sizes)):
            positions = self.positions[self.image == image]
            breaks = np.flatnonzero(np.diff(positions) != 1) + 1
            runs.append(tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)))
        return tuple(runs)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns where the tokens are one image's single grid, read row by row; None otherwise."""
        if self.reason or len(self) == 0 or not bool((self.kind == "patch").all()) or self.grid.max() > 0:
            return None
        return int(self.row[-1]) + 1, int(self.column[-1]) + 1

    def placed(self, image: int = 0) -> np.ndarray:
        """Bool array ``[image token]``: the tokens of an image that have a box."""
        if not 0 <= image < len(self.sizes):
            raise ValueError(f"the prompt has {len(self.sizes)} image(s), counted from 0: there is no image {image}.")
        return (self.image == image) & ~np.isnan(self.boxes[:, 0])

    def at(self, x: float, y: float, image: int = 0) -> np.ndarray:
        """Indices of the image tokens whose box holds the point (shares of the image's width and height)."""
        x0, y0, x1, y1 = self.boxes.T
        return np.flatnonzero(self.placed(image) & (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))

    def in_sequence(self, chosen: np.ndarray, length: int) -> np.ndarray:
        """Bool array ``[length]`` over the prompt's tokens (or keys): the chosen ones of ``[image token]``."""
        chosen = np.asarray(chosen, dtype=bool)
        if chosen.shape != (len(self),) or (len(self) and length <= self.positions[-1]):
            raise ValueError(
                f"{len(self)} image tokens up to position {self.positions[-1:]} do not fit {chosen.shape} choices in a "
                f"sequence of {length}: choose among the layout's tokens and give the prompt's whole length."
            )
        mask = np.zeros(length, dtype=bool)
        mask[self.positions[chosen]] = True
        return mask


def image_layouts(
    family: Family,
    config: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]],
    options: Mapping[str, Any] | None = None,
) -> list[Layout]:
    """Where the image tokens of each prompt lie on its images.

    Parameters
    ----------
    family : Family
    config : the model's config
    processor : the processor that made ``inputs``
    inputs : mapping
        Its outputs: ``input_ids [prompt, token]`` and what it says about the images.
    sizes : per prompt, (height, width) of each of its images
        As they were given to the processor, in the order of the prompt.
    options : mapping, optional
        Options on images that the processor's call was given (``do_pan_and_scan=True``).

    Raises
    ------
    SubjectError
        If the family's layout is unknown, or the processor wrote another number of image tokens.
    TypeError, ValueError
        If ``family`` is no ``Family``, or ``inputs`` or ``sizes`` are not what they should be.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {family!r:.60} ({type(family).__name__}): pass subject.anatomy.family")
    if family.layout not in CUTS:
        raise SubjectError(
            f"model_type '{family.model_type}' declares the layout '{family.layout}', which vlm_core.families.tiling does not know "
            f"(known: {', '.join(CUTS)}): its image tokens cannot be placed on the image."
        )
    if processor is None:
        raise SubjectError(
            "image tokens cannot be placed without the processor that made them: give the subject its processor."
        )
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise ValueError("inputs must be what the processor gave, with 'input_ids' in it: pass batch.inputs of subject.encode(...)")
    _require_sizes(sizes)
    # Tensors may lie on another device.
    names = ("input_ids", "image_grid_thw", "image_sizes", "batch_num_images", "aspect_ratio_ids")
    found = {name: inputs[name] for name in names if name in inputs}
    described = {name: np.asarray(value.cpu() if hasattr(value, "cpu") else value) for name, value in found.items()}
    source = Source(processor, config, described, options or {})
    ids = described["input_ids"]
    if len(sizes) != len(ids):
        raise ValueError(f"there are {len(ids)} prompts, but sizes of the images of {len(sizes)}.")
    token = next(getattr(config, name) for name in family.image_token if hasattr(config, name))
    crossing = family.layout == "keys"
    slots = described["aspect_ratio_ids"].shape[1] if crossing else 0
    layouts, index = [], 0
    for row, prompt in enumerate(sizes):
        images = []
        for height, width in prompt:
            images.append(CUTS[family.layout](source, int(height), int(width), index))
            index += 1
        if crossing:
            # Prompts of one batch get as many images each; what is missing is filled up.
            keys = sum(map(len, images[0])) if images else 0
            unused = [Part("padding", None, None, -1, count=keys * max(slots - len(prompt), 0))]
            positions = np.arange(keys * slots)
        else:
            unused, positions = [], np.flatnonzero(ids[row] == token)
        layouts.append(_assemble(family, images, unused, positions, prompt, crossing))
    return layouts


def _require_sizes(sizes: Any) -> None:
    """Refuse what is not, per prompt, a list of (height, width)."""
    instead = "give per prompt a list of its images' (height, width), such as [[(336, 224)]]"

    def several(value: Any) -> bool:
        return not isinstance(value, str | bytes | Mapping) and hasattr(value, "__len__") and hasattr(value, "__iter__")

    if not several(sizes):
        raise ValueError(f"sizes are {sizes!r:.60} ({type(sizes).__name__}): {instead}")
    for number, prompt in enumerate(sizes):
        if not several(prompt):
            raise ValueError(f"the sizes of prompt {number} are {prompt!r:.60}: {instead}")
        for size in prompt:
            if not several(size) or len(size) != 2 or not all(hasattr(one, "__index__") and operator.index(one) > 0 for one in size):
                raise ValueError(f"an image of prompt {number} has the size {size!r:.60}, which is no pair of whole numbers above 0: {instead}")


def _assemble(
    family: Family,
    images: list[list[Part]],
    unused: list[Part],
    positions: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    crossing: bool,
) -> Layout:
    patches = tuple(part.patches for parts in images for part in parts if part.patches is not None and not crossing)
    pieces = [_tokens(part, number) for number, parts in enumerate(images) for part in parts]
    pieces += [_tokens(part, -1) for part in (*unused, Part("padding", None, None))]
    grids = 0
    for piece in pieces:
        on_grid = piece["grid"] == 0
        piece["grid"][on_grid] = grids
        grids += bool(on_grid.any())
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    count = len(columns["kind"])
    if count != len(positions):
        raise SubjectError(
            f"model_type '{family.model_type}': images of (height, width) {', '.join(map(str, map(tuple, sizes)))} make "
            f"{count} image tokens by the processor's settings, but the prompt holds {len(positions)}: give the sizes that "
            f"the processor saw and the options it was called with."
        )
    reason = _NO_BOX.get(family.layout, "")
    return Layout(
        positions=positions,
        sizes=tuple((int(height), int(width)) for height, width in sizes),
        where="cross_attention" if crossing else "sequence",
        reason=reason and f"model_type '{family.model_type}': {reason}.",
        patches=patches,
        **columns,
    )


def _tokens(part: Part, image: int) -> dict[str, np.ndarray]:
    # The tokens of one part, row by row.
    count = len(part)
    tokens = {
        "image": np.full(count, image),
        "kind": np.full(count, part.kind, dtype="<U9"),
        "tile": np.full(count, -1),
        "grid": np.full(count, -1),
        "row": np.full(count, -1),
        "column": np.full(count, -1),
        "corners": np.full((count, 4), np.nan),
    }
    if part.down is None:
        tokens["tile"][:] = part.tile
        return tokens
    rows, columns = len(part.down), len(part.across)
    row, column = (index.reshape(-1) for index in np.indices((rows, columns + part.newline)))
    on_grid = column < columns
    row, column = row[on_grid], column[on_grid]
    starts = np.stack([part.across[column, 0], part.down[row, 0]], axis=1)
    stops = np.stack([part.across[column, 1], part.down[row, 1]], axis=1)
    boxes = np.concatenate([starts, stops], axis=1).clip(0.0, 1.0)
    outside = (boxes[:, 2:] - boxes[:, :2] < 1e-9).any(axis=1)
    boxes[outside] = np.nan
    tokens["kind"][on_grid] = np.where(outside, "padding", part.kind)
    tokens["kind"][~on_grid] = "newline"
    tokens["tile"][on_grid] = np.broadcast_to(part.tile, (rows, columns)).reshape(-1)
    for name, values in (("grid", 0), ("row", row), ("column", column), ("corners", boxes)):
        tokens[name][on_grid] = values
    return tokens


def coverage(layout: Layout, mask: np.ndarray, image: int = 0) -> np.ndarray:
    """Share of each token's box that a mask covers.

    Parameters
    ----------
    mask : bool array ``[height, width]``
        On the original image, at any resolution of it.
    image : int
        The image of the prompt that it belongs to.

    Returns
    -------
    float array ``[image token]``
        Exact areas; 0 for tokens without a box and for those of other images.

    Raises
    ------
    ValueError
        If the tokens have no place on the image.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"a mask is one array [height, width], but this one has shape {mask.shape}.")
    height, width = mask.shape
    here = layout.placed(image)
    summed = np.zeros((height + 1, width + 1))
    summed[1:, 1:] = (mask != 0).cumsum(0).cumsum(1)
    x0, y0, x1, y1 = (layout.boxes[here] * [width, height, width, height]).T
    inside = _area(summed, y1, x1) - _area(summed, y0, x1) - _area(summed, y1, x0) + _area(summed, y0, x0)
    shares = np.zeros(len(layout))
    shares[here] = (inside / ((x1 - x0) * (y1 - y0))).clip(0.0, 1.0)
    return shares


def _area(summed: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    # The mask's area left of and above a point; between pixel edges it grows bilinearly.
    top = np.minimum(y.astype(int), summed.shape[0] - 2)
    left = np.minimum(x.astype(int), summed.shape[1] - 2)
    v, u = y - top, x - left
    upper = (1 - u) * summed[top, left] + u * summed[top, left + 1]
    lower = (1 - u) * summed[top + 1, left] + u * summed[top + 1, left + 1]
    return (1 - v) * upper + v * lower


def object_tokens(
    layout: Layout, mask: np.ndarray, threshold: float = 0.0, rings: int = 0, image: int = 0
) -> np.ndarray:
    """The image tokens that show an object.

    Parameters
    ----------
    mask : bool array ``[height, width]``
    threshold : float
        A token counts when more than this share of its box is inside the mask; 0 means any part of it.
    rings : {0, 1, 2}
        Rings of neighbours added, the eight around a token, on its own grid (tile by tile).
    image : int

    Returns
    -------
    bool array ``[image token]``

    Raises
    ------
    ValueError
        If the tokens have no place on the image, or an argument is out of range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"the threshold is a share of a token's box, at least 0 and below 1, but it is {threshold}.")
    if rings not in (0, 1, 2):
        raise ValueError(f"rings of neighbours are 0, 1 or 2, but {rings!r} were asked for.")
    chosen = coverage(layout, mask, image) > threshold
    if not rings:
        return chosen
    here, around = layout.placed(image), chosen.copy()
    for grid in np.unique(layout.grid[chosen]):
        on_grid = np.flatnonzero(here & (layout.grid == grid))
        shown = np.zeros((layout.row[on_grid].max() + 1 + 2 * rings, layout.column[on_grid].max() + 1 + 2 * rings), bool)
        picked = on_grid[chosen[on_grid]]
        for down in range(2 * rings + 1):
            for right in range(2 * rings + 1):
                shown[layout.row[picked] + down, layout.column[picked] + right] = True
        around[on_grid] = shown[layout.row[on_grid] + rings, layout.column[on_grid] + rings]
    return around


def heatmap(layout: Layout, values: Any, size: tuple[int, int], image: int = 0) -> np.ndarray:
    """Values of image tokens drawn on the image.

    Parameters
    ----------
    values : float array ``[image token]``
    size : (height, width)
        Of the drawing; the original image's for a pixel-by-pixel overlay.
    image : int

    Returns
    -------
    float array ``[height, width]``
        Each pixel the mean of the tokens over it, weighted by how much of it they cover; the thumbnail's only where no
        finer token is. NaN where the model saw nothing (cropped away).

    Raises
    ------
    ValueError
        If the tokens have no place on the image, or there is not one value per image token.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(layout),):
        raise ValueError(f"a heatmap needs one value per image token ({len(layout)}), but the values have shape {values.shape}.")
    here, coarse = layout.placed(image), layout.kind == _COARSE
    fine = _paint(layout, values, here & ~coarse, size)
    rough = _paint(layout, values, here & coarse, size)
    return np.where(np.isnan(fine), rough, fine)


def _paint(layout: Layout, values: np.ndarray, tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    total, weight = np.zeros(size), np.zeros(size)
    for grid in np.unique(layout.grid[tokens]):
        on_grid = tokens & (layout.grid == grid)
        rows, row = np.unique(layout.row[on_grid], return_inverse=True)
        columns, column = np.unique(layout.column[on_grid], return_inverse=True)
        # A grid is separable: what a token covers of a pixel is the product of what its row and its column cover.
        x, y = np.zeros((len(columns), 2)), np.zeros((len(rows), 2))
        x[column], y[row] = layout.corners[on_grid][:, [0, 2]], layout.corners[on_grid][:, [1, 3]]
        down, across = _overlap(y, size[0]), _overlap(x, size[1])
        drawn, present = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
        drawn[row, column], present[row, column] = values[on_grid], 1
        total += down @ drawn @ across.T
        weight += down @ present @ across.T
    return np.divide(total, weight, out=np.full(size, np.nan), where=weight > 1e-9)


def _overlap(intervals: np.ndarray, n: int) -> np.ndarray:
    # [pixel, interval]: the share of each of n pixels that an interval covers.
    pixels = np.arange(n)[:, None]
    low, high = intervals[:, 0] * n, intervals[:, 1] * n
    return (np.minimum(high, pixels + 1) - np.maximum(low, pixels)).clip(0.0, 1.0)
