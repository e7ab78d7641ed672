"""Equality without case, punctuation and spacing, the score of items that name no other.

``EXACT``   the scorer
"""

from __future__ import annotations

from typing import Any

from vlm_core.items import plain
from vlm_core.scoring.scorer import Scorer, accepted

__all__ = ["EXACT"]


def exact(output: str, item: Any) -> float:
    """1 where the output is one of the item's accepted answers (``plain``), else 0."""
    return float(plain(output) in {plain(one) for one in accepted(item)})


EXACT = Scorer("exact", "vlm_core.items.plain: equality without case, punctuation and spacing", exact)
