"""Where files lie, and where they may.

``within(folder, path, where)``   the file that data names, which cannot leave its folder: data is written by others
``cache_root()``                  where things are kept that take long to make or to fetch
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["cache_root", "within"]

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
    # Its parts are also those of a path with slashes.
    if ".." in PureWindowsPath(text).parts:
        raise ValueError(f"{where} climbs out of its folder ({text:.80}): {remedy}")
    found = (folders[0] / text).resolve()
    if not any(found.is_relative_to(one) for one in folders):
        raise ValueError(f"{where} lies outside of its folder ({text:.80} is {found}): {remedy}")
    if not found.is_file():
        raise ValueError(f"{where} is not there ({text:.80}): no file of that name lies in {folders[0]}")
    return found


def cache_root() -> Path:
    """Where things are kept between runs: ``$VLM_CLAIMS_CACHE``, else ``vlm-claims`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlm-claims"
    return Path(os.environ.get("VLM_CLAIMS_CACHE", default))
