"""A part of an effect over the whole of it, pooled over items.

``pooled_shares(part, whole, clusters)``   the share as a function of how often each cluster is drawn
``pooled_share(part, whole)``              the share itself
``estimate_share(part, whole, clusters)``  the share with bounds, of parts that cannot leave a range

A share of each item would be a ratio by a number that is near zero for some: sums over items are divided instead, so that an item counts
as much as there is to divide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.stats import Estimate, estimate_statistic, per_cluster
from vlm_core.stats.intervals import constant_bounds

__all__ = ["estimate_share", "pooled_share", "pooled_shares"]


def pooled_shares(part: ArrayLike, whole: ArrayLike, clusters: ArrayLike) -> Callable[[np.ndarray], np.ndarray]:
    """Sum of parts over the sum of wholes, for `vlm_core.stats.estimate_statistic`.

    Parameters
    ----------
    part : [item, ...]
    whole : [item], or as ``part``
    clusters : [item]

    Returns
    -------
    callable
        ``weights [draw, cluster] -> [draw, ...]``, clusters in the sorted order of their ids; 0 where the wholes sum to 0.

    Raises
    ------
    ValueError
        Where there is not one whole per item.
    """
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    if whole.shape not in (part.shape, part.shape[:1]):
        raise ValueError(f"parts of shape {part.shape} and wholes of shape {whole.shape}: give one whole per item, or one per part")
    parts, wholes = per_cluster(part, clusters), per_cluster(whole, clusters)

    def share(weights: np.ndarray) -> np.ndarray:
        above, below = np.tensordot(weights, parts, 1), np.tensordot(weights, wholes, 1)
        below = np.broadcast_to(below.reshape(below.shape + (1,) * (above.ndim - below.ndim)), above.shape)
        return np.divide(above, below, out=np.zeros_like(above), where=below != 0)

    return share


def pooled_share(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """Sum of parts over the sum of wholes: ``part`` ``[item, ...]``, ``whole`` ``[item]`` or as ``part``, result ``[...]``."""
    every = pooled_shares(part, whole, np.zeros(len(part)))
    return every(np.ones((1, 1)))[0]


def estimate_share(part: ArrayLike, whole: ArrayLike, clusters: ArrayLike, limits: tuple[float, float], **options) -> Estimate | None:
    """Sum of parts over the sum of wholes with bounds, also where the share is the same in every cluster.

    Resampling clusters that all have one share gives no bounds. That none of n clusters deviates bounds the share of clusters that do, by
    1 - α^(1/n), as for a mean without variance (`vlm_core.stats.intervals`): the bounds are the share with that many clusters that deviate as
    far as ``limits`` let them.

    Parameters
    ----------
    part, whole : [item]
        ``whole`` is not negative.
    clusters : [item]
    limits : (low, high)
        A cluster's part is at least ``low`` times the largest whole of a cluster, and at most ``high`` times its own.
    **options
        Of ``vlm_core.stats.estimate_statistic``.

    Returns
    -------
    Estimate, or None where there is nothing to have a share of.
    """
    shares, wholes = pooled_shares(part, whole, clusters), per_cluster(whole, clusters)
    if wholes.min() < 0:
        raise ValueError(f"a whole is negative ({wholes.min():g}): no share of it has limits")
    if not wholes.any():
        return None
    found = estimate_statistic(shares, clusters, **options)
    if found is not None:
        return found
    value = float(shares(np.ones((1, wholes.size)))[0])
    return Estimate(
        value=value,
        standard_error=0.0,
        seed_error=0.0,
        df=wholes.size - 1,
        method=f"exact binomial bound, 0 of {wholes.size} clusters deviating (zero variance)",
        n_items=int(np.size(clusters)),
        n_clusters=int(wholes.size),
        n_seeds=1,
        resolution=1e-12,
        _bounds=constant_bounds(value, wholes, limits),
    )
