"""Mean pooling on the image's grid: the mandatory baseline of all that merges.

``Pooling``    every block of neighbours becomes its mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import ClassVar

import torch

from vlm_core.interventions.policy import Choice, Policy, Seen

__all__ = ["Pooling"]


@dataclass(frozen=True, eq=False)
class Pooling(Policy):
    """Blocks of neighbouring tokens are averaged; the first token of a block stays and carries the mean.

    Notes
    -----
    [ours] As many blocks as tokens are to stay, for any fraction; a quarter of a grid with even sides gives blocks of 2 x 2.

    The blocks are shared out among the grids in proportion to their tokens (largest remainder; the earlier grid where remainders are alike).
    Tokens without a place (class tokens, ends of lines) come last and make blocks of their own; a grid that is too small for a block goes.
    A grid with ``k`` blocks is cut into bands of whole rows: as many as make its blocks nearly square, ``sqrt(k * rows / columns)`` rounded,
    at least one. Every band gets one block, the others are shared out in proportion to its tokens. A band is walked column by
    column, down and up in turn, and cut into parts that differ by one token at most: on a full grid each block is connected.
    """

    name: ClassVar[str] = "pooling"
    reads: ClassVar[frozenset[str]] = frozenset({"grid"})

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The blocks' first tokens, and their means."""
        places = seen.outside()
        found = blocks(tuple(places.grid.tolist()), tuple(places.row.tolist()), tuple(places.column.tolist()), keep)
        device = seen.stream.device
        mix = torch.zeros(keep, len(seen), device=device)
        members = torch.tensor([(number, one) for number, block in enumerate(found) for one in block], device=device)
        mix[members[:, 0], members[:, 1]] = 1.0
        mix /= mix.sum(1, keepdim=True)
        return Choice(torch.tensor([block[0] for block in found], device=device), mix)


@lru_cache(maxsize=1024)
def blocks(grid: tuple[int, ...], row: tuple[int, ...], column: tuple[int, ...], keep: int) -> tuple[tuple[int, ...], ...]:
    """Members of each block in ascending order, the blocks by their first; see ``Pooling``.

    Parameters
    ----------
    grid, row, column : tuple of int, one per candidate
        -1 for tokens of no grid.
    keep : int
        How many blocks.
    """
    members: dict[int, list[int]] = {number: [] for number in sorted(set(grid) - {-1})}
    members |= {-1: []} if -1 in grid else {}
    for one, number in enumerate(grid):
        members[number].append(one)
    found = []
    for (number, own), count in zip(members.items(), _shared_out(keep, list(map(len, members.values()))), strict=True):
        if not count:
            continue
        found += _cut(own, count) if number == -1 else _of_grid([(row[one], column[one], one) for one in own], count)
    return tuple(sorted(tuple(sorted(block)) for block in found))


def _of_grid(places: list[tuple[int, int, int]], count: int) -> list[list[int]]:
    rows, columns = ({place[axis] for place in places} for axis in (0, 1))
    n_bands = min(max(1, int(sqrt(count * len(rows) / len(columns)) + 0.5)), len(rows), count)
    bands: list[list[tuple[int, int, int]]] = [[] for _ in range(n_bands)]
    band_of = {one: number for number, some in enumerate(_cut(sorted(rows), n_bands)) for one in some}
    for place in places:
        bands[band_of[place[0]]].append(place)
    found = []
    for band, more in zip(bands, _shared_out(count - n_bands, [len(band) - 1 for band in bands]), strict=True):
        order = {one: number for number, one in enumerate(sorted({place[1] for place in band}))}
        walked = sorted(band, key=lambda place: (order[place[1]], -place[0] if order[place[1]] % 2 else place[0]))
        found += _cut([place[2] for place in walked], 1 + more)
    return found


def _cut(members: Sequence[int], count: int) -> list[list[int]]:
    """``count`` parts that differ by one member at most."""
    bounds = [number * len(members) // count for number in range(count + 1)]
    return [list(members[start:stop]) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def _shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in proportion to ``sizes``, by largest remainder: whole numbers, none above its size where ``total`` is at most the sum."""
    everything = sum(sizes)
    if not total:
        return [0] * len(sizes)
    counts = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda number: -(total * sizes[number] % everything))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts
