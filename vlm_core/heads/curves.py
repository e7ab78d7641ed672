"""How much of what the image does for the answer some heads carry: faithfulness and completeness over their number.

``recovery``            the answer with only the first k heads of a ranking seeing the image, and with all but these
``share_of_effect``     a part of the image's effect as a share of the whole, with bounds
``curves``              both shares over k for every ranking, with intervals
``fewest_heads``        the smallest k whose faithfulness is above a limit
``head_counts``         numbers of heads from shares of them

With z the mean of a metric over items, Faith(C) = [z(only C) - z(none)] / [z(all) - z(none)] and
Comp(C) = [z(all but C) - z(none)] / [z(all) - z(none)]: ratios of sums over items, so that an item whose answer does not hang on the image
weighs little. The formulas are our reconstruction of Kim et al. 2025, arXiv:2509.17588.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from vlm_core.families.anatomy import HeadId
from vlm_core.heads.ranking import whole_heads
from vlm_core.heads.rankings import Removal
from vlm_core.stats import Estimate, estimate_statistic, per_cluster
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide

__all__ = ["curves", "fewest_heads", "head_counts", "recovery", "share_of_effect"]

_RESAMPLES = 1000  # of each point of a curve


def head_counts(n_heads: int, shares: Iterable[float]) -> tuple[int, ...]:
    """Numbers of heads, rising and distinct, that are at most shares of ``n_heads`` (but at least one head, and never all of them)."""
    return tuple(sorted({min(max(1, whole_heads(n_heads, share)), n_heads - 1) for share in shares}))


def recovery(
    subject: Subject,
    items: Sequence,
    rankings: Mapping[str, Sequence[HeadId]],
    counts: Sequence[int],
    remove: Removal,
    *,
    sides: Sequence[str] = ("only", "without"),
    metric: str = "margin",
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> pd.DataFrame:
    """Score items with the first heads of each ranking alone seeing the image, and with these alone not seeing it.

    Parameters
    ----------
    rankings : mapping of name to heads
        Every head of the subject that can see the image once, the first ones first.
    counts : sequence of int
        How many of the first heads make the set C.
    remove : callable
        ``remove(heads)`` takes the image from heads.
    sides : sequence of {"only", "without"}
        Faithfulness needs ``only``, completeness ``without``.
    metric : str
        What z is the mean of; see ``vlm_core.sweep``.

    Returns
    -------
    DataFrame
        ``item, cluster, task, ranking, heads`` (number in C), one column for each of the sides, and ``every``, ``none``: the metric with all
        heads seeing the image and with none.

    Raises
    ------
    ValueError
        If a ranking does not hold every head once, or a count is none or all of the heads.
    """
    every = list(subject.image_heads)
    for name, ranking in rankings.items():
        if sorted(map(tuple, ranking)) != sorted(map(tuple, every)):
            raise ValueError(f"ranking {name!r} must hold each of the {len(every)} heads once: rank them with order_heads")
    if not counts or not all(0 < count < len(every) for count in counts):
        raise ValueError(f"counts must be numbers of heads from 1 to {len(every) - 1}, got {list(counts)}")
    conditions: dict = {"every": None, "none": remove(every)}
    for name, ranking in rankings.items():
        for count in counts:
            sets = {"only": ranking[count:], "without": ranking[:count]}
            conditions |= {f"{side}/{name}/{count}": remove(sets[side]) for side in sides}
    values = wide(sweep(subject, items, conditions, metrics=(metric,), store=store, progress=progress), metric)
    about = values[["cluster", "task", "every", "none"]].rename_axis("item").reset_index()
    parts = [
        about.assign(ranking=name, heads=count, **{side: values[f"{side}/{name}/{count}"].to_numpy() for side in sides})
        for name in rankings
        for count in counts
    ]
    return pd.concat(parts, ignore_index=True)[["item", "cluster", "task", "ranking", "heads", *sides, "every", "none"]]


def share_of_effect(part: ArrayLike, every: ArrayLike, none: ArrayLike, clusters: ArrayLike, **options) -> Estimate | None:
    """``sum(part - none) / sum(every - none)`` over items, with bounds by the cluster bootstrap.

    Faithfulness where ``part`` is the metric with only C seeing the image, completeness where all but C see it.

    Parameters
    ----------
    part, every, none : [item]
        The metric per item.
    clusters : [item]
    **options
        Of ``vlm_core.stats.estimate_statistic``.

    Returns
    -------
    Estimate, or None where there are no items, the image has no effect on the metric at all, or every draw gives the same share.

    Raises
    ------
    ValueError
        With fewer than three clusters, or where the effect is zero in some draw only.
    """
    part, every, none = (np.asarray(values, dtype=float) for values in (part, every, none))
    if not part.size:
        return None
    gained, whole = per_cluster(part - none, clusters), per_cluster(every - none, clusters)
    if not whole.any():
        return None
    return estimate_statistic(lambda weights: weights @ gained / (weights @ whole), clusters, **options)


def curves(table: pd.DataFrame, rng: int = 0) -> pd.DataFrame:
    """Faithfulness and completeness of every ranking at every number of heads.

    Rankings that share a name up to a ``/`` (``random/0``, ``random/1``) are one, each item's metric averaged over them.

    Parameters
    ----------
    table : DataFrame
        From ``recovery``; tables of several tasks may be stacked.

    Returns
    -------
    DataFrame
        ``ranking, heads, share, value, lower, upper``: ``share`` is ``faithfulness`` or ``completeness``, bounds are 95 % intervals, NaN
        where there are none.
    """
    sides = {side: share for side, share in (("only", "faithfulness"), ("without", "completeness")) if side in table}
    kind = table["ranking"].str.split("/").str[0].rename("ranking")
    per_item = table.groupby([kind, "heads", "item", "cluster"], sort=False)[[*sides, "every", "none"]].mean().reset_index()
    rows = []
    for (ranking, heads), cell in per_item.groupby(["ranking", "heads"], sort=False):
        for side, share in sides.items():
            found = share_of_effect(
                cell[side], cell["every"], cell["none"], cell["cluster"], n_resamples=_RESAMPLES, smallest_alpha=0.025, rng=rng
            )
            lower, upper = (np.nan, np.nan) if found is None else found.bounds(0.025)
            whole = float((cell["every"] - cell["none"]).sum())
            value = float((cell[side] - cell["none"]).sum()) / whole if whole else np.nan
            rows.append({"ranking": ranking, "heads": int(heads), "share": share, "value": value, "lower": lower, "upper": upper})
    return pd.DataFrame(rows)


def fewest_heads(curve: pd.DataFrame, ranking: str, limit: float, *, bound: str = "value") -> int | None:
    """The smallest number of heads whose faithfulness is above ``limit``, None where none measured is.

    Parameters
    ----------
    curve : DataFrame
        From ``curves``.
    bound : {"value", "lower"}
        Whether the estimate or its lower bound must be above.
    """
    rows = curve[(curve["ranking"] == ranking) & (curve["share"] == "faithfulness") & (curve[bound] > limit)]
    return None if rows.empty else int(rows["heads"].min())
