"""How many visual tokens a subject needs, from which layer on, kept by which policy.

``reducers(...)``        the policies to compare, by name, simplest first
``holds_exactly(...)``   whether one keeps as many tokens as asked, everywhere
``unavailable(...)``     those that need what a subject does not have, with the reason
``drop_table(...)``      accuracy under every combination of layer, keep fraction and policy
``choose_drop(...)``     the layer and policy that lose least at a given fraction, on discovery items
``harmless(...)``        what loses little on discovery items, and ``choose_recipe(...)`` the one of these that saves most
``early``, ``asked_by``, ``mid_depth``, ``three_quarters``, ``spread``    layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from vlm_core.errors import NotMeasurable, SubjectError
from vlm_core.interventions import DropTokens, Row
from vlm_core.interventions.numeric import shown
from vlm_core.interventions.policy import Policy
from vlm_core.interventions.tokens import DROP_POLICIES
from vlm_core.reduction import declared
from vlm_core.reduction.pyramid import N_STAGES, pyramid_of
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows
from vlm_core.subjects.subject import Subject
from vlm_core.subjects.visual import OUTSIDE
from vlm_core.sweeps.sweep import sweep

__all__ = [
    "REFERENCES",
    "TIMED",
    "Cell",
    "Reducer",
    "asked_by",
    "choose_drop",
    "choose_recipe",
    "drop_table",
    "early",
    "harmless",
    "holds_exactly",
    "losses",
    "mid_depth",
    "reducers",
    "row_of",
    "spread",
    "three_quarters",
    "unavailable",
]

REFERENCES = ("random", "stride", "pooling")
"""Policies that know nothing of what the tokens carry: what an informed one has to beat."""

TIMED = 8
"""Reductions whose time is measured to choose a recipe among them."""

Reducer = str | Policy | Callable[[int, float], Row]
"""``"random"`` or ``"stride"``, a policy, or a function of (layer, keep) for what takes several steps, None where these do not fit."""


class Cell(NamedTuple):
    """A way to leave a model fewer tokens: from which layer on, which fraction, by which policy."""

    layer: int
    keep: float
    policy: str


def early(subject: Subject) -> int:
    """The layer at which FastV drops tokens: 2 of 32, in proportion, and never before the second (a policy reads the layer before).

    Where a family adds visual features to its first layers, the first layer after these.

    Raises
    ------
    NotMeasurable
        Where the subject has no such layer.
    """
    return _there(subject, max(1, round(subject.anatomy.n_layers * 2 / 32)))


def _there(subject: Subject, layer: int) -> int:
    n, layer = subject.anatomy.n_layers, max(layer, subject.anatomy.n_deepstack)
    if layer >= n:
        raise NotMeasurable(f"the subject has {n} {'layer' if n == 1 else 'layers'}, too few to drop tokens at layer {layer} (counted from 0)")
    return layer


def asked_by(subject: Subject) -> int:
    """The first layer, from the early one on, before which words of the question have attended to one another.

    What a policy reads of the question in the first layer's attention is each word by itself.

    Raises
    ------
    NotMeasurable
        Where the subject has no such layer.
    """
    return _there(subject, max(2, early(subject)))


def mid_depth(subject: Subject) -> tuple[int, ...]:
    """Layers from half to two thirds of the depth, counted from 0 (3 and 4 of 6; 16 to 21 of 32, at most four of them).

    Later layers would make "from mid-depth on" true by definition: fewer and fewer layers are left that could need the tokens.
    """
    n = subject.anatomy.n_layers
    first = min(max(-(-n // 2), subject.anatomy.n_deepstack), n - 1)
    return spread_between(first, max(first, (2 * n) // 3), 4)


def three_quarters(subject: Subject) -> int:
    """The layer at 3/4 of the depth, counted from 0 (4 of 6; 24 of 32)."""
    return 3 * subject.anatomy.n_layers // 4


def spread(subject: Subject, most: int = 8) -> tuple[int, ...]:
    """Every layer at which tokens can go, or ``most`` evenly spaced ones of a deeper subject, the first and the last included."""
    return spread_between(subject.anatomy.n_deepstack, subject.anatomy.n_layers - 1, most)


def spread_between(first: int, last: int, most: int) -> tuple[int, ...]:
    """Whole numbers from ``first`` to ``last``, at most ``most`` of them, evenly spaced."""
    return tuple(dict.fromkeys(int(k) for k in np.linspace(first, last, min(most, last - first + 1)).round()))


def reducers(subject: Subject, **more: Reducer) -> dict[str, Reducer]:
    """Every policy that comes with the library and keeps as many tokens as asked, by name, those that know least first; and ``more``.

    Stages keep as many on average over layers.
    """
    policies = {name: one for name, one in declared().items() if one.exact}
    first = [name for name in REFERENCES if name in policies]
    found: dict[str, Reducer] = {name: policies[name] for name in (*first, *(name for name in policies if name not in first))}
    # What these strings name is drawn for a whole batch at once.
    found |= {name: name for name in DROP_POLICIES if name in found}
    return {**found, "pyramid": partial(_staged, subject.anatomy.n_layers), **more}


def _staged(n_layers: int, layer: int, keep: float) -> Row:
    if layer == 0 or n_layers - layer < N_STAGES:
        return None
    return pyramid_of(keep, n_layers, layer)


def holds_exactly(reducer: Reducer) -> bool:
    """Whether as many tokens stay as asked, in every prompt and in every layer from the first on."""
    return isinstance(reducer, str) or (isinstance(reducer, Policy) and reducer.exact)


def unavailable(subject: Subject, items: Sequence, among: Mapping[str, Reducer]) -> dict[str, str]:
    """Policies that ask for what this subject or these prompts do not have, each with the reason: every one is asked once about each item.

    Parameters
    ----------
    items : sequence of items
        A few, one of each kind of prompt.
    """
    missing: dict[str, str] = {}
    layer = max(1, subject.anatomy.n_deepstack)
    for name, one in among.items():
        if not isinstance(one, Policy):
            continue
        try:
            encoded = encode_items(subject, items, reads=one.reads & OUTSIDE)
            if layer < subject.anatomy.n_layers and _possible(one, layer, 0.5):
                every = list(range(len(encoded)))
                forward_rows(subject, encoded, every, [DropTokens(layer, 0.5, one)] * len(encoded), every)
        except (NotMeasurable, SubjectError) as error:
            missing[name] = str(error)
    return missing


def row_of(reducer: Reducer, layer: int, keep: float, seed: int = 0) -> Row:
    """What a reducer does at a layer and fraction.

    Raises
    ------
    ValueError
        Where its policy reads a layer before the first.
    """
    if keep == 1:
        return None
    if keep == 0:
        return DropTokens(layer, 0.0)
    if isinstance(reducer, str):
        return DropTokens(layer, keep, reducer, seed=seed)
    return DropTokens(layer, keep, reducer) if isinstance(reducer, Policy) else reducer(layer, keep)


def _possible(reducer: Reducer, layer: int, keep: float) -> bool:
    if isinstance(reducer, Policy):
        try:
            reducer.require_layer(layer)
        except ValueError:
            return False
        return True
    return isinstance(reducer, str) or reducer(layer, keep) is not None


def drop_table(
    subject: Subject,
    items: Sequence,
    *,
    layers: Sequence[int],
    keeps: Sequence[float],
    policies: Mapping[str, Reducer],
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> pd.DataFrame:
    """Accuracy per item under every way to leave fewer tokens.

    Parameters
    ----------
    layers, keeps, policies
        The grid. A policy that reads the layer before is left out at layer 0; where nothing or everything is kept, policies
        are the same and run once.
    seed : int
        Of the random policy.
    store, progress
        As in ``vlm_core.sweep``.

    Returns
    -------
    DataFrame
        ``item, cluster, task, layer, keep, policy, correct, margin``; ``keep = 1`` is the untouched subject.
    """
    grid = [
        Cell(layer, keep, name)
        for layer in layers
        for keep in keeps
        for name, reducer in policies.items()
        if keep in (0, 1) or _possible(reducer, layer, keep)
    ]
    labels = {cell: "full" if cell.keep == 1 else f"{cell.layer}/{shown(cell.keep)}/{'any' if cell.keep == 0 else cell.policy}" for cell in grid}
    interventions = {label: row_of(policies[cell.policy], cell.layer, cell.keep, seed) for cell, label in labels.items()}
    measured = sweep(subject, items, interventions, metrics=("correct", "margin"), store=store, progress=progress)
    # Metrics of a row follow one another.
    rows = measured[measured["metric"] == "correct"].rename(columns={"value": "correct"}).reset_index(drop=True)
    rows["margin"] = measured.loc[measured["metric"] == "margin", "value"].to_numpy()
    cells = pd.DataFrame([(*cell, label) for cell, label in labels.items()], columns=["layer", "keep", "policy", "intervention"])
    merged = rows.merge(cells, on="intervention", how="inner")
    return merged[["item", "cluster", "task", "layer", "keep", "policy", "correct", "margin"]]


def choose_drop(table: pd.DataFrame, keep: float, task: str | None = None) -> Cell:
    """The layer and policy with the highest accuracy at ``keep``, from a discovery `drop_table`.

    Ties go to the highest accuracy over all tasks of the table, then to the largest mean margin of the answer, then to the earliest layer
    (it saves most), then to the policy that the table has first.

    Parameters
    ----------
    task : str, optional
        Whose accuracy it is. Default: all tasks together.

    Raises
    ------
    ValueError
        If the table has no rows at this fraction.
    """
    rows = table[table["keep"] == keep]
    if task is not None:
        rows = rows[rows["task"] == task]
    if rows.empty:
        raise ValueError(f"the table has no rows at keep = {shown(keep)}" + (f" of task '{task}'" if task is not None else ""))
    cells = ["layer", "policy"]
    own, over_all = (one.groupby(cells, sort=False)[["correct", "margin"]].mean().round(9) for one in (rows, table[table["keep"] == keep]))
    order = {policy: i for i, policy in enumerate(table["policy"].drop_duplicates())}

    def rank(cell: tuple) -> tuple:
        return own.loc[cell, "correct"], over_all.loc[cell, "correct"], own.loc[cell, "margin"], -cell[0], -order[cell[1]]

    layer, policy = max(own.index, key=rank)
    return Cell(int(layer), float(keep), policy)


def losses(table: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Accuracy lost per item, ``item, cluster, task, loss``: of the untouched subject, less that under ``cell``.

    Raises
    ------
    ValueError
        Where the table lacks the cell, or the untouched subject.
    """
    full = table[table["keep"] == 1].drop_duplicates("item").set_index("item")["correct"]
    at = (table["layer"] == cell.layer) & (table["keep"] == cell.keep) & (table["policy"] == cell.policy)
    rows = table[at]
    if rows.empty or full.empty:
        raise ValueError(f"the table has no rows of {'the untouched subject' if full.empty else cell}: measure keep = 1 and every cell")
    found = rows[["item", "cluster", "task"]].assign(loss=full.loc[rows["item"]].to_numpy() - rows["correct"].to_numpy())
    return found.reset_index(drop=True)


