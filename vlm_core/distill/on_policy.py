"""On-policy distillation of a student: one run of ``trl.DistillationTrainer``.

The student answers prompts by sampling, and learns to give each next token of its own answers the probability that the teacher gives it
(Agarwal et al. 2023, arXiv:2306.13649). Both read the same tokens, so they must have the same vocabulary and see pictures alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import trl
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, set_seed
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.utils import RepeatSampler

from vlm_core.distill.last_layer import read_alone, tokens_before
from vlm_core.distill.lora import Lora
from vlm_core.distill.operations import Operations
from vlm_core.distill.training import Budget, Run, Spent, Student, train
from vlm_core.errors import NotMeasurable
from vlm_core.families.processing import load_processor
from vlm_core.interventions import Row
from vlm_core.reduction.recipe import Recipe
from vlm_core.subjects.checkpoint import SAFE
from vlm_core.subjects.load import load_vlm

__all__ = ["on_policy", "require_alike"]

_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


class _Prompts(torch.utils.data.Dataset):
    """Prompts, each rendered, tokenized and its picture normalised once, as `trl.DistillationTrainer` does for every batch."""

    def __init__(self, trainer: trl.DistillationTrainer, data: datasets.Dataset) -> None:
        self._pad = trainer._tokenizer.pad_token_id
        self._rows = [self._encoded(trainer, row) for row in data]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._rows[row]

    @staticmethod
    def _encoded(trainer: trl.DistillationTrainer, row: Mapping[str, Any]) -> dict[str, Any]:
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        (ids,), _, fields = trainer._tokenize_prompts([messages])
        text = apply_chat_template({"prompt": messages}, trainer.processing_class)["prompt"]
        again = trainer.processing_class(images=[row["images"]], text=[text], padding=True, return_tensors="pt")
        return {
            "ids": list(ids),
            "generate": {name: _tensor(value) for name, value in fields.items()},
            "forward": {name: value for name, value in again.items() if name not in ("input_ids", "attention_mask")},
            "images": len(row["images"]),
        }

    def ids(self, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts' tokens and mask ``[row, token]``, padded on the left."""
        ids = [torch.tensor(row["ids"]) for row in rows]
        mask = [torch.ones_like(one) for one in ids]
        return _left(ids, self._pad), _left(mask, 0)

    @staticmethod
    def fields(rows: Sequence[Mapping[str, Any]], use: str) -> dict[str, torch.Tensor]:
        """What else the model is told: ``use`` is "generate" or "forward"."""
        names = rows[0][use]
        values = {name: [row[use][name] for row in rows] for name in names}
        return {name: _left([one[0] for one in found], 0) if name in _PER_TOKEN else torch.cat(found) for name, found in values.items()}


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.array(value))


def _left(rows: list[torch.Tensor], padding: int) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")


