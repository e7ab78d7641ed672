"""Which image tokens stay when tokens are dropped, and the shorter sequence that is left.

``kept_pattern(...)``         random and stride: a boolean pattern over an item's image tokens
``kept_image_tokens(...)``    every policy, for a whole batch
``branched(...)``             the tokens of a batch whose rows were gathered anew
``shortened(...)``            the tokens that stay, side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from vlm_core.interventions import DropTokens
from vlm_core.seam.views import Tokens

__all__ = ["branched", "kept_image_tokens", "kept_pattern", "shortened"]


@lru_cache(maxsize=65536)
def kept_pattern(policy: str, seed: int, item: int, n: int, k: int) -> np.ndarray:
    """Which ``k`` of an item's ``n`` image tokens stay, ``[image token]`` boolean, for ``random`` and ``stride``."""
    pattern = np.zeros(n, dtype=bool)
    if policy == "stride":
        pattern[((np.arange(k) + 0.5) * n / k).astype(int)] = True
    else:
        # Nested: with one seed, an item's smaller subsets lie inside its larger ones.
        pattern[np.random.default_rng((seed, item)).permutation(n)[:k]] = True
    return pattern


def kept_image_tokens(
    candidates: torch.Tensor,
    drops: Sequence[DropTokens | None],
    n_image: Sequence[int],
    items: Sequence[int],
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens that stay, ``[element, token]`` (arbitrary at tokens that are no candidates).

    Parameters
    ----------
    candidates : BoolTensor ``[element, token]``
        Image tokens that may be dropped.
    drops : one per element
    n_image : sequence of int
        Candidates that each element started with: what ``keep`` is a fraction of.
    items : sequence of int
        Seeds of random choices.
    scores : Tensor ``[element, token]``, optional
        Attention on every token in the layer before, for ``policy="attention"``.
    """
    present = candidates.sum(1).tolist()
    patterns = np.ones((len(drops), max(1, *present)), dtype=bool)
    ranked = {}
    for element, (drop, n) in enumerate(zip(drops, present, strict=True)):
        if drop is None:
            continue
        k = min(drop.count(n_image[element]), n)
        if drop.policy == "attention" and 0 < k < n:
            ranked[element] = k
        elif k < n:
            patterns[element] = False
            if k:
                patterns[element, :n] = kept_pattern(drop.policy, drop.seed, items[element], n, k)
    ordinal = (candidates.long().cumsum(1) - 1).clamp(min=0)
    kept = torch.as_tensor(patterns, device=ordinal.device).gather(1, ordinal)
    if ranked:
        chosen = torch.tensor(list(ranked), device=kept.device)
        masked = scores.to(kept.device)[chosen].masked_fill(~candidates[chosen], -torch.inf)
        ranks = masked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept[chosen] = ranks < torch.tensor(list(ranked.values()), device=kept.device)[:, None]
    return kept


def branched(tokens: Tokens, gather: torch.Tensor, rows: torch.Tensor) -> Tokens:
    """The tokens of elements ``gather``, standing for ``rows``."""
    return replace(
        tokens,
        image=tokens.image[gather],
        valid=tokens.valid[gather],
        rows=rows,
        source=gather if tokens.source is None else tokens.source[gather],
        index=None if tokens.index is None else tokens.index[gather],
        begun=None if tokens.begun is None else tokens.begun[gather],
        named={name: members[gather] for name, members in tokens.named.items()},
    )


def shortened(tokens: Tokens, kept: torch.Tensor) -> tuple[Tokens, torch.Tensor]:
    """The tokens ``kept``, and where they were, ``[element, token]``.

    Elements that lost more tokens than others are filled up on the side of ``tokens.left``.
    """
    length = int(kept.sum(1).max())
    if tokens.left:
        order = kept.int().argsort(dim=1, stable=True)[:, kept.shape[1] - length :]
    else:
        order = (~kept).int().argsort(dim=1, stable=True)[:, :length]
    # The question stays what it is when no image token is left before it.
    tokens = tokens.pinned()
    shorter = replace(
        tokens,
        image=(tokens.image & kept).gather(1, order),
        valid=kept.gather(1, order),
        index=order if tokens.index is None else tokens.index.gather(1, order),
        begun=tokens.start,
        named={name: members.gather(1, order) for name, members in tokens.named.items()},
    )
    return shorter, order
