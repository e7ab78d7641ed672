"""Groups of image tokens: an object's, those around it, the rest, those whose norm stands out.

``image_groups(subject, items, objects)``   ``ImageGroups`` of every item, for the ``groups`` of ``observe`` and ``sweep``
``GROUPS``                                  the groups
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_core.errors import NotMeasurable
from vlm_core.families.layout import object_tokens
from vlm_core.items import item_field, take
from vlm_core.subjects.subject import Subject
from vlm_core.tracing.object_tokens import embedding_norms, high_norm_level, item_layouts
from vlm_core.tracing.places import Masks, mask_of

__all__ = ["GROUPS", "ImageGroups", "image_groups"]

GROUPS = {
    "all": "every image token",
    "object": "image tokens that show any part of the object",
    "boundary": "the first ring of neighbours around these",
    "background": "the rest, those without a place on the image included",
    "high-norm": "image tokens whose embedding is longer than the mean over all items' by more than two standard deviations",
}


@dataclass(frozen=True, eq=False)
class ImageGroups:
    """Groups of the image tokens of some items.

    Attributes
    ----------
    names : tuple of str
        Of ``GROUPS``: without objects, ``all`` and ``high-norm``.
    members : dict of str to dict of str to bool array ``[image token]``
        Item id to group to its members.
    level : float
        The length above which an embedding's norm stands out.
    """

    names: tuple[str, ...]
    members: dict[str, dict[str, np.ndarray]]
    level: float

    def of(self, item: Any) -> dict[str, np.ndarray]:
        """The groups of an item, bool ``[image token]``; a ``KeyError`` that says so where it was not grouped."""
        name = str(item_field(item, "id"))
        if name not in self.members:
            raise KeyError(f"item {name!r} was not grouped: image_groups was given other items")
        return self.members[name]

    def __call__(self, item: Any, prompt: Any) -> dict[str, np.ndarray]:
        """The groups but ``all`` as members of the prompt's tokens, bool ``[token]``; ``all`` is every prompt's ``image``."""
        own = {name: one for name, one in self.of(item).items() if name != "all"}
        return {name: in_prompt(one, prompt) for name, one in own.items()}


def in_prompt(chosen: np.ndarray, prompt: Any) -> np.ndarray:
    """Chosen image tokens ``[image token]`` as members of the prompt's tokens, bool ``[token]``."""
    found = np.zeros(len(prompt), dtype=bool)
    found[np.flatnonzero(np.asarray(prompt.image.cpu()))] = chosen
    return found


def image_groups(subject: Subject, items: Sequence, objects: Masks | None = None) -> ImageGroups:
    """Group the image tokens of every item.

    Parameters
    ----------
    objects : callable or mapping of item ids, optional
        The object in each item's image, bool ``[height, width]``. Without, ``object``, ``boundary`` and ``background`` are left out.

    Raises
    ------
    ValueError
        Without items.
    NotMeasurable
        Where image tokens lie outside the token sequence, or objects are given and image tokens have no place on the image.

    Notes
    -----
    Object, boundary and background partition the image tokens; high-norm tokens lie in any of them. What stands out is one level for all
    items (Neo et al., ICLR 2025), of the embeddings that enter the first layer.
    """
    if not len(items):
        raise ValueError("there are no items whose image tokens could be grouped: pass at least one")
    family = subject.anatomy.family
    if not family.image_in_sequence:
        raise NotMeasurable(
            f"model_type '{family.model_type}': its image tokens lie outside the token sequence, so there is no residual stream of theirs "
            f"and nothing to drop: measure attention on them instead"
        )
    items = take(items, range(len(items)))
    norms = embedding_norms(subject, items)
    level = high_norm_level(norms)
    layouts = [None] * len(items) if objects is None else item_layouts(subject, items)
    members = {}
    for item, own, layout in zip(items, norms, layouts, strict=True):
        groups = {"all": np.ones(len(own), dtype=bool)}
        if layout is not None:
            shown, around = (object_tokens(layout, mask_of(objects, item), rings=rings) for rings in (0, 1))
            groups |= {"object": shown, "boundary": around & ~shown, "background": ~around}
        members[str(item_field(item, "id"))] = groups | {"high-norm": own > level}
    return ImageGroups(tuple(next(iter(members.values()))), members, level)
