"""Tokens that are no duplicates of a few pivots (DART, Wen et al. 2025, arXiv:2502.11494).

``DART``    pivots by the norm of their keys, then what is least like them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Choice, Policy, Seen

__all__ = ["DART"]


@dataclass(frozen=True, eq=False)
class DART(Policy):
    """Keep pivots, and for each of them the tokens that are least similar to it.

    Pivots are the tokens with the longest keys in the layer before (all key heads side by side): some of the image, which stay, and some
    of the question. What is left to keep is shared out among them evenly, the first ones getting one more. In turn, image pivots first,
    longest key first, each takes its share of the tokens that are not kept yet: those with the lowest cosine to its residual stream.

    Parameters
    ----------
    image_pivots : int
        At least one; fewer where fewer tokens are to stay.
    text_pivots : int
        Fewer where the question has fewer tokens.

    Notes
    -----
    Definition as in the public code, with 4 and 4 pivots, in three points our reading. Keys are measured by their Euclidean norm where
    the code sums magnitudes, which a rotary embedding changes with the position. Similarity is that of the residual stream
    itself, not of what the model's last norm makes of it. Shares are exact where the code rounds up. Not nested: a smaller fraction
    may keep what a larger one does not. Permuting the tokens permutes the choice where no two are alike.
    """

    image_pivots: int = 4
    text_pivots: int = 4
    name: ClassVar[str] = "dart"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __post_init__(self) -> None:
        self._seal(
            image_pivots=integer(self.image_pivots, "image_pivots", least=1), text_pivots=integer(self.text_pivots, "text_pivots", least=0)
        )

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The pivots of the image, and what is least like each pivot."""
        image, similarity = seen.once(("dart", self.digest), lambda: self._pivots(seen))
        image = image[:keep]
        taken = torch.zeros(len(seen), dtype=torch.bool, device=similarity.device)
        taken[image] = True
        share, more = divmod(keep - len(image), len(similarity))
        for number, row in enumerate(similarity):
            count = share + (number < more)
            if not count:
                break
            taken[row.masked_fill(taken, torch.inf).argsort(stable=True)[:count]] = True
        return Choice(taken.nonzero()[:, 0])

    def _pivots(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Pivots among the candidates, and cosines ``[pivot, candidate]`` of these and then the question's."""
        image = seen.keys.norm(dim=1).argsort(descending=True, stable=True)[: self.image_pivots]
        text = seen.asked_keys.norm(dim=1).argsort(descending=True, stable=True)[: self.text_pivots]
        unit = normalize(seen.hidden, dim=1)
        return image, torch.cat([unit[image], normalize(seen.asked, dim=1)[text]]) @ unit.T
