"""Queries and keys without rotary positions.

``unrotated(...)``    what an attention module would attend with if every token stood where the first one stands
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["unrotated"]


class _Known(Exception):
    """Raised inside an attention module once its queries and keys are known: the rest of it need not run."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        super().__init__("queries and keys are known")
        self.found = query, key


class _Asking:
    """What is active while an attention module is asked for queries and keys."""

    def attention_layer(self, module: nn.Module) -> int:
        return 0

    def attend(self, layer, original, module, query, key, *args, **kwargs):
        raise _Known(query, key)


def unrotated(module: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Queries ``[element, head, query, head_dim]`` and keys ``[element, kv head, key, head_dim]``, or None where nothing is rotated.

    The module is asked for them once more, with every token given the rotation of the first: a rotation common to query and key leaves
    their product, so this is attention without rotary positions in any scheme (partial, scaled, multi-axis). They are the model's own:
    image keys that an intervention replaces come after.

    Parameters
    ----------
    module : nn.Module
        An attention module of a language model with a seam.
    args, kwargs
        What it is about to be called with, no cache of earlier tokens among it that counts.
    """
    from vlm_core.seam.seam import active

    rotations = kwargs.get("position_embeddings")
    if rotations is None:
        return None
    if isinstance(rotations, tuple | list):
        one = tuple(part[..., :1, :].expand_as(part) for part in rotations)
    else:
        one = rotations[..., :1, :].expand_as(rotations)
    caches = {name: None for name in ("past_key_values", "past_key_value") if name in kwargs}
    try:
        with torch.no_grad(), active(_Asking()):
            module.forward(*args, **{**kwargs, **caches, "position_embeddings": one})
    except _Known as known:
        return known.found
    raise RuntimeError(f"{type(module).__name__} ran without asking for attention")
