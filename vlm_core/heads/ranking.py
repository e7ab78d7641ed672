"""Heads from a map of scores.

``image_map``     scores of the heads that can see the image as a map over all layers and heads
``order_heads``   heads from the highest score down
``top_heads``     the first so many, or such a share, of them
``whole_heads``   how many heads a share of them is

Where a family sees the image in some layers only (cross-attention), what is said of heads' sight of it is said of those layers' heads. Maps keep
their shape ``[layer, head]``; the heads of the other layers are NaN, no rank and no part of any share.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.families.anatomy import Anatomy, HeadId

__all__ = ["image_map", "order_heads", "top_heads", "whole_heads"]


def image_map(anatomy: Anatomy, scores: ArrayLike) -> np.ndarray:
    """Scores as a map in which heads that cannot see the image are NaN.

    Parameters
    ----------
    anatomy : Anatomy
    scores : [..., head of ``anatomy.image_heads``] or [..., layer, head]

    Returns
    -------
    ndarray ``[..., layer, head]``
    """
    scores = np.asarray(scores, dtype=float)
    layers, shape = list(anatomy.image_layers), (anatomy.n_layers, anatomy.n_heads)
    seen = scores[..., layers, :] if scores.shape[-2:] == shape else scores.reshape(*scores.shape[:-1], len(layers), anatomy.n_heads)
    whole = np.full((*seen.shape[:-2], *shape), np.nan)
    whole[..., layers, :] = seen
    return whole


def order_heads(scores: ArrayLike) -> list[HeadId]:
    """Heads from the highest score down; ties in (layer, head) order.

    Parameters
    ----------
    scores : [layer, head]
        A layer that is all NaN sees no image: its heads are left out.

    Raises
    ------
    ValueError
        If the scores are not a map over layers and heads, no head has one, or some but not all of a layer's heads are NaN.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2:
        raise ValueError(f"scores of heads have shape [layer, head], not {scores.shape}")
    known = ~np.isnan(scores)
    if not known.any() or (known.any(1) != known.all(1)).any():
        raise ValueError("a head has no score (NaN): heads cannot be ordered")
    order = np.argsort(-np.where(known, scores, -np.inf).ravel(), kind="stable")[: np.count_nonzero(known)]
    return [HeadId(*(int(i) for i in np.unravel_index(k, scores.shape))) for k in order]


def top_heads(scores: ArrayLike, most: float) -> tuple[HeadId, ...]:
    """The heads with the highest scores.

    Parameters
    ----------
    scores : [layer, head]
    most : float or int
        A float is the largest share of the heads that have a score, above 0 and at most 1 (`whole_heads`, but at least one head); an int is a
        number of heads.

    Raises
    ------
    ValueError
        If it asks for none, or for more heads than there are.
    """
    ordered = order_heads(scores)
    n = most if isinstance(most, int) else max(1, whole_heads(len(ordered), most)) if 0 < most <= 1 else 0
    if not 1 <= n <= len(ordered):
        raise ValueError(f"top_heads takes a share of heads (0 < share <= 1) or a number of heads (1 to {len(ordered)}), not {most!r}")
    return tuple(ordered[:n])


def whole_heads(n_heads: int, share: float) -> int:
    """The most heads that are at most ``share`` of ``n_heads``: rounded down, 0 where not even one head is so few.

    >>> whole_heads(48, 0.10), whole_heads(8, 0.10)
    (4, 0)
    """
    return math.floor(share * n_heads + 1e-9)  # 0.7 of 10 heads are 7, whatever the last bit of 0.7 says
