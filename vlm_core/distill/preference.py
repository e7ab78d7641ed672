"""Preference optimisation of a student on pairs of answers: one run of ``trl.DPOTrainer``.

``preference(...)``        train
``preference_loss(...)``   DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) with the terms of mDPO (Wang et al. 2024, arXiv:2406.11839)

With ``s(y | m) = log p(y | m, x) - log p_ref(y | m, x)``, the summed log-probabilities of an answer to prompt ``x`` about picture ``m``
under the student and under the student before this stage, chosen answer ``w``, rejected answer ``l`` and another picture ``m'``, the loss
is the mean over pairs of

    - log sigmoid(beta (s(w | m) - s(l | m)))                 DPO
    - image_term  log sigmoid(beta (s(w | m) - s(w | m')))    conditional preference: the chosen answer is the better one of its own picture
    - anchor_term log sigmoid(beta s(w | m))                  anchored preference (mDPO's, anchor at 0): the chosen answer does not lose
    - answer_term log p(w | m, x) / tokens of w               supervised training on the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 2)

mDPO crops its own picture to get ``m'``; here it is another row's picture (`vlm_core.distill.pairs.swapped_images`), the same one
all run long.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from torch.nn.functional import logsigmoid
from transformers import set_seed

from vlm_core.distill.answers import SharedPrompts, shared, whole_sequences
from vlm_core.distill.last_layer import read_alone, tokens_before
from vlm_core.distill.lora import Lora
from vlm_core.distill.pairs import swapped_images
from vlm_core.distill.ready import encoded_by, ready_rows
from vlm_core.distill.training import Budget, Run, Spent, Student, train
from vlm_core.interventions import Row
from vlm_core.reduction.recipe import Recipe

__all__ = ["preference", "preference_loss"]

_AGREES = 1e-4
"""Largest difference of a log-probability, relative or in nats, at which a pass over shared prompts stands for one over sequences."""


def preference_loss(
    scores: torch.Tensor,
    reference: torch.Tensor,
    beta: float,
    image_term: float = 0.0,
    anchor_term: float = 0.0,
    answer_term: float = 0.0,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the module.

    Parameters
    ----------
    scores, reference : Tensor ``[2 or 3, pair]``
        Summed log-probabilities of the chosen answer, the rejected one, and with ``image_term`` the chosen one given another picture.
    lengths : Tensor ``[pair]``
        Tokens of the chosen answers, for ``answer_term``.

    Returns
    -------
    loss, margins
        A scalar; ``beta (s(w | m) - s(l | m))`` ``[pair]``.
    """
    gained = beta * (scores - reference)
    margins = gained[0] - gained[1]
    loss = -logsigmoid(margins)
    if image_term:
        loss = loss - image_term * logsigmoid(gained[0] - gained[2])
    if anchor_term:
        loss = loss - anchor_term * logsigmoid(gained[0])
    if answer_term:
        loss = loss - answer_term * scores[0] / lengths
    return loss.mean(), margins.detach()


class _Pairs(torch.utils.data.Dataset):
    """Rows with their number, and the same rows about another picture where that is asked for."""

    def __init__(self, sets: Sequence[tuple[Any, Any]]) -> None:
        self._sets = sets

    def __len__(self) -> int:
        return len(self._sets[0][0])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"row": row, "rows": [rows[row] for rows, _ in self._sets]}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batches = [collate([row["rows"][number] for row in rows]) for number, (_, collate) in enumerate(self._sets)]
        return {"row": torch.tensor([row["row"] for row in rows]), "batches": [dict(batch) for batch in batches]}


