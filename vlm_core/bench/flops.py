"""Arithmetic of a sweep by formula, and what matrix products of the same shape reach.

``sweep_flops(case, prompt, heads, whole)``   what must be computed
``typical_width(widths)``                     at which width a sweep runs
``Products(case, tokens)``                    the decoder's matrix products alone, at one width

A sweep needs the whole prompt once; then, for each intervention, the layers from the touched one on, for the tokens that can change:
those after the image where only text queries are affected, else all. A layer's arithmetic is ``2 x`` its weights for each token and ``4
x`` the attention width for each query and key it sees; of the last layer only keys and values are needed for every token, the rest for
the token that is read. Vision tower, norms, rotation, softmax and scoring are not counted: the share understates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vlm_core import HeadId
from vlm_core.bench.subjects import Case, Prompt

__all__ = ["Products", "sweep_flops", "typical_width"]


def _linear(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def sweep_flops(case: Case, prompt: Prompt, heads: Sequence[HeadId], whole: bool) -> int:
    """Floating-point operations (two a multiply-add) of single-head interventions on one prompt.

    Parameters
    ----------
    whole : bool
        Whether all positions are affected, or only the tokens after the image.
    """
    anatomy = case.subject.anatomy
    n = prompt.embeds.shape[1]
    changed = n if whole else prompt.question
    weights = sum(module.weight.numel() for module in _linear(anatomy.layers[0]))
    key_value = sum(getattr(anatomy.attentions[0], name).weight.numel() for name in ("k_proj", "v_proj"))
    width = anatomy.n_heads * anatomy.head_dim

    def layer(tokens: int) -> int:
        seen = sum(range(n - tokens + 1, n + 1))
        return 2 * tokens * weights + 4 * width * seen

    def last_layer(tokens: int, read: int) -> int:
        return 2 * tokens * key_value + read * (2 * (weights - key_value) + 4 * width * n)

    before = anatomy.n_layers - 1
    once = before * layer(n) + last_layer(n, read=0)
    steps = sum(before - head.layer for head in heads)
    unembedding = 2 * anatomy.head.weight.numel()
    return once + steps * layer(changed) + len(heads) * (last_layer(changed, read=1) + unembedding)


def typical_width(widths: Mapping[int, int], default: int) -> int:
    """The width below and above which half of the multiply-adds lie, from ``{tokens: multiply-adds}``; ``default`` where there are none."""
    half, passed = sum(widths.values()) / 2, 0
    for width in sorted(widths):
        passed += widths[width]
        if passed >= half:
            return width
    return default


class Products:
    """Every linear map of the decoder once, on ``tokens`` random rows: ``run()`` is what there is to reach."""

    def __init__(self, case: Case, tokens: int) -> None:
        self.tokens = tokens
        self.weights = [module.weight for layer in case.subject.anatomy.layers for module in _linear(layer)]
        like = self.weights[0]
        widths = {weight.shape[1] for weight in self.weights}
        self.rows = {width: torch.randn(tokens, width, device=like.device, dtype=like.dtype) for width in widths}
        self.flops = 2 * tokens * sum(weight.numel() for weight in self.weights)

    def run(self, times: int = 1) -> int:
        """Multiply; gives back the floating-point operations done."""
        with torch.inference_mode():
            for _ in range(times):
                for weight in self.weights:
                    nn.functional.linear(self.rows[weight.shape[1]], weight)
        return times * self.flops
