"""Token merging: which image tokens become one, and what.

``merge_rounds(...)``    bipartite matching with size-weighted means, round by round (ToMe, Bolya et al. 2023)
"""

from __future__ import annotations

import torch

__all__ = ["merge_rounds"]


def merge_rounds(
    hidden: torch.Tensor, compared: torch.Tensor, sizes: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge tokens until ``keep`` are left; see ``MergeTokens`` for the definition.

    Parameters
    ----------
    hidden : Tensor ``[token, hidden]``
    compared : Tensor ``[token, size]``
        What similarity is read from.
    sizes : Tensor ``[token]``
        How many original tokens each stands for.
    keep : int
        At least 1.

    Returns
    -------
    left : LongTensor ``[keep]``
        Tokens that are left, in order.
    hidden, sizes
        Of all tokens; only those of ``left`` mean anything.
    """
    values = torch.cat([hidden.float(), compared.float()], dim=1)
    sizes = sizes.float().clone()
    left = torch.arange(hidden.shape[0], device=hidden.device)
    while len(left) > keep:
        even, odd = left[0::2], left[1::2]
        unit = torch.nn.functional.normalize(values[:, hidden.shape[1] :], dim=1)
        similarity = unit[even] @ unit[odd].T
        target = similarity.argmax(1)
        best = similarity.gather(1, target[:, None])[:, 0]
        gone = best.argsort(descending=True, stable=True)[: min(len(left) - keep, len(even))]
        source, target = even[gone], odd[target[gone]]
        weighted = values * sizes[:, None]
        weighted = weighted.index_add(0, target, weighted[source])
        sizes = sizes.index_add(0, target, sizes[source])
        changed = torch.zeros(len(values), 1, dtype=torch.bool, device=left.device).index_fill(0, target, True)
        values = torch.where(changed, weighted / sizes[:, None], values)
        left = left[~torch.isin(left, source)]
    return left, values[:, : hidden.shape[1]].to(hidden.dtype), sizes
