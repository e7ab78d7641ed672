"""How much of a head's attention is a matter of position.

``RelativeDistance``   how far back a head looks, and how much of its attention lies on the token before
``RotaryBias``         what rotary positions do to a head's attention: the same queries and keys, all tokens at one position
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.observation.declaring import OnImage, require_groups, require_names
from vlm_core.seam.views import AttentionView, Tokens

__all__ = ["RelativeDistance", "RotaryBias"]


@dataclass(frozen=True)
class RelativeDistance:
    """Distance between query and key, weighted by attention, averaged over a group of queries: ``[item, layer, head, kind]``.

    The kinds are ``distance`` (tokens, as a share of how far away the first token is: 0 looks at itself, 1 at the first token) and
    ``previous`` (share of attention on the token right before). Tokens are counted where they stand in the sequence, dropped ones not;
    NaN where keys lie outside the sequence (Mllama's cross-attention), or for ``distance`` where the only query is the first token.

    Parameters
    ----------
    queries : str
        A token group: whose attention.
    """

    reads_hidden = False

    queries: str = "question"

    def __post_init__(self) -> None:
        require_names(self, "queries")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have."""
        if tokens is not None:
            require_groups(self, tokens, self.queries)

    @property
    def axes(self) -> tuple:
        """Head and kind."""
        return (("head", None), ("kind", ("distance", "previous")))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, kind]`` of one layer."""
        shape = (*view.query.shape[:2], 2)
        if view.crossed:
            return torch.full(shape, torch.nan, device=view.query.device)
        valid = view.tokens.valid
        place = valid.int().cumsum(1) - 1  # the first valid token of every element is 0
        total, count = torch.zeros(shape, device=valid.device), torch.zeros((shape[0], 1, 2), device=valid.device)
        for block in view.blocks(self.queries):
            at = place.gather(1, block.positions)[:, :, None]
            apart = (at - place[:, None, : block.probabilities.shape[3]]).abs()
            share = apart / at.clamp(min=1)
            seen = torch.stack([share, (apart == 1) & (place[:, None, : share.shape[2]] < at)], dim=-1).float()
            found = torch.einsum("ehqk,eqkc->ehqc", block.probabilities, seen)
            defined = torch.stack([block.real & (at[:, :, 0] > 0)] * 2, dim=-1)
            total += found.masked_fill(~defined[:, None], 0.0).sum(2)
            count += defined.float().sum(1)[:, None]
        return total / count


@dataclass(frozen=True)
class RotaryBias(OnImage):
    """What rotary positions do to a head's attention: ``[item, layer, head, kind]``.

    The kinds are ``moved``, the share of attention that lands on other keys than it would if all tokens stood at one position (total
    variation distance, 0 to 1, averaged over queries), and ``image``, the mass on image keys that is left without positions. Everything
    else stays: the layer's own input, its causal order, windows and caps.

    NaN in layers whose attention takes no rotary positions from its decoder layer.

    Parameters
    ----------
    queries : str
        A token group: whose attention.

    Notes
    -----
    [ours] All tokens are given one rotation (``vlm_core.seam.unrotated``). Published scores without RoPE (FEATHER) skip the rotation; where
    all is rotary the two agree.
    """

    reads_hidden = False
    reads_unrotated = True

    queries: str = "question"

    def __post_init__(self) -> None:
        require_names(self, "queries")

    @property
    def axes(self) -> tuple:
        """Head and kind."""
        return (("head", None), ("kind", ("moved", "image")))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, kind]`` of one layer."""
        shape, flat = (*view.query.shape[:2], 2), view.unrotated
        if flat is None:
            return torch.full(shape, torch.nan, device=view.query.device)
        image = view.keys_of("image").float()
        total, count = torch.zeros(shape, device=image.device), torch.zeros((shape[0], 1, 1), device=image.device)
        for with_places, without in zip(view.blocks(self.queries), flat.blocks(self.queries), strict=True):
            seen = without.probabilities.shape[3]
            moved = (with_places.probabilities - without.probabilities).abs().sum(3) / 2
            on_image = torch.einsum("ehqk,ek->ehq", without.probabilities, image[:, :seen])
            real = without.real[:, None, :, None].float()
            total += (torch.stack([moved, on_image], dim=-1) * real).sum(2)
            count += real.sum(2)
        return total / count
