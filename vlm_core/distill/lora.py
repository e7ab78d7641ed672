"""Training of low-rank adapters on a few layers of the language model, merged into the student that is saved.

``Lora``   which layers and modules, which rank (Hu et al. 2021, arXiv:2106.09685), on PEFT

`vlm_core.heads.impact.layer_ranking` ranks layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import peft

from vlm_core.families.adapters import lora_targets
from vlm_core.interventions.numeric import integer, integers
from vlm_core.subjects.subject import Subject

__all__ = ["Lora"]


@dataclass(frozen=True)
class Lora:
    """Adapters on attention modules of decoder layers; everything else keeps its weights, the vision tower included.

    Parameters
    ----------
    layers : tuple of int
    rank : int
    alpha : int
        Adapters count ``alpha / rank``.
    modules : tuple of str
        Names inside the attention module.
    """

    layers: tuple[int, ...]
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(sorted(set(integers(self.layers, "layers", "each of layers")))))
        object.__setattr__(self, "modules", tuple(self.modules))
        integer(self.rank, "rank", least=1)

    def on(self, subject: Subject) -> peft.PeftModel:
        """The subject's model with these adapters, which alone train.

        Raises
        ------
        ValueError
            For a layer or a module that the model does not have.
        """
        targets = lora_targets(subject.anatomy, self.layers, self.modules)
        return peft.get_peft_model(subject.model, peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets))
