"""Supervised fine-tuning of a student on an instruction set: one run of ``trl.SFTTrainer``."""

from __future__ import annotations

from pathlib import Path

import datasets
import trl
from transformers import set_seed

from vlm_core.distill.last_layer import read_alone, tokens_before
from vlm_core.distill.lora import Lora
from vlm_core.distill.ready import encoded_conversations, ready_rows
from vlm_core.distill.training import Budget, Run, Spent, Student, train
from vlm_core.interventions import Row
from vlm_core.reduction.recipe import Recipe

__all__ = ["sft"]


def sft(
    student: str | Path,
    data: datasets.Dataset,
    budget: Budget,
    out: str | Path,
    *,
    seed: int = 0,
    recipe: Recipe | Row = None,
    lora: Lora | None = None,
    checkpoints: str | Path | None = None,
    log_to: str | Path | None = None,
    progress=None,
) -> Path:
    """Fine-tune a student on an instruction set with ``trl.SFTTrainer``, vision tower frozen, loss on the answers only.

    Parameters
    ----------
    student, budget, out, seed, recipe, lora, checkpoints, log_to, progress
        See `vlm_core.distill.training.Run`.
    data : datasets.Dataset
        See `instruction_set`.

    Returns
    -------
    Path
        ``out``, loadable with ``from_pretrained`` and usable as a subject.

    Raises
    ------
    ValueError
        For adapters or a recipe on layers that the model does not have.
    SubjectError
        If the model cannot be loaded, or has no vision tower that could be frozen.
    TrainingDiverged
        If a loss or weight is not finite; nothing is saved.
    """
    set_seed(seed)
    run = Run(student, budget, Path(out), seed, recipe, lora, checkpoints, log_to, progress)
    taught, spent = Student(run), Spent()

    class Trainer(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            ids, valid, read = inputs["input_ids"], inputs["attention_mask"], (inputs["labels"] != -100).sum(1)
            flops = taught.operations.rows(ids, valid, read)
            spent.add(images=len(ids), tokens=valid.sum(), supervised_tokens=read.sum(), flops=flops)
            with read_alone(taught.subject, tokens_before(inputs["labels"] != -100)):
                return super().compute_loss(model, inputs, *args, **kwargs)

    def make(arguments, callbacks):
        config = trl.SFTConfig(**arguments, max_length=None, assistant_only_loss=True)
        trainer = Trainer(taught.trained, args=config, train_dataset=data, processing_class=taught.processor, callbacks=callbacks)
        collator = trainer.data_collator
        trainer.train_dataset, trainer.data_collator, once = ready_rows(data, collator, encoded_conversations(collator))
        return trainer, once

    return train(run, taught, data, make, spent, {"kind": "sft"})
