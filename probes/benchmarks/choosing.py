"""Draws that depend on nothing but what is drawn from: no order of rows, no library's random numbers.

``rank(seed, name)``             a number in [0, 1) that a seed gives a name
``chosen(ids, n, seed)``         which ``n`` of them, in the order of their rank
``lettered(options, seed, name)``  options in the order that a seed gives them, with their letters
"""

from __future__ import annotations

import hashlib
import heapq
import string
from collections.abc import Iterable, Sequence

__all__ = ["chosen", "lettered", "rank"]


def rank(seed: int, name: str) -> float:
    """A number in [0, 1), uniform over names and seeds: the first 52 bits of SHA-256."""
    return int(hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()[:13], 16) / 16**13


def chosen(ids: Iterable[str], n: int, seed: int) -> list[str]:
    """The ``n`` ids of the lowest rank, lowest first; all where there are no more. However they are ordered, the same are chosen."""
    return heapq.nsmallest(n, ids, key=lambda one: (rank(seed, one), one))


def lettered(options: Sequence[str], seed: int, name: str) -> list[tuple[str, int]]:
    """``(letter, place of the option in the list)`` in a shuffled order that the seed and the item's name decide."""
    if len(options) > len(string.ascii_uppercase):
        raise ValueError(f"item {name!r} has {len(options)} options: there are letters for {len(string.ascii_uppercase)}")
    order = sorted(range(len(options)), key=lambda place: rank(seed, f"{name}\0{place}"))
    return list(zip(string.ascii_uppercase, order, strict=False))
