"""A part of an effect over the whole of it, pooled over items.

``pooled_shares(part, whole, clusters)``   the share as a function of how often each cluster is drawn
``pooled_share(part, whole)``              the share itself

A share of each item would be a ratio by a number that is near zero for some: sums over items are divided instead, so that an item counts
as much as there is to divide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.stats import per_cluster

__all__ = ["pooled_share", "pooled_shares"]


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
