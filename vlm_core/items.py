"""Probe items by duck type: a mapping or an object with ``id, scene_id, task, image, prompt, answer, candidates``.

A collection of items is any sequence of them, a ``datasets.Dataset`` included.

``item_field``, ``item_number``, ``take``   reading them
``plain(text)``                             an answer as it is compared with another
``require_items(items, fields)``            refuse what is no collection of items with these fields, before anything runs
``require_item(item, fields)``              the same of one item
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_core.images import require_image

__all__ = ["SCORED", "SHOWN", "item_field", "item_number", "plain", "require_distinct", "require_item", "require_items", "take"]

SHOWN = ("id", "image", "prompt")
"""What an item needs to be shown to a model."""
SCORED = ("id", "scene_id", "task", "image", "prompt", "answer", "candidates")
"""What an item needs to be scored."""


def item_field(item: Any, name: str) -> Any:
    """One field of an item; a ``ValueError`` that names the item and the fields it has."""
    if isinstance(item, Mapping):
        if name not in item:
            raise ValueError(f"item {item.get('id', '?')!r} has no field '{name}' (it has {', '.join(map(str, item))})")
        return item[name]
    if not hasattr(item, name):
        if not hasattr(item, "id"):
            raise ValueError(f"an item is a mapping or an object with the field '{name}' among others, got {_shown(item)}")
        raise ValueError(f"item {item.id!r} has no field '{name}'")
    return getattr(item, name)


def item_number(item: Any) -> int:
    """A number that names the item in every process, for reproducible draws."""
    return zlib.crc32(str(item_field(item, "id")).encode())


def plain(text: str) -> str:
    """An answer without case, punctuation and spacing: what makes two of them the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def require_distinct(items: Sequence) -> None:
    """Refuse two items of one id: what is measured could not tell them apart.

    Raises
    ------
    ValueError
    """
    # A dataset gives its ids alone, without decoding an image.
    ids = items["id"] if hasattr(items, "column_names") else [item_field(item, "id") for item in items]
    seen: set[str] = set()
    for one in map(str, ids):
        if one in seen:
            raise ValueError(f"two items have the id {one!r}: tables and recordings tell items by their ids, give each its own")
        seen.add(one)


def take(items: Sequence, indices: Sequence[int]) -> list:
    """The items at ``indices``, each read once (a dataset decodes its image on every access)."""
    return [items[int(index)] for index in indices]


def require_items(items: Any, fields: Sequence[str] = SHOWN) -> None:
    """Refuse what is no sequence of items.

    A list is looked through. Of a ``datasets.Dataset`` only the text is, since reading an image decodes it: its images, and the items of
    any other sequence, are looked at when they are read (``require_item``).

    Raises
    ------
    ValueError
    """
    if isinstance(items, Mapping):
        raise ValueError("items must be a sequence of items, got a mapping: put a single item into a list")
    if isinstance(items, str | bytes) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise ValueError(f"items must be a sequence (a list, a datasets.Dataset), got {_shown(items)}: write list(...) of them")
    if hasattr(items, "iloc"):
        raise ValueError(f"items must be a sequence of items, got a {type(items).__name__}: write .to_dict('records') of it")
    if isinstance(items, list | tuple):
        for item in items:
            require_item(item, fields)
    elif hasattr(items, "select_columns"):
        missing = [name for name in fields if name not in items.column_names]
        if missing:
            raise ValueError(f"the dataset of items has no column '{missing[0]}' (it has {', '.join(items.column_names)})")
        text = [name for name in fields if name != "image"]
        for item in items.select_columns(text):
            require_item(item, text)


def require_item(item: Any, fields: Sequence[str] = SHOWN) -> None:
    """Refuse an item that lacks one of ``fields``, or has something in it that cannot be shown or scored.

    Raises
    ------
    ValueError
    """
    values = {name: item_field(item, name) for name in fields}
    name = repr(item.get("id", "?") if isinstance(item, Mapping) else getattr(item, "id", "?"))
    for field in ("id", "scene_id", "task"):
        if field in values and values[field] is None:
            raise ValueError(f"item {name} has {field} None: items are told apart, clustered and tabled by these, give it one")
    if "image" in values:
        require_image(values["image"], f"the image of item {name}")
    if "prompt" in values and not isinstance(values["prompt"], str):
        raise ValueError(f"the prompt of item {name} must be a str, got {_shown(values['prompt'])}: write out what the model is asked")
    if "prompt" in values and not values["prompt"].strip():
        raise ValueError(f"the prompt of item {name} is empty: write out what the model is asked")
    if "candidates" in values:
        _require_candidates(values["candidates"], name)
    if "answer" in values and not isinstance(values["answer"], str):
        raise ValueError(f"the answer of item {name} must be a str, got {_shown(values['answer'])}: write it as the model would")
    if "answer" in values and "candidates" in values and values["answer"] not in values["candidates"]:
        raise ValueError(f"item {name}: answer {values['answer']!r} is not among its candidates {list(values['candidates'])}")


def _require_candidates(candidates: Any, name: str) -> None:
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not len(candidates):
        raise ValueError(f"the candidates of item {name} must be a list of at least one str, got {_shown(candidates)}")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            raise ValueError(f"the candidates of item {name} must be strings, got {_shown(candidate)} among them")
        if candidate in candidates[:number]:
            raise ValueError(f"item {name} names the candidate {candidate!r} twice: the tokenizer cannot tell them apart, give each once")


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, str | int | float) or (isinstance(value, list | tuple) and not value)
    return f"{value!r} ({type(value).__name__})" if plain else type(value).__name__
