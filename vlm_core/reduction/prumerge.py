"""Tokens that stand out in the vision tower's attention, with what their neighbours show (PruMerge, Shang et al. 2024, arXiv:2403.15388).

``PruMerge``    outliers, evenly spaced tokens beside them, and the nearest neighbours of each added to it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_core.interventions.numeric import boolean
from vlm_core.interventions.policy import Choice, Policy, Seen, TowerLayer
from vlm_core.reduction.baselines import spaced
from vlm_core.reduction.tower import last_layers, share

__all__ = ["PruMerge"]


@dataclass(frozen=True, eq=False)
class PruMerge(Policy):
    """Keep the outliers of the vision tower's attention, and add to each token that stays its nearest neighbours.

    Outliers receive more than ``Q3 + 1.5 (Q3 - Q1)``, quartiles of what the image tokens on a grid receive: of the tower's class
    token, or of all patches where it has none. Exactly as many tokens stay as are asked for: where there are more outliers, those
    that receive most; where there are fewer, all of them and evenly spaced ones of the others, as PruMerge+ supplements them.

    To each token that stays, its ``k`` nearest neighbours are added, weighted by what they receive: ``x_i + sum_j a_j x_j``. Nearest are
    those of all other tokens, whether they stay or not, whose keys have the highest cosine to its own.

    Parameters
    ----------
    adaptive : bool
        Whether the outliers alone stay (the token that receives most, where there is none), however many were asked for.
    neighbours : float
        ``k`` as a share of the image tokens that the prompt started with, rounded, at least one. Default as published: 32 of 576.
    layer : {-1, -2}
        Of the vision tower, counted from its end.

    Notes
    -----
    Reconstruction in four points. The public code merges what the tower gives and projects it then; here it is what the language
    model receives, from any layer on. Its attention is one softmax over all heads together; here heads are averaged. Its PruMerge+
    draws evenly spaced tokens by a step that follows the number of outliers; here they fill the budget. It appends one token more,
    the weighted sum of all that were dropped, for which there is no position here. Tokens without a place on a grid (class token,
    ends of rows) are no outliers, add nothing and get nothing added. Not nested, and, but for ``adaptive``, not equivariant: which
    tokens are evenly spaced depends on their order.
    """

    adaptive: bool = False
    neighbours: float = 32 / 576
    layer: int = -1
    name: ClassVar[str] = "prumerge"
    reads: ClassVar[frozenset[str]] = frozenset({"grid", "tower"})

    def __post_init__(self) -> None:
        self._seal(
            adaptive=boolean(self.adaptive, "adaptive"),
            neighbours=share(self.neighbours, "neighbours"),
            layer=last_layers(self.layer),
        )

    @property
    def exact(self) -> bool:
        """Whether as many tokens stay as are asked for."""
        return not self.adaptive

    def choose(self, seen: Seen, keep: int) -> Choice:
        """Outliers and evenly spaced tokens, each with its neighbours."""
        seen_by, placed = seen.tower(self.layer), seen.outside().grid >= 0
        order, n_outliers, unit = seen.once(("prumerge", self.layer), lambda: self._ranked(seen_by, placed))
        if self.adaptive:
            kept = order[: max(1, n_outliers)].sort().values
        else:
            kept = order[: min(n_outliers, keep)]
            others = order[n_outliers:].sort().values
            kept = torch.cat([kept, others[spaced(len(others), keep - len(kept)).to(others.device)]]).sort().values
        k = min(max(1, int(seen.n_started * self.neighbours + 0.5)), len(seen) - 1)
        rows = torch.arange(len(kept), device=kept.device)
        likeness = unit[kept] @ unit.T
        likeness[rows, kept] = -torch.inf
        nearest = likeness.topk(k, dim=1).indices
        mix = torch.zeros(len(kept), len(seen), device=kept.device)
        mix.scatter_(1, nearest, seen_by.received[nearest] * placed[kept][:, None])
        mix[rows, kept] = 1.0
        return Choice(kept, mix)

    @staticmethod
    def _ranked(seen_by: TowerLayer, placed: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Candidates, those that receive most first; how many of them are outliers; unit keys."""
        received = seen_by.received
        # Where no token has a place all receive nothing, and none is an outlier.
        among = received[placed] if bool(placed.any()) else received
        low, high = torch.quantile(among, torch.tensor([0.25, 0.75], device=received.device))
        order = received.argsort(descending=True, stable=True)
        return order, int((received > high + 1.5 * (high - low)).sum()), normalize(seen_by.keys.float(), dim=1)
