"""What a stored measurement on a subject depends on, as digests.

``weights_state(model)``         tells cheaply whether weights were changed in memory
``weights_digest(model)``        the weights themselves, wherever they are kept
``settings_digest(...)``         configuration of model and processor, attention, versions
``processor_settings(...)``      what a processor makes of text and pictures depends on
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from vlm_core.placement import present

__all__ = ["processor_settings", "settings_digest", "weights_digest", "weights_state"]


def weights_state(model: nn.Module) -> tuple:
    """What tells of weights that were changed in memory: equal as long as they were not."""
    # Version counters tell of edits in place, a sample of values of those that pass them by (``.data``).
    tensors = [tensor for tensor in model.parameters() if not tensor.is_meta]
    samples: dict[tuple, list[torch.Tensor]] = {}
    for tensor in tensors:
        samples.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().flatten()[:: _step(tensor.numel())])
    digest = hashlib.sha256()
    for alike in samples.values():
        digest.update(torch.cat(alike).cpu().view(torch.uint8).numpy())
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors), digest.digest()


@cache
def _step(n: int) -> int:
    """A step that takes about 256 of ``n`` values from all rows and all columns: it has no factor in common with the shape."""
    step = max(1, n // 256)
    while step > 1 and math.gcd(step, n) > 1:
        step -= 1
    return step


def weights_digest(model: nn.Module) -> str:
    """Digest of every tensor of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        owner, _, own = name.rpartition(".")
        with present(model.get_submodule(owner)) if tensor.is_meta else nullcontext():
            tensor = getattr(model.get_submodule(owner), own) if tensor.is_meta else tensor
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_digest(model: nn.Module, processor: Any, attention: str) -> str:
    """Digest of what else the numbers depend on; ``attention`` is the one that the seam delegates to."""
    parts = [model.config.to_json_string(), attention, torch.__version__, transformers.__version__]
    if processor is not None:
        parts += processor_settings(processor)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def processor_settings(processor: Any) -> tuple[str, ...]:
    """Configuration, chat template and tokenizer of a processor, as texts."""
    configured, template = processor.to_json_string(), str(getattr(processor, "chat_template", None))
    if not processor.tokenizer.is_fast:
        return configured, template, json.dumps(sorted(processor.tokenizer.get_vocab().items()))
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # How the last batch was padded is no setting.
    return configured, template, json.dumps({key: value for key, value in content.items() if key not in ("padding", "truncation")})
