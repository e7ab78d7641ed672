"""Where a module's weights are, when a device map keeps them somewhere else between uses.

Under ``device_map`` a module may compute on one device and keep its weights on another, or on disk: accelerate brings them before the
module's forward pass and takes them away after it. In between they are meta tensors, without numbers.

``home(module)``      the device on which a module computes
``present(module)``   context manager: in it the module's weights are there to be read
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import align_module_device
from torch import nn

__all__ = ["home", "present"]


def home(module: nn.Module) -> torch.device:
    """The device on which a module with weights of its own computes."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if place is None:
        return next(module.parameters()).device
    return torch.device(place)  # a number is one of the accelerator's


def present(module: nn.Module) -> AbstractContextManager:
    """In this context the module's own weights can be read, wherever they are kept; they are not to be used after it."""
    # Within the module's own forward pass they are there, and must stay.
    away = any(parameter.is_meta for parameter in module.parameters(recurse=False))
    return align_module_device(module) if away else nullcontext()
