"""What every kind of training shares: its budget, the student, the log that is left, and when it counts as failed.

``Budget``           optimiser steps, batch and rate
``Student``          a checkpoint loaded for training, its vision tower frozen
``Spent``            what training used so far: images, tokens, operations, seconds
``Run``, ``train``   the settings of one run that do not depend on its kind; carry it out with one of TRL's trainers

``training.json`` beside a trained student:

``kind``                 "sft", "preference" or "on_policy", with the settings of that kind under their own names
``budget``, ``seed``     as given
``lora``                 as given, or null
``recipe``               each part of it in words, as fitted to the student's depth, or null
``trained_parameters``   how many numbers could change
``losses``               means between logs, ten in all
``images``               pictures in the rows that were trained on, again for every time
``tokens``               of the sequences that gradients were computed for, padding not counted
``supervised_tokens``    those of them that the loss reads
``flops``                operations of the language model by formula (`vlm_core.distill.operations`), forward and backward;
                         of whole sequences, also where answers share a prompt; with those of a preference stage's reference, and on-policy
                         of the student's answers and the teacher's reading; not of making the data (`vlm_core.distill.asking`)
``seconds``              from the first step to the last, of all runs that a killed one was resumed in; what comes before (the reference of
                         a preference stage, making the data) is not among them
``encoded_once``         whether rows were encoded once (else TRL's collator made every batch)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from vlm_core.distill.lora import Lora
from vlm_core.distill.operations import Operations
from vlm_core.distill.ready import features_once
from vlm_core.errors import SubjectError
from vlm_core.interventions import Row, parts
from vlm_core.reduction.keeping import KeptTokens, keep_tokens
from vlm_core.reduction.recipe import Recipe
from vlm_core.subjects.checkpoint import SAFE
from vlm_core.subjects.load import load_vlm
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.features import vision_tower

__all__ = ["Budget", "Run", "Spent", "Student", "TrainingDiverged", "newest_checkpoint", "train"]

_LOGS = 10
_WHOLE = "whole"
"""A file that is written into a checkpoint when all else is there."""


class TrainingDiverged(Exception):
    """Training ended without a usable model."""


@dataclass(frozen=True)
class Budget:
    """What one training run may spend; equal budgets make arms comparable.

    ``steps`` are optimiser steps of ``batch_size`` images with all their turns; the rate warms up over a tenth of the steps and falls
    linearly.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Run:
    """Where a run starts, what it may spend and where it ends.

    Parameters
    ----------
    student : path or hub id
        The checkpoint to start from; it is not changed.
    budget : Budget
    out : path
        The trained checkpoint: model, processor and ``training.json``.
    seed : int
        Order of the data and everything else random.
    checkpoints : path, optional
        Folder for what a killed run is resumed from: a run that finds checkpoints of its own there goes on from the newest whole one,
        and ends with the same weights, bit by bit, on the same kind of machine with as many threads. Whoever changes
        data or settings takes another folder.
    recipe : Recipe or interventions that drop or merge tokens, optional
        In force in every pass of the student (`vlm_core.keep_tokens`): those of the loss, of the reference, of generation.
    lora : Lora, optional
        Train adapters only; default: all weights but the vision tower's.
    log_to : path, optional
        Folder for TensorBoard, where it is installed.
    progress : callable, optional
        Called with (steps done, steps in all).
    """

    student: str | Path
    budget: Budget
    out: Path
    seed: int = 0
    recipe: Recipe | Row = None
    lora: Lora | None = None
    checkpoints: str | Path | None = None
    log_to: str | Path | None = None
    progress: Callable[[int, int], None] | None = None

    def arguments(self, rows: int) -> dict[str, Any]:
        """Keyword arguments that the configurations of all of TRL's trainers take, for a set of so many rows."""
        steps = self.budget.steps
        every = max(1, steps // _LOGS)
        return {
            "output_dir": str(self.checkpoints or self.out),
            "max_steps": steps,
            "per_device_train_batch_size": self.budget.batch_size,
            "learning_rate": self.budget.learning_rate,
            "warmup_steps": max(1, steps // 10),
            "lr_scheduler_type": "linear",
            "adam_beta2": 0.98,
            "weight_decay": 0.01,
            "seed": self.seed,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "steps" if self.checkpoints else "no",
            "save_steps": every,  # with the logs, so that a resumed run logs the same means
            "save_total_limit": 2,
            "logging_steps": every,
            "logging_strategy": "steps",
            "logging_nan_inf_filter": False,  # else the trainer logs a loss of 0 in place of NaN, and divergence goes unseen
            "report_to": "tensorboard" if self.log_to and _tensorboard() else "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_drop_last": rows >= self.budget.batch_size,  # every step has as many images as the budget says
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }


def _tensorboard() -> bool:
    return any(find_spec(name) for name in ("tensorboard", "tensorboardX"))


class Student:
    """A checkpoint loaded for training.

    Attributes
    ----------
    subject : Subject
    model, processor
        The subject's; the vision tower does not train, and stays in evaluation mode when the model is set to training.
    trained : model
        What a trainer takes: the model, or the model with adapters.
    row : Row
        The recipe, fitted to the student's depth.
    kept : KeptTokens or None
        The recipe while it is in force.
    operations : Operations

    Raises
    ------
    SubjectError
        If it cannot be loaded, or has no vision tower that could be frozen.
    ValueError
        For adapters or a recipe on layers that it does not have.
    """

    def __init__(self, run: Run) -> None:
        source, lora = run.student, run.lora
        self.subject: Subject = load_vlm(source, dtype=torch.float32, device="cpu", check=False)
        self.model, self.processor = self.subject.model, self.subject.processor
        tower = vision_tower(self.subject)
        if tower is None:
            raise SubjectError(f"student '{source}' names no vision tower, so that nothing could be frozen: choose a model that has one")
        tower.requires_grad_(False)
        tower.eval().train = lambda mode=True: tower
        self.trained = self.model if lora is None else lora.on(self.subject)
        self.kept: KeptTokens | None = None
        self.row = None
        if run.recipe is not None:
            with keep_tokens(self.subject, run.recipe) as fitted:
                self.row = fitted.row
        self.operations = Operations(self.subject, self.row)
        self.trained_parameters = sum(weight.numel() for weight in self.trained.parameters() if weight.requires_grad)


class Spent(TrainerCallback, ExportableState):
    """What training used so far; goes on where a checkpoint left off.

    Attributes
    ----------
    images, tokens, supervised_tokens, flops : int
    seconds : float
    """

    COUNTS = ("images", "tokens", "supervised_tokens", "flops")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(self.COUNTS, 0)
        self.seconds = 0.0
        self._began = time.monotonic()

    def add(self, **counts: int) -> None:
        """Count a step."""
        for name, count in counts.items():
            self.counts[name] += int(count)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"counts": dict(self.counts), "seconds": self.seconds + time.monotonic() - self._began}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.monotonic()
        if state.global_step:
            found = state.stateful_callbacks[type(self).__name__]["attributes"]
            self.counts, self.seconds = dict(found["counts"]), found["seconds"]

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self._began = self.seconds + time.monotonic() - self._began, time.monotonic()


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


class _MarksWhole(TrainerCallback):
    """A checkpoint that is half written when the process is killed has no mark."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def newest_checkpoint(checkpoints: str | Path | None) -> str | None:
    """The newest checkpoint in a folder that was written whole; None without one."""
    found = [mark.parent for mark in Path(checkpoints).glob(f"checkpoint-*/{_WHOLE}")] if checkpoints else []
    return str(max(found, key=lambda folder: int(folder.name.rsplit("-", 1)[-1]))) if found else None


def _restored(model: torch.nn.Module, checkpoint: str | None) -> str | None:
    """Give a model the weights of a checkpoint, and the checkpoint back.

    The trainer matches the names in the file with those in memory, which differ for families whose checkpoints keep older names, and
    passes over what it does not find: it would go on from the weights that the run began with.
    """
    if checkpoint is not None and any(Path(checkpoint).glob("model*.safetensors")):
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True, **SAFE).state_dict())
    return checkpoint


def train(
    run: Run,
    student: Student,
    data: Dataset,
    make: Callable[[dict[str, Any], list], tuple[Trainer, bool]],
    spent: Spent,
    log: Mapping[str, Any],
    prepare: Callable[[Trainer], Mapping[str, Any]] | None = None,
    frozen: Sequence[Subject] = (),
) -> Path:
    """Carry out one run and save the student.

    Parameters
    ----------
    run : Run
    student : Student
    data : datasets.Dataset
    make : callable
        From the arguments of a TRL configuration and callbacks to the trainer of ``student.model``, and whether its rows are encoded once.
    spent : Spent
        What the trainer counts into.
    log : mapping
        What ``training.json`` tells beyond what is common.
    prepare : callable, optional
        What is done with the trainer before its first step, the student still being as it was; gives more for ``training.json``.
    frozen : sequence of Subject
        Others that see the pictures (a teacher).

    Returns
    -------
    Path
        ``run.out``.

    Raises
    ------
    TrainingDiverged
        If a loss or weight is not finite; nothing is saved.
    """
    callbacks = [spent, _MarksWhole(), *([_Progress(run.progress)] if run.progress is not None else [])]
    with _quiet("transformers.trainer", "trl"), _tensorboard_folder(run.log_to):
        trainer, once = make(run.arguments(len(data)), callbacks)
        trainer.remove_callback(PrinterCallback)
        # Asked at every step, by a walk over all weights, whose number stays.
        trainer.model.num_parameters = functools.cache(trainer.model.num_parameters)
        with contextlib.ExitStack() as stack:
            if student.row is not None:
                student.kept = stack.enter_context(keep_tokens(student.subject, student.row))
            for subject in (student.subject, *frozen):
                stack.enter_context(features_once(subject))
            log = {"encoded_once": once, **log, **(prepare(trainer) if prepare is not None else {})}
            trainer.train(resume_from_checkpoint=_restored(student.model, newest_checkpoint(run.checkpoints)))
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not (all(map(math.isfinite, losses)) and all(bool(weight.isfinite().all()) for weight in student.model.parameters())):
        raise TrainingDiverged(f"training of '{run.student}' diverged: lower the learning rate {run.budget.learning_rate}")
    counts = trainer.accelerator.reduce(torch.tensor([spent.counts[name] for name in Spent.COUNTS], device=trainer.args.device))
    if trainer.is_world_process_zero():
        if run.lora is not None:
            student.trained.merge_and_unload()
        used = {**dict(zip(Spent.COUNTS, counts.tolist(), strict=True)), "seconds": spent.seconds}
        _save(run, student, {**log, "losses": losses, **used})
    trainer.accelerator.wait_for_everyone()
    return run.out


def _save(run: Run, student: Student, log: dict[str, Any]) -> None:
    student.model.save_pretrained(run.out)
    student.processor.save_pretrained(run.out)
    lora = None if run.lora is None else asdict(run.lora)
    common = {"budget": asdict(run.budget), "seed": run.seed, "lora": lora, "recipe": _described(student.row)}
    common["trained_parameters"] = student.trained_parameters
    (run.out / "training.json").write_text(json.dumps({**log, **common}))


def _described(row: Row) -> list[str] | None:
    return None if row is None else [part.describe() for part in parts(row)]


@contextlib.contextmanager
def _tensorboard_folder(folder: str | Path | None):
    name, before = "TENSORBOARD_LOGGING_DIR", os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder is not None:
        os.environ[name] = str(folder)
    try:
        yield
    finally:
        if folder is not None and before is None:
            del os.environ[name]
        elif folder is not None:
            os.environ[name] = before


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
