"""Prompts encoded once, however many analyses ask about them.

``remembering(subject)``   in this context ``encode_items`` gives prompts that it has encoded before again
``KnownPrompts``           encoded prompts, within so many bytes
``among_alike(known)``     in this context subjects that have the same processor, or vision tower, share what it made
``KnownAlike``             what processors made of prompts, and vision towers of images

A prompt is known by its words and by what its images show, wherever it came from. What is remembered is what the language model received
(``vlm_core.subjects.embed.Encoded``), so neither processor nor vision tower runs for it again. Weights that change end the memory of all
that came before; processor and configuration stay as they are while a subject remembers.

Students of one checkpoint differ in their decoders: what their processor makes of a prompt is the same for all of them, and what a vision tower
makes of an image is, where training has left it as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from vlm_core.identity import image_digest
from vlm_core.memory import Bounded
from vlm_core.subjects.fingerprint import processor_settings, weights_digest

if TYPE_CHECKING:
    from vlm_core.subjects.batch import Batch
    from vlm_core.subjects.embed import Encoded
    from vlm_core.subjects.subject import Subject

__all__ = ["KnownAlike", "KnownPrompts", "among_alike", "prepared", "prompt_key", "remembering", "tower_key"]

_LIMIT = 2**29


def prompt_key(picture: Any, prompt: str, reads: Collection[str] = ()) -> tuple[str, ...]:
    """What a prompt is known by.

    Parameters
    ----------
    picture : image, or list of them
    reads : collection of str
        What is known of its image tokens outside the decoder.
    """
    return image_digest(picture), prompt, *sorted(reads)


class KnownPrompts(Bounded):
    """Encoded prompts of one subject, for all its threads; see ``vlm_core.memory.Bounded``."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._state: tuple | None = None
        self._lock = threading.Lock()

    def find(self, state: tuple, keys: Sequence[tuple[str, ...]]) -> list[Encoded | None]:
        """The prompts of ``keys``, None for each that is not known to weights in ``state`` (``Subject.weights_state``)."""
        with self._lock:
            if state != self._state:
                self._state = state
                self.clear()
            return [self.get(key) for key in keys]

    def learn(self, state: tuple, key: tuple[str, ...], encoded: Encoded) -> None:
        """Remember what weights in ``state`` made of a prompt."""
        with self._lock:
            if state == self._state:
                self.keep(key, encoded, _size(encoded))


@contextmanager
def remembering(subject: Subject, limit: int = _LIMIT) -> Iterator[KnownPrompts]:
    """In this context, and in every thread, ``subject`` encodes a prompt once.

    Parameters
    ----------
    limit : int
        Bytes that may be kept, on the subject's device.
    """
    before, subject.known_prompts = subject.known_prompts, KnownPrompts(limit)
    try:
        yield subject.known_prompts
    finally:
        subject.known_prompts = before


class KnownAlike(Bounded):
    """What processors made of batches of prompts, for every subject whose processor is set alike; see ``vlm_core.memory.Bounded``.

    Attributes
    ----------
    towers : dict
        Key of a vision tower (``tower_key``) → what is known of it.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        super().__init__(limit)
        self.towers: dict[tuple, Any] = {}


_ALIKE: ContextVar[KnownAlike | None] = ContextVar("vlm_core_known_alike", default=None)


@contextmanager
def among_alike(known: KnownAlike) -> Iterator[KnownAlike]:
    """In this context (and this thread) subjects share what is ``known``: processors and towers stay as they are in it."""
    token = _ALIKE.set(known)
    try:
        yield known
    finally:
        _ALIKE.reset(token)


def prepared(subject: Subject, pictures: Sequence, prompts: Sequence[str]) -> Batch:
    """Images and prompts as model inputs, padded on the right; found among those of subjects alike in their context."""
    known = _ALIKE.get()
    if known is None:
        return subject.encode(pictures, prompts, padding_side="right")
    weight = subject.anatomy.embedding.weight
    made = (subject.model.config.model_type, processor_settings(subject.processor), weight.dtype, weight.device)
    key = (*made, *(prompt_key(*one) for one in zip(pictures, prompts, strict=True)))
    found = known.get(key)
    if found is None:
        found = subject.encode(pictures, prompts, padding_side="right")
        known.keep(key, found, _size(found.inputs))
    return found


def tower_key(tower: Any) -> tuple[KnownAlike, tuple] | None:
    """Where what is known of a vision tower is kept, and its key there: the weights themselves; None outside ``among_alike``."""
    known = _ALIKE.get()
    if known is None or tower is None:
        return None
    first = next(tower.parameters())
    return known, (type(tower).__qualname__, weights_digest(tower), first.dtype, first.device)


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(_size, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(_size(getattr(value, one.name)) for one in fields(value))
    return 0
