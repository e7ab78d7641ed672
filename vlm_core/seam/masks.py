"""Attention masks, boolean or additive, and what happens to them when rows branch off and sequences get shorter.

A boolean mask (sdpa) says what may be seen, an additive one (eager) what is taken away: writing False into the latter unblocks.
No mask at all means causal under sdpa.
"""

from __future__ import annotations

import torch

from vlm_core.seam.views import Tokens

__all__ = ["additive", "blind", "block", "causal_mask", "select", "select_mask", "windowed"]


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """What no mask stands for, ``[1, 1, query, key]`` boolean."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)[None, None]


def block(mask: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """``mask`` with ``edges`` cut; both broadcast to ``[element, head, query, key]``."""
    if mask.dtype == torch.bool:
        return mask & ~edges
    return mask.expand(torch.broadcast_shapes(mask.shape, edges.shape)).masked_fill(edges, torch.finfo(mask.dtype).min)


def blind(mask: torch.Tensor) -> torch.Tensor:
    """Queries that no key is left for, ``[element, 1 or head, query]``."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return ~allowed.any(-1)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``mask`` as an additive one."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def select(tensor: torch.Tensor, tokens: Tokens, token_dim: int) -> torch.Tensor:
    """A per-token input (rotary embeddings, position ids) for the elements and tokens that are left.

    Parameters
    ----------
    token_dim : int
        Negative; rows are the dimension before it.
    """
    row_dim, token_dim = tensor.ndim + token_dim - 1, tensor.ndim + token_dim
    if tokens.source is not None and tensor.shape[row_dim] > 1:
        tensor = tensor.index_select(row_dim, tokens.source)
    index = tokens.index
    if index is None:
        return tensor
    if tensor.shape[row_dim] == 1:
        tensor = tensor.expand(*tensor.shape[:row_dim], index.shape[0], *tensor.shape[row_dim + 1 :])
    shape = [1] * tensor.ndim
    shape[row_dim], shape[token_dim] = index.shape
    return torch.take_along_dim(tensor, index.view(shape), dim=token_dim)


def select_mask(mask: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The model's own mask for the elements and tokens that are left, ``[element, 1, query, key]``."""
    if tokens.source is not None and mask.shape[0] > 1:
        mask = mask[tokens.source]
    index = tokens.index
    if index is None:
        return mask
    mask = mask.expand(index.shape[0], -1, -1, -1)
    mask = torch.take_along_dim(mask, index[:, None, :, None], dim=2)
    mask = torch.take_along_dim(mask, index[:, None, None, :], dim=3)
    return block(mask, ~tokens.valid[:, None, None, :])


def windowed(valid: torch.Tensor, columns: torch.Tensor, window: int) -> torch.Tensor:
    """Keys that the newest token sees through a sliding window, ``[element, key]``.

    Parameters
    ----------
    valid, columns : ``[element, key]``
        Real keys; where each was in the unshortened sequence, the newest token last.
    """
    return valid & (columns > columns[:, -1:] - window)
