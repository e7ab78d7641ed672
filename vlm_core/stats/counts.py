"""Counts against what was expected, where counts of one cluster depend on each other.

``goodness_of_fit``   χ² with its effect size w, and a p-value that clusters make
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .statistic import per_cluster


@dataclass(frozen=True)
class GoodnessOfFit:
    """How far counts lie from what was expected.

    Attributes
    ----------
    chi2
        Pearson's statistic of the summed counts.
    w
        Cohen's effect size, the root of ``chi2`` over the number counted: 0.1 small, 0.3 medium, 0.5 large (Cohen 1988, p. 227).
    p_value
        Of "every category is met as often as expected, on average over clusters", by sign flips.
    n_counted, n_clusters
        Things counted, and the clusters that they are of.
    """

    chi2: float
    w: float
    p_value: float
    n_counted: float
    n_clusters: int


def goodness_of_fit(
    observed: ArrayLike, expected: ArrayLike, clusters: ArrayLike, *, n_resamples: int = 9999, rng: int | np.random.Generator = 0
) -> GoodnessOfFit:
    """Pearson's χ² of counts that come in clusters.

    Parameters
    ----------
    observed, expected : [item, category]
        Counts, and what they would be on average under the hypothesis. Each item's sums must be equal.
    clusters : [item]
        Cluster of each item; clusters are independent, items and the things counted in one of them need not be.
    n_resamples
        Sign flips.

    Returns
    -------
    GoodnessOfFit

    Raises
    ------
    ValueError
        For shapes that do not fit, numbers that are not finite or below 0, sums that differ, nothing counted, or counts where none can be.

    Notes
    -----
    The χ² distribution supposes things that are counted independently, which tokens of one image are not: with clusters of many it rejects
    far too often. Here the differences from what was expected are summed cluster by cluster, and χ² is compared with its values when each
    cluster's differences, all categories together, change sign at random. Exact where a cluster's differences are as likely as their
    negatives; else as exact as a wild bootstrap, whose variance is that of the clusters (Liu 1988, Ann. Statist. 16:1696-1708; Mammen 1993,
    Ann. Statist. 21:255-285).
    """
    observed, expected = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    if observed.ndim != 2 or observed.shape != expected.shape:
        raise ValueError(f"counts are [item, category] and so is what was expected, got shapes {observed.shape} and {expected.shape}")
    both = np.stack([observed, expected])
    if not np.all(np.isfinite(both)) or both.min(initial=0.0) < 0.0:
        raise ValueError("counts and what was expected must be finite and at least 0")
    if not np.allclose(observed.sum(1), expected.sum(1)):
        raise ValueError("each item must have as many counted as expected: scale what was expected to each item's counts")
    if not observed.sum() > 0:
        raise ValueError("nothing was counted: goodness of fit needs at least one count")
    totals = expected.sum(0)
    possible = totals > 0
    if observed[:, ~possible].any():
        raise ValueError(f"category {int(np.flatnonzero(observed.sum(0) * ~possible)[0])} was met although none was expected")
    differences = per_cluster(observed - expected, clusters)[:, possible]

    def statistic(signs: np.ndarray) -> np.ndarray:
        return np.square(signs @ differences) @ (1.0 / totals[possible])

    n = len(differences)
    chi2 = float(statistic(np.ones((1, n)))[0])
    signs = np.random.default_rng(rng).integers(0, 2, size=(n_resamples, n)) * 2.0 - 1.0
    # Equal arrangements must compare equal, whatever the order of their sums.
    reached = np.count_nonzero(statistic(signs) >= chi2 * (1 - 1e-9) - 1e-12)
    return GoodnessOfFit(
        chi2=chi2,
        w=float(np.sqrt(chi2 / observed.sum())),
        p_value=float((1 + reached) / (n_resamples + 1)),
        n_counted=float(observed.sum()),
        n_clusters=n,
    )
