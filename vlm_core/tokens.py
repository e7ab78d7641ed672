"""How many visual tokens a subject needs, from which layer on.

``drop_table``     accuracy under every combination of layer, keep fraction and policy
``choose_drop``    the policy and layer that lose least at a given fraction, on discovery items
``mid_depth``      the layers "from mid-depth on" means
``spread``         a few layers over the whole depth
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlm_core.interventions import DropTokens
from vlm_core.interventions.numeric import shown
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep

__all__ = ["POLICIES", "choose_drop", "drop_table", "mid_depth", "spread"]

POLICIES = ("random", "stride", "attention")


def mid_depth(subject: Subject) -> tuple[int, ...]:
    """Layers from half to two thirds of the depth, counted from 0 (3 and 4 of 6; 16 to 21 of 32, at most four of them).

    Later layers would make "from mid-depth on" true by definition: fewer and fewer layers are left that could need the tokens.
    """
    n = subject.anatomy.n_layers
    first = min(-(-n // 2), n - 1)
    return spread_between(first, max(first, (2 * n) // 3), 4)


def spread(subject: Subject, most: int = 8) -> tuple[int, ...]:
    """Every layer, or ``most`` evenly spaced ones of a deeper subject, the first and the last included."""
    return spread_between(0, subject.anatomy.n_layers - 1, most)


def spread_between(first: int, last: int, most: int) -> tuple[int, ...]:
    """Whole numbers from ``first`` to ``last``, at most ``most`` of them, evenly spaced."""
    return tuple(dict.fromkeys(int(k) for k in np.linspace(first, last, min(most, last - first + 1)).round()))


def drop_table(
    subject: Subject,
    items: Sequence,
    *,
    layers: Sequence[int],
    keeps: Sequence[float],
    policies: Sequence[str] = POLICIES,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> pd.DataFrame:
    """Accuracy per item under every way to drop tokens.

    Parameters
    ----------
    layers, keeps, policies
        The grid. A policy that needs attention before the drop is left out at layer 0; where nothing or everything is kept, policies
        are the same and run once.
    seed : int
        Of the random policy.
    store, progress
        As in ``vlm_core.sweep``.

    Returns
    -------
    DataFrame
        ``item, cluster, task, layer, keep, policy, correct``; ``keep = 1`` is the untouched subject.
    """
    grid = [
        (layer, keep, policy)
        for layer in layers
        for keep in keeps
        for policy in policies
        if not (policy == "attention" and layer == 0 and 0 < keep < 1)
    ]
    labels = {cell: "full" if cell[1] == 1 else f"{cell[0]}/{shown(cell[1])}/{'any' if cell[1] == 0 else cell[2]}" for cell in grid}
    interventions = {label: None if label == "full" else DropTokens(*cell, seed=seed) for cell, label in labels.items()}
    measured = sweep(subject, items, interventions, metrics=("correct",), store=store, progress=progress)
    cells = pd.DataFrame([(*cell, label) for cell, label in labels.items()], columns=["layer", "keep", "policy", "intervention"])
    merged = measured.merge(cells, on="intervention", how="inner").rename(columns={"value": "correct"})
    return merged[["item", "cluster", "task", "layer", "keep", "policy", "correct"]]


def choose_drop(table: pd.DataFrame, keep: float, seed: int = 0) -> DropTokens:
    """The policy and layer with the highest accuracy at ``keep``, from a discovery `drop_table`.

    Ties go to the earliest layer (it saves most), then to the simplest policy (``random``, ``stride``, ``attention``).

    Raises
    ------
    ValueError
        If the table has no rows at this fraction.
    """
    rows = table[table["keep"] == keep]
    if rows.empty:
        raise ValueError(f"the table has no rows at keep = {shown(keep)}")
    mean = rows.groupby(["layer", "policy"], sort=False)["correct"].mean()
    order = {policy: i for i, policy in enumerate(POLICIES)}
    layer, policy = max(mean.index, key=lambda cell: (round(mean[cell], 12), -cell[0], -order[cell[1]]))
    return DropTokens(int(layer), keep, policy, seed=seed)
