"""Decoder layers called by themselves, outside the model's own loop.

``call_layer(...)``   what a layer gives to the next
``KeysKnown``         how a last layer is stopped once its keys and values are known
"""

from __future__ import annotations

import torch

__all__ = ["KeysKnown", "call_layer"]


class KeysKnown(Exception):
    """Raised inside the last layer once its keys and values are known."""


def call_layer(layer, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """What a decoder layer, called by itself, gives to the next."""
    output = layer(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output
