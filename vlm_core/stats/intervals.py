"""The one place that computes the bounds of a mean.

``estimate_mean``
    mean effect with one-sided bounds at any level: what `decide` reads, what its p-values invert, and what
    :mod:`vlm_core.stats.descriptive` shows two-sided

Which bounds, and why
---------------------
* **BCa cluster bootstrap** (``scipy.stats.bootstrap`` on one (sum, count) pair per cluster), its percentiles
  *expanded* by the t distribution: n resampled clusters are as narrow as n - 1 and their tails as thin as a normal's,
  which at 30 clusters and α = 0.05/7 would let 1.6 times too many false claims through
  (the expanded percentile interval of Hesterberg 2015, Am. Stat. 69:371-386, arXiv:1411.5279).
* **Student t on cluster means** below 20 clusters, where a bootstrap has too little to resample.
* **Gaffke's order-statistic bound** for bounded effects when almost all clusters have the same value (fewer than 20
  differ, and fewer than half). The bootstrap cannot resample what it has not seen: it supported false claims up to
  7 times too often there. Gaffke's bound puts one unseen cluster at the end of the range; it is exact
  (Clopper-Pearson) for two-valued effects and equals the zero-variance bound when no cluster differs
  (Gaffke 2005, Math. Methods Statist. 14:451-467; Learned-Miller & Thomas 2020, arXiv:1905.06208, who find it
  conservative for every bounded distribution tried; a general proof is not known to us).
* **Zero variance**, bounded effects: 0 of n clusters deviating bounds the share that does by
  ``u = 1 - alpha**(1/n)``, so the mean by ``c + (high - c) u``. Unbounded effects: no interval exists.
* **Seeds crossed with clusters**: each source has its own bound, the seeds Student t on the seed means (k - 1 degrees
  of freedom), the clusters any of the above on effects averaged over seeds; their distances from the estimate add in
  quadrature. Conservative for any split of a normal variance (Banerjee 1960, Sankhya 22:357-358), where Satterthwaite's
  degrees of freedom let 2.5 times too many false claims through with 3 seeds at α = 0.05/8.

Differences below 1e-9 count as none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

N_RESAMPLES = 9999
FEW_CLUSTERS = 20

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean with one-sided bounds at every level.

    Attributes
    ----------
    value
        Mean over items (and seeds).
    standard_error
        Its standard error, all sources of variation together.
    seed_error
        The part of the standard error that more clusters cannot remove.
    df
        Degrees of freedom of the scarcest source.
    method
        How the bounds were made, in words.
    n_items, n_clusters, n_seeds
        What the mean is over.
    resolution
        Smallest p-value the method can give.
    """

    value: float
    standard_error: float
    seed_error: float
    df: int
    method: str
    n_items: int
    n_clusters: int
    n_seeds: int
    resolution: float
    _bounds: Callable[[float], Bounds]

    def bounds(self, alpha: float) -> Bounds:
        """Lower and upper one-sided bound, each missed with probability ``alpha``."""
        if alpha == 0.5:
            return self.value, self.value
        lower, upper = self._bounds(min(alpha, 1 - alpha))
        return (lower, upper) if alpha < 0.5 else (upper, lower)

    def p_above(self, limit: float) -> float:
        """One-sided p-value against "the mean is at most ``limit``": the level at which the lower bound reaches it."""
        return self._smallest_level(lambda alpha: self.bounds(alpha)[0] > limit)

    def p_below(self, limit: float) -> float:
        """One-sided p-value against "the mean is at least ``limit``": the level at which the upper bound reaches it."""
        return self._smallest_level(lambda alpha: self.bounds(alpha)[1] < limit)

    def _smallest_level(self, excludes: Callable[[float], bool]) -> float:
        def level(logit: float) -> float:
            return float(1 / (1 + np.exp(-logit)))

        low, high = float(np.log(self.resolution / (1 - self.resolution))), 7.0
        if excludes(self.resolution):
            return self.resolution
        if not excludes(level(high)):
            return 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            if excludes(level(middle)):
                high = middle
            else:
                low = middle
        return level(high)


