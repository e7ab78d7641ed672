"""Two-sided intervals for tables and figures.

``interval``
    mean of clustered values, fast enough for every point of a curve
``accuracy_interval``, ``wilson``
    accuracies, of scenes that share items or of independent items
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

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


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval for ``k`` right answers among ``n`` independent items."""
    result = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(int(k) / int(n), float(result.low), float(result.high), confidence, int(n), int(n), "Wilson score")


def accuracy_interval(correct: ArrayLike, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Interval:
    """Interval for an accuracy: Wilson where items are independent, cluster bootstrap where scenes share items.

    Parameters
    ----------
    correct : [item]
        0/1, or a share right per item.
    clusters : [item], optional
        Scene of each item; independent items where absent.
    """
    correct = np.asarray(correct, dtype=float)
    if not np.all((correct >= 0) & (correct <= 1)):
        raise ValueError("accuracy_interval needs values between 0 and 1")
    independent = clusters is None or np.unique(np.asarray(clusters)).size == correct.size
    if independent and np.all((correct == 0) | (correct == 1)):
        return wilson(int(correct.sum()), correct.size, confidence)
    return interval(correct, np.arange(correct.size) if clusters is None else clusters, confidence, bounds=(0.0, 1.0))
