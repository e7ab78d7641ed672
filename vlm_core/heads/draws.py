"""Random heads to compare with.

``layer_matched``      random heads from the same layers in the same numbers
``layer_free``         as many random heads from anywhere
``matching_sets``      how many sets of heads match a set layer by layer
``assign_draws``       which items each random set is run on, each set on items of its own
``assign_shared``      the same with some items on which every set is run: what a p-value needs
``draw_means``         what random sets leave of every item; ``draw_losses``: what each set costs on the shared items; ``draw_p``: how often as much
                       as the targeted set
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vlm_core.families.anatomy import HeadId
from vlm_core.stats import monte_carlo_p
from vlm_core.subjects.subject import Subject

__all__ = ["assign_draws", "assign_shared", "draw_losses", "draw_means", "draw_p", "layer_free", "layer_matched", "matching_sets"]


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


def matching_sets(heads: Sequence[HeadId], subject: Subject) -> int:
    """How many sets of heads have as many heads in every layer as ``heads``, ``heads`` among them."""
    return math.prod(math.comb(subject.anatomy.n_heads, n) for n in Counter(layer for layer, _ in heads).values())


def layer_free(heads: Sequence[HeadId], subject: Subject, draws: int, seed: int = 0) -> list[tuple[HeadId, ...]]:
    """Random sets of as many heads as ``heads`` from all layers that see the image; never the same set."""
    every = list(subject.image_heads)
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


def assign_shared(labels: Sequence[str], n_items: int, shared: int, each: int, seed: int = 0) -> tuple[list[tuple[int, str]], list[int]]:
    """Run every random draw on the same ``shared`` items, and every other item on ``each`` of the draws.

    On the shared items the draws differ from one another, and from a targeted set that was run on them too, by their heads alone: were the
    targeted set one more draw, every rank among their losses would be as likely as any other, whatever the items are. That is what makes
    a Monte-Carlo p-value valid. Draws that each had items of their own would differ by luck with items besides, in a comparison that
    the fewer items blunt the more. The other items serve the mean over draws of every item, which an interval over items needs.

    Parameters
    ----------
    labels : sequence of str
        One a draw.
    n_items, shared : int
        All items, and those (drawn at random) on which every draw is run; all of them where there are no more.
    each : int
        Draws that every other item is run on.

    Returns
    -------
    list of (item index, label)
        For ``vlm_core.sweep(assignments=...)``.
    list of int
        The shared items, in order.

    Raises
    ------
    ValueError
        Without items or draws, or if no item would be shared.
    """
    if n_items < 1 or not labels:
        raise ValueError(f"{len(labels)} random draws and {n_items} items: there must be at least one of each")
    if shared < 1:
        raise ValueError(f"shared is {shared}: random draws are compared on the same items, at least one")
    rng = np.random.default_rng(seed)
    order = rng.permutation(n_items).tolist()
    common = sorted(order[:shared])
    plan = [(item, label) for label in labels for item in common]
    for item in order[shared:]:
        plan += [(item, labels[k]) for k in sorted(rng.choice(len(labels), size=min(each, len(labels)), replace=False))]
    return plan, common


def draw_means(table: pd.DataFrame, group: str, items: Sequence[str]) -> pd.Series:
    """Mean correctness of every item over the random draws that it was run on.

    Parameters
    ----------
    table : DataFrame
        From ``vlm_core.sweep``, metric ``correct``, over random draws labelled ``group/0, group/1, ...``.
    group : str
    items : sequence of str
        Ids, in the order wanted; NaN for one that no draw was run on.
    """
    return _draws_of(table, group).groupby("item")["value"].mean().reindex(items)


def draw_losses(table: pd.DataFrame, group: str, full: pd.Series, shared: Sequence[str]) -> pd.Series:
    """Accuracy that each random draw costs on the items all draws were run on, one value a draw.

    Parameters
    ----------
    table, group
        As in ``draw_means``.
    full : Series
        Correctness of the untouched subject, indexed by item.
    shared : sequence of str
        Ids of the items that all draws were run on.

    Raises
    ------
    ValueError
        If a draw lacks one of the shared items.
    """
    rows = _draws_of(table, group)
    left = rows[rows["item"].isin(set(shared))].pivot(index="intervention", columns="item", values="value").reindex(columns=list(shared))
    if left.isna().any(axis=None):
        raise ValueError(f"random draws {group!r} were not all run on the {len(shared)} shared items: their losses cannot be compared")
    return full.loc[list(shared)].mean() - left.mean(axis=1)


def _draws_of(table: pd.DataFrame, group: str) -> pd.DataFrame:
    return table[table["intervention"].str.startswith(f"{group}/")]


def draw_p(targeted: float, random: Sequence[float], sets: int) -> float:
    """p-value of "the targeted set is one of those that match it, drawn at random".

    Parameters
    ----------
    targeted : float
        What the targeted set costs on the shared items.
    random : sequence of float
        What each draw costs on the same items.
    sets : int
        How many sets match (``matching_sets``). Draws leave the targeted one out; were it drawn like the others, one draw in ``sets`` would be
        it and cost as much. That share is added, which counts where few sets match.
    """
    return min(1.0, 1 / sets + (1 - 1 / sets) * monte_carlo_p(targeted, random))
