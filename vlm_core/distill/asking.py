"""Floating-point operations of asking a model for data, by formula: what it answers, what it draws, what it scores.

``answering_flops(subject, said)``            of greedy answers
``sampling_flops(subject, drawn)``            of samples
``scoring_flops(subject, items, answers)``    of scores of answers

Counted as `vlm_core.reduction.costs.prefill_flops` counts, of the passes that are made: a prompt once however much is said to it, then a
token at a time with keys and values known, samples that have said the same so far as one. Padding does not count, nor do the vision tower
and the projector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from vlm_core.evaluation import Generated
from vlm_core.identity import picture_digest
from vlm_core.items import item_field, take
from vlm_core.quantization import n_weights
from vlm_core.sampling import Sampled
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.answers import written
from vlm_core.sweeps.branches import Branches
from vlm_core.sweeps.features import Prompt, prompts_of
from vlm_core.sweeps.scoring import CandidateSet, token_set

__all__ = ["answering_flops", "sampling_flops", "scoring_flops"]


class _Passes:
    """Forward passes of a language model, added up."""

    def __init__(self) -> None:
        self.tokens = self.products = self.reads = 0

    def add(self, tokens: int, past: int = 0, reads: int = 1) -> None:
        """Of so many tokens after ``past`` whose keys and values are known; logits of ``reads`` are computed."""
        self.tokens += tokens
        self.products += tokens * (past + tokens)
        self.reads += reads

    def flops(self, subject: Subject) -> int:
        """Their operations."""
        anatomy = subject.anatomy
        linear = sum(n_weights(one) for layer in anatomy.layers for one in layer.modules() if isinstance(one, nn.Linear))
        width = anatomy.n_layers * anatomy.n_heads * anatomy.head_dim
        return 2 * self.tokens * linear + 4 * width * self.products + 2 * self.reads * anatomy.head.weight.numel()


def answering_flops(subject: Subject, said: Sequence[Generated]) -> int:
    """Operations of `vlm_core.evaluation.generated`, by what it gave."""
    passes = _Passes()
    for one in said:
        passes.add(one.prompt)
        for before in range(one.tokens - 1):
            passes.add(1, one.prompt + before)
    return passes.flops(subject)


def sampling_flops(subject: Subject, drawn: Sequence[Sampled]) -> int:
    """Operations of `vlm_core.sampling.sampled`, by what it gave."""
    passes = _Passes()
    for one in drawn:
        passes.add(one.prompt)
        for beginning in {tokens[:n] for tokens in one.tokens for n in range(1, len(tokens))}:
            passes.add(1, one.prompt + len(beginning) - 1)
    return passes.flops(subject)


def scoring_flops(subject: Subject, items: Sequence, answers: Sequence[str]) -> int:
    """Operations of `vlm_core.sweeps.answers.answer_scores`.

    Where several sequences are about one picture, the longest counts whole, and of every question what follows the picture with the tokens
    of all its answers, those that several begin with once; where a family's image tokens see the question, or the picture comes last, every
    sequence counts whole. What the scores leave out of the last layer, where nobody reads, counts all the same: less than a layer's share.

    Parameters
    ----------
    items, answers : sequences
        As many of each; an item may be there several times.
    """
    asked: dict[tuple[str, str], tuple[object, dict[tuple[int, ...], None]]] = {}
    for item, answer in zip(take(items, range(len(items))), answers, strict=True):
        tokens = written(subject, answer)
        if tokens is not None:
            key = picture_digest(item_field(item, "image")), item_field(item, "prompt")
            asked.setdefault(key, (item, {}))[1][tokens] = None
    passes = _Passes()
    together: dict[tuple[str, tuple[int, ...]], list[tuple[int, CandidateSet]]] = {}  # length of the prompt, its answers
    prompts = prompts_of(subject, [item for item, _ in asked.values()])
    for (key, (_, continuations)), prompt in zip(asked.items(), prompts, strict=True):
        wanted, beginning = token_set(list(continuations)), _beginning(subject, prompt)
        if beginning:
            together.setdefault((key[0], tuple(prompt.ids[:beginning].tolist())), []).append((len(prompt), wanted))
            continue
        for row, prefix in enumerate(wanted.prefixes):
            passes.add(len(prompt) + len(prefix), reads=sum(own == row for own, _ in wanted.reads))
    for (_, prefix), questions in together.items():
        lengths = [n + len(answer) for n, wanted in questions for answer in wanted.prefixes]
        if len(lengths) == 1:
            passes.add(lengths[0], reads=len(questions[0][1].reads))
            continue
        passes.add(max(lengths), reads=0)
        for n, wanted in questions:
            passes.add(n - len(prefix) + len(Branches(wanted.prefixes).tokens), len(prefix), len(wanted.reads))
    return passes.flops(subject)


def _beginning(subject: Subject, prompt: Prompt) -> int:
    """Tokens up to the last image token, where they are computed once for all that follows; else 0."""
    image = np.flatnonzero(prompt.image.numpy())
    shared = len(image) and image[-1] < len(prompt) - 1 and "shared_prefix" not in subject.anatomy.family.refusals
    return int(image[-1]) + 1 if shared else 0
