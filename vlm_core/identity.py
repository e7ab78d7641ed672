"""What a stored measurement depends on, as digests.

``digest``          JSON, short
``image_digest``    what an image (or several) shows
``picture_digest``  the same of its pixels in RGB alone, whatever mode or file it came in
``item_digest``     what an item asks
``code_digest``     a callable: its code, defaults and what it closes over
``library_digest``  this library's code
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from vlm_core.images import as_rgb

__all__ = ["code_digest", "digest", "image_digest", "item_digest", "library_digest", "picture_digest"]

ITEM_FIELDS = ("id", "scene_id", "task", "prompt", "answer", "candidates")


def digest(content: Any) -> str:
    """Hash of JSON, short enough for a file's name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def image_digest(image) -> str:
    """Digest of what an image shows: size, mode, palette and pixels; of a list of images, of all of them in order."""
    if isinstance(image, list | tuple):
        return _sha256(*(image_digest(one).encode() for one in image))
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    return _sha256(repr((image.mode, image.size, palette, image.info.get("transparency"))).encode(), image.tobytes())


def picture_digest(image) -> str:
    """SHA-256 of a picture's pixels: of ``"<width>x<height> "`` and its RGB bytes, row by row.

    One picture has one digest in whatever file or mode it was saved without loss. Of a list of images: their digests joined by ``+``.

    Raises
    ------
    ValueError
        Where the image's file cannot be read to its end.
    """
    if isinstance(image, list | tuple):
        return "+".join(map(picture_digest, image))
    digest = hashlib.sha256(f"{image.width}x{image.height} ".encode())
    digest.update(as_rgb(image).tobytes())
    return digest.hexdigest()


def item_digest(item, fields: Sequence[str] = ITEM_FIELDS) -> str:
    """Digest of an item's image and text ``fields``; a field that it does not have counts as None."""
    def field(name: str):
        return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)

    shown = field("image")
    parts = [repr((name, field(name))).encode() for name in fields]
    return _sha256(*parts, b"" if shown is None else image_digest(shown).encode())


def code_digest(function: Callable | None) -> str | None:
    """Digest of what a callable is; None for None. Global names that it reads are outside: pass what matters as an argument.

    Raises
    ------
    ValueError
        Where something that it closes over cannot be pickled, so that two such callables cannot be told apart.
    """
    if function is None:
        return None
    try:
        if not isinstance(function, FunctionType):
            return _sha256(_pickled(function))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        closed = [code_digest(one).encode() if isinstance(one, FunctionType) else _pickled(one) for one in cells]
        defaults = _pickled((function.__defaults__, function.__kwdefaults__))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise ValueError(
            f"'{name}' cannot be told from others like it ({error}): what is stored under it might be another's; make it a function "
            f"of plain values"
        ) from error
    return _sha256(*_code(function.__code__), defaults, *closed)


def _code(code: CodeType) -> list[bytes]:
    parts = [code.co_code, repr((code.co_names, code.co_varnames, code.co_freevars)).encode()]
    for constant in code.co_consts:
        parts += _code(constant) if isinstance(constant, CodeType) else [_constant(constant).encode()]
    return parts


def _constant(value) -> str:
    # The order in which a set gives its members depends on the process.
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(_constant, value))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    return repr(value)


class _Pickler(pickle.Pickler):
    """A pickler to which a set is its members' digests, in order: what it writes is the same in every process."""

    def persistent_id(self, value):
        if type(value) in (set, frozenset):
            return type(value).__name__, sorted(_sha256(_pickled(one)) for one in value)
        return None


def _pickled(value) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


@functools.cache
def library_digest(root: Path = Path(__file__).parent) -> str:
    """Digest of the code of ``vlm_core``, but for its tests, its benchmark and its statistics, which train and measure nothing.

    Computed once: what a process has imported does not change with the files.
    """
    parts = []
    for path in sorted(root.rglob("*.py")):
        if not {"tests", "bench", "stats"} & set(path.relative_to(root).parts):
            parts += [path.relative_to(root).as_posix().encode(), path.read_bytes()]
    return _sha256(*parts)[:16]
