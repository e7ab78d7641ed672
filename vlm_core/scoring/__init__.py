"""Scores of generated answers, as benchmarks define them.

``SCORERS``                     every scorer by name
``score_answer(output, item)``  one generated text against one item, by the scorer that the item names
``Scorer``                      what a scorer is
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vlm_core.items import item_field
from vlm_core.scoring.exact import EXACT
from vlm_core.scoring.option import OPTION
from vlm_core.scoring.scorer import Scorer
from vlm_core.scoring.spoken import SPOKEN
from vlm_core.scoring.text import ANLS, CONTAINS, GQA, OCRBENCH, RELAXED
from vlm_core.scoring.vqa import TEXTVQA, VQA
from vlm_core.scoring.yes_no import POPE

__all__ = ["SCORERS", "Scorer", "score_answer", "scorer_of"]

_ALL = (ANLS, CONTAINS, EXACT, GQA, OCRBENCH, OPTION, POPE, RELAXED, SPOKEN, TEXTVQA, VQA)
SCORERS: Mapping[str, Scorer] = MappingProxyType({one.name: one for one in _ALL})
"""Every scorer by the name that items give it."""


def scorer_of(item: Any) -> Scorer:
    """The scorer that an item names in its field ``scorer``; ``"exact"`` where it names none.

    Raises
    ------
    ValueError
        Where no scorer has that name.
    """
    name = (item.get("scorer") if isinstance(item, Mapping) else getattr(item, "scorer", None)) or EXACT.name
    if name not in SCORERS:
        raise ValueError(f"there is no scorer '{name}': an item's scorer is one of {', '.join(sorted(SCORERS))}")
    return SCORERS[name]


def score_answer(output: str, item: Any) -> float:
    """The score in [0, 1] of one generated text, by the scorer that its item names.

    Parameters
    ----------
    output : str
        What a subject wrote, untouched.
    item : mapping or object
        With ``answer``, and ``references``, ``candidates`` where its benchmark has them.

    Raises
    ------
    ValueError
        Where no scorer has the item's name for one, or the item lacks what that scorer needs.
    """
    scorer = scorer_of(item)
    for field in scorer.needs:
        if item_field(item, field) is None:
            raise ValueError(f"item {item_field(item, 'id')!r} has no {field}, which the scorer '{scorer.name}' needs")
    return scorer.score(output, item)
