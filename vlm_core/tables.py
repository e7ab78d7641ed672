"""Reshape sweep tables.

``wide``    one row an item, one column an intervention
"""

from __future__ import annotations

import pandas as pd

__all__ = ["wide"]


def wide(table: pd.DataFrame, metric: str = "correct") -> pd.DataFrame:
    """One metric of a sweep, one row an item, one column an intervention.

    Parameters
    ----------
    table : DataFrame
        From ``vlm_core.sweep``.
    metric : str

    Returns
    -------
    DataFrame
        Indexed by item, in the order measured, with ``cluster`` and ``task`` first; NaN where an item was not run under an
        intervention.

    Raises
    ------
    ValueError
        If the table has no such metric, or an item was measured twice under one intervention.
    """
    chosen = table[table["metric"] == metric]
    if chosen.empty:
        raise ValueError(f"the sweep has no metric '{metric}': it measured {', '.join(sorted(table['metric'].unique()))}")
    if chosen.duplicated(["item", "intervention"]).any():
        raise ValueError("an item was measured twice under one intervention: give the interventions distinct labels")
    about = chosen.drop_duplicates("item").set_index("item")[["cluster", "task"]]
    values = chosen.pivot(index="item", columns="intervention", values="value")
    order = chosen["intervention"].drop_duplicates().tolist()
    return about.join(values[order])
