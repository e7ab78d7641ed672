"""Weights of fewer bits, and what reads them.

``QUANTIZATIONS``              the names: ``"4bit"``, ``"8bit"``
``quantization_config(...)``   what ``from_pretrained`` needs for one; a clear sentence where it cannot be had here
``quantization_of(model)``     the name of what a loaded model has
``n_weights(linear)``          weights of a linear map, however they are stored; ``n_values(parameter)`` the numbers of a parameter
``as_matrix(linear, inputs)``  what a linear map makes of inputs, whatever it is made of

A quantized linear map holds packed integers: its ``weight`` is no matrix. It is a ``torch.nn.Linear`` all the same, and applies like
one. What needs the matrix applies it to unit vectors (``as_matrix``); what counts weights goes by the shape of the map.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

__all__ = ["QUANTIZATIONS", "as_matrix", "n_values", "n_weights", "quantization_config", "quantization_of"]

QUANTIZATIONS = ("4bit", "8bit")


def quantization_config(name: str | None, dtype: torch.dtype) -> Any:
    """The ``BitsAndBytesConfig`` of a name, None for None.

    NF4 for ``"4bit"`` (Dettmers et al. 2023, QLoRA, arXiv:2305.14314), LLM.int8 for ``"8bit"`` (Dettmers et al. 2022,
    arXiv:2208.07339), whose threshold for outliers is off: which columns are outliers would depend on what else is in a batch.

    Raises
    ------
    ValueError
        For another name, or where bitsandbytes is not installed.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization {name!r} is unknown: use one of {', '.join(QUANTIZATIONS)}, or none")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization '{name}' needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave the weights as they are"
        )
    from transformers import BitsAndBytesConfig

    if name == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def quantization_of(model: nn.Module) -> str | None:
    """``"4bit"`` or ``"8bit"`` where linear maps are quantized, by this library or before; another method's own name; else None."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    found = config if isinstance(config, dict) else config.to_dict()
    bits = [name for name in QUANTIZATIONS if found.get(f"load_in_{name}")]
    return bits[0] if bits else str(getattr(found.get("quant_method"), "value", found.get("quant_method")))


def n_weights(linear: nn.Linear) -> int:
    """Weights of a linear map: 4-bit ones are stored in pairs."""
    return linear.in_features * linear.out_features


def n_values(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: 4-bit ones are stored in pairs."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def as_matrix(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a linear map makes of ``inputs`` ``[row, in]``, without its bias; adapters and quantized weights included."""
    return linear.forward(inputs) - linear.forward(torch.zeros_like(inputs[:1]))
