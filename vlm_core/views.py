"""What can be seen of a batch at some layer.

``Tokens``           which token is what, and where it comes from
``AttentionView``    one attention, for observers
``LayerView``        the residual stream that enters a layer, for observers
``query_probabilities``    attention of a few queries, without the whole map
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

__all__ = ["AttentionView", "LayerView", "Tokens", "query_probabilities"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens a batch holds at some layer.

    Parameters
    ----------
    image, valid : BoolTensor ``[element, token]``
        Image tokens; tokens that are neither padding nor dropped.
    rows : LongTensor ``[element]``
        A row that each element stands for.
    source : LongTensor ``[element]`` or None
        Sequence of the incoming batch that each element comes from; None where it is the same.
    index : LongTensor ``[element, token]`` or None
        Original position of each token; None where nothing was dropped.
    left : bool
        Whether rows are filled up on the left.
    """

    image: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    source: torch.Tensor | None = None
    index: torch.Tensor | None = None
    left: bool = False

    @property
    def last(self) -> torch.Tensor:
        """Index of the last valid token, ``[element]``."""
        n = self.valid.shape[1]
        return n - 1 - self.valid.flip(1).int().argmax(1)

    def group(self, name: str) -> torch.Tensor:
        """Members of a token group, ``[element, token]``."""
        if name == "image":
            return self.image & self.valid
        if name == "text":
            return self.valid & ~self.image
        if name == "all":
            return self.valid
        where = self.last if name == "last" else self.valid.int().argmax(1)
        return torch.arange(self.valid.shape[1], device=where.device) == where[:, None]

    def extended(self, length: int) -> Tokens:
        """The same with generated text tokens appended up to ``length``."""
        extra = length - self.valid.shape[1]
        pad = nn.functional.pad
        return self if extra == 0 else replace(
            self, image=pad(self.image, (0, extra)), valid=pad(self.valid, (0, extra), value=True), index=None
        )


@dataclass(frozen=True, eq=False)
class AttentionView:
    """What an observer sees inside one attention: tensors after interventions.

    ``query`` ``[element, head, query, head_dim]``; ``key``, ``value`` ``[element, kv head, key, head_dim]``;
    ``output`` ``[element, query, head, head_dim]`` before the output projection.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    tokens: Tokens

    def probabilities(self, queries: torch.Tensor) -> torch.Tensor:
        """Attention of the queries at ``[element, n]``: ``[element, head, n, key]``."""
        return query_probabilities(
            self.query, self.key, self.mask, self.scaling, queries, self.tokens.valid, self.softcap
        )


@dataclass(frozen=True, eq=False)
class LayerView:
    """The residual stream ``hidden`` ``[element, token, hidden]`` that enters ``layer`` (or the final norm)."""

    layer: int
    hidden: torch.Tensor
    tokens: Tokens


def query_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    queries: torch.Tensor,
    valid: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention probabilities of a few queries only, ``[element, head, n, key]``.

    Parameters
    ----------
    queries : LongTensor ``[element, n]``
        Query positions. The whole ``[query, key]`` map is never built.
    """
    n_heads, n_queries, n_keys = query.shape[1], query.shape[2], key.shape[2]
    picked = torch.take_along_dim(query, queries[:, None, :, None], dim=2).float()
    key = key.float()
    if key.shape[1] != n_heads:
        key = key.repeat_interleave(n_heads // key.shape[1], dim=1)
    scores = picked @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        positions = torch.arange(n_keys, device=key.device)
        allowed = positions <= (queries + n_keys - n_queries)[:, None, :, None]
    else:
        mask = mask.expand(query.shape[0], -1, -1, -1)
        allowed = torch.take_along_dim(mask, queries[:, None, :, None], dim=2)
        if allowed.dtype != torch.bool:
            allowed = allowed > torch.finfo(allowed.dtype).min / 2
    allowed = allowed & valid[:, None, None, :]
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
