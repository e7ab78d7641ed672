"""Images as processors take them: PIL images, eight bits a channel.

``require_image(image, where)``   refuse what is no image, in one sentence
``open_image(source, where)``     an image from its file or bytes, decoded, within limits
``stored_image(value, where)``    the same of what a data set stores as an image
``as_rgb(image)``                 an image in RGB; sixteen bits are scaled, not cut off
``MAX_PIXELS, FORMATS``           the limits
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlm_core.paths import within

__all__ = ["FORMATS", "MAX_PIXELS", "as_rgb", "open_image", "require_image", "stored_image"]

MAX_PIXELS = 2**26
"""The most pixels an image may have: 8192 x 8192, in RGB 201 MB. A file of a few kB can claim more."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded; of others, some start programs (EPS)."""

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
        For anything else, an image without pixels or with more than ``MAX_PIXELS``, or one whose brightness has no fixed range (modes ``I``
        and ``F``).
    """
    for one in image if isinstance(image, list | tuple) else (image,):
        if not isinstance(one, Image.Image):
            raise ValueError(
                f"{where} must be a PIL image or a list of them, got {'a list with ' if one is not image else ''}{_shown(one)}: "
                f"{_remedy(one)}"
            )
        if 0 in one.size:
            raise ValueError(f"{where} has no pixels (its size is {one.width} x {one.height}): look where it was cut or loaded")
        _require_size(one, where)
        if one.mode in _BOUNDLESS:
            raise ValueError(
                f"{where} has mode '{one.mode}', whose brightness has no fixed range: scale its values to 0..255 and make it 'L', or to "
                f"0..65535 and make it 'I;16'"
            )


def open_image(source: bytes | str | Path, where: str) -> Image.Image:
    """An image from the bytes of its file, or from a path, decoded to its end and turned as its camera says.

    Parameters
    ----------
    where : str
        What the error calls it ("the image of item 'a'").

    Raises
    ------
    ValueError
        One sentence: no image of ``FORMATS``, more than ``MAX_PIXELS`` (known before anything is decoded), several frames, a file that ends
        too early.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own limit lies above the one here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where} has more than {MAX_PIXELS:,} pixels, the limit: make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"{where} is no image that can be read ({_short(error)}): it may be one of {', '.join(FORMATS)}") from error
    _require_size(image, where)
    try:
        # A photograph of two lenses (MPO) is one picture; pages and animations are several.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
        if not several:
            # Decodes it, and turns it as it was held: so does datasets.
            ImageOps.exif_transpose(image, in_place=True)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{where} cannot be decoded to its end ({_short(error)}): copy or make it again") from error
    if several:
        raise ValueError(f"{where} has several frames or pages: save the one that is meant")
    return image


def stored_image(value: Any, where: str, folder: str | Path | Sequence[str | Path] | None = None) -> Any:
    """An image, or a list of them, as a data set stores it: the bytes of a file, a path within ``folder``, or a PIL image.

    Parameters
    ----------
    where : str
        What the error calls it.
    folder : path or several, optional
        Where files lie that the data names; without it none is opened.

    Raises
    ------
    ValueError
        One sentence: see `open_image`, `require_image` and `vlm_core.paths.within`.
    """
    if isinstance(value, list | tuple):
        return [stored_image(one, where, folder) for one in value]
    stored = isinstance(value, dict) and bool({"bytes", "path"} & set(value))
    if stored and value.get("bytes"):
        value = open_image(value["bytes"], where)
    elif (stored and value.get("path")) or isinstance(value, str):
        path = value["path"] if stored else value
        if folder is None:
            raise ValueError(f"{where} is a path ({path:.80}), not a picture: say which folder it lies in (folder=...)")
        value = open_image(within(folder, path, where, absolute=stored), where)
    require_image(value, where)
    return value


def _require_size(image: Image.Image, where: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{where} has {image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}: make it smaller"
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


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split())}"[:120] or type(error).__name__


def _remedy(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "use Image.fromarray on an array of uint8"
    return "open it with PIL.Image.open" if isinstance(value, str) or hasattr(value, "__fspath__") else "give every prompt its image"
