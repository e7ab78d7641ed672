"""Policies that leave a model fewer visual tokens, one small module each, and what is measured of them.

Every policy is a frozen declaration (`vlm_core.interventions.policy.Policy`): ``DropTokens(layer, keep, policy)`` applies it in any
forward pass, under ``generate`` and in sweeps.

``declared()``                  every policy with its usual settings, by name
``train_gate(vlm, items, ...)`` a learned gate of one subject (`vlm_core.reduction.gate_training`)
``relevance_maps(...)``         what relevance budgets see, their calibration and their control (`vlm_core.reduction.relevance_maps`)
``keep_tokens(vlm, recipe)``    a model that keeps fewer tokens in every call (`vlm_core.reduction.keeping`)
``Recipe``                      what a measured reduction comes to (`vlm_core.reduction.recipe`)

Measured on a subject, each in a module of its own:

``image_groups``    an object's image tokens, those around it, the rest, those whose norm stands out
``redundancy``      how alike image tokens are in every layer
``utility``         what an answer loses without each of them, and without groups
``horizon``         the layer from which it needs none of them
``kept_tokens``     which image tokens are left under an intervention
``kept_rows``       where on the image the tokens lie that a policy keeps
"""

from vlm_core.interventions.policy import Policy
from vlm_core.reduction.baselines import Random, Stride
from vlm_core.reduction.dart import DART
from vlm_core.reduction.debiased import Debiased
from vlm_core.reduction.divprune import DivPrune
from vlm_core.reduction.fastv import FastV
from vlm_core.reduction.gate import LearnedGate
from vlm_core.reduction.guided import HeadGuided
from vlm_core.reduction.hiprune import HiPrune
from vlm_core.reduction.pooling import Pooling
from vlm_core.reduction.prumerge import PruMerge
from vlm_core.reduction.pyramid import pyramid, pyramid_of
from vlm_core.reduction.relevance import RelevanceBudget
from vlm_core.reduction.sparsevlm import SparseVLM
from vlm_core.reduction.tome import ToMe
from vlm_core.reduction.visionzip import VisionZip

__all__ = [
    "DART",
    "Debiased",
    "DivPrune",
    "FastV",
    "HeadGuided",
    "HiPrune",
    "LearnedGate",
    "Pooling",
    "PruMerge",
    "Random",
    "RelevanceBudget",
    "SparseVLM",
    "Stride",
    "ToMe",
    "VisionZip",
    "declared",
    "pyramid",
    "pyramid_of",
]


def declared() -> dict[str, Policy]:
    """Every policy with its usual settings (and FastV as its paper words it), by the name that tables have.

    Not ``HeadGuided``, which has no usual heads, nor ``LearnedGate``, which is trained on a subject, nor ``pyramid``, which is several
    drops.
    """
    policies = (
        Random(),
        Stride(),
        Pooling(),
        FastV(),
        FastV("all"),
        Debiased(),
        SparseVLM(),
        ToMe(),
        ToMe("keys"),
        DivPrune(),
        DART(),
        VisionZip(),
        PruMerge(),
        PruMerge(adaptive=True),
        HiPrune(),
        RelevanceBudget(),
        RelevanceBudget("similarity"),
    )
    return {policy.describe(): policy for policy in policies}
