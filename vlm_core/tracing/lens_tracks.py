"""An object's word in the logit lens of image tokens, layer by layer (Neo et al., ICLR 2025).

``lens_tracks(subject, items, ...)``   rank of the word at the object's own tokens and at other objects', entropy of the lens
``LensTracks``                         them, item by item
``entropy_stages(...)``                the fall from the first third of the depth to the last, and the rise at its end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vlm_core.errors import NotMeasurable
from vlm_core.families.layout import object_tokens
from vlm_core.items import item_field, take
from vlm_core.observation.lens import LogitLens
from vlm_core.observation.observing import observe
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.object_tokens import item_layouts
from vlm_core.tracing.places import Masks, mask_of

__all__ = ["LensTracks", "entropy_stages", "lens_tracks"]

PLACES = ("own", "others")


@dataclass(frozen=True, eq=False)
class LensTracks:
    """What the logit lens reads at image tokens.

    Attributes
    ----------
    log_rank : dict of str to ndarray ``[item, layer + 1]``
        Natural logarithm of the word's rank (1 is the likeliest), averaged over the tokens of ``own`` (the object's) and of ``others``.
        The last column is the model's own output.
    entropy : ndarray ``[item, layer + 1]``
        Of the lens over the vocabulary, in nats, averaged over the object's tokens.
    vocabulary : int
    items, clusters : tuple of str
        Id and scene of each item.
    """

    log_rank: dict[str, np.ndarray]
    entropy: np.ndarray
    vocabulary: int
    items: tuple[str, ...]
    clusters: tuple[str, ...]

    def lead(self) -> np.ndarray:
        """How much better the word ranks at the object's own tokens than at the others, in log rank, ``[item, layer + 1]``."""
        return self.log_rank["others"] - self.log_rank["own"]


def lens_tracks(
    subject: Subject,
    items: Sequence,
    masks: Masks,
    other_masks: Masks,
    *,
    batch_rows: int | None = None,
) -> LensTracks:
    """Follow an object's word through the layers, at the tokens that show it and at tokens that show other objects.

    Parameters
    ----------
    items : sequence of items
        Whose ``answer`` is a word for the object (its shape, its colour); its first token is followed.
    masks : callable or mapping of item ids
        The object's pixels, bool ``[height, width]``.
    other_masks : callable or mapping of item ids
        Pixels of objects in the same image that the word does not fit. Tokens that show both are the object's own.
    batch_rows : int, optional
        Items per forward pass.

    Returns
    -------
    LensTracks
        Of the items whose image tokens show both.

    Raises
    ------
    NotMeasurable
        Where image tokens have no place on the image or lie outside the token sequence, or no item shows both.

    Notes
    -----
    The lens is the model's own final norm, once, and its unembedding (``vlm_core.LogitLens``). A word that is frequent in answers ranks high
    everywhere late in the model: the other objects' tokens, read by the same lens in the same pass, take that out.
    """
    items, members = take(items, range(len(items))), {}
    for item, layout in zip(items, item_layouts(subject, items), strict=True):
        own, others = (object_tokens(layout, mask_of(mask, item)) for mask in (masks, other_masks))
        if own.any() and (others & ~own).any():
            members[str(item_field(item, "id"))] = layout, {"own": own, "others": others & ~own}
    if not members:
        raise NotMeasurable("no item shows both its object and another one in its image tokens: there is no word to follow")
    items = [item for item in items if str(item_field(item, "id")) in members]

    def groups(item, prompt):
        layout, named = members[str(item_field(item, "id"))]
        return {name: layout.in_sequence(chosen, len(prompt)) for name, chosen in named.items()}

    lenses = [LogitLens(positions=place, top=0, words="answer", entropy=place == "own") for place in PLACES]
    found = dict(zip(PLACES, observe(subject, items, lenses, batch_rows=batch_rows, groups=groups), strict=True))
    log_rank = {}
    for place, values in found.items():
        rank = values["rank"][..., 0].astype(float)
        log_rank[place] = _mean(np.where(rank >= 0, np.log1p(rank.clip(min=0)), np.nan))
    return LensTracks(
        log_rank,
        _mean(found["own"]["entropy"][..., 0].astype(float)),
        subject.anatomy.vocab_size,
        tuple(str(item_field(item, "id")) for item in items),
        tuple(str(item_field(item, "scene_id")) for item in items),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over tokens ``[item, layer, token] -> [item, layer]``, those that are filling (NaN) left out."""
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(-1) / known.sum(-1)


def entropy_stages(entropy: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Each item's fall and rise of entropy over three stages of the depth.

    Parameters
    ----------
    entropy : ``[item, layer + 1]``
        What enters each layer; the last column is what the model puts out.

    Returns
    -------
    fall, rise : ndarray ``[item]``
        ``fall``: the mean over the first third of the layers minus that over the last third. ``rise``: the output minus the last third.

    Raises
    ------
    ValueError
        With fewer than three layers.

    Notes
    -----
    Neo et al. 2025 see entropy high, then falling, then rising slightly at the end; where the stages begin is our choice, made before any
    number was seen.
    """
    entropy = np.asarray(entropy, dtype=float)
    n_layers = entropy.shape[1] - 1
    if n_layers < 3:
        raise ValueError(f"three stages need three layers or more, there are {n_layers}")
    third = max(1, n_layers // 3)
    late = entropy[:, n_layers - third : n_layers].mean(1)
    return entropy[:, :third].mean(1) - late, entropy[:, n_layers] - late
