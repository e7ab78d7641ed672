"""Two-sided intervals for tables and figures.

``interval``
    mean of clustered values, fast enough for every point of a curve
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from .intervals import Bounds, estimate_mean


@dataclass(frozen=True)
class Interval:
    """A two-sided interval for a table or a figure."""

    estimate: float
    lower: float
    upper: float
    confidence: float
    n_items: int
    n_clusters: int
    method: str

    def as_dict(self) -> dict:
        return asdict(self)


def interval(
    effect: ArrayLike,
    clusters: ArrayLike,
    confidence: float = 0.95,
    *,
    bounds: Bounds | None = (-1.0, 1.0),
    rng: int = 0,
) -> Interval:
    """Two-sided cluster interval for the mean over items, fast enough for every point of a figure.

    Values beyond ``bounds`` are taken to have none. Without variance and without bounds there is no interval: both
    ends are NaN and the method says so.

    Parameters
    ----------
    effect, clusters : [item]
        Finite values and the cluster of each.
    confidence
        Two-sided.
    """
    effect = np.asarray(effect, dtype=float)
    if effect.ndim != 1 or effect.size == 0 or not np.all(np.isfinite(effect)):
        raise ValueError("interval needs a non-empty one-dimensional effect of finite numbers")
    if bounds is not None and (effect.min() < bounds[0] or effect.max() > bounds[1]):
        bounds = None
    alpha = (1 - confidence) / 2
    found = estimate_mean(effect, clusters, bounds=bounds, smallest_alpha=alpha, rng=rng, fast=True)
    if found is None:
        n = np.unique(np.asarray(clusters)).size
        nan = float("nan")
        return Interval(float(effect.mean()), nan, nan, confidence, effect.size, n, "none: zero variance, no bounds")
    lower, upper = found.bounds(alpha)
    return Interval(
        found.value, float(lower), float(upper), confidence, found.n_items, found.n_clusters, found.method
    )
