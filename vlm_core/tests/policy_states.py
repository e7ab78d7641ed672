"""Random states for policies, without a model.

``seen_of(...)``      what a policy sees: an image between a preamble and a question, random streams, queries and keys
``permuted(...)``     the same with the image tokens' contents in another order
``attention_of(...)`` the attention that it stands for, in plain loops
``drawn_gate(...)``   a gate that nobody trained
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from vlm_core.interventions.policy import Seen, Visual
from vlm_core.interventions.sources import GateWeights
from vlm_core.reduction import LearnedGate
from vlm_core.seam.views import AttentionView, Tokens

N_PREAMBLE = 2


def seen_of(
    n: int,
    n_question: int = 5,
    hidden: int = 8,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    seed: int = 0,
    layer: int = 2,
    item: int = 0,
    visual: Visual | None = None,
) -> Seen:
    """A prompt with ``n`` image tokens, all of them candidates; the layer before attends causally."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    length = N_PREAMBLE + n + n_question
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, N_PREAMBLE : N_PREAMBLE + n] = True
    query, key = (normal(1, count, length, head_dim) for count in (heads, kv_heads))
    tokens = Tokens(image, torch.ones_like(image), torch.zeros(1, dtype=torch.long))
    output = torch.zeros(1, length, heads, head_dim)
    before, unrotated = (
        AttentionView(layer - 1, one, key, key, output, None, head_dim**-0.5, None, tokens)
        for one in (query, normal(*query.shape))
    )
    return Seen(
        layer=layer,
        stream=normal(length, hidden),
        candidates=image[0].nonzero()[:, 0],
        question=torch.arange(N_PREAMBLE + n, length),
        ordinals=torch.arange(n),
        n_started=n,
        item=item,
        before=before if layer else None,
        unrotated=unrotated if layer else None,
        visual=visual,
    )


def permuted(seen: Seen, order: torch.Tensor) -> Seen:
    """Candidate ``i`` has what candidate ``order[i]`` had: its stream, its keys in the layer before, its place and what the tower saw."""
    stream = seen.stream.clone()
    stream[seen.candidates] = seen.stream[seen.candidates][order]
    views = []
    for view in (seen.before, seen.unrotated):
        key = view.key.clone()
        key[:, :, seen.candidates] = view.key[:, :, seen.candidates[order]]
        views.append(replace(view, key=key, _kept={}))
    return replace(
        seen, stream=stream, ordinals=seen.ordinals[order], sizes=seen.sizes[order], before=views[0], unrotated=views[1], _kept={}
    )


def attention_of(view: AttentionView, head: int, query: int) -> list[float]:
    """Attention of one query of one head on all tokens, in plain loops."""
    shared = view.query.shape[1] // view.key.shape[1]
    one = view.query[0, head, query].tolist()
    scores = []
    for token in range(query + 1):
        key = view.key[0, head // shared, token].tolist()
        scores.append(sum(a * b for a, b in zip(one, key, strict=True)) * view.scaling)
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights] + [0.0] * (view.key.shape[2] - query - 1)


def same_tokens(policy, n: int, keep: int, seed: int, visual: Visual | None = None) -> bool:
    """Whether permuting the candidates permutes the choice, and what the tokens that stay carry."""
    seen = seen_of(n, seed=seed, visual=visual)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    plain, other = policy.choose(seen, keep), policy.choose(permuted(seen, order), keep)
    if sorted(order[other.kept].tolist()) != plain.kept.tolist():
        return False
    if plain.mix is None:
        return other.mix is None
    # Row of each token that stays, columns of all candidates, as they were before.
    mix = torch.zeros_like(other.mix)
    mix[:, order] = other.mix
    return torch.allclose(mix[order[other.kept].argsort()], plain.mix, atol=1e-6)


def drawn_gate(hidden: int, width: int = 5, seed: int = 0) -> LearnedGate:
    """A gate of random weights that belongs to no subject."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token": (width, hidden), "question": (width, hidden), "bias": (width,), "out": (width,), "direct": (hidden,)}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return LearnedGate(GateWeights(**weights, subject=torch.zeros(0, hidden)))
