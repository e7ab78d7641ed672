"""Observe, change and measure vision-language models through one seam.

>>> from vlm_core import ZeroHeads, load_subject, sweep
>>> subject = load_subject("fixtures/embedded/vlm")                                   # doctest: +SKIP
>>> table = sweep(subject, items, {"full": None, "cut": ZeroHeads([(3, 1)])})         # doctest: +SKIP

``vlm_core.stats`` needs no torch; names below load their modules on first use, so importing it stays cheap.
"""

from importlib import import_module

_HOMES = {
    "anatomy": ("FAMILIES", "Anatomy", "Family", "HeadId"),
    "checkpoint": ("Checkpoint", "inspect_checkpoint", "precheck_subject"),
    "errors": ("SubjectError",),
    "evaluation": ("accuracy_table", "evaluate"),
    "interventions": (
        "DropTokens",
        "HeadMeans",
        "ImageKVMeans",
        "KnockOut",
        "MeanHeads",
        "ReplaceImageKV",
        "ZeroHeads",
        "describe",
    ),
    "observers": (
        "AttentionMass",
        "HeadOutputs",
        "HiddenStates",
        "ImageAttention",
        "attention_map",
        "head_means",
        "image_kv_means",
        "observe",
    ),
    "checks": ("selfcheck",),
    "subject": ("Batch", "Subject", "load_subject"),
    "sweeps": ("sweep",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vlm_core' has no attribute '{name}'")
    return getattr(import_module(f"vlm_core.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
