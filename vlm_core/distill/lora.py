"""Training of low-rank adapters on a few layers of the language model, merged into the student that is saved.

``Lora``              which layers and modules, which rank (Hu et al. 2021, arXiv:2106.09685), on PEFT
``informed_layers``   layers that a score ranks top and bottom, and others at random, as many of each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import peft

from vlm_core.families.adapters import lora_targets
from vlm_core.interventions.numeric import integer, integers
from vlm_core.subjects.subject import Subject

__all__ = ["Lora", "informed_layers"]


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


def informed_layers(scores: Sequence[float], share: float = 4 / 32, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Layers by a score of each: of 32 layers four, of other depths as large a share, at least one.

    Parameters
    ----------
    scores : sequence of float, one per layer
    share : float
        Of all layers, above 0, at most a half.
    seed : int
        Of the random ones.

    Returns
    -------
    dict of str to tuple of int
        ``top`` and ``bottom`` (of equal scores the earlier layer counts as higher), and ``random``, drawn from all layers but the top ones.

    Raises
    ------
    ValueError
        For a share outside its range, scores that are not finite, or fewer than two layers.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise ValueError(f"informed_layers needs one finite score for each of at least two layers, got {scores.tolist()}")
    if not 0 < share <= 0.5:
        raise ValueError(f"the share of layers must be above 0 and at most 0.5, got {share}")
    order = np.argsort(-scores, kind="stable")
    n = max(1, round(share * len(scores)))
    drawn = np.random.default_rng(seed).choice(order[n:], n, replace=False)
    return {name: tuple(sorted(map(int, layers))) for name, layers in (("top", order[:n]), ("bottom", order[-n:]), ("random", drawn))}
