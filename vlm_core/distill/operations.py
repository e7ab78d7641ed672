"""Floating-point operations of training, by formula.

``Operations(subject)``   of a language model's passes with and without gradients

Counted as `vlm_core.reduction.costs.prefill_flops` counts (two a multiply-add; linear maps, products of queries and keys and of weights
and values, the unembedding of tokens that are read). Going back through a linear map takes as many again for the gradient of what goes
into it, where anything before it trains, and as many for the gradient of its weights, where they train: three times the forward pass where
everything trains. Passes are whole ones, whatever of them need not be computed (`vlm_core.distill.last_layer`). Padding does not count, nor do
recomputed activations, the vision tower (it is frozen, and sees each picture once), the projector and the optimiser.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from vlm_core.interventions import Row
from vlm_core.reduction.costs import layer_lengths
from vlm_core.subjects.subject import Subject

__all__ = ["Operations"]


class Operations:
    """Operations of one language model, as its weights train or do not when this is made.

    Parameters
    ----------
    subject : Subject
    row : Row
        The reduction in force.
    """

    def __init__(self, subject: Subject, row: Row = None) -> None:
        self._anatomy, self._row = subject.anatomy, row
        self._layers = [_Layer.of(subject, layer) for layer in range(subject.anatomy.n_layers)]
        below = _trains(subject.anatomy.embedding) or _inputs_train(subject)
        for layer in self._layers:
            layer.below, below = below, below or layer.trains
        head = subject.anatomy.head.weight
        self._read = [2 * head.numel() * (1 + gradients * (int(below) + int(head.requires_grad))) for gradients in (0, 1)]
        self.sequence, self.continuation = cache(self._sequence), cache(self._continuation)

    def rows(self, ids: torch.Tensor, valid: torch.Tensor, read: torch.Tensor, gradients: bool = True) -> int:
        """Of padded sequences.

        Parameters
        ----------
        ids, valid : Tensor ``[row, token]``
        read : Tensor ``[row]``
            Tokens whose logits are computed.
        """
        real = valid.bool()
        image = ((ids == self._anatomy.image_token_id) & real).sum(1).tolist()
        every = zip(real.sum(1).tolist(), image, read.tolist(), strict=True)
        return sum(self.sequence(tokens, pictured, asked, gradients) for tokens, pictured, asked in every)

    def _sequence(self, tokens: int, image: int, read: int, gradients: bool = True) -> int:
        """Of one sequence of so many tokens, image tokens among them."""
        lengths = layer_lengths(self._row, tokens, image, len(self._layers))
        return self._passed([(n, n) for n in lengths], gradients) + read * self._read[gradients]

    def _continuation(self, tokens: int, past: int, image: int, read: int, gradients: bool = True) -> int:
        """Of so many tokens more, after a sequence of ``past`` tokens whose keys and values are known."""
        lengths = layer_lengths(self._row, past, image, len(self._layers))
        return self._passed([(tokens, n + tokens) for n in lengths], gradients) + read * self._read[gradients]

    def _passed(self, pairs: list[tuple[int, int]], gradients: bool) -> int:
        width = self._anatomy.n_heads * self._anatomy.head_dim
        total = 0
        for layer, (queries, keys) in zip(self._layers, pairs, strict=True):
            linear, attention = layer.factors(gradients)
            total += 2 * queries * linear + 4 * width * queries * keys * attention
        return total


class _Layer:
    """Linear maps of a decoder layer: weights, those that train, and those that come after what trains."""

    def __init__(self, read: list[nn.Linear], rest: list[nn.Linear], adapters: list[nn.Linear]) -> None:
        self._maps = [
            (one.weight.numel(), one.weight.requires_grad, later) for later, some in enumerate((read, rest, adapters)) for one in some
        ]
        self._entrance_trains = any(one.weight.requires_grad for one in (*read, *adapters))
        self.trains = any(trains for _, trains, _ in self._maps)
        self.below = False

    @classmethod
    def of(cls, subject: Subject, layer: int) -> _Layer:
        """``read`` are maps whose input is the layer's, ``adapters`` the second halves of low-rank adapters on those."""
        anatomy = subject.anatomy
        attention = anatomy.attentions[layer]
        after = set(map(id, anatomy.output_projection(layer).modules()))
        inside = {id(one): name for name, one in attention.named_modules()}
        kinds: dict[str, list[nn.Linear]] = {"read": [], "rest": [], "adapters": []}
        for one in anatomy.layers[layer].modules():
            if isinstance(one, nn.Linear):
                name = inside.get(id(one))
                kind = "rest" if name is None or id(one) in after else "adapters" if ".lora_B." in name else "read"
                kinds[kind].append(one)
        return cls(**kinds)

    def factors(self, gradients: bool) -> tuple[int, int]:
        """Weights times passes over them, and passes over the products of attention."""
        if not gradients:
            return sum(n for n, *_ in self._maps), 1
        comes = {0: self.below, 1: self.below or self._entrance_trains, 2: self.below or self._entrance_trains}
        return sum(n * (1 + int(comes[later]) + int(trains)) for n, trains, later in self._maps), 3 if comes[1] else 1


def _trains(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


def _inputs_train(subject: Subject) -> bool:
    """Whether anything between the vision tower and the language model trains."""
    inside = set(map(id, subject.anatomy.language_model.parameters()))
    return any(weight.requires_grad for weight in subject.anatomy.base.parameters() if id(weight) not in inside)
