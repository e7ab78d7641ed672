"""Pictures that stay in their files' bytes until someone looks at them.

``PackedPicture(data)``   a PIL image of a PNG file's bytes, its pixels decoded when they are asked for
``DECODED``               pixels that are kept, of all such pictures together, within so many bytes

A probe set holds thousands of pictures. At a side of 1344 pixels each takes 7 MB decoded, a ninth of that as a file, and nothing of this
process where its bytes lie in a memory-mapped one. What a small set decodes once stays decoded.
"""

from __future__ import annotations

import hashlib
import io
import threading
from typing import Any

from PIL import Image

from vlm_core.memory import Bounded

__all__ = ["DECODED", "PackedPicture"]

DECODED = Bounded(2**28)
_LOCK = threading.Lock()
_BYTES = {"L": 1, "RGB": 4, "RGBA": 4}  # a pixel, as Pillow holds it


class PackedPicture(Image.Image):
    """An image like any other, but for when it is decoded. What changes it in place gives it pixels of its own.

    Parameters
    ----------
    data : bytes-like
        Of a PNG file; grey, RGB or RGBA.

    Attributes
    ----------
    packed : bytes-like
        The same.

    Raises
    ------
    ValueError
        One sentence: no PNG file, or one of another mode.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        try:
            header = Image.open(io.BytesIO(data), formats=("PNG",))
        except OSError as error:
            raise ValueError(f"a packed picture is no PNG file ({error}): save it as one") from error
        self._mode, self._size = header.mode, header.size
        if self._mode not in _BYTES:
            raise ValueError(f"a picture of mode '{self._mode}' is not kept packed, those of {', '.join(_BYTES)} are: convert it")
        self.packed, self._key, self.readonly = data, hashlib.sha256(data).digest(), 1

    @property
    def im(self) -> Any:
        """Its pixels as Pillow's core has them: found among ``DECODED``, or decoded."""
        if self._im is not None:
            return super().im
        with _LOCK:
            found = DECODED.get(self._key)
        if found is None:
            found = _decoded(self.packed)
            with _LOCK:
                DECODED.keep(self._key, found, self.width * self.height * _BYTES[self._mode])
        return found

    @im.setter
    def im(self, own: Any) -> None:
        self._im = own

    def load(self) -> Any:
        """Pixels that can be read, one by one."""
        return super().load() if self._im is not None else self.im.pixel_access(self.readonly)

    def __reduce__(self) -> tuple:
        if self._im is not None:  # changed: as the plain image that it is by then
            return Image.frombytes, (self.mode, self.size, self.tobytes())
        return PackedPicture, (bytes(self.packed),)


def _decoded(data: Any) -> Any:
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image.im
