"""What a design can see: the smallest difference it decides, and the clusters it would need.

``minimum_detectable_effect``
    distance from the declared limit that a sample like this one decides at 80 % power
``clusters_needed``
    clusters at which that distance shrinks to the declared limit
"""

from __future__ import annotations

import math

from scipy import optimize, stats

from .claims import ClaimTest
from .intervals import Bounds, Estimate

POWER = 0.8


def minimum_detectable_effect(
    estimate: Estimate, test: ClaimTest, alpha: float, power: float = POWER, *, cluster_ratio: float = 1.0
) -> float:
    """Distance between the true effect and the claim's limit at which the claim is decided with the stated power.

    The bound's own distance from the estimate (whatever the method) plus the quantile that the power asks for. An
    equivalence claim must clear both sides, so each at ``(1 + power) / 2`` and with the wider distance.

    Parameters
    ----------
    cluster_ratio
        Clusters of the planned sample over those of this one. The clusters' share of the distance shrinks by its
        square root; the seeds' share stays.
    """
    lower, upper = estimate.bounds(alpha)
    below, above = estimate.value - lower, upper - estimate.value
    reach = {"equivalence": max(below, above), "non-inferiority": above}.get(test.kind, below)
    if test.kind == "equivalence":
        power = (1 + power) / 2
    seed_reach = 0.0 if estimate.n_seeds == 1 else stats.t.isf(alpha, estimate.n_seeds - 1) * estimate.seed_error
    cluster_reach = math.sqrt(max(reach**2 - seed_reach**2, 0) / cluster_ratio)
    cluster_error = math.sqrt(max(estimate.standard_error**2 - estimate.seed_error**2, 0) / cluster_ratio)
    error = math.hypot(cluster_error, estimate.seed_error)
    return float(math.hypot(cluster_reach, seed_reach) + stats.t.ppf(power, estimate.df) * error)


def clusters_needed(estimate: Estimate, test: ClaimTest, alpha: float, bounds: Bounds | None) -> int | None:
    """Clusters with which an effect as large as the claim's limit is told from none at 80 % power.

    Without variance, the n whose zero-deviation bound reaches the limit. None where nothing is asked (a limit of 0)
    or no number of clusters is enough, because the seeds' share alone exceeds the limit.
    """
    wanted = test.limit
    if wanted <= 0:
        return None
    if estimate.standard_error == 0:
        room = max(bounds[1] - estimate.value, estimate.value - bounds[0])
        return 1 if wanted >= room else math.ceil(math.log(alpha) / math.log1p(-wanted / room))

    def excess(log_ratio: float) -> float:
        return minimum_detectable_effect(estimate, test, alpha, cluster_ratio=math.exp(log_ratio)) - wanted

    most = math.log(1e9)
    if excess(most) > 0:
        return None
    if excess(-most) < 0:
        return 2
    return max(2, math.ceil(estimate.n_clusters * math.exp(optimize.brentq(excess, -most, most))))
