"""Looking at what policies see, and answering in their place.

``Answered``         a policy that answers by a function of the context
``answering(...)``   the context
``seen_by(...)``     what is made of the candidates of every item before a layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch

from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.interventions.tokens import DropTokens
from vlm_core.items import item_field, item_number, require_items, take
from vlm_core.seam.plan import require_possible
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows
from vlm_core.subjects.subject import Subject
from vlm_core.subjects.visual import OUTSIDE

__all__ = ["Answered", "answering", "seen_by"]

Made = TypeVar("Made")

_ANSWER: ContextVar[Callable[[Seen, int], Choice]] = ContextVar("vlm_core_answer")


@dataclass(frozen=True, eq=False)
class Answered(Policy):
    """A policy that answers what the function of ``answering`` answers; it is for passes of the library's own, and never stored.

    Parameters
    ----------
    asks : tuple of str
        What the function reads (``vlm_core.interventions.policy.READS``).
    """

    asks: tuple[str, ...] = ()
    exact: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[str]:
        """What the function reads."""
        return frozenset(self.asks)

    def choose(self, seen: Seen, keep: int) -> Choice:
        """What the function answers."""
        return _ANSWER.get()(seen, keep)

    def describe(self) -> str:
        """A label."""
        return "answered"


class _AllSeen(Exception):
    """Raised where every prompt of a pass has been looked at: what later layers make of them is of no use."""


@contextmanager
def answering(function: Callable[[Seen, int], Choice]) -> Iterator[None]:
    """In this context ``Answered`` answers by ``function(seen, keep)``."""
    token = _ANSWER.set(function)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def seen_by(
    subject: Subject, items: Sequence, layer: int, reads: frozenset[str], make: Callable[[Seen], Made], batch: int = 32
) -> list[Made]:
    """``make(seen)`` of every item's image tokens before a layer.

    Parameters
    ----------
    reads : frozenset of str
        What ``make`` reads beside the residual stream.
    batch : int
        Prompts per pass.

    Raises
    ------
    ValueError
        For a layer that there is not, or a prompt with fewer than two image tokens.
    """
    require_items(items)
    row = DropTokens(integer(layer, "layer", least=0), 0.5, Answered(tuple(sorted(reads))))
    require_possible(row, subject.anatomy)
    made: list[Made] = []

    def look(seen: Seen, keep: int) -> Choice:
        made.append(make(seen))
        if len(made) == stop:
            raise _AllSeen
        return Choice(torch.arange(keep, device=seen.candidates.device))

    for start in range(0, len(items), batch):
        stop = min(start + batch, len(items))
        chunk = take(items, range(start, stop))
        encoded = encode_items(subject, chunk, reads=reads & OUTSIDE)
        for item, one in zip(chunk, encoded, strict=True):
            if int(one.image.sum()) < 2:
                raise ValueError(f"item {item_field(item, 'id')!r} has fewer than two image tokens: there is nothing to choose among")
        with answering(look), suppress(_AllSeen):
            forward_rows(subject, encoded, np.arange(len(chunk)), [row] * len(chunk), list(map(item_number, chunk)))
    return made
