"""Supervised fine-tuning of a student on an instruction set: one run of ``trl.SFTTrainer``."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForImageTextToText, PrinterCallback, set_seed

from vlm_core.distill.training import Budget, Progress, TrainingDiverged, freeze_tower, quiet
from vlm_core.families.processing import load_processor

__all__ = ["sft"]


def sft(student: str | Path, data: datasets.Dataset, budget: Budget, out: str | Path, *, seed: int = 0, progress=None) -> Path:
    """Fine-tune a student on an instruction set with ``trl.SFTTrainer``, vision tower frozen, loss on the answers only.

    Parameters
    ----------
    student : path or hub id
        The checkpoint to start from; it is not changed.
    data : datasets.Dataset
        See `instruction_set`.
    budget : Budget
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
    freeze_tower(model, student)
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
    with quiet("transformers.trainer", "trl"):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=processor,
            callbacks=[Progress(progress)] if progress is not None else None,
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
