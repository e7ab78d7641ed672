"""Token merging as a policy (Bolya et al. 2023, arXiv:2210.09461).

``ToMe``    bipartite matching, size-weighted means, proportional attention
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.interventions.tokens import MergeTokens
from vlm_core.seam.merging import merge_rounds

__all__ = ["ToMe"]


@dataclass(frozen=True, eq=False)
class ToMe(Policy):
    """Merge tokens into their like until as many are left as are to stay: what ``MergeTokens`` does, whose definition this is.

    Parameters
    ----------
    similarity : {"hidden", "keys"}
        What is compared by cosine: the residual stream, or the mean keys of the layer before.
    proportional : bool
        Whether merged tokens weigh in later attention as the tokens that they stand for.
    """

    similarity: str = "hidden"
    proportional: bool = True
    name: ClassVar[str] = "tome"

    def __post_init__(self) -> None:
        merging = MergeTokens(1, 1.0, self.similarity, self.proportional)
        self._seal(proportional=merging.proportional)

    @property
    def reads(self) -> frozenset[str]:
        """Keys are those of the layer before."""
        return frozenset({"attention"}) if self.similarity == "keys" else frozenset()

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The tokens that are left, with the weights of what was merged into them."""
        compared = seen.hidden if self.similarity == "hidden" else seen.mean_keys
        own = torch.eye(len(seen), device=compared.device)
        left, mix, sizes = merge_rounds(own, compared, seen.sizes, keep)
        return Choice(left, mix[left], sizes[left], self.proportional)
