"""How many pixels a subject looks at: pictures are best drawn on as many, since a processor that enlarges them adds no detail.

``own_resolution(subject)``   the side of a square picture, in pixels
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from vlm_core.subjects.subject import Subject

__all__ = ["LEAST", "SIDES", "TOKENS", "own_resolution"]

SIDES = (64, 96, 128, 192, 256, 336, 448, 672, 896)
TOKENS = 256  # 16 x 16 of one picture
LEAST = SIDES[0]


def own_resolution(subject: Subject) -> int:
    """The side of a square picture that the subject's processor neither enlarges nor makes smaller, at least 64.

    The processor itself is asked. Where every picture becomes views of one size (a resized picture, tiles, crops), it is the side of a view: a tile
    shows a scene whole, and more tiles of one picture no more of it. Where pictures keep their size (Qwen-VL, Pixtral), the smallest of ``SIDES``
    that has 16 x 16 tokens, or as many as any.
    """
    seen = {side: _looked_at(subject, side) for side in (SIDES[0], SIDES[-1])}
    views = {view for view, _ in seen.values()}
    if len(views) == 1 and None not in views:
        return max(LEAST, *views)
    enough = min(TOKENS, seen[SIDES[-1]][1])
    for side in SIDES:
        view, tokens = seen.get(side) or _looked_at(subject, side)
        if tokens >= enough:
            return max(side, view or 0)
    return SIDES[-1]


def _looked_at(subject: Subject, side: int) -> tuple[int | None, int]:
    """The longer side of the views that a square picture becomes (None where it becomes a row of patches), and its image tokens."""
    batch = subject.encode([Image.new("RGB", (side, side), (127, 127, 127))], ["?"])
    pixels = batch.inputs.get("pixel_values")
    return (max(pixels.shape[-2:]) if pixels is not None and pixels.ndim >= 4 else None), int(batch.image.sum())
