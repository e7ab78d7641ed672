"""Ordered alternatives: does an effect rise, or fall, along conditions with a natural order (layers, keep fractions)?

``linear_contrast``
    each item's slope over the conditions: the effect that a ``Trend`` claim hands to `decide`
``page_p``
    the p-value of Page's ordered test that goes with it
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .permutation import never_zero


def _table(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape[1] < 3:
        raise ValueError(f"a trend needs [item, condition] values with 3 conditions or more, not shape {values.shape}")
    return values


def linear_contrast(values: ArrayLike, *, falling: bool = False) -> np.ndarray:
    """Least-squares slope of each item's values per step of the condition.

    Parameters
    ----------
    values : [item, condition]
        Measurements, conditions in their natural order.
    falling
        The prediction is a fall: the slope changes sign, so that positive always means "as predicted".

    Returns
    -------
    numpy.ndarray : [item]
    """
    values = _table(values)
    steps = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    slope = values @ steps / (steps @ steps)
    return -slope if falling else slope


def page_p(values: ArrayLike, clusters: ArrayLike, *, falling: bool = False) -> float:
    """p-value of Page's trend test on cluster means (its rows must be independent, and items of a scene are not).

    Parameters
    ----------
    values : [item, condition]
        Measurements, conditions in their natural order.
    clusters : [item]
        Cluster of each item.
    falling
        The prediction is a fall.

    Returns
    -------
    float
        Never 0: where the p-value is too small to compute, the spacing of floats (2.2e-16) bounds it from above.
    """
    values = _table(values)
    if not np.all(np.isfinite(values)):
        raise ValueError("page_p needs finite values: a condition was not measured for every item")
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    # Ranks within a row are the same for sums as for means; rounded so that equal conditions stay tied.
    totals = np.round(np.stack([np.bincount(codes, column) for column in values.T], axis=1), 9)
    return never_zero(stats.page_trend_test(totals[:, ::-1] if falling else totals).pvalue)
