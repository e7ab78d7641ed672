"""Files and folders that things are written to.

``write_whole(path, text)``   so that what a killed process leaves is the file of before or the new one, never a part of it
``as_folder(path, what)``     refuse a folder that cannot be one, before anything is computed
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["as_folder", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; its folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def as_folder(path: str | Path, what: str) -> Path:
    """A path that is a folder, or can become one.

    Parameters
    ----------
    what : str
        What is written there, for messages: "a recording's directory".

    Raises
    ------
    ValueError
        Where it, or a folder above it, is a file.
    """
    for folder in (Path(path), *Path(path).parents):
        if folder.is_file():
            raise ValueError(f"{path} cannot be {what}: {folder} is a file, name another path")
    return Path(path)
