"""Answers that name where: "red" becomes "red at row two column three".

``grounded_answers(items, answers, where)``   the answers with their places
``mask_cell``, ``box_cell``                   the cell of a grid that a mask or a box lies in, in words
``by_mask``, ``by_box``, ``by_asking``        make a ``where``: from a mask, from a box in the item, from the teacher's own answer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_core.distill.instructions import require_answers
from vlm_core.items import item_field, plain, require_distinct, require_items, take

if TYPE_CHECKING:
    from vlm_core.distill.teachers import Teacher

__all__ = ["CELL", "TEMPLATE", "box_cell", "by_asking", "by_box", "by_mask", "grounded_answers", "mask_cell"]

TEMPLATE = "{answer} at {where}"
CELL = "row {row} column {column}"
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()

Where = Callable[[Any], str | None]


def grounded_answers(items: Sequence, answers: Sequence[str], where: Where, template: str = TEMPLATE) -> list[str]:
    """Answers that go on to say where what they are about is.

    Parameters
    ----------
    items : sequence of items
    answers : sequence of str
        One an item.
    where : callable
        ``where(item)``: the place in words, or None where it is not known; the answer then stays as it is.
    template : str
        With ``{answer}`` and ``{where}``. It begins with the answer, so that candidates are scored as before: what follows the answer
        cannot change what precedes it.

    Raises
    ------
    ValueError
        For another template, another number of answers than items, a place that is no text.
    """
    if not template.startswith("{answer}") or template.count("{where}") != 1 or template.count("{answer}") != 1:
        raise ValueError(f"the template {template!r} must begin with {{answer}} and hold {{where}} once, as {TEMPLATE!r} does")
    require_answers(items, answers, "a grounded answer")
    said = []
    for item, answer in zip(take(items, range(len(items))), answers, strict=True):
        place = where(item)
        if place is not None and not isinstance(place, str):
            raise ValueError(f"where gives {place!r:.60} ({type(place).__name__}) for item {item_field(item, 'id')!r}, not a text or None")
        said.append(answer if place is None or not place.strip() else template.replace("{where}", place).replace("{answer}", answer, 1))
    return said


def mask_cell(mask: np.ndarray, rows: int, columns: int, template: str = CELL) -> str | None:
    """The cell of a grid over the picture that holds most of a mask; the first of those that hold as much. None for an empty mask.

    Parameters
    ----------
    mask : bool array ``[height, width]``
    rows, columns : int
        Of the grid, counted from one at the top left.
    template : str
        With ``{row}`` and ``{column}``.

    Raises
    ------
    ValueError
        For an array of another shape, or a grid without cells.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"a mask is one array [height, width], but this one has shape {mask.shape}")
    _require_grid(rows, columns)
    area = _share(mask.shape[0], rows) @ (mask != 0).astype(float) @ _share(mask.shape[1], columns).T
    if not area.any():
        return None
    # Sums of the same pixels in another order may differ in the last bit.
    row, column = divmod(int(np.argmax(area >= area.max() * (1 - 1e-9))), columns)
    return template.format(row=_number(row + 1), column=_number(column + 1))


def box_cell(box: Sequence[float], size: tuple[int, int], rows: int, columns: int, template: str = CELL) -> str:
    """The cell of a grid that the centre of a box lies in.

    Parameters
    ----------
    box : (left, top, right, bottom), pixels
    size : (width, height) of the picture, pixels

    Raises
    ------
    ValueError
        For a box without extent, or one whose centre is outside the picture.
    """
    _require_grid(rows, columns)
    if len(box) != 4 or not (box[0] <= box[2] and box[1] <= box[3]):
        raise ValueError(f"a box is (left, top, right, bottom) in pixels, got {tuple(box)}")
    x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"the centre of the box {tuple(box)} lies outside a picture of {size[0]} x {size[1]} pixels")
    row, column = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
    return template.format(row=_number(row + 1), column=_number(column + 1))


def by_mask(mask_of: Callable[[Any], np.ndarray | None], rows: int, columns: int, template: str = CELL) -> Where:
    """A ``where`` by each item's mask, ``mask_of(item)`` (None: not known)."""

    def where(item):
        mask = mask_of(item)
        return None if mask is None else mask_cell(mask, rows, columns, template)

    return where


def by_box(field: str, rows: int, columns: int, template: str = CELL) -> Where:
    """A ``where`` by the box in an item's ``field``, or the first of a list of boxes; not known where there is none."""

    def where(item):
        box = item_field(item, field)
        if box is not None and len(box) and hasattr(box[0], "__len__"):
            box = box[0]
        return None if box is None or not len(box) else box_cell(box, item_field(item, "image").size, rows, columns, template)

    return where


def by_asking(teacher: Teacher, items: Sequence, question: Callable[[Any], str | None] | str) -> Where:
    """A ``where`` by the teacher's own answers to a question about each item's place.

    Parameters
    ----------
    items : sequence of items
        Those that will be asked for: the teacher answers all of them at once, here.
    question : callable or str
        The prompt for an item (None: do not ask), or one for all.
    """
    require_items(items, ("id", "image"))
    require_distinct(items)
    items = take(items, range(len(items)))
    asked = []
    for item in items:
        prompt = question if isinstance(question, str) else question(item)
        if prompt is not None:
            asked.append({"id": str(item_field(item, "id")), "image": item_field(item, "image"), "prompt": prompt})
    places = {one["id"]: said for one, said in zip(asked, teacher.answers(asked), strict=True)} if asked else {}
    known = {str(item_field(item, "id")) for item in items}

    def where(item):
        name = str(item_field(item, "id"))
        if name not in known:
            raise ValueError(f"the teacher was not asked where about item {name!r}: give by_asking all items")
        place = places.get(name, "")
        return place if plain(place) else None

    return where


def _require_grid(rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _share(n: int, cells: int) -> np.ndarray:
    """How much of each of ``n`` pixels lies in each cell, float array ``[cell, pixel]``."""
    edges = np.linspace(0, n, cells + 1)
    pixels = np.arange(n)
    return (np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)).clip(0)


def _number(value: int) -> str:
    return _NUMBERS[value - 1] if value <= len(_NUMBERS) else str(value)