def cluster_totals(effect: ArrayLike, clusters: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Sum of effects and number of items of each cluster, in an order that neither names nor rows can change.

    Parameters
    ----------
    effect, clusters : [item]
        Effects and the cluster of each.

    Returns
    -------
    sums, counts : [cluster]
        Sorted by cluster mean, then size, so that a seeded bootstrap does not depend on the input's order.
    """
    effect = np.asarray(effect, dtype=float)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if codes.shape != effect.shape:
        raise ValueError(f"{effect.size} effects and {codes.size} cluster ids: each effect needs exactly one")
    rows = np.lexsort((effect, codes))
    counts = np.bincount(codes).astype(float)
    sums = np.bincount(codes[rows], weights=effect[rows])
    order = np.lexsort((counts, np.round(sums / counts, 9)))
    return sums[order], counts[order]


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    # Rounded so that equal resamples compare equal: the bias correction counts ties.
    return np.round(np.sum(sums, axis=axis) / np.sum(counts, axis=axis), 12)


def _residuals(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Cluster contributions to the mean over items, linearised: mean 0, variance n times that of the mean."""
    mean = sums.sum(-1, keepdims=True) / counts.sum(-1, keepdims=True)
    return (sums - mean * counts) / counts.mean(-1, keepdims=True)


def _standard_error(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.std(_residuals(sums, counts), axis=-1, ddof=1) / np.sqrt(sums.shape[-1])


def expanded_level(alpha: float, n: int) -> float:
    """Bootstrap percentile whose bound is Student's t for normal data (Hesterberg 2015)."""
    return float(stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf(alpha, n - 1)))


def bca_bounds(
    sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, n_resamples: int = N_RESAMPLES
) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """BCa bounds with t-expanded percentiles, as a function of the one-sided level.

    Parameters
    ----------
    sums, counts : [..., cluster]
        Cluster totals; leading axes are independent data sets that share the resampled indices.
    """
    n = sums.shape[-1]
    options = {
        "paired": True,
        "vectorized": True,
        "axis": -1,
        "method": "BCa",
        "batch": max(1, 4_000_000 // sums.size),
    }
    first = stats.bootstrap((sums, counts), _ratio, n_resamples=n_resamples, rng=rng, **options)

    @lru_cache(maxsize=256)
    def bounds(alpha: float) -> tuple[np.ndarray, np.ndarray]:
        confidence = 1 - 2 * expanded_level(alpha, n)
        result = stats.bootstrap(
            (sums, counts), _ratio, n_resamples=0, bootstrap_result=first, confidence_level=confidence, **options
        )
        return result.confidence_interval

    return bounds


def _percentile_bounds(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Callable[[float], Bounds]:
    n = sums.size
    weights = _multinomial_weights(n, int(rng.integers(2**31)))
    draws = (weights @ sums) / (weights @ counts)

    def bounds(alpha: float) -> Bounds:
        level = expanded_level(alpha, n)
        lower, upper = np.quantile(draws, [level, 1 - level])
        return float(lower), float(upper)

    return bounds


@lru_cache(maxsize=8)
def _multinomial_weights(n: int, seed: int, draws: int = 2000) -> np.ndarray:
    """[draw, cluster] how often each cluster is resampled; shared by every table row of the same size."""
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)
    weights.flags.writeable = False
    return weights


def student_bounds(mean: ArrayLike, standard_error: ArrayLike, df: int) -> Callable[[float], tuple]:
    """Student t bounds as a function of the one-sided level."""

    def bounds(alpha: float) -> tuple:
        reach = stats.t.isf(alpha, df) * standard_error
        return mean - reach, mean + reach

    return bounds


def constant_bounds(value: float, counts: np.ndarray, limits: Bounds) -> Callable[[float], Bounds]:
    """Bounds for an effect that is the same in all n clusters: exact binomial, 0 of n clusters deviating.

    Valid although the constant is not known beforehand: were the mean above ``value + (high - value) u``, more than a
    share ``u`` of clusters would lie above ``value``, and n clusters without one have probability below alpha. A
    deviating cluster may be as large as the largest seen.
    """
    low, high = limits

    def bounds(alpha: float) -> Bounds:
        share = -np.expm1(np.log(alpha) / counts.size)
        share = share * counts.max() / (share * counts.max() + (1 - share) * counts.mean())
        return float(value - (value - low) * share), float(value + (high - value) * share)

    return bounds


def _gaffke_bounds(
    sums: np.ndarray, counts: np.ndarray, limits: Bounds, rng: np.random.Generator, n_resamples: int = N_RESAMPLES
) -> Callable[[float], Bounds]:
    """Order-statistic bounds for the mean of bounded effects, one unseen cluster at the end of the range.

    Quantiles of ``sum_i D_i x_(i)`` over the n clusters and one at the limit, D uniform on the simplex. Clusters with
    equal totals share one gamma variate, so a thousand unchanged clusters cost one column.
    """
    # Grouped by mean, not by sum: a shift of every effect then keeps the order, and with it the draws.
    pairs, multiplicity = np.unique(np.stack([np.round(sums / counts, 9), counts], 1), axis=0, return_counts=True)
    weights = rng.standard_gamma(multiplicity, size=(n_resamples, multiplicity.size))
    unseen = rng.standard_exponential(n_resamples) * counts.max()
    total, size = weights @ pairs.prod(axis=1), weights @ pairs[:, 1] + unseen
    low, high = (np.sort((total + limit * unseen) / size) for limit in limits)

    def bounds(alpha: float) -> Bounds:
        return float(np.quantile(low, alpha)), float(np.quantile(high, 1 - alpha))

    return bounds


def _in_quadrature(value: float, *sources: Callable[[float], Bounds]) -> Callable[[float], Bounds]:
    """Bounds whose distance from the value is the root of the sources' summed squares."""

    def bounds(alpha: float) -> Bounds:
        pairs = np.array([source(alpha) for source in sources], dtype=float)
        below, above = np.maximum(value - pairs[:, 0], 0), np.maximum(pairs[:, 1] - value, 0)
        return float(value - np.hypot.reduce(below)), float(value + np.hypot.reduce(above))

    return bounds


def _cluster_bounds(
    sums: np.ndarray, counts: np.ndarray, limits: Bounds | None, rng: np.random.Generator, n_resamples: int, fast: bool
) -> tuple[Callable[[float], Bounds], str, float] | None:
    """Bounds, method and resolution for one (sum, count) pair per cluster; None where no bound exists."""
    n = sums.size
    value = float(sums.sum() / counts.sum())
    means = sums / counts
    if np.ptp(means) <= 1e-9 * max(1.0, abs(value)):
        if limits is None:
            return None
        method = f"exact binomial bound, 0 of {n} clusters deviating (zero variance)"
        return constant_bounds(value, counts, limits), method, 1e-12
    _, tally = np.unique(np.round(means, 9), return_counts=True)
    deviating = n - int(tally.max())
    if limits is not None and deviating < FEW_CLUSTERS and deviating < n / 2:
        method = f"Gaffke order-statistic bound, {deviating} of {n} clusters deviating"
        return _gaffke_bounds(sums, counts, limits, rng, n_resamples), method, 1 / (n_resamples + 1)
    if n >= FEW_CLUSTERS:
        if fast:
            return _percentile_bounds(sums, counts, rng), "percentile cluster bootstrap, t-expanded", 1 / 2001
        bounds, method = bca_bounds(sums, counts, rng, n_resamples), "BCa cluster bootstrap, t-expanded"
        if np.all(np.isfinite(bounds(0.05))):
            return bounds, method, 1 / (n_resamples + 1)
    return student_bounds(value, float(_standard_error(sums, counts)), n - 1), "Student t on cluster means", 1e-12


def estimate_mean(
    effect: ArrayLike,
    clusters: ArrayLike,
    seeds: ArrayLike | None = None,
    *,
    bounds: Bounds | None = (-1.0, 1.0),
    smallest_alpha: float = 0.05,
    rng: int | np.random.Generator = 0,
    fast: bool = False,
) -> Estimate | None:
    """Mean effect over items with bounds for the population of clusters (and of seeds).

    Parameters
    ----------
    effect : [row]
        One finite effect per item, or per (item, seed).
    clusters, seeds : [row]
        Where each row comes from. Every seed must have the same rows of every cluster.
    bounds
        Range that an effect cannot leave, or None.
    smallest_alpha
        Smallest one-sided level that will be asked for; the bootstrap draws enough to place it.
    fast
        Percentile in place of BCa: for descriptive numbers, many at a time.

    Returns
    -------
    Estimate, or None where no bound exists (no variance between clusters and no range to fall back on).
    """
    effect, clusters = np.asarray(effect, dtype=float), np.asarray(clusters)
    rng = np.random.default_rng(rng)
    labels = np.zeros(1) if seeds is None else np.unique(np.asarray(seeds))
    sums, counts = cluster_totals(effect, clusters)
    n, k = sums.size, labels.size
    value = float(sums.sum() / counts.sum())
    cluster_counts = counts / k
    level = max(expanded_level(smallest_alpha, max(n, 2)), 1.25e-4)
    n_resamples = max(N_RESAMPLES, int(np.ceil(25 / level)))
    found = _cluster_bounds(sums / k, cluster_counts, bounds, rng, n_resamples, fast)
    if found is None:
        return None
    cluster_bounds, method, resolution = found
    variance = float(_standard_error(sums / k, cluster_counts)) ** 2 if n > 1 else 0.0
    seed_error, df, combined = 0.0, n - 1, cluster_bounds
    if k > 1:
        seed_means = np.array([np.sort(effect[np.asarray(seeds) == label]).mean() for label in labels])
        seed_error = float(np.std(np.sort(seed_means), ddof=1) / np.sqrt(k))
        df = min(k, n) - 1
        combined = _in_quadrature(value, cluster_bounds, student_bounds(value, seed_error, k - 1))
        method = f"{method}, crossed with Student t on {k} seed means (in quadrature)"
    return Estimate(
        value=value,
        standard_error=float(np.sqrt(variance + seed_error**2)),
        seed_error=seed_error,
        df=max(df, 1),
        method=method,
        n_items=int(round(counts.sum() / k)),
        n_clusters=n,
        n_seeds=k,
        resolution=resolution,
        _bounds=combined,
    )
