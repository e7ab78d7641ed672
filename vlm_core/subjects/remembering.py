"""Prompts encoded once, however many analyses ask about them.

``remembering(subject)``   in this context ``encode_items`` gives prompts that it has encoded before again
``KnownPrompts``           encoded prompts, within so many bytes

A prompt is known by its words and by what its images show, wherever it came from. What is remembered is what the language model received
(``vlm_core.subjects.embed.Encoded``), so neither processor nor vision tower runs for it again. Weights that change end the memory of all
that came before; processor and configuration stay as they are while a subject remembers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from vlm_core.identity import image_digest
from vlm_core.memory import Bounded

if TYPE_CHECKING:
    from vlm_core.subjects.embed import Encoded
    from vlm_core.subjects.subject import Subject

__all__ = ["KnownPrompts", "prompt_key", "remembering"]

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
