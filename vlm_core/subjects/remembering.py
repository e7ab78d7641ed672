"""Prompts encoded once, however many analyses ask about them.

``remembering(subject)``   in this context ``encode_items`` gives prompts that it has encoded before again
``KnownPrompts``           encoded prompts, within so many bytes

A prompt is known by its words and by what its images show, wherever it came from. What is remembered is what the language model received
(``vlm_core.subjects.embed.Encoded``), so neither processor nor vision tower runs for it again. Weights that change end the memory of all
that came before; processor and configuration stay as they are while a subject remembers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from vlm_core.identity import image_digest

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


class KnownPrompts:
    """Encoded prompts of one subject. Those used longest ago go first where there is no room.

    Parameters
    ----------
    limit : int
        Bytes that may be kept.

    Attributes
    ----------
    bytes : int
        Bytes that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._state: tuple | None = None
        self._encoded: OrderedDict[tuple[str, ...], tuple[Encoded, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._encoded)

    def find(self, state: tuple, keys: Sequence[tuple[str, ...]]) -> list[Encoded | None]:
        """The prompts of ``keys``, None for each that is not known to weights in ``state`` (``Subject.weights_state``)."""
        with self._lock:
            if state != self._state:
                self._state, self.bytes = state, 0
                self._encoded.clear()
            for key in keys:
                if key in self._encoded:
                    self._encoded.move_to_end(key)
            return [self._encoded[key][0] if key in self._encoded else None for key in keys]

    def keep(self, state: tuple, key: tuple[str, ...], encoded: Encoded) -> None:
        """Remember what weights in ``state`` made of a prompt."""
        size = _size(encoded)
        with self._lock:
            if state != self._state or key in self._encoded or size > self.limit:
                return
            self._encoded[key] = encoded, size
            self.bytes += size
            while self.bytes > self.limit:
                _, (_, gone) = self._encoded.popitem(last=False)
                self.bytes -= gone


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
