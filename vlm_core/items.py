"""Probe items by duck type: a mapping or an object with ``id, scene_id, task, image, prompt, answer, candidates``.

A collection of items is any sequence of them, a ``datasets.Dataset`` included.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["item_field", "item_number", "require_distinct", "take"]


def item_field(item: Any, name: str) -> Any:
    """One field of an item; a ``KeyError`` that names the item and the fields it has."""
    if isinstance(item, Mapping):
        if name not in item:
            raise KeyError(f"item {item.get('id', '?')!r} has no field '{name}' (it has {', '.join(map(str, item))})")
        return item[name]
    if not hasattr(item, name):
        raise KeyError(f"item {getattr(item, 'id', '?')!r} has no field '{name}'")
    return getattr(item, name)


def item_number(item: Any) -> int:
    """A number that names the item in every process, for reproducible draws."""
    return zlib.crc32(str(item_field(item, "id")).encode())


def require_distinct(items: Sequence) -> None:
    """Refuse two items of one id: a table could not tell them apart.

    Raises
    ------
    ValueError
    """
    # A dataset gives its ids alone, without decoding an image.
    ids = items["id"] if hasattr(items, "column_names") else [item_field(item, "id") for item in items]
    seen: set[str] = set()
    for one in map(str, ids):
        if one in seen:
            raise ValueError(f"two items have the id {one!r}: the table of a sweep tells items by their ids, give each its own")
        seen.add(one)


def take(items: Sequence, indices: Sequence[int]) -> list:
    """The items at ``indices``, each read once (a dataset decodes its image on every access)."""
    return [items[int(index)] for index in indices]
