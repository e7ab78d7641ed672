"""Bounds for any statistic of clustered items: a correlation, an agreement of rankings, a ratio of means.

``estimate_statistic``   value and one-sided bounds at any level, by the cluster bootstrap: what `decide` reads
``jackknife_statistic``  the same by leaving clusters out, for statistics that drawing a cluster twice would shift
``per_cluster``          values of items summed cluster by cluster, in the order that ``estimate_statistic`` weights them
``kendall_w``            agreement of several rankings (Kendall's W)
``kruskal``              Kruskal-Wallis test with its effect size ε²
``friedman``             Friedman test of treatments that were all measured on the same blocks, with its effect size W

A statistic is written once, as a function of how often each cluster is drawn; the bootstrap and the jackknife that BCa needs both call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .intervals import N_RESAMPLES, Bounds, Estimate, expanded_level, student_bounds
from .permutation import never_zero

_TIED = 1e-12
_KEPT_COUNTS = 2**24  # draws × clusters of a bootstrap whose draws are kept for the next statistic


def per_cluster(values: ArrayLike, clusters: ArrayLike) -> np.ndarray:
    """Sums over the items of each cluster.

    Parameters
    ----------
    values : [item, ...]
    clusters : [item]

    Returns
    -------
    numpy.ndarray : [cluster, ...]
        Clusters in the sorted order of their ids.
    """
    values = np.asarray(values, dtype=float)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if len(codes) != len(values):
        raise ValueError(f"{len(values)} values and {len(codes)} cluster ids: each item needs exactly one")
    sums = np.zeros((codes.max() + 1, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums


def _resamples(rng: int | np.random.Generator, n: int, n_resamples: int, at_once: int) -> Iterator[np.ndarray]:
    """How often each of ``n`` clusters is drawn, ``[draw, cluster]``, at most ``at_once`` draws together."""
    rng = np.random.default_rng(rng)
    for start in range(0, n_resamples, at_once):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(at_once, n_resamples - start))


@lru_cache(maxsize=4)
def _known_resamples(seed: int, n: int, n_resamples: int, at_once: int) -> tuple[np.ndarray, ...]:
    """The same for a seed, drawn once for all statistics of as many clusters."""
    return tuple(counts.astype(np.min_scalar_type(n)) for counts in _resamples(seed, n, n_resamples, at_once))


def estimate_statistic(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: ArrayLike,
    *,
    limits: Bounds | None = None,
    n_resamples: int = N_RESAMPLES,
    smallest_alpha: float = 0.05,
    rng: int | np.random.Generator = 0,
    draws_at_once: int = 1000,
) -> Estimate | None:
    """A statistic with bounds for the population of clusters: BCa cluster bootstrap, percentiles expanded by the t distribution.

    Parameters
    ----------
    statistic : callable
        ``statistic(weights [draw, cluster]) -> [draw]``: the statistic's value when each cluster counts as often as its weight says (all
        ones for the sample itself). Clusters are in the sorted order of their ids (see `per_cluster`).
    clusters : [item]
        Cluster of each item.
    limits
        Range that the statistic cannot leave; bounds are cut to it.
    n_resamples, smallest_alpha
        Draws, and the smallest one-sided level that will be asked for (more are drawn where it needs them).
    draws_at_once
        Draws handed to ``statistic`` together.

    Returns
    -------
    Estimate, or None where the statistic is the same in every draw, so that no bound exists.

    Raises
    ------
    ValueError
        With fewer than three clusters, or where the statistic is not finite.

    References
    ----------
    Efron 1987 (BCa, acceleration from the jackknife); Hesterberg 2015, arXiv:1411.5279 (expanded percentiles).
    """
    clusters = np.asarray(clusters)
    n = np.unique(clusters).size
    if n < 3:
        raise ValueError(f"{n} clusters: bounds of a statistic need at least three")
    level = max(expanded_level(smallest_alpha, n), 1.25e-4)
    n_resamples = max(n_resamples, int(np.ceil(25 / level)))
    value = float(_values(statistic, np.ones((1, n)))[0])
    seeded = isinstance(rng, int) and n * n_resamples <= _KEPT_COUNTS
    resamples = (_known_resamples if seeded else _resamples)(rng, n, n_resamples, draws_at_once)
    drawn = np.sort(np.concatenate([_values(statistic, counts.astype(float)) for counts in resamples]))
    if np.ptp(drawn) <= 1e-9 * max(1.0, abs(value)):
        return None
    left_out = _left_out(statistic, n, draws_at_once)
    influence = left_out.mean() - left_out
    spread = float(np.square(influence).sum())
    acceleration = float((influence**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0
    below = np.count_nonzero(drawn < value - _TIED) + 0.5 * np.count_nonzero(np.abs(drawn - value) <= _TIED)
    bias = float(stats.norm.ppf(np.clip(below / drawn.size, 1 / (drawn.size + 1), drawn.size / (drawn.size + 1))))
    low, high = (-np.inf, np.inf) if limits is None else limits

    @lru_cache(maxsize=256)
    def bounds(alpha: float) -> Bounds:
        reach = stats.norm.isf(expanded_level(alpha, n))
        levels = [stats.norm.cdf(bias + z / max(1 - acceleration * z, 1e-3)) for z in (bias - reach, bias + reach)]
        lower, upper = np.quantile(drawn, levels)
        return float(np.clip(lower, low, high)), float(np.clip(upper, low, high))

    return Estimate(
        value=value,
        standard_error=float(np.std(drawn, ddof=1) * np.sqrt(n / (n - 1))),
        seed_error=0.0,
        df=n - 1,
        method="BCa cluster bootstrap of the statistic, t-expanded",
        n_items=int(clusters.size),
        n_clusters=int(n),
        n_seeds=1,
        resolution=1 / (drawn.size + 1),
        _bounds=bounds,
    )


def jackknife_statistic(
    statistic: Callable[[np.ndarray], np.ndarray], clusters: ArrayLike, *, limits: Bounds | None = None, draws_at_once: int = 1000
) -> Estimate | None:
    """A statistic with bounds for what it is on average over samples of this many clusters: value ± t standard errors of the jackknife.

    Rankings made on resampled scenes agree less than those made on the scenes themselves, because each holds some scenes twice and others
    not at all; the percentiles of such a bootstrap lie beside the value, and its spread is that of noisier rankings. Leaving one cluster
    out doubles none.

    Parameters
    ----------
    statistic, clusters, limits, draws_at_once
        As for `estimate_statistic`. The statistic must treat all clusters alike for the bounds to hold.

    Returns
    -------
    Estimate, or None where the statistic is the same whichever cluster is left out, so that no bound exists.

    Raises
    ------
    ValueError
        With fewer than three clusters, or where the statistic is not finite.

    Notes
    -----
    The squared standard error is on average no smaller than the variance of the statistic (over samples with one cluster less), whatever
    the statistic: Efron & Stein 1981, Ann. Statist. 9:586-596. So bounds err on the wide side: by nothing for a mean, by up to √2 where
    only interactions between pairs of clusters vary.
    """
    clusters = np.asarray(clusters)
    n = np.unique(clusters).size
    if n < 3:
        raise ValueError(f"{n} clusters: bounds of a statistic need at least three")
    value, left_out = float(_values(statistic, np.ones((1, n)))[0]), _left_out(statistic, n, draws_at_once)
    if np.ptp(left_out) <= 1e-9 * max(1.0, abs(value)):
        return None
    error = float(np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum()))
    low, high = (-np.inf, np.inf) if limits is None else limits

    def bounds(alpha: float) -> Bounds:
        return tuple(float(np.clip(bound, low, high)) for bound in student_bounds(value, error, n - 1)(alpha))

    return Estimate(
        value=value,
        standard_error=error,
        seed_error=0.0,
        df=n - 1,
        method="jackknife over clusters, Student t",
        n_items=int(clusters.size),
        n_clusters=int(n),
        n_seeds=1,
        resolution=1e-12,
        _bounds=bounds,
    )


def _left_out(statistic, n: int, draws_at_once: int) -> np.ndarray:
    """The statistic without each of the n clusters in turn."""
    return np.concatenate([_values(statistic, rows) for rows in np.array_split(1.0 - np.eye(n), -(-n // draws_at_once))])


def _values(statistic, weights: np.ndarray) -> np.ndarray:
    values = np.asarray(statistic(weights), dtype=float)
    if values.shape != (len(weights),):
        raise ValueError(f"the statistic gave shape {values.shape} for {len(weights)} draws: expected one number a draw")
    if not np.all(np.isfinite(values)):
        raise ValueError("the statistic is NaN or infinite for some resample of the clusters")
    return values


def kendall_w(scores: ArrayLike) -> np.ndarray:
    """Kendall's coefficient of concordance of several rankings of the same things, ties corrected.

    Parameters
    ----------
    scores : [..., judge, thing]
        What each judge ranks by; only the order counts. Leading axes are independent data sets.

    Returns
    -------
    numpy.ndarray : [...]
        0 (no agreement) to 1 (the same ranking); 0 where no judge tells any two things apart.

    References
    ----------
    Kendall & Babington Smith 1939, Ann. Math. Statist. 10:275-287; tie correction as in R's ``DescTools::KendallW(correct=TRUE)``.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim < 2 or scores.shape[-2] < 2 or scores.shape[-1] < 2:
        raise ValueError(f"kendall_w needs [judge, thing] with two or more of each, not shape {scores.shape}")
    judges, things = scores.shape[-2:]
    ranks = stats.rankdata(scores, axis=-1)
    totals = ranks.sum(-2)
    squares = np.square(totals - totals.mean(-1, keepdims=True)).sum(-1)
    # of a judge's ranking without ties, the variance of ranks times things is (things³ - things) / 12; ties lower it
    untied = 12 * np.square(ranks - (things + 1) / 2).sum(-1).sum(-1)
    return np.divide(12 * squares, judges * untied, out=np.zeros_like(squares), where=untied > 0)


