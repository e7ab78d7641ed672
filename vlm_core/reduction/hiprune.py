"""Tokens from two depths of the vision tower (HiPrune, Liu et al. 2025, arXiv:2508.00553).

``HiPrune``    objects and what lies beside them from the middle, summaries from the end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.reduction.tower import share

__all__ = ["HiPrune"]


@dataclass(frozen=True, eq=False)
class HiPrune(Policy):
    """Keep anchors, the tokens beside them, and registers.

    Anchors receive most attention in the tower's object layer, ``objects * keep / 5`` of them, rounded, at least one. Buffers are
    the tokens above, below, left and right of an anchor on its grid; where they are more than what is left to keep, those that
    receive most in the object layer. Registers fill up what is left: the tokens that receive most in the tower's last layer and are
    not kept yet.

    Parameters
    ----------
    objects : float
        Share of the tokens kept that anchors and their buffers take where no two of them touch, above 0 and at most 1.
    object_layer : int, optional
        Layer of the vision tower from 0. Default: the middle one, ``(n_layers - 1) // 2``.

    Notes
    -----
    Definition from the paper with its share of 0.1, in three points our reading (reconstruction). The number of anchors is what
    makes each of them and its four buffers five tokens; the published object layer (9 of 24 in CLIP, 16 of 32 in Qwen2.5-VL) is the
    middle one here, whatever the tower; attention is the class token's where the tower has one, of all patches elsewhere. Tokens
    without a place on a grid (class token, ends of rows) are kept last of all. Not nested: more anchors may push out a register.
    Permuting the tokens permutes the choice where no two are alike.
    """

    objects: float = 0.1
    object_layer: int | None = None
    name: ClassVar[str] = "hiprune"
    reads: ClassVar[frozenset[str]] = frozenset({"grid", "tower"})

    def __post_init__(self) -> None:
        layer = self.object_layer
        self._seal(
            objects=share(self.objects, "objects"),
            object_layer=None if layer is None else integer(layer, "object_layer", least=0),
        )

    def choose(self, seen: Seen, keep: int) -> Choice:
        """Anchors, buffers, registers."""
        by_object, by_last = seen.once(("hiprune", self.object_layer), lambda: self._orders(seen))
        anchors = by_object[: max(1, int(self.objects * keep / 5 + 0.5))]
        taken = torch.zeros(len(seen), dtype=torch.bool, device=anchors.device)
        taken[anchors] = True
        beside = seen.outside().neighbours(anchors).any(0) & ~taken
        taken[by_object[beside[by_object]][: keep - len(anchors)]] = True
        taken[by_last[~taken[by_last]][: keep - int(taken.sum())]] = True
        return Choice(taken.nonzero()[:, 0])

    def _orders(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates, those first that receive most in the object layer and in the last one."""
        placed = seen.outside().grid >= 0
        middle = (len(seen.outside().tower) - 1) // 2 if self.object_layer is None else self.object_layer
        found = (seen.tower(layer).received.masked_fill(~placed, -1.0) for layer in (middle, -1))
        by_object, by_last = (received.argsort(descending=True, stable=True) for received in found)
        return by_object, by_last
