"""Tokens that differ most from one another (DivPrune, Alvar et al. 2025, arXiv:2503.02175).

``DivPrune``    greedy max-min cosine distance
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_core.interventions.policy import Choice, Policy, Seen

__all__ = ["DivPrune"]


@dataclass(frozen=True, eq=False)
class DivPrune(Policy):
    """Keep tokens one after another, each time the one whose nearest kept token is farthest away.

    The distance is one minus the cosine of two tokens' residual streams (before layer 0: of their projected features, where the paper
    prunes). The first is the token whose nearest other token is farthest away. Of two alike the earlier is kept, which is all that
    depends on the order of the tokens: two that are each other's nearest neighbours are alike as first ones.
    """

    name: ClassVar[str] = "divprune"

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The first ``keep`` of the greedy order, which is the same for every fraction."""
        greedy = seen.once(("divprune",), lambda: _Greedy(seen.hidden))
        return Choice(torch.stack(greedy.first(keep)).sort().values)


class _Greedy:
    """The greedy order of tokens ``[token, hidden]``, as far as someone asked."""

    def __init__(self, hidden: torch.Tensor) -> None:
        unit = normalize(hidden, dim=1)
        self._distances = 1 - unit @ unit.T
        self._order = [self._distances.clone().fill_diagonal_(torch.inf).min(1).values.argmax()]
        self._nearest = self._kept(self._distances[self._order[0]])

    def _kept(self, nearest: torch.Tensor) -> torch.Tensor:
        # Never again, whatever rounding makes of a token's distance to itself.
        return nearest.index_fill(0, self._order[-1][None], -torch.inf)

    def first(self, count: int) -> list[torch.Tensor]:
        while len(self._order) < count:
            self._order.append(self._nearest.argmax())
            self._nearest = self._kept(torch.minimum(self._nearest, self._distances[self._order[-1]]))
        return self._order[:count]
