"""A subject from a checkpoint, checked: ``load_subject(path_or_id)``.

``precheck_subject(...)`` lives in ``vlm_core.subjects.checkpoint``: the cheap checks, without loading weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from vlm_core.errors import SubjectError
from vlm_core.families.processing import load_processor
from vlm_core.subjects.checkpoint import inspect_checkpoint
from vlm_core.subjects.checks import selfcheck
from vlm_core.subjects.subject import Subject

__all__ = ["load_subject"]


def load_subject(
    path_or_id: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    check: bool = True,
    device_map: str | dict | None = None,
) -> Subject:
    """Load a checkpoint and make sure that it can be measured.

    Parameters
    ----------
    path_or_id : str or Path
        A directory, or a model id of the Hugging Face Hub.
    revision : str, optional
    dtype : "auto" or dtype
        ``"auto"``: the checkpoint's own, but float32 on a CPU.
    device : "auto" or str
        ``"auto"``: ``cuda`` where there is one.
    check : bool
        Run ``selfcheck`` (a few forward passes).
    device_map : str or dict, optional
        Where each module goes, as transformers and accelerate understand it: ``"auto"`` spreads a model larger than one
        device over several (and the CPU). In place of ``device``.

    Raises
    ------
    ValueError
        If both ``device`` and ``device_map`` are given.
    SubjectError
        One clear sentence: not found, text-only, corrupted, too large, no attention interface, failed self-check.
    """
    if device_map is not None and device != "auto":
        raise ValueError(f"device {device!r} and device_map {device_map!r} were both given: name one of them")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = inspect_checkpoint(path_or_id, revision)
    stored = getattr(torch, str(checkpoint.dtype), torch.float32)
    if dtype == "auto":
        dtype = torch.float32 if str(device).startswith("cpu") else stored
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if device_map is None:
        checkpoint.require_memory(device, dtype)
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            checkpoint.source, revision=revision, dtype=dtype, device_map=device_map, output_loading_info=True
        )
        processor = load_processor(checkpoint.source, revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SubjectError(
            f"subject '{path_or_id}' could not be loaded by transformers: {_first_line(error)}"
        ) from error
    wrong = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
    if wrong:
        raise SubjectError(
            f"subject '{path_or_id}' lacks {len(wrong)} tensor{'s' if len(wrong) > 1 else ''} that its config announces "
            f"(first: {wrong[0]}): config and weights do not belong together; save or download the checkpoint again."
        )
    subject = Subject(model if device_map is not None else model.to(device), processor, name=checkpoint.name, checkpoint=checkpoint)
    if check:
        selfcheck(subject)
    return subject


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
