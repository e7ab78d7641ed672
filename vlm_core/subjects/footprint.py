"""Memory that a subject needs, estimated before its weights are read.

``Footprint``                    bytes of the weights and of one prompt in flight
``Footprint.of(checkpoint)``     from its config and the number of its parameters
``require_room(...)``            refuse a subject that does not fit where it is to go
``rows_that_fit(...)``           prompts a batch in what is left once it is loaded
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_core.errors import SubjectError
from vlm_core.memory import free_memory
from vlm_core.subjects.checkpoint import SAFE, Checkpoint

__all__ = ["QUANTIZED_BYTES", "Footprint", "free_on", "require_room", "rows_that_fit"]

QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes a weight of a linear map has under bitsandbytes; NF4 keeps a float32 scale per block of 64."""

_MARGIN = 1.1  # buffers, the largest tensor twice while it is converted
_TEXT_TOKENS = 64  # of a question, its template and its answer
_IMAGE_TOKENS = 576  # where a config does not say: 24 x 24
_TILES = 4  # that a square picture is cut into, beside the whole
_SHARE = 0.5  # of what is free, for a batch in flight: the rest is for what is recorded


@dataclass(frozen=True)
class Footprint:
    """Bytes that a subject takes.

    Parameters
    ----------
    n_parameters : int
    weights : int
        Of all weights.
    prompt : int
        Of one prompt in flight: keys and values of every layer, what one layer computes with, and the logits.
    n_tokens : int
        Tokens of that prompt, an estimate.
    """

    n_parameters: int
    weights: int
    prompt: int
    n_tokens: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None = None) -> Footprint:
        """From what is known without the weights; where the number of parameters is not, from the model's shapes."""
        config, width = checkpoint.config, dtype.itemsize
        text = {**config, **(config.get("text_config") or {})}
        n = checkpoint.n_parameters or _counted(checkpoint)

        def whole(name: str, otherwise: int = 0) -> int:  # a config that says nonsense is for transformers to refuse
            return text[name] if isinstance(text.get(name), int) else otherwise

        hidden, vocabulary, heads = whole("hidden_size"), whole("vocab_size"), max(1, whole("num_attention_heads"))
        # bitsandbytes leaves embedding and unembedding as they are.
        kept = min(n, 2 * hidden * vocabulary) if quantization else n
        weights = kept * width + (n - kept) * QUANTIZED_BYTES.get(quantization, width)
        views = 1 + _TILES if config.get("image_grid_pinpoints") else 1
        tokens = views * _image_tokens(config) + _TEXT_TOKENS
        keys = 2 * whole("num_key_value_heads", heads) * whole("head_dim", hidden // heads)
        inner = whole("intermediate_size", 4 * hidden)
        prompt = tokens * width * (whole("num_hidden_layers", 1) * keys + 12 * hidden + 4 * inner) + 4 * vocabulary
        return cls(n, int(weights * _MARGIN), prompt, tokens)


def _image_tokens(config: Mapping[str, Any]) -> int:
    for name in ("image_seq_length", "mm_tokens_per_image", "num_query_tokens"):
        if isinstance(config.get(name), int):
            return config[name]
    vision = config.get("vision_config") or {}
    size, patch = (one[0] if isinstance(one, list) else one for one in (vision.get("image_size"), vision.get("patch_size")))
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and patch else _IMAGE_TOKENS


def _counted(checkpoint: Checkpoint) -> int:
    """Parameters of the model that the config describes, made without memory for them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(checkpoint.source, revision=checkpoint.commit or checkpoint.revision, **SAFE)
        return AutoModelForImageTextToText.from_config(config, **SAFE).num_parameters()


def free_on(device: torch.device | str, spread: bool = False) -> int:
    """Free bytes of a device; with ``spread`` of every accelerator and the host together."""
    if spread:
        return free_memory() + sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def require_room(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, quantization: str | None = None, spread: bool = False
) -> Footprint:
    """The footprint of a checkpoint that fits.

    Parameters
    ----------
    spread : bool
        Whether it goes over all devices and the host (``device_map="auto"``).

    Raises
    ------
    SubjectError
        In one sentence, where the weights and one prompt need more than is free.
    """
    footprint, free = Footprint.of(checkpoint, dtype, quantization), free_on(device, spread)
    needed = footprint.weights + footprint.prompt
    if needed > free:
        where = "all devices and the host together" if spread else str(device)
        kind = f"{quantization}, the rest " if quantization else ""
        raise SubjectError(
            f"subject '{checkpoint.name}' needs about {_size(needed)} on {where} ({_size(footprint.weights)} for "
            f"{_number(footprint.n_parameters)} parameters as {kind}{str(dtype).removeprefix('torch.')}, {_size(footprint.prompt)} for keys, "
            f"values and activations of one prompt of about {footprint.n_tokens} tokens), but only {_size(free)} are free: use a smaller "
            f"checkpoint, a smaller dtype, 4bit or 8bit weights, or another device."
        )
    return footprint


def rows_that_fit(footprint: Footprint, device: torch.device | str, usual: int, spread: bool = False) -> int:
    """Prompts a batch, at most ``usual`` and at least one, in half of what is free once the weights are there."""
    return max(1, min(usual, int(free_on(device, spread) * _SHARE // footprint.prompt)))


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"


def _number(n: int) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M"
