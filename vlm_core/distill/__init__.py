"""Distillation into a small VLM on TRL: data from a teacher's answers, then training on it.

``instruction_set``  a TRL conversational data set (an image, its questions and answers)
``Budget``, ``sft``  steps, batch and rate, declared; one run of ``trl.SFTTrainer``, saved as a checkpoint
"""

from vlm_core.distill.instructions import instruction_set
from vlm_core.distill.sft import sft
from vlm_core.distill.training import Budget, TrainingDiverged

__all__ = ["Budget", "TrainingDiverged", "instruction_set", "sft"]
