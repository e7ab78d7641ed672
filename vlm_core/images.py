"""Images as processors take them: PIL images, eight bits a channel.

``require_image(image, where)``   refuse what is no image, in one sentence
``as_rgb(image)``                 an image in RGB; sixteen bits are scaled, not cut off
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

__all__ = ["as_rgb", "require_image"]

_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_BOUNDLESS = ("I", "F")


def require_image(image: Any, where: str) -> None:
    """Refuse what is neither a PIL image nor a list of them.

    Parameters
    ----------
    where : str
        What the error calls it ("image of item 'a'").

    Raises
    ------
    ValueError
        For anything else, an image without pixels, or one whose brightness has no fixed range (modes ``I`` and ``F``).
    """
    for one in image if isinstance(image, list | tuple) else (image,):
        if not isinstance(one, Image.Image):
            raise ValueError(
                f"{where} must be a PIL image or a list of them, got {'a list with ' if one is not image else ''}{_shown(one)}: "
                f"{_remedy(one)}"
            )
        if 0 in one.size:
            raise ValueError(f"{where} has no pixels (its size is {one.width} x {one.height}): look where it was cut or loaded")
        if one.mode in _BOUNDLESS:
            raise ValueError(
                f"{where} has mode '{one.mode}', whose brightness has no fixed range: scale its values to 0..255 and make it 'L', or to "
                f"0..65535 and make it 'I;16'"
            )


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB. Sixteen-bit grey (``I;16``) is scaled from 0..65535 to 0..255: Pillow's own conversion would cut at 255.

    Raises
    ------
    ValueError
        Where the image's file cannot be read to its end.
    """
    try:
        if image.mode in _DEEP:
            values = np.asarray(image).astype(np.uint32)
            # 65535 = 257 * 255.
            image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        return image.convert("RGB")
    except OSError as error:
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(f"{name} cannot be read ({error}): copy or make it again") from error


def _shown(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str | int | float) else type(value).__name__


def _remedy(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "use Image.fromarray on an array of uint8"
    return "open it with PIL.Image.open" if isinstance(value, str) or hasattr(value, "__fspath__") else "give every prompt its image"