def kruskal(groups: Sequence[ArrayLike]) -> tuple[float, float]:
    """Kruskal-Wallis test of "all groups have one distribution", with its effect size.

    Parameters
    ----------
    groups : sequence of arrays
        At least two, none empty.

    Returns
    -------
    p_value, epsilon_squared : float
        ε² = H (n + 1) / (n² - 1), from 0 to 1; (1.0, 0.0) where all values are equal.

    References
    ----------
    ``scipy.stats.kruskal``; Tomczak & Tomczak 2014, Trends Sport Sci. 1:19-25 (ε²).
    """
    groups = [np.asarray(group, dtype=float).ravel() for group in groups]
    if len(groups) < 2 or not all(group.size for group in groups):
        raise ValueError(f"kruskal needs two groups or more, none empty: sizes are {[group.size for group in groups]}")
    values = np.concatenate(groups)
    if np.ptp(values) == 0:
        return 1.0, 0.0
    found, n = stats.kruskal(*groups), values.size
    return never_zero(found.pvalue), float(found.statistic * (n + 1) / (n**2 - 1))


def friedman(values: ArrayLike) -> tuple[float, float]:
    """Friedman test of "all treatments have one distribution", each block's values compared among themselves only.

    Parameters
    ----------
    values : [block, treatment]
        Blocks must be independent (cluster means, where items of a cluster are not); two treatments or more.

    Returns
    -------
    p_value, w : float
        Chi-square approximation; W is Kendall's coefficient of concordance of the blocks, from 0 to 1. (1.0, 0.0) where no block tells any two
        treatments apart.

    References
    ----------
    Friedman 1937, J. Am. Stat. Assoc. 32:675-701; χ² = blocks · (treatments - 1) · W, ties corrected as in ``scipy.stats.friedmanchisquare``,
    which needs three treatments (with two this is the sign test's χ²).
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or min(values.shape, default=0) < 2:
        raise ValueError(f"friedman needs [block, treatment] with two or more of each, not shape {values.shape}")
    blocks, treatments = values.shape
    w = float(kendall_w(values))
    return never_zero(stats.chi2.sf(blocks * (treatments - 1) * w, treatments - 1)), w
