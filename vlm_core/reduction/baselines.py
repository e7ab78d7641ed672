"""What every policy is compared with: tokens that stay without anyone looking at them.

``Random``    a uniform subset
``Stride``    evenly spaced tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.seam.dropping import kept_pattern

__all__ = ["Random", "Stride", "spaced"]


def spaced(n: int, keep: int) -> torch.Tensor:
    """``keep`` of ``n`` numbers, evenly spaced, LongTensor ``[keep]``: the middles of ``keep`` equal parts."""
    return torch.from_numpy(kept_pattern("stride", 0, 0, n, keep).nonzero()[0])


@dataclass(frozen=True, eq=False)
class Random(Policy):
    """Keep a uniform subset: what ``DropTokens(policy="random")`` keeps.

    Parameters
    ----------
    seed : int
        Of the draw, together with the item: an item loses the same tokens in every batch, and its smaller subsets lie in its larger ones.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        self._seal(seed=integer(self.seed, "seed", least=0))

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The item's own draw."""
        return Choice(torch.from_numpy(kept_pattern("random", self.seed, seen.item, len(seen), keep).nonzero()[0]))


@dataclass(frozen=True, eq=False)
class Stride(Policy):
    """Keep evenly spaced tokens in sequence order: what ``DropTokens(policy="stride")`` keeps."""

    name: ClassVar[str] = "stride"

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The middles of ``keep`` equal parts."""
        return Choice(spaced(len(seen), keep))
