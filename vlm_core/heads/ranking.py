"""Heads from a map of scores.

``order_heads``   heads from the highest score down
``top_heads``     the first so many, or such a share, of them
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.families.anatomy import HeadId

__all__ = ["order_heads", "top_heads"]


def order_heads(scores: ArrayLike) -> list[HeadId]:
    """Heads from the highest score down; ties in (layer, head) order.

    Parameters
    ----------
    scores : [layer, head]

    Raises
    ------
    ValueError
        If the scores are not a map over layers and heads, or one is NaN.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"scores of heads have shape [layer, head], not {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("a head has no score (NaN): heads cannot be ordered")
    order = np.argsort(-scores.ravel(), kind="stable")
    return [HeadId(*(int(i) for i in np.unravel_index(k, scores.shape))) for k in order]


def top_heads(scores: ArrayLike, most: float) -> tuple[HeadId, ...]:
    """The heads with the highest scores.

    Parameters
    ----------
    scores : [layer, head]
    most : float or int
        A float is a share of all heads, above 0 and at most 1 (at least one head, rounded to the nearest number); an int is a number of heads.

    Raises
    ------
    ValueError
        If it asks for none, or for more heads than there are.
    """
    ordered = order_heads(scores)
    n = most if isinstance(most, int) else max(1, round(most * len(ordered))) if 0 < most <= 1 else 0
    if not 1 <= n <= len(ordered):
        raise ValueError(f"top_heads takes a share of heads (0 < share <= 1) or a number of heads (1 to {len(ordered)}), not {most!r}")
    return tuple(ordered[:n])
