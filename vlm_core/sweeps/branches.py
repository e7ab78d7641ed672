"""Several answers after one prompt, as one sequence in which no answer sees another.

``Branches``   the tokens of some answer prefixes, each token that several begin with once
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

__all__ = ["Branches"]


@dataclass(frozen=True, eq=False)
class Branches:
    """A prompt's answer prefixes, laid out one token after another.

    Parameters
    ----------
    prefixes : tuple of token tuples

    Attributes
    ----------
    tokens : tuple of int
        A prefix's tokens after those that it begins with.
    depths : tuple of int
        How many tokens of its own answer stand before each.
    places : dict of prefix to tuple of int
        Where the tokens of a prefix are among ``tokens``.
    """

    prefixes: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...] = field(init=False)
    depths: tuple[int, ...] = field(init=False)
    places: dict[tuple[int, ...], tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        at: dict[tuple[int, ...], int] = {}
        for prefix in self.prefixes:
            for length in range(1, len(prefix) + 1):
                at.setdefault(prefix[:length], len(at))
        begun = {prefix: tuple(at[prefix[:length]] for length in range(1, len(prefix) + 1)) for prefix in (*at, *self.prefixes)}
        object.__setattr__(self, "tokens", tuple(prefix[-1] for prefix in at))
        object.__setattr__(self, "depths", tuple(len(prefix) - 1 for prefix in at))
        object.__setattr__(self, "places", begun)

    def positions(self, n_prompt: int, start: int, device: torch.device) -> torch.Tensor:
        """Where in its own sequence each token from ``start`` on stands, ``[token]``: those of a prompt of ``n_prompt``, then the answers'."""
        depths = torch.tensor(self.depths, dtype=torch.long, device=device)
        return torch.cat([torch.arange(start, n_prompt, device=device), n_prompt + depths])

    def seen(self, n_prompt: int, device: torch.device) -> torch.Tensor:
        """Which tokens each may see of a prompt of ``n_prompt`` and the answers, ``[token, token]``: the prompt, and of its own answer those before."""
        n = n_prompt + len(self.tokens)
        seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        seen[n_prompt:, n_prompt:] = False
        for places in self.places.values():
            if places:
                seen[n_prompt + places[-1], [n_prompt + place for place in places]] = True
        return seen

    def reads(self, prefix: tuple[int, ...], positions: Iterable[int], n_prompt: int) -> tuple[int, ...]:
        """Where the tokens at ``positions`` of the prompt with ``prefix`` are here."""
        return tuple(at if at < n_prompt else n_prompt + self.places[prefix][at - n_prompt] for at in positions)
