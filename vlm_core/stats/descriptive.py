"""Two-sided intervals for tables and figures.

``interval``
    mean of clustered values, fast enough for every point of a curve
``interval_each``
    the same for thousands of columns at once: every feature of every head
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .intervals import FEW_CLUSTERS, Bounds, estimate_mean, expanded_level


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
    seeds: ArrayLike | None = None,
    bounds: Bounds | None = (-1.0, 1.0),
    rng: int = 0,
) -> Interval:
    """Two-sided cluster interval for the mean over items (and seeds), fast enough for every point of a figure.

    Values beyond ``bounds`` are taken to have none. Without variance and without bounds there is no interval: both
    ends are NaN and the method says so.

    Parameters
    ----------
    effect, clusters : [item]
        Finite values and the cluster of each.
    confidence
        Two-sided.
    seeds : [item], optional
        Where each value comes from, crossed with clusters as in `estimate_mean`.
    """
    effect = np.asarray(effect, dtype=float)
    if effect.ndim != 1 or effect.size == 0 or not np.all(np.isfinite(effect)):
        raise ValueError("interval needs a non-empty one-dimensional effect of finite numbers")
    if bounds is not None and (effect.min() < bounds[0] or effect.max() > bounds[1]):
        bounds = None
    alpha = (1 - confidence) / 2
    found = estimate_mean(effect, clusters, seeds, bounds=bounds, smallest_alpha=alpha, rng=rng, fast=True)
    if found is None:
        n = np.unique(np.asarray(clusters)).size
        nan = float("nan")
        return Interval(float(effect.mean()), nan, nan, confidence, effect.size, n, "none: zero variance, no bounds")
    lower, upper = found.bounds(alpha)
    return Interval(
        found.value, float(lower), float(upper), confidence, found.n_items, found.n_clusters, found.method
    )


_DRAWS = 2000
_COLUMNS_AT_ONCE = 2048


def interval_each(
    values: ArrayLike, clusters: ArrayLike, confidence: float = 0.95, *, rng: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over items of many columns, each with its two-sided cluster interval, as `interval` gives them without bounds.

    A NaN is a missing item of its column. Percentile cluster bootstrap, t-expanded, all columns on the same resamples; Student t on
    cluster means below 20 clusters. A column without variance between clusters, or with fewer than two of them, has no interval: NaN.

    Parameters
    ----------
    values : [item, ...]
    clusters : [item]
    confidence
        Two-sided.

    Returns
    -------
    mean, lower, upper : numpy.ndarray [...]
    """
    values = np.asarray(values, dtype=float)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if values.ndim < 1 or len(values) != codes.size or not codes.size:
        raise ValueError(f"{len(values)} items and {codes.size} cluster ids: each item needs exactly one")
    shape = values.shape[1:]
    columns = values.reshape(len(values), -1)
    member = np.zeros((codes.max() + 1, len(columns)))
    member[codes, np.arange(len(columns))] = 1.0
    known = np.isfinite(columns)
    sums, counts = member @ np.where(known, columns, 0.0), member @ known.astype(float)
    n = (counts > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / counts.sum(0)
        means = sums / counts
        spread = np.where(counts > 0, means, -np.inf).max(0) - np.where(counts > 0, means, np.inf).min(0)
    alpha = (1 - confidence) / 2
    varies = (n > 1) & (spread > 1e-9 * np.maximum(1.0, np.abs(mean)))
    lower, upper = np.full((2, columns.shape[1]), np.nan)
    few = varies & (n < FEW_CLUSTERS)
    if few.any():
        centred = (sums - mean * counts)[:, few] / (counts.sum(0) / np.maximum(n, 1))[few]
        error = np.sqrt(np.square(centred).sum(0) / (n[few] - 1) / n[few])
        reach = stats.t.isf(alpha, n[few] - 1) * error
        lower[few], upper[few] = mean[few] - reach, mean[few] + reach
    many = np.flatnonzero(varies & ~few)
    if many.size:
        size = len(sums)
        weights = np.random.default_rng(rng).multinomial(size, np.full(size, 1 / size), size=_DRAWS).astype(float)
        level = expanded_level(alpha, size)
        for some in np.array_split(many, -(-many.size // _COLUMNS_AT_ONCE)):
            with np.errstate(invalid="ignore"):
                draws = (weights @ sums[:, some]) / (weights @ counts[:, some])
            # a draw without any item of a column, where most items lack it, is none
            quantile = np.nanquantile if np.isnan(draws).any() else np.quantile
            lower[some], upper[some] = quantile(draws, [level, 1 - level], axis=0)
    return mean.reshape(shape), lower.reshape(shape), upper.reshape(shape)
