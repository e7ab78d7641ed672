"""A subject from a checkpoint, checked: ``load_vlm(path_or_id)``.

``require_loadable(...)``   refuse a device, dtype or quantization that cannot be had here, before a checkpoint is touched

``precheck_subject(...)`` lives in ``vlm_core.subjects.checkpoint``: the cheap checks, without loading weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from vlm_core.errors import SubjectError
from vlm_core.families.processing import load_processor
from vlm_core.quantization import quantization_config
from vlm_core.secrets import hidden
from vlm_core.subjects.checkpoint import SAFE, inspect_checkpoint
from vlm_core.subjects.checks import selfcheck
from vlm_core.subjects.footprint import require_room, rows_that_fit
from vlm_core.subjects.subject import Subject

__all__ = ["load_vlm", "require_loadable"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A config that contradicts itself can fail anywhere in the code that reads it.
_UNLOADABLE = (OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, SafetensorError, StrictDataclassError)


def load_vlm(
    path_or_id: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    check: bool = True,
    device_map: str | dict | None = None,
    quantization: str | None = None,
) -> Subject:
    """Load a checkpoint and make sure that it can be measured.

    Parameters
    ----------
    path_or_id : str or Path
        A directory, or a model id of the Hugging Face Hub.
    revision : str, optional
        A branch, tag or commit of the Hub; what it stands for is looked up once, and every file is that commit's.
    dtype : "auto" or dtype
        ``"auto"``: the checkpoint's own, but float32 on a CPU.
    device : "auto", str or torch.device
        ``"auto"``: ``cuda`` where there is one.
    check : bool
        Run ``selfcheck`` (a few forward passes).
    device_map : str or dict, optional
        Where each module goes, as transformers and accelerate understand it: ``"auto"`` spreads a model larger than one
        device over several (and the CPU). In place of ``device``.
    quantization : {"4bit", "8bit"}, optional
        Linear maps of fewer bits (``vlm_core.quantization``), where bitsandbytes is installed.

    Raises
    ------
    ValueError
        For a dtype that is no floating-point type, a device that torch does not know or that this machine lacks, a quantization that cannot
        be had here, or if both ``device`` and ``device_map`` are given.
    SubjectError
        One clear sentence: not found, text-only, corrupted, too large, no attention interface, failed self-check, or asking for code of its own,
        which is never run.
    """
    if device_map is not None and device != "auto":
        raise ValueError(f"device {device!r} and device_map {device_map!r} were both given: name one of them")
    device, wanted = require_loadable(device, dtype, quantization)
    checkpoint = inspect_checkpoint(path_or_id, revision)
    stored = getattr(torch, str(checkpoint.dtype), torch.float32)
    dtype = wanted or (torch.float32 if device.type == "cpu" else stored)
    spread = device_map is not None
    quantized = quantization_config(quantization, dtype)
    files = {"revision": checkpoint.commit or revision, **SAFE}
    # Quantized weights are made where they stay.
    placed = {"": device} if quantized is not None and not spread else device_map
    try:
        require_room(checkpoint, device, dtype, quantization, spread)  # of the weights, before anything else is downloaded
        processor = load_processor(checkpoint.source, files["revision"])
        footprint = require_room(checkpoint, device, dtype, quantization, spread, processor)
        model, loading = AutoModelForImageTextToText.from_pretrained(
            checkpoint.source, dtype=dtype, device_map=placed, quantization_config=quantized, use_safetensors=True,
            output_loading_info=True, **files,
        )  # fmt: skip
    except _UNLOADABLE as error:
        _refuse_own_code(path_or_id, error)
        raise SubjectError(f"subject '{path_or_id}' could not be loaded by transformers: {_one_line(error)}") from error
    if not checkpoint.files:  # downloaded just now
        checkpoint = inspect_checkpoint(path_or_id, revision)
    wrong = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    if wrong:
        raise SubjectError(
            f"subject '{path_or_id}' lacks {len(wrong)} tensor{'s' if len(wrong) > 1 else ''} that its config announces "
            f"(first: {wrong[0]}): config and weights do not belong together; save or download the checkpoint again."
        )
    subject = Subject(model if placed is not None else model.to(device), processor, name=checkpoint.name, checkpoint=checkpoint)
    subject.batch_rows = rows_that_fit(footprint, device, subject.batch_rows, spread)
    if check:
        selfcheck(subject)
    return subject


def require_loadable(device: str | torch.device = "auto", dtype: Any = "auto", quantization: str | None = None) -> tuple[torch.device, Any]:
    """The device and dtype (None for ``"auto"``) that ``load_vlm`` would use.

    Raises
    ------
    ValueError
        One sentence for what is not there, or unknown.
    """
    found, wanted = _device(device), _dtype(dtype)
    quantization_config(quantization, wanted or torch.float32)
    return found, wanted


def _refuse_own_code(path_or_id: str | Path, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise SubjectError(
            f"subject '{path_or_id}' asks for code of its own (an auto_map in its configuration), which is never run: use a checkpoint whose "
            f"model and processor are classes of transformers."
        ) from error


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A floating-point dtype by its name, None for ``"auto"``."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise ValueError(f"dtype {dtype!r} is none that a model computes in: use 'auto' (the checkpoint's own) or one of {known}")
    return found


def _device(device: str | torch.device) -> torch.device:
    """A device that is there."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    instead = "use " + " or ".join(["'auto'", "'cpu'", *(f"'cuda:{number}'" for number in range(n_gpus))])
    if not isinstance(device, str | torch.device):
        raise ValueError(f"device must be a name or a torch.device, got {device!r} ({type(device).__name__}): {instead}")
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is none that torch knows: {instead}") from None
    kind = torch.backends.mps if found.type == "mps" else getattr(torch, found.type, None)
    count = 1 if found.type in ("cpu", "mps") else getattr(kind, "device_count", lambda: 0)()
    if not getattr(kind, "is_available", lambda: False)() or (found.index or 0) >= count:
        raise ValueError(f"device '{found}' is not there: {instead}")
    return found


def _one_line(error: Exception) -> str:
    line = hidden(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]} ..."
