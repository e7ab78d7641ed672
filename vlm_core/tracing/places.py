"""Token groups of prompts, by what the tokens are: an object's, the other image tokens, the question, the chat template after it.

``token_places(subject, items, masks)``   ``Places``: the groups of every item's prompt, for ``sweep(groups=...)`` and ``observe(groups=...)``
``template_length(subject, items)``       how many tokens the chat template puts between a question and its answer
``PLACES``                                the groups
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_core.families.layout import Layout, image_layouts, object_tokens
from vlm_core.items import item_field, take
from vlm_core.subjects.subject import Subject

__all__ = ["PLACES", "Masks", "Places", "mask_of", "template_length", "token_places"]

PLACES = {
    "object": "image tokens that show any part of the object",
    "background": "the other image tokens, those without a place on the image included",
    "asked": "the question: text after the last image token, without the chat template that follows",
    "role": "what the chat template puts after the question, without the last token",
    "asking": "asked and role: text after the last image token, without the last token",
    "context": "all text without the last token",
}

Masks = Callable[[Any], np.ndarray] | Mapping[str, np.ndarray]
"""An item's object in its image, bool ``[height, width]``: a function of the item, or a mapping of its id."""


@dataclass(frozen=True, eq=False)
class Places:
    """Token groups of some items' prompts.

    Attributes
    ----------
    named : dict of str to dict of str to bool array ``[token]``
        Item id to group name (``PLACES``) to its members in the prompt.
    """

    named: dict[str, dict[str, np.ndarray]]

    def __call__(self, item: Any, prompt: Any = None) -> dict[str, np.ndarray]:
        """The groups of an item; a ``KeyError`` that says so where it was not placed."""
        name = str(item_field(item, "id"))
        if name not in self.named:
            raise KeyError(f"item {name!r} was not placed: token_places was given other items")
        return self.named[name]

    def has(self, item: Any, *groups: str) -> bool:
        """Whether an item has tokens in all of these groups."""
        return all(bool(self(item)[group].any()) for group in groups)


def token_places(
    subject: Subject,
    items: Sequence,
    masks: Masks | None = None,
    *,
    rings: int = 0,
    batch: int = 32,
) -> Places:
    """The groups ``PLACES`` in every item's prompt.

    Parameters
    ----------
    masks : callable or mapping, optional
        The object in each item's image (its first, where it has several). Without, ``object`` and ``background`` are left out.
    rings : {0, 1, 2}
        Rings of neighbours that count to the object.
    batch : int
        Prompts prepared together.

    Raises
    ------
    ValueError
        Where there are no items, or masks are given and image tokens have no place on the image or lie outside the token sequence.

    Notes
    -----
    Nothing of the model runs. An object's tokens are those that show any part of it, in tiles and thumbnails alike. Where the question ends
    and the chat template goes on is found by ``template_length``.
    """
    if not len(items):
        raise ValueError("there are no items to place")
    family, last = subject.anatomy.family, template_length(subject, items)
    named: dict[str, dict[str, np.ndarray]] = {}
    for start in range(0, len(items), batch):
        some = take(items, range(start, min(start + batch, len(items))))
        prepared = subject.encode_items(some, padding_side="right")
        sizes = [[(one.height, one.width) for one in _pictures(item)] for item in some]
        layouts = [None] * len(some)
        if masks is not None:
            layouts = image_layouts(family, subject.model.config, subject.processor, prepared.inputs, sizes)
        lengths = prepared.valid.sum(1).tolist()
        for item, image, length, layout in zip(some, prepared.image.cpu().numpy(), lengths, layouts, strict=True):
            groups = _text_places(image[:length], last)
            if layout is not None:
                groups |= _image_places(layout, mask_of(masks, item), length, rings, str(family.model_type))
            named[str(item_field(item, "id"))] = groups
    return Places(named)


def template_length(subject: Subject, items: Sequence, most: int = 8) -> int:
    """Tokens that the chat template puts after a question, the prompt's last one included; 0 where a prompt ends with its question.

    The ends of a prompt and of the same prompt without its last word are compared: what they have in common belongs to the template. The
    least over the first ``most`` items of two words or more.

    Raises
    ------
    ValueError
        Where no item has a prompt of two words.
    """
    worded = [item for item in take(items, range(min(most, len(items)))) if len(item_field(item, "prompt").split()) > 1]
    if not worded:
        raise ValueError(f"none of the first {most} prompts has two words: where a question ends cannot be told from the chat template")
    common = []
    for item in worded:
        words = item_field(item, "prompt").split()
        both = []
        for prompt in (" ".join(words), " ".join(words[:-1])):
            prepared = subject.encode([item_field(item, "image")], [prompt])
            both.append(prepared.inputs["input_ids"][0][prepared.valid[0]].cpu().numpy())
        n = min(map(len, both))
        differs = both[0][::-1][:n] != both[1][::-1][:n]
        common.append(int(differs.argmax()) if differs.any() else n)
    return min(common)


def _pictures(item: Any) -> list:
    pictures = item_field(item, "image")
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]


def mask_of(masks: Masks, item: Any) -> np.ndarray:
    """An item's object, bool ``[height, width]``."""
    return masks[str(item_field(item, "id"))] if isinstance(masks, Mapping) else masks(item)


def _text_places(image: np.ndarray, template: int) -> dict[str, np.ndarray]:
    length = len(image)
    steps = np.arange(length)
    last = steps == length - 1
    after = steps > (np.flatnonzero(image)[-1] if image.any() else -1)
    role = after & (steps >= length - template) & ~last
    asking = after & ~last
    return {"asked": asking & ~role, "role": role, "asking": asking, "context": ~image & ~last}


def _image_places(layout: Layout, mask: np.ndarray, length: int, rings: int, family: str) -> dict[str, np.ndarray]:
    if layout.where != "sequence":
        raise ValueError(
            f"model_type '{family}': its image tokens lie outside the token sequence, so an object's tokens are no token group: cut or "
            f"replace the image as a whole"
        )
    shown = object_tokens(layout, mask, rings=rings)
    return {"object": layout.in_sequence(shown, length), "background": layout.in_sequence(~shown, length)}
