"""Append-only JSON lines that several processes extend: an addition is there whole or not at all.

``locked``  keep others out between reading and appending
``read``    every line
``append``  add lines; the file is replaced by itself with them, so that a kill leaves the old one
"""

from __future__ import annotations

import json
import os

from filelock import FileLock

from reports import record


def locked(path):
    """A lock on the file for all processes of this machine, to be entered with ``with``; entering it again inside is allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)


def read(path):
    """The entries of the file, in order; none where it does not exist.

    Raises
    ------
    ValueError
        Naming the line that is no JSON object.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}, is no JSON object: the file was changed or cut")
        entries.append(entry)
    return entries


def append(path, entries):
    """Add entries, one line each, after those that are there."""
    with locked(path):
        there = path.read_bytes() if path.exists() else b""
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as out:
            out.write(there + "".join(record.dumps(entry) + "\n" for entry in entries).encode())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
