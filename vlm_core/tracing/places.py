"""Token groups of prompts, by what the tokens are: an object's, the other image tokens, the question, the chat template after it.

``token_places(subject, items, masks)``   ``Places``: the groups of every item's prompt, for the ``groups`` of ``sweep`` and ``observe``
``template_lengths(subject, items)``      how many tokens the chat template puts before a question and after it
``PLACES``                                the groups
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_core.errors import NotMeasurable
from vlm_core.families.layout import Layout, image_layouts, object_tokens
from vlm_core.items import item_field, take
from vlm_core.subjects.subject import Subject

__all__ = ["PLACES", "Masks", "Places", "mask_of", "template_lengths", "token_places"]

PLACES = {
    "object": "image tokens that show any part of the object",
    "background": "the other image tokens, those without a place on the image included",
    "asked": "the question: text after the last image token, without what the chat template puts around it",
    "role": "what the chat template puts after the question, without the last token",
    "asking": "all text after the last image token, without the last token",
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
    NotMeasurable
        Where masks are given and image tokens have no place on the image or lie outside the token sequence.
    ValueError
        Where there are no items.

    Notes
    -----
    Nothing of the model runs. An object's tokens are those that show any part of it, in tiles and thumbnails alike. Where the question ends
    and the chat template goes on is found by ``template_lengths``.
    """
    if not len(items):
        raise ValueError("there are no items to place")
    family, template = subject.anatomy.family, template_lengths(subject, items)
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
            groups = _text_places(image[:length], *template)
            if layout is not None:
                groups |= _image_places(layout, mask_of(masks, item), length, rings, str(family.model_type))
            named[str(item_field(item, "id"))] = groups
    return Places(named)


def template_lengths(subject: Subject, items: Sequence, most: int = 8) -> tuple[int, int]:
    """Tokens that the chat template puts between the image and a question (the end of the image, say), and after the question.

    The second counts the prompt's last token; it is 0 where a prompt ends with its question. A prompt is compared with itself without its
    first and without its last word: what they have in common from the last image token on, and at the end, belongs to the template. The
    least over the first ``most`` items of two words or more.

    Raises
    ------
    ValueError
        Where no item has a prompt of two words.
    """
    worded = [item for item in take(items, range(min(most, len(items)))) if len(item_field(item, "prompt").split()) > 1]
    if not worded:
        raise ValueError(f"none of the first {most} prompts has two words: where a question ends cannot be told from the chat template")
    before, after = [], []
    for item in worded:
        words = item_field(item, "prompt").split()
        whole, headless, tailless = (_after_image(subject, item, " ".join(some)) for some in (words, words[1:], words[:-1]))
        before.append(_in_common(whole, headless))
        after.append(_in_common(whole[::-1], tailless[::-1]))
    return min(before), min(after)


def _after_image(subject: Subject, item: Any, prompt: str) -> np.ndarray:
    """Token ids after the last image token (all of them, where there is none)."""
    prepared = subject.encode([item_field(item, "image")], [prompt])
    ids, image = (one[0][prepared.valid[0]].cpu().numpy() for one in (prepared.inputs["input_ids"], prepared.image))
    return ids[int(np.flatnonzero(image)[-1]) + 1 if image.any() else 0 :]


def _in_common(first: np.ndarray, second: np.ndarray) -> int:
    n = min(len(first), len(second))
    differs = first[:n] != second[:n]
    return int(differs.argmax()) if differs.any() else n


def _pictures(item: Any) -> list:
    pictures = item_field(item, "image")
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]


def mask_of(masks: Masks, item: Any) -> np.ndarray:
    """An item's object, bool ``[height, width]``."""
    return masks[str(item_field(item, "id"))] if isinstance(masks, Mapping) else masks(item)


def _text_places(image: np.ndarray, before: int, after: int) -> dict[str, np.ndarray]:
    steps, first = np.arange(len(image)), int(np.flatnonzero(image)[-1]) + 1 if image.any() else 0
    last = steps == len(image) - 1
    asking = (steps >= first) & ~last
    role = asking & (steps >= len(image) - after)
    return {"asked": asking & ~role & (steps >= first + before), "role": role, "asking": asking, "context": ~image & ~last}


def _image_places(layout: Layout, mask: np.ndarray, length: int, rings: int, family: str) -> dict[str, np.ndarray]:
    if layout.where != "sequence":
        raise NotMeasurable(
            f"model_type '{family}': its image tokens lie outside the token sequence, so an object's tokens are no token group: cut or "
            f"replace the image as a whole"
        )
    shown = object_tokens(layout, mask, rings=rings)
    return {"object": layout.in_sequence(shown, length), "background": layout.in_sequence(~shown, length)}
