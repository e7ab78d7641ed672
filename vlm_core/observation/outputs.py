"""What heads and layers pass on.

``HeadOutputs``        per-head outputs before the output projection, or their norms
``HiddenStates``       the residual stream
``positions_of``       the tokens that a group's name or numbers stand for

What these say in words is in ``vlm_core.observation.lens``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.observation.declaring import freeze_numbers, require_layers, require_positions
from vlm_core.seam.views import AttentionView, LayerView, Tokens

__all__ = ["HeadOutputs", "HiddenStates", "positions_of"]


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of every head before the output projection.

    ``reduce="last"``: the vector at the last token, ``[item, layer, head, head_dim]``; ``"mean"``: its mean over all
    tokens; ``"norm"``: the mean over all tokens of its length, ``[item, layer, head]``.
    """

    reads_hidden = False

    reduce: str = "last"

    def __post_init__(self) -> None:
        if self.reduce not in ("last", "mean", "norm"):
            raise ValueError(f"reduce must be last, mean or norm, got '{self.reduce}'")

    @property
    def axes(self) -> tuple | None:
        """Head, for norms; vectors are no rows of a table."""
        return (("head", None),) if self.reduce == "norm" else None

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, ...]`` of one layer."""
        if self.reduce == "last":
            return torch.take_along_dim(view.output, view.tokens.last[:, None, None, None], dim=1)[:, 0].float()
        output = view.output.float()
        weight = view.tokens.valid[:, :, None].float()
        if self.reduce == "norm":
            return (output.norm(dim=-1) * weight).sum(1) / weight.sum(1)
        return (output * weight[..., None]).sum(1) / weight[..., None].sum(1)


@dataclass(frozen=True)
class HiddenStates:
    """The residual stream that enters each layer; index ``n_layers`` is what enters the final norm.

    Parameters
    ----------
    layers : tuple of int, optional
        Default: every layer, and what enters the final norm.
    positions : str or tuple of int
        ``"last"``, ``"image"``, ``"text"`` or another token group but ``"all"``: the mean over the group's tokens,
        ``[item, layer, hidden]``, NaN where it has none. ``"all"``, ``"image tokens"``, ``"question tokens"``, ...: every token of
        the group, ``[item, layer, token, hidden]``, padded with NaN. Numbers: those valid tokens, negative ones from the end.

    Notes
    -----
    Index ``n_layers`` is *before* the final norm, unlike transformers' ``hidden_states[-1]``: a logit lens norms every
    layer alike, exactly once.
    """

    layers: tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "last"

    def __post_init__(self) -> None:
        freeze_numbers(self, "layers", "positions")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a layer that the model, or positions that the batch does not have."""
        require_layers(self, anatomy)
        if tokens is not None:
            require_positions(self, tokens)

    @property
    def ragged(self) -> dict[int, str]:
        """The token axis, where every token is kept."""
        each = isinstance(self.positions, str) and (self.positions == "all" or self.positions.endswith(" tokens"))
        return {-2: self.positions.removesuffix(" tokens")} if each else {}

    def layer(self, view: LayerView) -> torch.Tensor | None:
        """Hidden states of one layer, None where not asked for."""
        if self.layers is not None and view.layer not in self.layers:
            return None
        where, real = positions_of(view.tokens, self.positions)
        picked = torch.take_along_dim(view.hidden, where[:, :, None], dim=1).float()
        if self.positions == "last":
            return picked[:, 0]
        if self.ragged:
            return picked.masked_fill(~real[:, :, None], torch.nan)
        if not isinstance(self.positions, str):
            return picked
        weight = real[:, :, None].float()
        # 0 / 0 of an empty group is NaN.
        return (picked * weight).sum(1) / weight.sum(1)


def positions_of(tokens: Tokens, positions: str | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[element, n]`` of a group's members (``"image tokens"`` too), or of numbered tokens; which are real.

    Raises
    ------
    ValueError
        Where a sequence has no such token.
    """
    if isinstance(positions, str):
        return tokens.members(positions.removesuffix(" tokens"))
    order, real = tokens.members("all")
    lengths = real.sum(1, keepdim=True)
    wanted = torch.tensor(positions, device=order.device).expand(order.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + lengths, wanted)
    if bool(((wanted < 0) | (wanted >= lengths)).any()):
        raise ValueError(f"positions {positions} lie outside a sequence of {int(lengths.min())} tokens")
    return order.gather(1, wanted), torch.ones_like(wanted, dtype=torch.bool)
