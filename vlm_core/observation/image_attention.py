"""Attention on the tokens of the image, one by one, and how it falls on an object.

``ImageAttention``     attention on every image token
``TopShare``           how much of it the most attended tokens hold
``MaskIoU``            overlap of the binarised attention with an object's mask (Head Impact)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.numeric import real
from vlm_core.observation.declaring import OnImage, freeze, require_groups, require_images, require_names
from vlm_core.seam.views import AttentionView, Tokens

__all__ = ["ImageAttention", "MaskIoU", "TopShare"]


@dataclass(frozen=True)
class ImageAttention(OnImage):
    """Attention on every image token, averaged over a group of queries: ``[item, layer, head, image token]``.

    Rows with fewer image tokens than the widest of their batch are padded with NaN.
    """

    reads_hidden = False

    queries: str = "last"

    def __post_init__(self) -> None:
        require_names(self, "queries")

    @property
    def ragged(self) -> dict[int, str]:
        """The last axis is as long as there are image tokens."""
        return {-1: "image"}

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, image token]`` of one layer."""
        attention, present = _on_image(view, self.queries)
        return attention.masked_fill(~present[:, None], torch.nan)


@dataclass(frozen=True)
class TopShare(OnImage):
    """Share of a head's image attention that its most attended image tokens hold: ``[item, layer, head]``.

    Attention is averaged over the queries first. NaN where a head gives the image no attention. Keys of a cross-attention that no head
    attends to are not counted: they fill up tiles.

    Parameters
    ----------
    queries : str
        A token group: whose attention.
    share : float
        Of the image's tokens, above 0 and at most 1: ``round(share * n)`` of them, at least one. A head that attends evenly gives them that
        share.
    """

    reads_hidden = False

    queries: str = "last"
    share: float = 0.25

    def __post_init__(self) -> None:
        require_names(self, "queries")
        object.__setattr__(self, "share", real(self.share, "share of TopShare"))
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share of TopShare must lie above 0 and be at most 1, got {self.share}")

    @property
    def axes(self) -> tuple:
        """Head."""
        return (("head", None),)

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head]`` of one layer."""
        attention, present = _on_image(view, self.queries)
        if view.crossed:
            present = (attention > 0).any(1)
        falling = attention.masked_fill(~present[:, None], 0.0).sort(dim=2, descending=True).values
        count = (self.share * present.sum(1)).round().clamp(min=1)
        top = torch.arange(falling.shape[2], device=falling.device) < count[:, None]
        # 0 / 0 of a head that does not see the image is NaN.
        return (falling * top[:, None]).sum(2) / falling.sum(2)


@dataclass(frozen=True)
class MaskIoU:
    """Overlap of a head's binarised image attention with an object's mask: ``[item, layer, head, threshold]``.

    Attention is averaged over the queries first, then compared with a threshold of its own head and item.
    Intersection over union counts image tokens; NaN where the mask is empty, and in layers whose image lies outside the
    sequence, where a token group cannot be an object (Mllama), or where a prompt has none of the queries.

    Parameters
    ----------
    mask : str
        Named token group; its image tokens are the object.
    queries : str
        A token group: whose attention (the answer's tokens in Head Impact, the last prompt token here).
    thresholds : tuple of str or float
        ``"mean"`` over image tokens (Head Impact), ``"mean + sd"`` one standard deviation above it, ``"half"`` of the largest, or a quantile
        between 0 and 1.

    Notes
    -----
    Sergeev & Kotelnikov 2025, arXiv:2511.23375: Head Impact is the mean of the ``"mean"`` column over a set. The other
    thresholds show how much the ranking of heads owes to that choice.
    """

    reads_hidden = False

    mask: str = "object"
    queries: str = "last"
    thresholds: tuple[str | float, ...] = ("mean", "half", 0.75, 0.9)

    def __post_init__(self) -> None:
        require_names(self, "mask", "queries")
        freeze(self, "thresholds")
        if not isinstance(self.thresholds, tuple) or not self.thresholds:
            raise ValueError(f"thresholds of MaskIoU must be several, got {self.thresholds!r}: pass a tuple such as ('mean', 0.9)")
        for threshold in self.thresholds:
            if threshold not in ("mean", "mean + sd", "half") and not (isinstance(threshold, float) and 0.0 < threshold < 1.0):
                raise ValueError(f"a threshold is 'mean', 'mean + sd', 'half' or a quantile between 0 and 1, got {threshold!r}")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have, and a prompt without image tokens."""
        if tokens is not None:
            require_groups(self, tokens, self.queries, self.mask)
            require_images(self, tokens)

    @property
    def axes(self) -> tuple:
        """Head and threshold."""
        return (("head", None), ("threshold", tuple(map(str, self.thresholds))))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, threshold]`` of one layer."""
        attention, present = _on_image(view, self.queries)
        if view.crossed:
            return attention.new_full((*attention.shape[:2], len(self.thresholds)), torch.nan)
        where, _ = view.tokens.members("image")
        mask = (view.tokens.group(self.mask).gather(1, where) & present)[:, None]
        known = attention.masked_fill(~present[:, None], torch.nan)
        scores = []
        for threshold in self.thresholds:
            if threshold == "mean":
                level = known.nanmean(2, keepdim=True)
            elif threshold == "mean + sd":
                level = known.nanmean(2, keepdim=True)
                level = level + (known - level).square().nanmean(2, keepdim=True).sqrt()
            elif threshold == "half":
                level = known.nan_to_num(0.0).amax(2, keepdim=True) / 2
            else:
                level = known.nanquantile(threshold, dim=2, keepdim=True)
            high = (known > level) & present[:, None]
            scores.append((high & mask).sum(2) / (high | mask).sum(2).float())
        defined = mask.any(2) & view.tokens.members(self.queries)[1].any(1, keepdim=True)
        return torch.stack(scores, dim=2).masked_fill(~defined[:, :, None], torch.nan)


def _on_image(view: AttentionView, queries: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention ``[element, head, image token]`` and which of the tokens are real ``[element, image token]``."""
    mean = view.mean(queries)
    if view.crossed:
        return mean, view.keys_of("image")
    where, present = view.tokens.members("image")
    return torch.take_along_dim(mean, where[:, None], dim=2), present
