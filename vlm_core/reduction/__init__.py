"""Policies that leave a model fewer visual tokens, one small module each, and what is measured of them.

Every policy is a frozen declaration (`vlm_core.interventions.policy.Policy`): ``DropTokens(layer, keep, policy)`` applies it in any
forward pass, under ``generate`` and in sweeps.

``declared()``                  every policy with its usual settings, by name
``keep_tokens(vlm, recipe)``    a model that keeps fewer tokens in every call (`vlm_core.reduction.keeping`)
``Recipe``                      what a measured reduction comes to (`vlm_core.reduction.recipe`)
"""

from vlm_core.interventions.policy import Policy
from vlm_core.reduction.fastv import FastV

__all__ = ["FastV", "declared"]


def declared() -> dict[str, Policy]:
    """Every policy with its usual settings (and FastV as its paper words it), by the name that tables have."""
    policies = (FastV(), FastV("all"))
    return {policy.describe(): policy for policy in policies}
