"""Localisation heads: the few whose attention on the image is strong and falls on one spot (CVPR 2025; seilk/LocalizationHeads).

``localisation_heads(subject, items)``   the heads that are chosen most often over a set
``LocalisationHeads``                    them, and what they were chosen by
``set_scores(per_item, sets)``            what sets of heads score on every item, to compare them with
``elbow(values)``                        the value at the bend of a sorted curve
``spatial_entropy(maps, layout)``        how scattered attention is over the image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from vlm_core.families.anatomy import HeadId
from vlm_core.families.layout import Layout
from vlm_core.heads.ranking import order_heads
from vlm_core.items import take
from vlm_core.observation.image_attention import ImageAttention
from vlm_core.observation.observing import observed, prepare
from vlm_core.observation.sinks import SinkMass, Sinks
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.object_tokens import item_layouts

__all__ = ["LocalisationHeads", "elbow", "localisation_heads", "set_scores", "spatial_entropy"]

LEAST_IMAGE_MASS = 0.2
MOST_SINK_SHARE = 0.5
"""Heads that look at the image at all, and not mostly at its sinks (Kang et al., ICLR 2025)."""
_FLOOR = 1e-3
_TOUCHING = np.zeros((3, 3, 3), dtype=int)
_TOUCHING[1] = 1


@dataclass(frozen=True, eq=False)
class LocalisationHeads:
    """Heads that localise.

    Attributes
    ----------
    heads : tuple of HeadId
        The most often chosen ones, the first most often; fewer than asked for where there are fewer candidates.
    frequency : ndarray ``[layer, head]``
        Share of the items on which a head was among the chosen ones.
    mass : ndarray ``[layer, head]``
        Mean attention sum on the image.
    threshold : float
        The attention sum at the elbow: heads below it are no candidates.
    candidates : ndarray of bool ``[layer, head]``
    entropy : ndarray ``[item, layer, head]``
        Spatial entropy; infinite where nothing rises above the floor.
    """

    heads: tuple[HeadId, ...]
    frequency: np.ndarray
    mass: np.ndarray
    threshold: float
    candidates: np.ndarray
    entropy: np.ndarray


def localisation_heads(
    subject: Subject,
    items: Sequence,
    *,
    top: int = 3,
    chosen: int = 10,
    sinks: Sinks | bool | None = None,
    batch_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LocalisationHeads:
    """Heads whose attention is on the image and on one place of it.

    Parameters
    ----------
    items : sequence of items
        The discovery set.
    top : int
        How many heads to name.
    chosen : int
        Heads with the lowest spatial entropy that each item chooses among the candidates, at most half of them.
    sinks : Sinks or bool, optional
        Sink-aware: heads are candidates only with an image mass of at least 0.2, of which at most half lies on attention sinks. True finds
        the model's sinks on the items.
    batch_rows : int, optional
        Items per forward pass.

    Raises
    ------
    ValueError
        Without items, or where image tokens have no place on the image.

    Notes
    -----
    Candidates are the heads whose attention sum (from the last prompt token on all image tokens, averaged over items) reaches that at the
    elbow of the sorted curve; the threshold is a sum, not a place in the list of heads. On every item the candidates with the lowest spatial
    entropy are chosen; equal entropies (one spot only) go by the attention sum. How ties are broken, and that at most half of the candidates
    are chosen in models with few heads, is ours.
    """
    if not len(items):
        raise ValueError("localisation heads are found on items: pass at least one")
    items = take(items, range(len(items)))
    layouts = item_layouts(subject, items)
    observers = [ImageAttention("last")]
    if sinks is not None and sinks is not False:
        observers.append(SinkMass("last", None if sinks is True else sinks))
    ready = prepare(subject, items, observers)
    masses, entropies, sunk = [], [], []
    for some in observed(subject, items, ready, None, batch_rows):
        for maps in some.values[0][""].numpy():
            layout = layouts[len(masses)]
            maps = maps[..., : len(layout)].astype(float)
            masses.append(maps.sum(-1))
            entropies.append(spatial_entropy(maps, layout))
        if len(ready) > 1:
            sunk.append(some.values[1][""].numpy()[..., 1])
        if progress is not None:
            progress(len(masses), len(items))
    per_item, entropy = np.stack(masses), np.stack(entropies)
    mass = per_item.mean(0)
    threshold = elbow(mass)
    candidates = mass >= threshold
    if sunk:
        share = np.divide(np.concatenate(sunk).mean(0), mass, out=np.ones_like(mass), where=mass > 0)
        candidates &= (mass >= LEAST_IMAGE_MASS) & (share <= MOST_SINK_SHARE)
    frequency = _frequency(np.where(candidates, entropy, np.inf), per_item, min(chosen, max(top, int(candidates.sum()) // 2)))
    ranked = order_heads(np.where(candidates, frequency + 1e-6 * mass, -1.0))
    return LocalisationHeads(tuple(ranked[: min(top, int(candidates.sum()))]), frequency, mass, threshold, candidates, entropy)


def set_scores(per_item: ArrayLike, sets: Sequence[Sequence[HeadId]]) -> np.ndarray:
    """Mean score of each set of heads on every item: ``per_item`` ``[item, layer, head]``, result ``[set, item]``."""
    per_item = np.asarray(per_item, dtype=float)
    return np.stack([np.mean([per_item[:, layer, head] for layer, head in heads], axis=0) for heads in sets])


def _frequency(entropy: np.ndarray, mass: np.ndarray, chosen: int) -> np.ndarray:
    """Share of items on which a head's entropy is among the lowest, ``[layer, head]``; heads that have none are never chosen."""
    n_items, *shape = entropy.shape
    flat, mass = entropy.reshape(n_items, -1), mass.reshape(n_items, -1)
    order = np.lexsort((-mass, flat), axis=1)[:, :chosen]
    picked = np.zeros_like(flat)
    np.put_along_axis(picked, order, 1.0, axis=1)
    return (picked * np.isfinite(flat)).mean(0).reshape(shape)


