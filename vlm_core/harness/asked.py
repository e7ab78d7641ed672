"""What subjects are asked: a set's items, looked through once before anybody answers.

``AskedSet.read(name, source, modes)``   a set with the hash of what it asks; every wrong item is one sentence
``ASKED_ALIKE``                          what two answers to the same item must share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_core.harness.config import ItemSet
from vlm_core.identity import digest, item_digest, picture_digest
from vlm_core.items import SCORED, SHOWN, require_item
from vlm_core.scoring import score_answer, scorer_of
from vlm_core.sources import items_on_asking

__all__ = ["ASKED_ALIKE", "AskedSet"]

_GREEDY = tuple(name for name in SCORED if name != "candidates")
_DIGESTED = (*(name for name in SCORED if name != "image"), "references", "scorer")
ASKED_ALIKE = ("prompt", "image", "answer", "cluster", "task")
"""Of the fields of an answer, those that follow from the item alone."""


@dataclass(frozen=True)
class AskedSet:
    """Items of one set, and what is known of them without their pictures in memory.

    Parameters
    ----------
    name : str
    items : sequence of items
        Read when they are asked for.
    modes : tuple of str
        How they are answered.
    facts : tuple of dict
        Of each item the fields of an answer that follow from it: ``item, cluster, task, prompt, image, answer, scorer`` and, where it has
        them, ``references`` and ``candidates``. ``image`` is the hash of its pixels (`vlm_core.identity.picture_digest`).
    digest : str
        Of all that is asked, in order, pictures included.
    """

    name: str
    items: Sequence[dict]
    modes: tuple[str, ...]
    facts: tuple[dict[str, Any], ...]
    digest: str

    @classmethod
    def read(cls, name: str, source: ItemSet, modes: tuple[str, ...]) -> AskedSet:
        """Look through a set.

        Raises
        ------
        ValueError
            One sentence that names the set and the item: what cannot be had, shown, answered or scored.
        """
        where = f"sets.{name}"
        items = items_on_asking(source, where)
        if source.scorer is not None:
            items = _ScoredBy(items, source.scorer)
        facts, digests, seen = [], [], set()
        try:
            for item in items:
                if "candidates" in modes and item.get("candidates") is None:
                    require_item(item, SHOWN)
                    raise ValueError(
                        f"item {item['id']!r} has no candidates to choose from: answer the set by mode = 'greedy', in [{where}] if others "
                        f"have them"
                    )
                require_item(item, SCORED if "candidates" in modes else _GREEDY)
                if "greedy" in modes:
                    score_answer("", item)  # says what the scorer misses
                fact = _fact(item)
                if fact["item"] in seen:
                    raise ValueError(f"two items have the id {fact['item']!r}: answers are told apart by them, give each its own")
                seen.add(fact["item"])
                facts.append(fact)
                digests.append(item_digest(item, _DIGESTED))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return cls(name, items, modes, tuple(facts), digest(digests))


class _ScoredBy(Sequence):
    """Items that all name one scorer."""

    def __init__(self, items: Sequence[dict], scorer: str) -> None:
        self._items, self._scorer = items, scorer

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        return {**self._items[index], "scorer": self._scorer}


def _fact(item: dict) -> dict[str, Any]:
    lists = {name: item.get(name) for name in ("references", "candidates")}
    return {
        "item": str(item["id"]),
        "cluster": str(item["scene_id"]),
        "task": str(item["task"]),
        "prompt": item["prompt"],
        "image": picture_digest(item["image"]),
        "answer": item["answer"],
        **{name: [str(one) for one in values] for name, values in lists.items() if values is not None},
        "scorer": scorer_of(item).name,
    }
