"""Distillation into a small VLM on TRL: data from a teacher's answers, then training on it.

Data: ``items_from`` any data set, a ``Teacher`` that answers, filters, preference pairs, what controls train on, a leakage check, a data
card; each module says what it exports. Training: ``Budget`` (steps, batch and rate, declared), and one run of one of TRL's trainers, saved as a
checkpoint: ``sft`` on answers, ``preference`` on pairs of answers, ``on_policy`` on the student's own answers towards a teacher's probabilities.

Practice: ``python -m vlm_core.distill --config FILE``, or ``running.distill(DistillConfig.from_file(FILE))``, does all of it as a file declares;
``costs`` says what training took, and what the student takes beside its teacher.
"""

from vlm_core.distill.card import data_card
from vlm_core.distill.filters import Kept, agreeing, deduplicated, self_consistent, within_length, writable
from vlm_core.distill.grounded import box_cell, by_asking, by_box, by_mask, grounded_answers, mask_cell
from vlm_core.distill.instructions import instruction_set, prompt_set
from vlm_core.distill.leakage import leaks, require_disjoint
from vlm_core.distill.lora import Lora
from vlm_core.distill.on_policy import on_policy
from vlm_core.distill.pairs import (
    Pair,
    preference_set,
    rubric,
    shuffled_answers,
    swapped_images,
    swapped_preferences,
    teacher_against_student,
    teacher_ranked,
)
from vlm_core.distill.preference import preference
from vlm_core.distill.sft import sft
from vlm_core.distill.teachers import RecordedTeacher, SubjectTeacher, Teacher, record_answers
from vlm_core.distill.training import Budget, TrainingDiverged
from vlm_core.sources import Columns, items_from

__all__ = [
    "Budget",
    "Columns",
    "Kept",
    "Lora",
    "Pair",
    "RecordedTeacher",
    "SubjectTeacher",
    "Teacher",
    "TrainingDiverged",
    "agreeing",
    "box_cell",
    "by_asking",
    "by_box",
    "by_mask",
    "data_card",
    "deduplicated",
    "grounded_answers",
    "instruction_set",
    "items_from",
    "leaks",
    "mask_cell",
    "on_policy",
    "preference",
    "preference_set",
    "prompt_set",
    "record_answers",
    "require_disjoint",
    "rubric",
    "self_consistent",
    "sft",
    "shuffled_answers",
    "swapped_images",
    "swapped_preferences",
    "teacher_against_student",
    "teacher_ranked",
    "within_length",
    "writable",
]
