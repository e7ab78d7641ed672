"""What a scorer is: a declaration of how one answer is held against what a benchmark accepts.

``Scorer``           name, source, the function that scores one answer, optionally the one that sums a benchmark up
``accepted(item)``   every answer that an item accepts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vlm_core.items import item_field

__all__ = ["Scorer", "accepted"]


@dataclass(frozen=True)
class Scorer:
    """How an answer is scored.

    Parameters
    ----------
    name : str
        As items and benchmarks name it.
    source : str
        Where the score is defined.
    score : callable
        ``score(output, item) -> float`` in [0, 1]: a generated text against one item.
    summary : callable, optional
        ``summary(table) -> {measure: value}``, what a benchmark reports beside the mean score. The table has a row an item: ``output``
        (text as the subject wrote it), ``answer``, ``references`` (a list), ``task`` and ``score``.
    needs : tuple of str
        Fields beside ``answer`` that an item must have.
    """

    name: str
    source: str
    score: Callable[[str, Any], float]
    summary: Callable[[pd.DataFrame], dict[str, float]] | None = None
    needs: tuple[str, ...] = ()


def accepted(item: Any) -> list[str]:
    """All answers that an item accepts: its ``references``, or its ``answer`` alone where it has none."""
    has = item.get("references") if isinstance(item, Mapping) else getattr(item, "references", None)
    return [str(one) for one in has] if has else [str(item_field(item, "answer"))]
