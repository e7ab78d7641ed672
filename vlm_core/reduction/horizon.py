"""The information horizon: the layer from which an answer no longer needs the image's tokens.

``information_horizon(table, margin)``   the first layer from which all of them can go for less than a margin of accuracy, task by task
``InformationHorizon``                   these layers, and what dropping costs at every layer
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from vlm_core.stats import estimate_mean

__all__ = ["InformationHorizon", "information_horizon"]

COLUMNS = ("item", "cluster", "task", "layer", "keep", "correct")


@dataclass(frozen=True, eq=False)
class InformationHorizon:
    """From which layer on image tokens are needed no more.

    Attributes
    ----------
    horizons : DataFrame
        One row a task, indexed by it: ``layer`` (the first from which, at it and every later measured layer, the upper bound of the loss
        lies below the margin; missing where it does at none), ``estimated`` (the same of the estimates themselves), ``accuracy`` with all
        tokens, ``n_items``, ``n_clusters``. Layers are nullable integers.
    curves : DataFrame
        One row a task and measured layer: ``task, layer, loss`` (accuracy with all tokens minus without any from this layer on, mean over
        items), ``lower, upper`` (one-sided bounds), ``n_items, n_clusters, method``.
    margin, alpha : float
    """

    horizons: pd.DataFrame
    curves: pd.DataFrame
    margin: float
    alpha: float


def information_horizon(table: pd.DataFrame, margin: float, alpha: float = 0.05) -> InformationHorizon:
    """The first layer from which dropping all image tokens costs less than a margin, there and at every later measured layer.

    Parameters
    ----------
    table : DataFrame
        From `vlm_core.reduction.curves.drop_table` with the fractions 0 and 1 among ``keeps``: what it costs to drop everything, against
        the same items' answers with all tokens. Rows of other fractions are left aside.
    margin : float
        Of accuracy, above 0.
    alpha : float
        One-sided level of each bound.

    Returns
    -------
    InformationHorizon

    Raises
    ------
    ValueError
        For a margin or level out of range, a table without these columns or fractions, items not measured at every layer, or numbers that
        are not finite.

    Notes
    -----
    Bounds are those of the cluster bootstrap (`vlm_core.stats.estimate_mean`). Read from the last layer to the first, stopping at the first
    bound that reaches the margin, the test is a fixed sequence: the chance that any layer passes whose true loss is at least the margin is
    at most alpha in each task, with no adjustment for the number of layers (Maurer, Hothorn & Lehmacher 1995). The price is the reading: a
    layer after which a later one fails is no horizon, whatever its own loss. Where a task is answered no better than by chance, no layer's
    tokens matter and the horizon is 0: look at ``accuracy`` first. Where nothing is lost in any of n scenes, the bound is
    1 - alpha^(1/n): a margin of 5 points takes 59 scenes at alpha 0.05, with fewer no layer can pass.
    """
    if not 0.0 < margin < 1.0 or not 0.0 < alpha < 0.5:
        raise ValueError(f"margin must lie between 0 and 1 and alpha between 0 and 0.5, got {margin!r} and {alpha!r}")
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no column '{missing[0]}' (it has {', '.join(map(str, table.columns))}): pass one of drop_table")
    if not {0.0, 1.0} <= set(table["keep"]):
        raise ValueError("the table must hold keep = 0 and keep = 1: the loss of dropping everything is measured against the whole image")
    curves, horizons = [], []
    for task, rows in table.groupby("task", sort=False):
        full = rows[rows["keep"] == 1.0].drop_duplicates("item").set_index("item")
        gone = rows[rows["keep"] == 0.0].drop_duplicates(["item", "layer"]).pivot(index="item", columns="layer", values="correct")
        if set(gone.index) != set(full.index) or gone.isna().to_numpy().any() or full["correct"].isna().any():
            raise ValueError(
                f"task '{task}': some item has no finite answer with all tokens or without any at some layer: measure each at every layer"
            )
        gone = gone.loc[full.index]
        losses = full["correct"].to_numpy(float)[:, None] - gone.to_numpy(float)
        clusters = full["cluster"].to_numpy()
        own = [_point(str(task), int(layer), losses[:, k], clusters, alpha) for k, layer in enumerate(gone.columns)]
        curves += own
        horizons.append(
            {
                "task": str(task),
                "layer": _first([one["upper"] < margin for one in own], gone.columns),
                "estimated": _first([one["loss"] < margin for one in own], gone.columns),
                "accuracy": float(full["correct"].mean()),
                "n_items": len(full),
                "n_clusters": own[0]["n_clusters"],
            }
        )
    found = pd.DataFrame(horizons).set_index("task").astype({"layer": "Int64", "estimated": "Int64"})
    return InformationHorizon(found, pd.DataFrame(curves), float(margin), float(alpha))


def _point(task: str, layer: int, loss: np.ndarray, clusters: np.ndarray, alpha: float) -> dict:
    found = estimate_mean(loss, clusters, smallest_alpha=alpha)
    lower, upper = found.bounds(alpha)
    return {
        "task": task,
        "layer": layer,
        "loss": found.value,
        "lower": float(lower),
        "upper": float(upper),
        "n_items": found.n_items,
        "n_clusters": found.n_clusters,
        "method": found.method,
    }


def _first(passes: list[bool], layers) -> int | None:
    """The first layer from which all pass; None where the last does not."""
    kept = None
    for passed, layer in zip(reversed(passes), reversed(list(layers)), strict=True):
        if not passed:
            break
        kept = int(layer)
    return kept
