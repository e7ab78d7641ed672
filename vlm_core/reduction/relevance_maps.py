"""Relevance budgets of a subject's items: calibrated, put to the test, shown.

``calibrated(...)``       the policy whose totals vary about what is asked for
``asked_otherwise(...)``  the control: what the questions of other items couple to
``relevance_maps(...)``   scores, what dominated each region, and budgets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Seen
from vlm_core.interventions.sources import Couplings
from vlm_core.interventions.tokens import DropTokens
from vlm_core.items import item_field, item_number, require_distinct, require_items, take
from vlm_core.reduction.answering import seen_by
from vlm_core.reduction.relevance import SCORES, Relevance, RelevanceBudget
from vlm_core.subjects.subject import Subject

__all__ = ["RelevanceMap", "asked_otherwise", "calibrated", "relevance_maps"]

_SCALE = 2.0
"""Standard deviations of demand at which a total is as far from what is asked for as it goes."""
_ALIKE = 1e-6
"""Demands that differ by less are the same."""


@dataclass(frozen=True, eq=False)
class RelevanceMap:
    """What a relevance budget makes of one item.

    Parameters
    ----------
    item : object
        Its id.
    scores : float array ``[score, image token]``
        Of ``SCORES``, each with mean 1.
    grid, row, column : int array ``[image token]``
        Places, -1 for tokens without one (``vlm_core.families.layout.Layout``).
    region : int array ``[image token]``
    dominant : tuple of str, one per region
        The score by which the region has the largest share of the image.
    shares : float array ``[score, region]``
    budget : int array ``[region]``
        Tokens that stay.
    kept : bool array ``[image token]``
    demand : float
        Share of the image's tokens that the question couples to.
    """

    item: object
    scores: np.ndarray
    grid: np.ndarray
    row: np.ndarray
    column: np.ndarray
    region: np.ndarray
    dominant: tuple[str, ...]
    shares: np.ndarray
    budget: np.ndarray
    kept: np.ndarray
    demand: float


def _require(policy: RelevanceBudget) -> None:
    if not isinstance(policy, RelevanceBudget):
        raise TypeError(f"the policy must be a RelevanceBudget, got {policy!r:.60} ({type(policy).__name__})")


def calibrated(subject: Subject, items: Sequence, layer: int, policy: RelevanceBudget | None = None) -> RelevanceBudget:
    """The policy with a demand whose mean total over these items is what is asked for.

    The scale is twice the standard deviation of the items' demands; the centre is where what lies above and below evens out. Use items
    that nothing is decided on.

    Raises
    ------
    ValueError
        Where all items demand the same.
    """
    policy = RelevanceBudget() if policy is None else policy
    _require(policy)
    demands = seen_by(subject, items, layer, policy.reads, lambda seen: policy.relevance(seen).demand)
    return replace(policy, demand=_calibration(np.array(demands)))


def _calibration(demands: np.ndarray) -> tuple[float, float]:
    scale = _SCALE * float(demands.std()) if len(demands) else 0.0
    if scale < _ALIKE:
        raise ValueError(f"{len(demands)} items all demand the same: a total cannot follow the question on them, leave demand None")
    low, high = float(demands.min()), float(demands.max())
    # The mean falls as the centre rises, from 0 or above to 0 or below.
    for _ in range(60):
        centre = (low + high) / 2
        low, high = (centre, high) if np.clip((demands - centre) / scale, -1, 1).mean() > 0 else (low, centre)
    return (low + high) / 2, scale


def asked_otherwise(subject: Subject, items: Sequence, layer: int, policy: RelevanceBudget | None = None, seed: int = 0) -> RelevanceBudget:
    """The policy with each image's coupling to the question of another of the items: what stays has nothing to do with what is asked.

    Its own question is never among those drawn. A demand is calibrated anew, on these items and what they are now coupled to, so that
    totals are equal in the mean.

    Returns
    -------
    policy : RelevanceBudget
        For these items only, at this layer, before which nothing may be dropped.

    Raises
    ------
    ValueError
        Where all items ask the same, two items have one id, or the policy does not look at the question.
    """
    policy = RelevanceBudget() if policy is None else policy
    _require(policy)
    if policy.coupling == "none" or isinstance(policy.coupling, Couplings):
        raise ValueError("only a policy that couples to the question by attention or similarity can be asked otherwise")
    require_items(items)
    require_distinct(items)
    draw = np.random.default_rng(integer(seed, "seed", least=0))
    chosen = take(items, range(len(items)))
    prompts = [item_field(item, "prompt") for item in chosen]
    if len(set(prompts)) < 2:
        raise ValueError(f"all {len(prompts)} items ask the same: there is no other question to ask")
    exchanged = []
    for item, prompt in zip(chosen, prompts, strict=True):
        other = str(draw.choice([one for one in prompts if one != prompt]))
        exchanged.append({"id": item_field(item, "id"), "image": item_field(item, "image"), "prompt": other})
    found = seen_by(subject, exchanged, layer, policy.reads, lambda seen: (policy.couplings(seen).cpu(), policy.relevance(seen).demand))
    couplings = [one for one, _ in found]
    held = Couplings(
        torch.tensor([item_number(item) for item in chosen]), torch.tensor([len(one) for one in couplings]), torch.cat(couplings).clone()
    )
    demand = None if policy.demand is None else _calibration(np.array([one for _, one in found]))
    return replace(policy, coupling=held, demand=demand)


def relevance_maps(
    subject: Subject, items: Sequence, layer: int, keep: float, policy: RelevanceBudget | None = None
) -> list[RelevanceMap]:
    """What the policy sees in each item, and what it keeps, at one layer and fraction."""
    policy = RelevanceBudget() if policy is None else policy
    _require(policy)
    drop = DropTokens(layer, keep, policy)

    def made(seen: Seen) -> tuple[Relevance, np.ndarray, np.ndarray, list[np.ndarray]]:
        n = len(seen)
        count, relevance, places = drop.count(n), policy.relevance(seen), seen.outside()
        kept, budget = np.full(n, count > 0), relevance.sizes * (count > 0)
        if 0 < count < n:
            kept = np.zeros(n, dtype=bool)
            kept[policy.choose(seen, count).kept.cpu().numpy()] = True
            budget = policy.budget(relevance, count)
        return relevance, budget.cpu().numpy(), kept, [one.cpu().numpy() for one in (places.grid, places.row, places.column)]

    maps = []
    for item, (relevance, budget, kept, places) in zip(
        take(items, range(len(items))), seen_by(subject, items, layer, policy.reads, made), strict=True
    ):
        scores, region, shares = (one.cpu().numpy() for one in (relevance.scores, relevance.region, relevance.shares))
        dominant = tuple(SCORES[number] for number in relevance.dominant.tolist())
        maps.append(RelevanceMap(item_field(item, "id"), scores, *places, region, dominant, shares, budget, kept, relevance.demand))
    return maps