def elbow(values: ArrayLike) -> float:
    """The value at the bend of a sorted curve: where it is farthest from the chord between its ends.

    Parameters
    ----------
    values : array
        In any order and shape.

    Returns
    -------
    float
        One of the values; the smallest where the sorted curve is straight.
    """
    curve = np.sort(np.asarray(values, dtype=float).ravel())
    if not curve.size or not np.isfinite(curve).all():
        raise ValueError("an elbow needs one finite value or more")
    chord = np.linspace(curve[0], curve[-1], curve.size)
    distance = np.abs(curve - chord)
    return float(curve[distance.argmax()]) if distance.max() > 1e-12 * max(1.0, np.abs(curve).max()) else float(curve[0])


def spatial_entropy(maps: ArrayLike, layout: Layout) -> np.ndarray:
    """How scattered attention is over the image: ``-Σ P log P`` over its connected components.

    Parameters
    ----------
    maps : ``[..., image token]``
    layout : Layout
        Where the tokens are. Tokens without a place count for nothing; components end where a grid (a tile, a thumbnail) does.

    Returns
    -------
    numpy.ndarray ``[...]``
        0 for one component, more the more evenly several share the attention; infinite where nothing is above the mean by 1e-3.

    Notes
    -----
    ``relu(A - mean) > 1e-3``, 8-connected; ``P`` is a component's share of what is above the mean.
    """
    maps = np.asarray(maps, dtype=float)
    if maps.shape[-1:] != (len(layout),):
        raise ValueError(f"a map has one value per image token ({len(layout)}), these have shape {maps.shape}")
    placed = ~np.isnan(layout.boxes[:, 0])
    if not placed.any():
        raise ValueError("none of the image tokens has a place on the image: attention on them is nowhere")
    flat = maps.reshape(-1, len(layout))
    above = (flat - flat[:, placed].mean(1, keepdims=True)).clip(min=0.0)
    sums, owners = [], []
    for grid in np.unique(layout.grid[placed]):
        on_grid = placed & (layout.grid == grid)
        row, column = layout.row[on_grid], layout.column[on_grid]
        drawn = np.zeros((len(flat), row.max() + 1, column.max() + 1))
        drawn[:, row, column] = above[:, on_grid]
        labels, n = ndimage.label(drawn > _FLOOR, structure=_TOUCHING)
        first = np.zeros(n + 1, dtype=int)
        first[labels] = np.arange(len(flat))[:, None, None]
        sums.append(np.bincount(labels.ravel(), drawn.ravel(), minlength=n + 1)[1:])
        owners.append(first[1:])
    parts, owner = np.concatenate(sums), np.concatenate(owners)
    total = np.bincount(owner, parts, minlength=len(flat))
    share = parts / total[owner]
    entropy = np.bincount(owner, -share * np.log(share), minlength=len(flat))
    return np.where(total > 0, entropy, np.inf).reshape(maps.shape[:-1])