class _EpochSampler(RepeatSampler):
    """TRL's order of the data, drawn from the seed and the number of the epoch, so that a resumed run finds it again."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def on_policy(
    student: str | Path,
    teacher: str | Path,
    data: datasets.Dataset,
    budget: Budget,
    out: str | Path,
    *,
    divergence: float = 1.0,
    temperature: float = 1.0,
    max_new_tokens: int = 8,
    seed: int = 0,
    recipe: Recipe | Row = None,
    lora: Lora | None = None,
    checkpoints: str | Path | None = None,
    log_to: str | Path | None = None,
    progress=None,
) -> Path:
    """Train a student on its own answers towards a teacher's next-token probabilities, tower frozen, with ``trl.DistillationTrainer``.

    Parameters
    ----------
    student, budget, out, seed, recipe, lora, checkpoints, log_to, progress
        See `vlm_core.distill.training.Run`.
    teacher : path or hub id
        A checkpoint with the student's vocabulary, and the same preparation of pictures.
    data : datasets.Dataset
        See `vlm_core.distill.prompt_set`; at least a batch of rows.
    divergence : float
        0 is the forward KL divergence, KL(teacher || student), 1 the reverse, KL(student || teacher), between them the generalised
        Jensen-Shannon divergence (TRL's ``beta``).
    temperature : float
        Of the student's sampling, and of both distributions.
    max_new_tokens : int

    Returns
    -------
    Path
        ``out``, loadable with ``from_pretrained`` and usable as a subject.

    Raises
    ------
    ValueError
        For a teacher with another vocabulary or other inputs, or fewer rows than a batch; before anything is trained.
    NotMeasurable
        For a recipe that reads the vision tower, which generation has seen before the model is called.
    SubjectError, TrainingDiverged
        As `vlm_core.distill.sft`.
    """
    if len(data) < budget.batch_size:
        raise ValueError(f"{len(data)} prompts are fewer than the {budget.batch_size} of a batch: give more, or a smaller batch_size")
    require_alike(student, teacher, data)
    set_seed(seed)
    run = Run(student, budget, Path(out), seed, recipe, lora, checkpoints, log_to, progress)
    taught, spent = Student(run), Spent()
    reading = load_processor(student)
    reading.tokenizer.padding_side = "left"  # TRL's generation asks for it; the student's own processor is saved as it was
    teaching = load_vlm(teacher, dtype=torch.float32, device="cpu", check=False)
    teaching.model.requires_grad_(False)
    reading_teacher = Operations(teaching)

    class Trainer(trl.DistillationTrainer):
        prompts: _Prompts | None = None

        def _get_train_sampler(self, dataset=None):
            dataset = self.train_dataset if dataset is None else dataset
            size = self.args.per_device_train_batch_size * self.accelerator.num_processes
            return _EpochSampler(dataset, mini_repeat_count=1, batch_size=size, shuffle=self.shuffle_dataset, seed=self.args.seed)

        def _generate_and_score_completions(self, inputs):
            if self.prompts is None:
                return super()._generate_and_score_completions(inputs)
            return self.generated(self.prompts, inputs)

        def generated(self, prompts: _Prompts, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            """What TRL makes of prompts, from prompts that were encoded before."""
            device = self.accelerator.device
            said = self._generate_single_turn([row["ids"] for row in rows], None, prompts.fields(rows, "generate"))
            said = [torch.tensor(ids) for ids in said]
            ids, mask = prompts.ids(rows)
            answers = pad_sequence(said, batch_first=True, padding_value=self._tokenizer.pad_token_id)
            spoken = pad_sequence([torch.ones_like(one) for one in said], batch_first=True)
            told = prompts.fields(rows, "forward")
            for name in _PER_TOKEN:
                if name in told:
                    told[name] = torch.cat([told[name], told[name].new_zeros(answers.shape)], dim=1)
            tensors = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": answers, "completion_mask": spoken, **told}
            moved = {name: tensor.to(device) for name, tensor in tensors.items()}
            total = self.accelerator.gather(moved["completion_mask"].sum()).sum()
            self._metrics["train"]["completions/mean_length"].append(float(spoken.sum(1).float().mean()))
            return {**moved, "num_items_in_batch": total, "num_images": [row["images"] for row in rows]}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            answered = inputs["completion_mask"].sum()
            tokens = inputs["prompt_mask"].sum() + answered
            spent.add(images=len(inputs["prompt_ids"]), tokens=tokens, supervised_tokens=answered, flops=self.flops(inputs))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def flops(self, inputs: Mapping[str, Any]) -> int:
            """The student says it, learns from it, and the teacher reads it."""
            read = inputs["completion_mask"].sum(1)
            whole = [torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1) for part in ("ids", "mask")]
            total = taught.operations.rows(*whole, read) + reading_teacher.rows(*whole, read, False)
            image = (inputs["prompt_ids"] == taught.subject.anatomy.image_token_id).sum(1)
            for past, pictured, said in torch.stack([inputs["prompt_mask"].sum(1), image, read], 1).tolist():
                total += taught.operations.sequence(past, pictured, 1, False)
                total += sum(taught.operations.continuation(1, past + before, pictured, 1, False) for before in range(said - 1))
            return total

        def _get_last_hidden_state(self, model, input_ids, attention_mask, logits_to_keep, **fields):
            place = torch.arange(input_ids.shape[1], device=input_ids.device) >= input_ids.shape[1] - logits_to_keep
            answer = place & attention_mask.bool()
            own = model is self.accelerator.unwrap_model(self.model)
            answering = taught.kept.answering(answer) if own and taught.kept is not None else contextlib.nullcontext()
            with answering, read_alone(taught.subject if own else teaching, tokens_before(answer)):
                return super()._get_last_hidden_state(model, input_ids, attention_mask, logits_to_keep, **fields)

    def make(arguments, callbacks):
        config = trl.DistillationConfig(**arguments, beta=divergence, temperature=temperature, max_completion_length=max_new_tokens)
        return Trainer(
            taught.trained,
            teacher_model=teaching.model,
            args=config,
            train_dataset=data,
            processing_class=reading,
            callbacks=callbacks,
        ), False

    def prepare(trainer):
        prompts = _encoded_once(trainer, data, budget.batch_size)
        if prompts is not None:
            trainer.prompts = trainer.train_dataset = prompts
        return {"encoded_once": prompts is not None}

    settings = {"divergence": divergence, "temperature": temperature, "max_new_tokens": max_new_tokens, "teacher": str(teacher)}
    log = {"kind": "on_policy", **settings}
    return train(run, taught, data, make, spent, log, prepare, [teaching])


def _encoded_once(trainer: Any, data: datasets.Dataset, size: int) -> _Prompts | None:
    """The prompts encoded, if the trainer makes the same of them as of the rows themselves; on a batch, its random numbers given back."""
    state = torch.get_rng_state()
    try:
        prompts = _Prompts(trainer, data)
        rows = list(range(size))
        theirs = trl.DistillationTrainer._generate_and_score_completions(trainer, [data[row] for row in rows])
        torch.set_rng_state(state)
        ours = trainer.generated(prompts, [prompts[row] for row in rows])
    except NotMeasurable:
        raise  # a recipe that cannot be in force here
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None  # fields of other shapes than these: TRL knows them
    finally:
        torch.set_rng_state(state)
        trainer._metrics["train"].clear()
        trainer.state.num_input_tokens_seen = 0
    return prompts if ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in theirs) else None


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def require_alike(student: str | Path, teacher: str | Path, data: datasets.Dataset) -> None:
    """Refuse a teacher that cannot read what the student reads.

    Raises
    ------
    ValueError
        For another vocabulary, or other inputs for the first row of ``data``.
    """
    processors = [load_processor(one) for one in (student, teacher)]
    words, known = (processor.tokenizer.get_vocab() for processor in processors)
    sizes = [AutoConfig.from_pretrained(one, **SAFE).get_text_config().vocab_size for one in (student, teacher)]
    instead = "take a teacher of the student's family, or train on the teacher's answers with sft"
    if words != known or sizes[0] != sizes[1]:
        apart = sorted(word for word in words.keys() | known.keys() if words.get(word) != known.get(word))
        what = f"{len(apart)} tokens apart, such as {apart[0]!r}" if apart else f"{sizes[1]} against {sizes[0]} of the student"
        raise ValueError(
            f"teacher '{teacher}' has another vocabulary than student '{student}' ({what}), but on-policy distillation compares "
            f"probabilities of the same tokens: {instead}"
        )
    asked = [prepare_multimodal_messages(data[0]["prompt"], images=data[0]["images"])]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    own, other = (processor.apply_chat_template(asked, **options) for processor in processors)
    if own.keys() != other.keys() or not all(own[name].shape == other[name].shape and torch.equal(own[name], other[name]) for name in own):
        raise ValueError(
            f"teacher '{teacher}' is given other inputs than student '{student}' for the same prompt and picture (another chat template or "
            f"preparation of pictures), but on-policy distillation lets both read the same: {instead}"
        )
