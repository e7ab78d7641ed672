"""Attention without its leaning to a position, and tokens from everywhere (after FEATHER, Endo et al. 2024, arXiv:2412.13180).

``Debiased``    attention without rotary positions, combined with evenly spaced tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.interventions.numeric import real
from vlm_core.interventions.policy import Choice, Policy, Seen
from vlm_core.reduction.baselines import spaced

__all__ = ["Debiased"]


@dataclass(frozen=True, eq=False)
class Debiased(Policy):
    """Keep evenly spaced tokens, and of the others those that the last token would attend to most if all stood at one position.

    Parameters
    ----------
    uniform : float
        Share of the tokens that stay which are evenly spaced in sequence order, in [0, 1], rounded to whole tokens.

    Notes
    -----
    Rotary positions draw the attention of early layers to tokens close to the question, the bottom rows of the image. A reconstruction with
    an exact budget: the published run keeps 0.3 of the tokens by attention and those of every third row and column beside them, together
    at most 0.41, of which 0.27 are evenly spaced; tokens that both name are kept once, so its count varies. It prunes again, to the square
    of 0.3, at a later layer: several ``DropTokens`` in one row. Evenly spaced tokens depend on the order, those by attention do not
    where no two are alike.
    """

    uniform: float = 0.25
    name: ClassVar[str] = "debiased"
    reads: ClassVar[frozenset[str]] = frozenset({"unrotated"})

    def __post_init__(self) -> None:
        uniform = real(self.uniform, "uniform")
        if not 0.0 <= uniform <= 1.0:
            raise ValueError(f"uniform must be a share between 0 and 1, got {uniform}")
        self._seal(uniform=uniform)

    def choose(self, seen: Seen, keep: int) -> Choice:
        """Evenly spaced tokens, then those attended to most."""
        scores = seen.attention("last", rotary=False)[0].clone()
        if n_uniform := round(self.uniform * keep):
            scores[spaced(len(seen), n_uniform).to(scores.device)] = torch.inf
        return Choice(scores.argsort(descending=True, stable=True)[:keep].sort().values)
