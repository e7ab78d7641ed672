"""How alike the tokens of a group are: what redundancy of visual tokens is measured by.

``MEASURES``          what each measure is, in a sentence
``likeness(rows)``    all of them, of some vectors
``TokenLikeness``     the same of the residual stream of token groups, layer by layer
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_core.observation.declaring import freeze_groups, require_groups, require_images
from vlm_core.seam.views import LayerView, Tokens

__all__ = ["MEASURES", "TokenLikeness", "likeness"]

MEASURES = {
    "cosine": "mean cosine similarity of all pairs of tokens",
    "nearest": "mean over tokens of the cosine similarity to the most similar other one",
    "effective rank": "exp of the entropy of the singular values' shares of their sum",
    "participation ratio": "(sum of squared singular values)^2 over the sum of their fourth powers",
    "nearest, centred": "as nearest, the group's mean token taken away first",
    "effective rank, centred": "as effective rank, the group's mean token taken away first",
    "participation ratio, centred": "as participation ratio, the group's mean token taken away first",
}
"""The mean cosine of centred tokens is left out: it is -1 / (n - 1) for any n vectors of one length, and says nothing."""


def likeness(rows: torch.Tensor) -> torch.Tensor:
    """``MEASURES`` of some vectors, in their order.

    Parameters
    ----------
    rows : Tensor ``[token, hidden]``

    Returns
    -------
    float64 Tensor ``[measure]``
        NaN throughout with fewer than two tokens or numbers that are not finite. A vector without a length has no direction and is in no
        cosine; where fewer than two have one, cosines are NaN. Ranks of vectors that are all zero (centred: all alike) are NaN.

    Notes
    -----
    Effective rank: Roy & Vetterli 2007, EUSIPCO, of the matrix as it is; between 1 and the rank. The participation ratio is that of the
    squared singular values, which are the eigenvalues of the Gram matrix; centred they are those of the covariance, as Gao et al. 2017
    (bioRxiv 214262) define it. Literature on token redundancy differs in whether the mean is taken away: a direction that all tokens share
    makes uncentred tokens look alike, whatever they hold beside it. Both are given. Computed in float64 from Gram matrices; what lies below
    the rounding of the uncentred one counts as zero.
    """
    n, width = rows.shape
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
    if n < 2 or not bool(rows.isfinite().all()):
        return rows.new_full((len(MEASURES),), torch.nan)
    plain, centred = _spectrum(rows), rows - rows.mean(0)
    floor = max(n, width) * torch.finfo(rows.dtype).eps * plain.max()
    return torch.stack(
        [
            *_cosines(rows, floor),
            *_ranks(plain, floor),
            _cosines(centred, floor)[1],
            *_ranks(_spectrum(centred), floor),
        ]
    )


def _spectrum(rows: torch.Tensor) -> torch.Tensor:
    """Squared singular values."""
    return torch.linalg.eigvalsh(rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows)


def _ranks(squared: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squared = squared.where(squared > floor, 0.0)
    singular = squared.sqrt()
    # 0 / 0 of vectors that are all zero is NaN.
    return torch.special.entr(singular / singular.sum()).sum().exp(), squared.sum().square() / squared.square().sum()


def _cosines(rows: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = rows.square().sum(1)
    rows = rows[lengths > floor]
    m = len(rows)
    if m < 2:
        return rows.new_full((), torch.nan), rows.new_full((), torch.nan)
    rows = torch.nn.functional.normalize(rows, dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(0.0)
    return cosines.sum() / (m * (m - 1)), cosines.fill_diagonal_(-torch.inf).amax(1).mean()


@dataclass(frozen=True)
class TokenLikeness:
    """``MEASURES`` of the residual stream of token groups, as it enters each layer: ``[item, layer, group, measure]``.

    Layer ``n_layers`` is what enters the final norm. NaN for groups of fewer than two tokens.

    Parameters
    ----------
    groups : tuple of str
        Token groups (``vlm_core.seam.views.GROUPS`` or named ones). A single name is one group.
    """

    groups: tuple[str, ...] = ("image",)

    def __post_init__(self) -> None:
        freeze_groups(self, "groups")

    def require_there(self, anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have, and a prompt without the image tokens that are asked for."""
        if tokens is not None:
            require_groups(self, tokens, *self.groups)
            if "image" in self.groups:
                require_images(self, tokens)

    @property
    def axes(self) -> tuple:
        """Group and measure."""
        return (("group", self.groups), ("measure", tuple(MEASURES)))

    def layer(self, view: LayerView) -> torch.Tensor:
        """``[element, group, measure]`` of one layer."""
        members = [view.tokens.group(group) for group in self.groups]
        found = [torch.stack([likeness(hidden[own[element]]) for own in members]) for element, hidden in enumerate(view.hidden)]
        return torch.stack(found).float()
