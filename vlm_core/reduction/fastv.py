"""FastV: the image tokens that are attended to most (Chen et al. 2024, arXiv:2403.06764).

``FastV``    by the attention of the layer before
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.interventions.policy import Ranked, Seen

__all__ = ["FastV"]

QUERIES = ("last", "all")


@dataclass(frozen=True, eq=False)
class FastV(Ranked):
    """Keep the image tokens with the highest attention in the layer before, averaged over heads and queries.

    Parameters
    ----------
    queries : {"last", "all"}
        ``last`` is what the public code does, the attention of the prompt's last token; ``all`` is what the text says, the attention that a
        token receives from all of the prompt's tokens.
    """

    queries: str = "last"
    name: ClassVar[str] = "fastv"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        if self.queries not in QUERIES:
            raise ValueError(f"queries of FastV must be one of {', '.join(QUERIES)}, got {self.queries!r}")
        self._seal()

    def scores(self, seen: Seen) -> torch.Tensor:
        """Attention received, ``[candidate]``."""
        return seen.attention(self.queries).mean(0)
