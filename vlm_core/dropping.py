"""Which image tokens stay when tokens are dropped.

``kept_pattern(...)``         random and stride: a boolean pattern over an item's image tokens
``kept_image_tokens(...)``    every policy, for a whole batch
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from vlm_core.interventions import DropTokens
from vlm_core.views import Tokens

__all__ = ["kept_image_tokens", "kept_pattern"]


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
    tokens: Tokens,
    drops: Sequence[DropTokens | None],
    n_image: Sequence[int],
    items: Sequence[int],
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image tokens that stay, ``[element, token]`` (arbitrary at other tokens).

    Parameters
    ----------
    drops : one per element
    n_image : sequence of int
        Image tokens that each element started with: what ``keep`` is a fraction of.
    items : sequence of int
        Seeds of random choices.
    scores : Tensor ``[element, token]``, optional
        Attention on every token in the layer before, for ``policy="attention"``.
    """
    present = tokens.image.sum(1).tolist()
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
    ordinal = (tokens.image.long().cumsum(1) - 1).clamp(min=0)
    kept = torch.as_tensor(patterns, device=ordinal.device).gather(1, ordinal)
    if ranked:
        chosen = torch.tensor(list(ranked), device=kept.device)
        masked = scores[chosen].masked_fill(~tokens.image[chosen], -torch.inf)
        ranks = masked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept[chosen] = ranks < torch.tensor(list(ranked.values()), device=kept.device)[:, None]
    return kept
