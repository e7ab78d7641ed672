"""Decoder layers called by themselves, outside the model's own loop.

``call_layer(...)``          what a layer gives to the next
``KeysKnown``                how a last layer is stopped once its keys and values are known
``outside_inference(...)``   what was computed in inference mode, as a pass with gradients can use it
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KeysKnown", "call_layer", "outside_inference"]


class KeysKnown(Exception):
    """Raised inside the last layer once its keys and values are known."""


def call_layer(layer, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """What a decoder layer, called by itself, gives to the next."""
    output = layer(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def outside_inference(value: Any) -> Any:
    """Tensors of inference mode copied, in containers too: they cannot be part of a graph, their copies can."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, list | tuple):
        return type(value)(map(outside_inference, value))
    if isinstance(value, dict):
        return {name: outside_inference(one) for name, one in value.items()}
    return value
