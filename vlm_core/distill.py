"""Distillation into a small VLM on TRL: data from a teacher's answers, then supervised fine-tuning.

``instruction_set``     a TRL conversational data set (an image, its questions and answers)
``SFTBudget``, ``sft``  steps, batch and rate, declared; one run of ``trl.SFTTrainer``, saved as a checkpoint
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback, set_seed

from vlm_core.errors import SubjectError
from vlm_core.families.processing import load_processor

__all__ = ["SFTBudget", "TrainingDiverged", "instruction_set", "sft"]

_TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder")


class TrainingDiverged(Exception):
    """Training ended without a usable model."""


@dataclass(frozen=True)
class SFTBudget:
    """What one training run may spend; equal budgets make arms comparable.

    ``steps`` are optimiser steps of ``batch_size`` images with all their turns; the rate warms up over a tenth of the steps and falls linearly.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3


def instruction_set(items: Sequence, answers: Sequence[str]) -> datasets.Dataset:
    """A multimodal instruction set in TRL's conversational form: one row a scene, its questions as turns of one conversation.

    Parameters
    ----------
    items : sequence of items
        With ``scene_id``, ``image`` and ``prompt``.
    answers : sequence of str
        What the student shall learn to say, one an item.

    Returns
    -------
    datasets.Dataset
        Columns ``images`` (a list of one image) and ``messages``.

    Raises
    ------
    ValueError
        If items and answers differ in number.
    """
    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items but {len(answers)} answers: an instruction set needs one answer an item")
    scenes: dict[str, dict] = {}
    for item, answer in zip(items, answers, strict=True):
        row = scenes.setdefault(item["scene_id"], {"images": [item["image"]], "messages": []})
        row["messages"] += [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": answer}]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(message)})
    return datasets.Dataset.from_list(list(scenes.values()), features=features)


class _Progress(TrainerCallback):
    def __init__(self, report):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


def sft(student: str | Path, data: datasets.Dataset, budget: SFTBudget, out: str | Path, *, seed: int = 0, progress=None) -> Path:
    """Fine-tune a student on an instruction set with ``trl.SFTTrainer``, vision tower frozen, loss on the answers only.

    Parameters
    ----------
    student : path or hub id
        The checkpoint to start from; it is not changed.
    data : datasets.Dataset
        See `instruction_set`.
    budget : SFTBudget
    out : path
        The trained checkpoint: model, processor and ``training.json`` (budget, seed, losses, seconds).
    seed : int
        Order of the data and everything else random.
    progress : callable, optional
        Called with (steps done, steps in all).

    Returns
    -------
    Path
        ``out``, loadable with ``from_pretrained`` and usable as a subject.

    Raises
    ------
    SubjectError
        If the model has no vision tower this function knows how to freeze, or training diverged (a loss or weight not finite).
    """
    from trl import SFTConfig, SFTTrainer

    out = Path(out)
    set_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32, attn_implementation="eager")
    processor = load_processor(student)
    _freeze_tower(model, student)
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        warmup_steps=max(1, budget.steps // 10),
        lr_scheduler_type="linear",
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=seed,
        max_length=None,
        assistant_only_loss=True,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=max(1, budget.steps // 10),
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # else the trainer logs a loss of 0 in place of NaN, and divergence goes unseen
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    began = time.monotonic()
    with _quiet("transformers.trainer", "trl"):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=processor,
            callbacks=[_Progress(progress)] if progress is not None else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not (all(map(math.isfinite, losses)) and all(bool(weight.isfinite().all()) for weight in model.parameters())):
        raise TrainingDiverged(f"training of '{student}' diverged: lower the learning rate {budget.learning_rate}")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    log = {"budget": asdict(budget), "seed": seed, "losses": losses, "seconds": time.monotonic() - began}
    (out / "training.json").write_text(json.dumps(log))
    return out


def _freeze_tower(model, name) -> None:
    towers = [module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in _TOWER_NAMES]
    if not towers:
        raise SubjectError(f"student '{name}' has no vision tower under any of the names {', '.join(_TOWER_NAMES)}")
    towers[0].requires_grad_(False)


@contextlib.contextmanager
def _quiet(*names: str):
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
