"""Paths that stand in data, which is written by others: they cannot leave the folder of the data.

``within(folder, path, where)``   the file that data names; a sentence where it lies elsewhere, or nowhere
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["within"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")


def within(folder: str | Path | Sequence[str | Path], path: str | Path, where: str, *, absolute: bool = False) -> Path:
    """The file that data names, with its links followed.

    Parameters
    ----------
    folder : path, or several
        Where the data lies; a relative path is relative to the first.
    path : str or path
        As the data has it.
    where : str
        What the error calls it ("the image of row 3").
    absolute : bool
        Whether the path may be an absolute one inside the folder: ``datasets`` makes such, people do not.

    Raises
    ------
    ValueError
        One sentence: an address in place of a path, an absolute path, one that leaves the folder, by ``..`` or by a link, no file there.
    """
    folders = [Path(one).resolve() for one in ([folder] if isinstance(folder, str | Path) else folder)]
    text = str(path)
    remedy = f"data can only name files within {folders[0]}, relative to it"
    if _SCHEME.match(text) and not PureWindowsPath(text).drive:
        raise ValueError(f"{where} is an address ({text:.80}), nothing is fetched for data: {remedy}")
    if "\0" in text or not text:
        raise ValueError(f"{where} is no path ({text!r:.80}): {remedy}")
    if not absolute and (PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or PureWindowsPath(text).drive):
        raise ValueError(f"{where} has an absolute path ({text:.80}): {remedy}")
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        raise ValueError(f"{where} climbs out of its folder ({text:.80}): {remedy}")
    found = (folders[0] / text).resolve()
    if not any(found.is_relative_to(one) for one in folders):
        raise ValueError(f"{where} lies outside of its folder ({text:.80} is {found}): {remedy}")
    if not found.is_file():
        raise ValueError(f"{where} is not there ({text:.80}): no file of that name lies in {folders[0]}")
    return found