def harmless(table: pd.DataFrame, margin: float) -> list[Cell]:
    """Cells that lose little on discovery items: less than half of ``margin`` over all tasks, and less than ``margin`` in every one.

    That is a choice and no claim: what they lose is decided on other items. In the table's order, those of smaller loss first.
    """
    order = {policy: i for i, policy in enumerate(table["policy"].drop_duplicates())}
    cells = table[table["keep"] < 1][["layer", "keep", "policy"]].drop_duplicates().itertuples(index=False, name=None)
    fine = []
    for cell in (Cell(int(layer), float(keep), policy) for layer, keep, policy in cells):
        by_task = losses(table, cell).groupby("task")["loss"].mean()
        if by_task.mean() < margin / 2 and (by_task < margin).all():
            fine.append((round(by_task.mean(), 12), order[cell.policy], cell))
    return [cell for *_, cell in sorted(fine)]


def choose_recipe(
    cells: Sequence[Cell], operations: Callable[[Cell], float], seconds: Callable[[Sequence[Cell]], Sequence[float]], timed: int = TIMED
) -> Cell | None:
    """Of the ``timed`` cells that save most operations, the one that saves most time.

    Operations alone would choose a policy that computes more than it saves; the clock alone would have to run for all. Ties go to the
    cell that comes first.

    Parameters
    ----------
    cells : sequence of Cell
        Those that qualify (`harmless`), better ones first.
    operations : callable
        Share of the prefill's operations that a cell saves.
    seconds : callable
        Shares of its measured time that cells save, measured side by side.

    Returns
    -------
    Cell or None
        None where no cell qualifies.
    """
    first = sorted(cells, key=lambda cell: -round(operations(cell), 9))[:timed]
    return max(zip(first, seconds(first), strict=True), key=itemgetter(1))[0] if first else None
