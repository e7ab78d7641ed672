"""Which tokens of a batch an intervention names.

``Positioned``    the layout of the incoming batch; finds groups and positions again at any layer, however short the sequence is there
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn.functional import pad

from vlm_core.interventions import Intervention, Positions
from vlm_core.seam.views import GROUPS, Tokens

__all__ = ["Positioned"]


class Positioned:
    """Tokens by name or by position in the prompt.

    Parameters
    ----------
    tokens : Tokens
        The incoming batch, one element per sequence.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    @cached_property
    def first(self) -> torch.Tensor:
        """Where each prompt begins, ``[element]``."""
        return self.tokens.start

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Tokens of each prompt, ``[element]``."""
        return self.tokens.prompt.sum(1)

    def check(
        self, named: Sequence[frozenset[Positions]], sequences: Sequence[int], on_image: Sequence[Intervention | None] = ()
    ) -> None:
        """Refuse what the batch does not have: ``named`` per row, ``sequences`` the rows' sequences.

        Parameters
        ----------
        on_image : sequence, one per row, optional
            An intervention of the row that is nothing without image tokens, or None.

        Raises
        ------
        ValueError
            For an unknown group, a position outside the row's prompt, or a prompt that has not the image tokens that it needs.
        """
        if any(part is not None for part in on_image):
            shown = self.tokens.group("image").any(1).tolist()
            for part, sequence in zip(on_image, sequences, strict=True):
                if part is not None and not shown[sequence]:
                    raise ValueError(
                        f"{part.describe()} is done to image tokens and prompt {sequence} of the batch has none: give that row None or what text "
                        f"has too (ZeroHeads, Steer on 'text'), or the prompt an image"
                    )
        for group in {group for positions in named for group in positions if isinstance(group, str)} - set(GROUPS):
            self.tokens.group(group)
        lengths = None
        for positions, sequence in zip(named, sequences, strict=True):
            for position in (one for group in positions if isinstance(group, tuple) for one in group):
                lengths = self.lengths.tolist() if lengths is None else lengths
                if not -lengths[sequence] <= position < lengths[sequence]:
                    raise ValueError(
                        f"position {position} lies outside the prompt of {lengths[sequence]} tokens: positions count "
                        f"from its first token, padding left out, negative ones from its end"
                    )

    def original(self, tokens: Tokens) -> torch.Tensor:
        """Where each token was in the incoming batch, ``[element or 1, token]``."""
        if tokens.index is not None:
            return tokens.index
        return torch.arange(tokens.valid.shape[1], device=tokens.valid.device)[None]

    def members(self, tokens: Tokens, positions: Positions, length: int | None = None) -> torch.Tensor:
        """Members at a layer, ``[element, token]``; with ``length``, the tokens generated up to there included."""
        length = tokens.valid.shape[1] if length is None else length
        if isinstance(positions, str):
            return tokens.extended(length).group(positions)
        device = tokens.valid.device
        first, lengths = self.first.to(device), self.lengths.to(device)
        if tokens.source is not None:
            first, lengths = first[tokens.source], lengths[tokens.source]
        wanted = torch.tensor(positions, device=device)
        wanted = torch.where(wanted < 0, lengths[:, None] + wanted, wanted[None]) + first[:, None]
        found = (self.original(tokens)[:, :, None] == wanted[:, None, :]).any(2) & tokens.valid
        return pad(found, (0, length - found.shape[1]))

    def columns(self, positions: Positions, sequence: int) -> torch.Tensor:
        """Columns of the incoming batch that ``positions`` name in the prompt of one sequence, in order; no answer's."""
        return (self.members(self.tokens, positions) & self.tokens.prompt)[sequence].nonzero()[:, 0]
