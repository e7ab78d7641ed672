"""Image features once per image, however many prompts ask about it.

``encode_distinct(subject, items)``   like ``vlm_core.subjects.embed.encode_items``, but no image passes the vision tower twice

An image that several items share is encoded with the first of them; the others receive its features through the model's own argument for
features that are known already (``mm_encoder_outputs``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch

from vlm_core.identity import image_digest
from vlm_core.items import item_field
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded, capture, encode_items
from vlm_core.subjects.subject import Subject

__all__ = ["encode_distinct", "image_features", "takes_features", "with_features"]

_PIXELS = ("pixel_values", "pixel_attention_mask")


def encode_distinct(subject: Subject, items: Sequence, batch: int = 32) -> list[Encoded]:
    """Encode items, every image once.

    Parameters
    ----------
    items : sequence of items
    batch : int
        Items whose images nobody shares are encoded in batches of so many.
    """
    by_image: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        by_image.setdefault(image_digest(item_field(item, "image")), []).append(number)
    shared = [numbers for numbers in by_image.values() if len(numbers) > 1] if takes_features(subject) else []
    together = {number for numbers in shared for number in numbers}
    alone = [number for number in range(len(items)) if number not in together]
    encoded: dict[int, Encoded] = dict(zip(alone, encode_items(subject, [items[number] for number in alone], batch=batch), strict=True))
    for numbers in shared:
        encoded.update(zip(numbers, _encode_one_image(subject, [items[number] for number in numbers]), strict=True))
    return [encoded[number] for number in range(len(items))]


def takes_features(subject: Subject) -> bool:
    """Whether the model accepts features that are known already, and they do not depend on the text (InstructBLIP's do)."""
    base = subject.anatomy.base
    if not hasattr(base, "get_image_features"):
        return False
    accepted, read = inspect.signature(base.forward).parameters, inspect.signature(base.get_image_features).parameters
    optional = "pixel_values" in accepted and accepted["pixel_values"].default is None
    return optional and "mm_encoder_outputs" in accepted and not any(name.endswith("input_ids") for name in read)


def _encode_one_image(subject: Subject, items: Sequence) -> list[Encoded]:
    features, encoded = None, []
    for item in items:
        inputs = subject.encode([item_field(item, "image")], [item_field(item, "prompt")], padding_side="right").inputs
        with torch.inference_mode(), active(None):
            features = image_features(subject, inputs) if features is None else features
            encoded.extend(capture(subject, with_features(inputs, features)))
    return encoded


def image_features(subject: Subject, inputs: Mapping):
    """What the vision tower and the projector make of the images of a prompt's ``inputs``, as the model itself returns it."""
    encode = subject.anatomy.base.get_image_features
    wanted = inspect.signature(encode).parameters
    return encode(**{name: value for name, value in inputs.items() if name in wanted}, return_dict=True)


def with_features(inputs: Mapping, features) -> dict:
    """The same inputs with ``features`` in place of pixels."""
    return {**{name: value for name, value in inputs.items() if name not in _PIXELS}, "mm_encoder_outputs": {"image": features}}
