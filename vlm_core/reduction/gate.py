"""A learned gate: image tokens ranked by a small scorer that was trained on one subject.

``LearnedGate``       the policy
``gate_scores(...)``  its scorer
``marks(...)``        by what a gate knows its subject again

``vlm_core.reduction.gate_training`` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.declaration import require_kind
from vlm_core.interventions.policy import Ranked, Seen
from vlm_core.interventions.sources import GateWeights
from vlm_core.placement import home, present
from vlm_core.quantization import as_matrix

__all__ = ["LearnedGate", "gate_scores", "marks"]

_MARKS = 4
_ALIKE = 0.99
"""Cosine of a subject's marks with themselves in another precision, at least."""


@dataclass(frozen=True, eq=False)
class LearnedGate(Ranked):
    """Keep the image tokens with the highest scores of a trained scorer.

    The scorer sees each token's residual stream and the question's mean one before the layer, see ``gate_scores``. A gate belongs to the
    subject that it was trained on; it is meant for the layer and fraction that it was trained at, and ranks tokens anywhere.

    Parameters
    ----------
    weights : GateWeights
        What training found (``vlm_core.reduction.gate_training.train_gate``).
    """

    weights: GateWeights
    name: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        require_kind(self.weights, (GateWeights,), "weights of a learned gate")
        self._seal()

    def scores(self, seen: Seen) -> torch.Tensor:
        """The scorer's, ``[candidate]``."""
        tensors = (getattr(self.weights, name) for name in ("token", "question", "bias", "out", "direct"))
        return gate_scores([one.to(seen.stream.device, torch.float32) for one in tensors], seen.hidden, seen.asked)

    def require_possible(self, anatomy: Anatomy) -> None:
        """Refuse a model that the gate was not trained on.

        Raises
        ------
        ValueError
        """
        trained, weights = self.weights.hidden_size, self.weights
        if trained != anatomy.hidden_size:
            raise ValueError(
                f"policy {self.describe()} was trained on residual streams of {trained} numbers, this model's have {anatomy.hidden_size}: "
                f"train one on this subject"
            )
        if not len(weights.subject):
            return
        own, known = marks(anatomy), weights.subject.float().cpu()
        if own.shape != known.shape or not float(torch.nn.functional.cosine_similarity(own.flatten(), known.flatten(), dim=0)) > _ALIKE:
            raise ValueError(f"policy {self.describe()} was trained on another model than this one: train one on this subject")


def gate_scores(weights: Sequence[torch.Tensor], tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """``gelu(token x + question q + bias) . out + direct . x`` of each token, ``[token]``, differentiable.

    Parameters
    ----------
    weights : token, question ``[width, hidden]``, bias, out ``[width]``, direct ``[hidden]``
    tokens : Tensor ``[token, hidden]``
        Residual streams; ``x`` is what is left of each without the mean of all, scaled to a root mean square of 1.
    asked : Tensor ``[token of the question, hidden]``
        Whose mean, scaled alike, is ``q``; zeros for a prompt without a question.
    """
    token, question, bias, out, direct = weights
    x = _scaled(tokens - tokens.mean(0))
    q = _scaled(asked.mean(0)) if len(asked) else torch.zeros_like(tokens[0])
    return torch.nn.functional.gelu(x @ token.T + question @ q + bias) @ out + x @ direct


def _scaled(stream: torch.Tensor) -> torch.Tensor:
    return stream * (stream.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def marks(anatomy: Anatomy) -> torch.Tensor:
    """Embeddings of a few tokens from all over the vocabulary, and what one number of a head writes in each layer; ``[mark, hidden]``.

    Each is of length 1, so that no layer outweighs the others.
    """
    with torch.no_grad():
        with present(anatomy.embedding):
            weight = anatomy.embedding.weight
            rows = [(2 * number + 1) * weight.shape[0] // (2 * _MARKS) for number in range(_MARKS)]
            found = [*weight[rows].float().cpu()]
        for layer in range(anatomy.n_layers):
            projection = anatomy.output_projection(layer)
            with present(projection):
                first = torch.eye(1, anatomy.n_heads * anatomy.head_dim, dtype=weight.dtype, device=home(projection))
                found.append(as_matrix(projection, first)[0].float().cpu())
        return torch.nn.functional.normalize(torch.stack(found), dim=1)
