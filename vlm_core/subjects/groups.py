"""Token groups that a caller names ("object", "background"), beside those that every prompt has.

``Groups``        what callers pass: ``groups(item, prompt)`` gives an item's groups by name
``grouped``       prompts with the groups that such a callable gives them
``with_groups``   one prompt with groups of its own

A group is one boolean per token of the prompt. Positions, weights and masks of another length are refused, not coerced: as booleans
they would name other tokens than was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlm_core.items import item_field
from vlm_core.seam.views import GROUPS
from vlm_core.subjects.embed import Encoded

__all__ = ["Groups", "grouped", "with_groups"]

Groups = Callable[[Any, Encoded], Mapping[str, np.ndarray] | None]
"""From (item, prompt) to token groups by name, boolean arrays ``[token]``; None for none.

The prompt has ``ids``, ``image`` and a length. It is an ``Encoded`` where a model has run, in a sweep its tokens alone
(``vlm_core.sweeps.features.Prompt``).
"""


def grouped(encoded: Sequence[Encoded], items: Sequence, groups: Groups | None) -> list[Encoded]:
    """The prompts of ``items`` with what ``groups`` names in each of them.

    Raises
    ------
    ValueError
        See ``with_groups``; the item is named.
    """
    if groups is None:
        return list(encoded)
    return [
        with_groups(one, groups(item, one) or {}, f"item {item_field(item, 'id')!r}") for one, item in zip(encoded, items, strict=True)
    ]


def with_groups(encoded: Encoded, named: Mapping[str, np.ndarray | torch.Tensor], whose: str = "a prompt") -> Encoded:
    """The same prompt with more token groups.

    Parameters
    ----------
    named : mapping of str to bool array or BoolTensor ``[token]``
    whose : str
        What an error calls the prompt.

    Raises
    ------
    ValueError
        For a group that is not one boolean per token, or takes a name of ``vlm_core.seam.views.GROUPS``.
    """
    if not isinstance(named, Mapping):
        raise ValueError(f"token groups of {whose} are a {type(named).__name__}: give a mapping of names to one boolean per token")
    members = {}
    for name, mask in named.items():
        if name in GROUPS:
            raise ValueError(f"token group '{name}' is one that every prompt has: give yours another name")
        mask = mask if isinstance(mask, torch.Tensor) else torch.as_tensor(np.asarray(mask))
        if mask.dtype != torch.bool or tuple(mask.shape) != (len(encoded),):
            raise ValueError(
                f"token group '{name}' of {whose} is {mask.dtype} of shape {tuple(mask.shape)}, its prompt has {len(encoded)} tokens: "
                f"give one boolean per token"
            )
        members[name] = mask.to(encoded.image.device)
    return replace(encoded, groups={**encoded.groups, **members})