def preference(
    student: str | Path,
    data: datasets.Dataset,
    budget: Budget,
    out: str | Path,
    *,
    beta: float = 0.1,
    image_term: float = 0.0,
    anchor_term: float = 0.0,
    answer_term: float = 0.0,
    seed: int = 0,
    recipe: Recipe | Row = None,
    lora: Lora | None = None,
    checkpoints: str | Path | None = None,
    log_to: str | Path | None = None,
    progress=None,
) -> Path:
    """Train a student to prefer one answer of each pair, with ``trl.DPOTrainer``, vision tower frozen.

    What the student before this stage finds of all pairs is computed once. Prompts are computed once for their answers where that
    gives the numbers of whole sequences (``shared_prompts`` in ``training.json``).

    Parameters
    ----------
    student, budget, out, seed, recipe, lora, checkpoints, log_to, progress
        See `vlm_core.distill.training.Run`.
    data : datasets.Dataset
        See `vlm_core.distill.preference_set`.
    beta : float
        How dear it is to leave the student before this stage.
    image_term, anchor_term, answer_term : float
        Weights of mDPO's two terms, and of supervised training on the chosen answer; see the module.

    Returns
    -------
    Path
        ``out``, loadable with ``from_pretrained`` and usable as a subject.

    Raises
    ------
    ValueError
        For an image term where all rows show one picture.
    SubjectError, TrainingDiverged
        As `vlm_core.distill.sft`.
    """
    set_seed(seed)
    run = Run(student, budget, Path(out), seed, recipe, lora, checkpoints, log_to, progress)
    swapped = [swapped_images(data, seed)] if image_term else []
    taught, spent = Student(run), Spent()

    class Trainer(trl.DPOTrainer):
        shares_prompts = False
        reference: torch.Tensor  # [2 or 3, row of data]

        def scores(self, model: Any, inputs: Mapping[str, Any], share: bool, spare: bool = True) -> torch.Tensor:
            read_of = read_alone if spare else _whole
            batches = inputs["batches"]
            n = len(inputs["row"])
            if share:
                read = [2, 1][: len(batches)]
                pad = self._tokenizer.pad_token_id
                prompts = SharedPrompts.of(batches, read, pad)
                with read_of(taught.subject, prompts.read):  # the pass over answers is of other sequences
                    return shared(model, prompts).view(-1, n)
            halves = [{name: value[: len(value) // 2] for name, value in other.items()} for other in batches[1:]]
            found = []
            for batch in (batches[0], *halves):
                with read_of(taught.subject, tokens_before(batch["completion_mask"])):
                    found.append(whole_sequences(model, batch).view(-1, n))
            return torch.cat(found)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            scores = self.scores(model, inputs, self.shares_prompts)
            reference = self.reference[:, inputs["row"]]
            n = len(inputs["row"])
            lengths = inputs["batches"][0]["completion_mask"][:n].sum(1)  # chosen answers come first
            loss, margins = preference_loss(scores, reference, self.beta, image_term, anchor_term, answer_term, lengths)
            self._metrics["train"]["rewards/margins"].append(margins.mean().item())
            self._metrics["train"]["rewards/accuracies"].append((margins > 0).float().mean().item())
            spent.add(images=n, flops=self.flops(inputs, True), **_counted(inputs))
            return loss

        def flops(self, inputs: Mapping[str, Any], gradients: bool) -> int:
            """Of whole sequences, shared prompts or not: runs with and without a recipe are to be compared."""
            total = 0
            for batch, sequences in _read(inputs):
                ids, valid, said = (batch[name][:sequences] for name in ("input_ids", "attention_mask", "completion_mask"))
                total += taught.operations.rows(ids, valid, said.sum(1), gradients)
            return total

    def make(arguments, callbacks):
        trainer = Trainer(
            taught.trained,
            ref_model=copy.deepcopy(taught.model) if lora is None else None,
            args=trl.DPOConfig(**arguments, max_length=None, beta=beta),
            train_dataset=data,
            processing_class=taught.processor,
            callbacks=callbacks,
        )
        trainer.ref_model = None  # what it would say is what the student says before its first step
        collator = trainer.data_collator
        sets = [ready_rows(one, collator, encoded_by(collator)) for one in (data, *swapped)]
        pairs = _Pairs([(rows, collate) for rows, collate, _ in sets])
        trainer.train_dataset, trainer.data_collator = pairs, pairs.collate
        return trainer, all(once for *_, once in sets)

    def prepare(trainer):
        pairs, size = trainer.train_dataset, budget.batch_size

        def batch(start: int) -> dict[str, Any]:
            return trainer._prepare_inputs(pairs.collate([pairs[row] for row in range(start, min(start + size, len(pairs)))]))

        @torch.no_grad()
        def found(inputs: Mapping[str, Any], share: bool, spare: bool = True) -> torch.Tensor:
            return trainer.scores(trainer.model, inputs, share, spare)

        trainer.model.train()
        # A recipe lets go of tokens of whole sequences; several processes share the gradients of one pass a step.
        alone = trainer.accelerator.num_processes == 1 and taught.row is None
        trainer.shares_prompts = alone and _shares(lambda share: found(batch(0), share, spare=share))
        parts = []
        for start in range(0, len(pairs), size):
            inputs = batch(start)
            parts.append(found(inputs, trainer.shares_prompts))
            spent.add(flops=trainer.flops(inputs, False))
        trainer.reference = torch.cat(parts, dim=1)
        return {"shared_prompts": trainer.shares_prompts}

    terms = {"beta": beta, "image_term": image_term, "anchor_term": anchor_term, "answer_term": answer_term}
    return train(run, taught, data, make, spent, {"kind": "preference", **terms}, prepare)


def _whole(subject: Any, read: torch.Tensor) -> contextlib.nullcontext:
    """Nothing is spared."""
    return contextlib.nullcontext()


def _shares(found) -> bool:
    """Whether a pass over shared prompts gives what one over whole sequences gives, of which nothing is spared, on the first batch."""
    try:
        return torch.allclose(found(True), found(False), rtol=_AGREES, atol=_AGREES)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False  # a family whose prompts need more than a cache to be gone on from


def _read(inputs: Mapping[str, Any]) -> list[tuple[Mapping[str, torch.Tensor], int]]:
    """Batches, and how many of their sequences are read: both answers of the first, the chosen ones about other pictures."""
    n = len(inputs["row"])
    return list(zip(inputs["batches"], (2 * n, n), strict=False))


def _counted(inputs: Mapping[str, Any]) -> dict[str, int]:
    every = _read(inputs)
    masks = {"tokens": "attention_mask", "supervised_tokens": "completion_mask"}
    return {name: sum(int(batch[mask][:sequences].sum()) for batch, sequences in every) for name, mask in masks.items()}
