"""Random heads to compare with.

``layer_matched``      random heads from the same layers in the same numbers
``layer_free``         as many random heads from anywhere
``assign_draws``       which items each random set is run on; ``draw_means`` sums up what it cost
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vlm_core.families.anatomy import HeadId
from vlm_core.subjects.subject import Subject

__all__ = ["assign_draws", "draw_means", "layer_free", "layer_matched"]


def layer_matched(heads: Sequence[HeadId], subject: Subject, draws: int, seed: int = 0) -> list[tuple[HeadId, ...]]:
    """Random sets of heads from the same layers, in the same numbers, as ``heads``.

    A draw may share heads with ``heads`` (this is what makes the comparison a permutation test of the ranking within
    layers) but is never the same set.

    Raises
    ------
    ValueError
        If ``heads`` takes whole layers, so that no other set exists.
    """
    wanted = Counter(layer for layer, _ in heads)
    n_heads = subject.anatomy.n_heads
    if all(n == n_heads for n in wanted.values()):
        raise ValueError("the heads fill their layers: no other set matches them layer by layer")

    def draw(rng):
        return [(layer, head) for layer, n in sorted(wanted.items()) for head in rng.choice(n_heads, size=n, replace=False)]

    return _draws(draw, heads, draws, seed)


def layer_free(heads: Sequence[HeadId], subject: Subject, draws: int, seed: int = 0) -> list[tuple[HeadId, ...]]:
    """Random sets of as many heads as ``heads`` from the whole model; never the same set."""
    every = list(subject.heads)
    if len(heads) >= len(every):
        raise ValueError("the heads are all there are: no other set has their number")

    def draw(rng):
        return [every[i] for i in rng.choice(len(every), size=len(heads), replace=False)]

    return _draws(draw, heads, draws, seed)


def _draws(draw, heads, draws: int, seed: int) -> list[tuple[HeadId, ...]]:
    rng, targeted, sets = np.random.default_rng(seed), set(heads), []
    while len(sets) < draws:
        candidate = tuple(sorted(HeadId(int(layer), int(head)) for layer, head in draw(rng)))
        if set(candidate) != targeted:
            sets.append(candidate)
    return sets


def assign_draws(labels: Sequence[str], n_items: int, items_per_draw: int, seed: int = 0) -> list[tuple[int, str]]:
    """Which items each random draw is run on: every draw on as many, every item on as nearly as many draws.

    Returns
    -------
    list of (item index, label)
        For ``vlm_core.sweep(assignments=...)``.

    Raises
    ------
    ValueError
        If a draw would be given no item.
    """
    if items_per_draw < 1:
        raise ValueError(f"items_per_draw is {items_per_draw}: a random draw needs at least one item")
    if n_items < 1:
        raise ValueError("there are no items: a random draw needs at least one")
    rng, order, assignments = np.random.default_rng(seed), [], []
    for label in labels:
        mine: list[int] = []
        while len(mine) < min(items_per_draw, n_items):
            if not order:
                order = rng.permutation(n_items).tolist()
            item = next(i for i in order if i not in mine)
            order.remove(item)
            mine.append(item)
        assignments += [(item, label) for item in mine]
    return assignments


def draw_means(table: pd.DataFrame, group: str, full: pd.Series, targeted: pd.Series) -> tuple[pd.Series, pd.DataFrame]:
    """Summaries of a sweep over random draws labelled ``group/0, group/1, ...``.

    Parameters
    ----------
    table : DataFrame
        From ``vlm_core.sweep``, metric ``correct``.
    group : str
    full, targeted : Series
        Correctness of the untouched subject and under the targeted intervention, indexed by item.

    Returns
    -------
    Series
        Mean correctness per item over the draws it was run on, in the order of ``full``.
    DataFrame
        One row a draw, ``random`` and ``targeted``: the mean accuracy each cost on that draw's own items.
    """
    rows = table[table["intervention"].str.startswith(f"{group}/")]
    per_item = rows.groupby("item")["value"].mean().reindex(full.index)
    whole = rows["item"].map(full).to_numpy(float)
    lost = pd.DataFrame({"random": whole - rows["value"].to_numpy(float), "targeted": whole - rows["item"].map(targeted).to_numpy(float)})
    return per_item, lost.groupby(rows["intervention"].to_numpy(), sort=False).mean()
