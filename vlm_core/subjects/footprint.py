"""Memory that a subject needs, estimated before its weights are read.

``Footprint``                    bytes of the weights and of one prompt in flight
``Footprint.of(checkpoint)``     from its config, the number of its parameters and what its processor makes of a picture
``require_room(...)``            refuse a subject that does not fit where it is to go
``rows_that_fit(...)``           prompts a batch in what is left once it is loaded
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlm_core.errors import SubjectError
from vlm_core.memory import free_memory
from vlm_core.subjects.checkpoint import SAFE, Checkpoint
from vlm_core.subjects.resolution import SIDES
from vlm_core.subjects.weightless import Weightless, patches_of

__all__ = ["PICTURE", "QUANTIZED_BYTES", "Footprint", "free_on", "require_room", "rows_that_fit"]

QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes a weight of a linear map has under bitsandbytes; NF4 keeps a float32 scale per block of 64."""
PICTURE = (SIDES[-1], SIDES[-1])
"""Width and height that are assumed of a picture: the most pixels that scenes are drawn on."""

_MARGIN = 1.1  # buffers, the largest tensor twice while it is converted
_TEXT_TOKENS = 64  # of a question and its answer
_SHARE = 0.5  # of what is free, for a batch in flight: the rest is for what is recorded
# What a processor raises on settings that contradict each other.
_UNANSWERED = (SubjectError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a subject takes.

    Parameters
    ----------
    n_parameters : int
    weights : int
        Of all weights.
    prompt : int
        Of one prompt in flight: its pixels and what one layer of the vision tower computes with, or keys and values of every layer of the
        language model, what one of them computes with and the logits, whichever is more. 0 where its processor was not asked.
    n_tokens : int
        Tokens of that prompt, those of its question an estimate.
    n_image : int
        Of these the image's, as the processor writes them; keys of the cross-attention where the image lies behind one.
    picture : (width, height)
        Of the picture that the processor was asked about.
    """

    n_parameters: int
    weights: int
    prompt: int = 0
    n_tokens: int = 0
    n_image: int = 0
    picture: tuple[int, int] = PICTURE

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: str | None = None,
        processor: Any = None,
        picture: tuple[int, int] = PICTURE,
    ) -> Footprint:
        """From what is known without the weights; where the number of parameters is not, from the model's shapes.

        Parameters
        ----------
        processor : processor, optional
            Of the checkpoint. It lays out one prompt with a blank picture; a warning says so in one sentence where it cannot, and the
            footprint is that of the weights. Default: weights alone.
        picture : (width, height)

        Raises
        ------
        Whatever ``transformers`` raises of a config that it cannot read.
        """
        config, n = _config(checkpoint), checkpoint.n_parameters or _counted(checkpoint)
        text = config.get_text_config()
        # bitsandbytes leaves embedding and unembedding as they are.
        kept = min(n, 2 * text.hidden_size * text.vocab_size) if quantization else n
        weights = int((kept * dtype.itemsize + (n - kept) * QUANTIZED_BYTES.get(quantization, dtype.itemsize)) * _MARGIN)
        if processor is None:
            return cls(n, weights)
        try:
            subject = Weightless(processor, config, checkpoint.name)
            batch = subject.encode([Image.new("RGB", picture, (127, 127, 127))], ["?"])
        except _UNANSWERED as error:
            warnings.warn(
                f"subject '{checkpoint.name}': what a picture of {picture[0]} x {picture[1]} pixels takes in memory is not known, for "
                f"its processor fails on it ({' '.join(str(error).split())[:200]}): whether a prompt fits beside the weights is not checked",
                stacklevel=2,
            )
            return cls(n, weights)
        views, patches = patches_of(batch.inputs, config)
        in_sequence = subject.anatomy.family.image_in_sequence
        image = int(batch.image.sum()) if in_sequence else patches + views  # a CLS leads every view
        tokens = int(batch.valid.sum()) + _TEXT_TOKENS
        seen = config.vision_config
        decoder = _in_flight(text, tokens, dtype.itemsize) + 4 * text.vocab_size
        if in_sequence:
            decoder += _kept(text, tokens, text.num_hidden_layers) * dtype.itemsize
        else:
            crossing = len(text.cross_attention_layers)
            decoder += _kept(text, tokens, text.num_hidden_layers - crossing) * dtype.itemsize
            decoder += (_kept(text, image, crossing) + image * text.hidden_size) * dtype.itemsize
        tower = _in_flight(seen, patches, dtype.itemsize)
        pixels = batch.inputs["pixel_values"].numel() * dtype.itemsize
        return cls(n, weights, pixels + max(tower, decoder), tokens, image, picture)


def _config(checkpoint: Checkpoint) -> Any:
    """The config with what the checkpoint leaves to the defaults of its class."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(copy.deepcopy(checkpoint.config))


def _in_flight(config: Any, tokens: int, width: int) -> int:
    """Bytes that one transformer layer computes with, of ``width`` each: residual stream, queries, keys, values; the MLP."""
    # Qwen2-VL's and GLM-4V's `hidden_size` may be that of what their tower gives.
    hidden = getattr(config, "embed_dim", None) or config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or int(getattr(config, "mlp_ratio", 4) * hidden)
    return tokens * (12 * hidden + 4 * inner) * width


def _kept(text: Any, tokens: int, layers: int) -> int:
    """Numbers in the keys and values of so many layers."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim * layers * tokens


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
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: str | None = None,
    spread: bool = False,
    processor: Any = None,
) -> Footprint:
    """The footprint of a checkpoint that fits.

    Parameters
    ----------
    spread : bool
        Whether it goes over all devices and the host (``device_map="auto"``).
    processor : processor, optional
        As in ``Footprint.of``. Default: weights alone have to fit.

    Raises
    ------
    SubjectError
        In one sentence, where the weights and one prompt need more than is free.
    """
    footprint, free = Footprint.of(checkpoint, dtype, quantization, processor), free_on(device, spread)
    needed = footprint.weights + footprint.prompt
    if needed > free:
        where = "all devices and the host together" if spread else str(device)
        kind = f"{quantization}, the rest " if quantization else ""
        shown = "" if not footprint.prompt else (
            f", {_size(footprint.prompt)} for pixels, keys, values and activations of one prompt of about {footprint.n_tokens} tokens, to "
            f"whose picture of {footprint.picture[0]} x {footprint.picture[1]} pixels its processor gives {footprint.n_image}"
        )
        raise SubjectError(
            f"subject '{checkpoint.name}' needs about {_size(needed)} on {where} ({_size(footprint.weights)} for "
            f"{_number(footprint.n_parameters)} parameters as {kind}{str(dtype).removeprefix('torch.')}{shown}), but only {_size(free)} "
            f"are free: use a smaller checkpoint, a smaller dtype, 4bit or 8bit weights, or another device."
        )
    return footprint


def rows_that_fit(footprint: Footprint, device: torch.device | str, usual: int, spread: bool = False) -> int:
    """Prompts a batch, at most ``usual`` and at least one, in half of what is free once the weights are there; ``usual`` where it is not
    known what a prompt takes."""
    if not footprint.prompt:
        return usual
    return max(1, min(usual, int(free_on(device, spread) * _SHARE // footprint.prompt)))


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"


def _number(n: int) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M"
