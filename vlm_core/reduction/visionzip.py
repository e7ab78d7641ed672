"""Tokens that the vision tower attends to most, and the rest merged into a few (VisionZip, Yang et al. 2025, arXiv:2412.04467).

``VisionZip``    dominant tokens by attention, contextual ones by similarity of keys
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.reduction.tower import last_layers, share

__all__ = ["VisionZip"]


@dataclass(frozen=True, eq=False)
class VisionZip(Policy):
    """Keep dominant tokens as they are, and merge all others into evenly spaced ones of them.

    Dominant are the tokens that receive most attention in a layer of the vision tower: of its class token, or of all patches
    where it has none. The others are numbered in sequence order; ``c`` of them are targets, every ``others // c``-th from the
    first on. Each of those that are left joins the target with the most similar keys (cosine, the earlier of two alike). A target
    carries half of itself and half of the mean of those that joined it; itself alone where none did.

    Parameters
    ----------
    dominant : float
        Share of the tokens kept that are dominant, above 0 and at most 1, rounded, at least one token. Default as published: 54 of 64.
    layer : {-2, -1}
        Of the vision tower, counted from its end.

    Notes
    -----
    Reconstruction in four points. The public code merges what the tower gives and projects it then; here it is what the language
    model receives, from any layer on. It adds the mean of those that joined to the target, which is the same direction twice as
    long. It compares keys averaged over heads; here they stand side by side. It keeps as many tokens of each view of an image;
    here all tokens of a prompt are ranked together. Tokens without a place on a grid (class token, ends of rows) neither are
    targets nor join one, and are dominant last of all. Not nested, and not equivariant: which tokens are targets depends on their
    order.
    """

    dominant: float = 54 / 64
    layer: int = -2
    name: ClassVar[str] = "visionzip"
    reads: ClassVar[frozenset[str]] = frozenset({"grid", "tower"})

    def __post_init__(self) -> None:
        self._seal(dominant=share(self.dominant, "dominant"), layer=last_layers(self.layer))

    def choose(self, seen: Seen, keep: int) -> Choice:
        """The dominant tokens, and the targets with what joined them."""
        seen_by, placed = seen.tower(self.layer), seen.outside().grid >= 0
        order = seen.once(
            ("visionzip", self.layer),
            lambda: seen_by.received.masked_fill(~placed, -1.0).argsort(descending=True, stable=True),
        )
        n_dominant = max(1, int(keep * self.dominant + 0.5))
        n_targets = keep - n_dominant if keep < int(placed.sum()) else 0
        chosen = order[: keep - n_targets]
        if not n_targets:
            return Choice(chosen.sort().values)
        rest = placed.clone()
        rest[chosen] = False
        rest = rest.nonzero()[:, 0]
        numbers = torch.arange(n_targets, device=rest.device) * (len(rest) // n_targets)
        joins = torch.ones_like(rest, dtype=torch.bool)
        joins[numbers] = False
        targets, joining = rest[numbers], rest[joins]
        unit = seen.once(("visionzip keys", self.layer), lambda: normalize(seen_by.keys.float(), dim=1))
        joined = (unit[joining] @ unit[targets].T).argmax(1)
        counts = joined.bincount(minlength=n_targets)
        kept = torch.cat([chosen, targets]).sort().values
        mix = torch.zeros(keep, len(seen), device=kept.device)
        mix[torch.arange(keep, device=kept.device), kept] = 1.0
        rows = torch.searchsorted(kept, targets)
        mix[rows, targets] = torch.where(counts > 0, 0.5, 1.0)
        mix[rows[joined], joining] = 0.5 / counts[joined]
        return Choice(kept, mix)
