"""Heads that are known to look at what matters choose the tokens.

``HeadGuided``    FastV's score from given heads alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions.declaration import as_heads, shown_heads
from vlm_core.interventions.policy import Ranked, Seen
from vlm_core.reduction.fastv import QUERIES

__all__ = ["HeadGuided"]


@dataclass(frozen=True, eq=False)
class HeadGuided(Ranked):
    """Keep the image tokens with the highest attention from some heads of the layer before.

    Parameters
    ----------
    heads : sequence of (layer, head)
        Heads of any layers, as a ranking gives them; those of the layer before the drop count, and there must be one.
    queries : {"last", "all"}
        As in ``FastV``, which this is with all heads of a layer.

    Notes
    -----
    [ours] FastV (arXiv:2403.06764) averages over all heads, though most heads hardly look at the image for what is asked.
    """

    heads: tuple[HeadId, ...]
    queries: str = "last"
    name: ClassVar[str] = "heads"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        if self.queries not in QUERIES:
            raise ValueError(f"queries of HeadGuided must be one of {', '.join(QUERIES)}, got {self.queries!r}")
        heads = as_heads(self.heads)
        if not heads:
            raise ValueError("HeadGuided needs at least one head to go by, got none: FastV() goes by all heads of a layer")
        self._seal(heads=heads)

    def require_layer(self, layer: int) -> None:
        """Refuse a layer before which none of the heads is."""
        super().require_layer(layer)
        if not self._before(layer):
            layers = ", ".join(map(str, sorted({head.layer + 1 for head in self.heads})))
            raise ValueError(f"none of {shown_heads(self.heads)} is in layer {layer - 1}, the one before the drop: drop at one of {layers}")

    def _before(self, layer: int) -> list[int]:
        return [head.head for head in self.heads if head.layer == layer - 1]

    def scores(self, seen: Seen) -> torch.Tensor:
        """Attention received from the heads, ``[candidate]``."""
        return seen.attention(self.queries, heads=self._before(seen.layer)).mean(0)

    def describe(self) -> str:
        """A short unique label."""
        queries = () if self.queries == "last" else (f"queries {self.queries}",)
        return f"{self.name}({', '.join((shown_heads(self.heads), *queries))})"
