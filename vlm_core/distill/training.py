"""What every kind of training shares: its budget, what is frozen, how it reports, and when it counts as failed."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from transformers import TrainerCallback

from vlm_core.errors import SubjectError

__all__ = ["Budget", "Progress", "TrainingDiverged", "freeze_tower", "quiet"]

_TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder")


class TrainingDiverged(Exception):
    """Training ended without a usable model."""


@dataclass(frozen=True)
class Budget:
    """What one training run may spend; equal budgets make arms comparable.

    ``steps`` are optimiser steps of ``batch_size`` images with all their turns; the rate warms up over a tenth of the steps and falls linearly.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3


class Progress(TrainerCallback):
    """Calls ``report(steps done, steps in all)`` after each step."""

    def __init__(self, report):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


def freeze_tower(model, name) -> None:
    """Let the vision tower of a model, called ``name`` in messages, not train; `SubjectError` if none is found."""
    towers = [module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in _TOWER_NAMES]
    if not towers:
        raise SubjectError(f"student '{name}' has no vision tower under any of the names {', '.join(_TOWER_NAMES)}")
    towers[0].requires_grad_(False)


@contextlib.contextmanager
def quiet(*names: str):
    """Only errors are heard of the loggers of these names."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
