"""H1: what heads look at while answering, against the pixels of the asked object (Head Impact).

Published with p-values: heads' overlap differs between layers (p < 0.001) and not within (p > 0.05). p-values turn on how many items there
are, so the claim is decided on effect sizes: layers must explain more of the variance of ranks than the heads of a layer do.
"""

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits_masks
from vlm_core import layer_ranking
from vlm_core.heads.impact import between_minus_within, layer_test, threshold_agreement
from vlm_core.stats import Claim, Superiority, estimate_statistic

SOURCE = "Sergeev & Kotelnikov 2025, arXiv:2511.23375"
LITERATURE = {"published": "between layers p < 0.001, within layers p > 0.05", "where": "PaliGemma2, Qwen2-VL, SmolVLM"}

LAYERS = Claim(
    id="H1.head_impact",
    sentence="Head Impact differs between layers (Kruskal-Wallis p < 0.001), and more than among the heads of a layer.",
    effect="ε² of Head Impact between layers - mean over layers of ε² among their heads",
    test=Superiority(0.0),
    source=SOURCE,
    tier="exploratory",
)
THRESHOLDS = Claim(
    id="H1.head_impact_thresholds",
    sentence="The ranking of heads by Head Impact survives other thresholds: Kendall's τ is above 0.7 with each.",
    effect="Kendall's τ between the ranking at the mean and that at the threshold that agrees least",
    test=Superiority(0.7),
    source=SOURCE,
    tier="exploratory",
)


@pytest.mark.claim(LAYERS)
def test_overlap_differs_between_layers_and_not_within(impact, floors, seed, evidence):
    measured = impact("confirmation")
    found, ranking = layer_test(measured.at()), layer_ranking(measured.scores, seed=seed)
    exhibits_masks.head_impact(evidence, measured, ranking, agreements(measured))
    statistic, alpha = between_minus_within(measured.at(), measured.clusters), LAYERS.alpha / evidence.family_size
    evidence.decide(
        LAYERS,
        estimate_statistic(statistic, measured.clusters, smallest_alpha=alpha, rng=seed),
        controls=controls(measured, floors),
        p_value=found.p_heads,
        details={
            "between layers": {"p": found.p_heads, "epsilon²": found.epsilon_heads, "unit": "a head's mean over items"},
            "between layers, item by item": {"p": found.p_items, "epsilon²": found.epsilon_items, "unit": "a head on an item"},
            "within layers": {"p": found.p_within, "epsilon²": found.epsilon_within, "unit": "a head on an item, layer by layer"},
            "as published": found.p_heads < 0.001 and min(found.p_within) > 0.05,
            "layers": {"order": ranking.order, "top": ranking.top, "bottom": ranking.bottom, "random": ranking.random},
            "literature": LITERATURE,
        },
    )


@pytest.mark.claim(THRESHOLDS)
def test_the_ranking_survives_other_thresholds(impact, floors, seed, evidence):
    measured = impact("confirmation")
    statistic, alpha = threshold_agreement(measured), THRESHOLDS.alpha / evidence.family_size
    evidence.decide(
        THRESHOLDS,
        estimate_statistic(statistic, measured.clusters, limits=(-1.0, 1.0), smallest_alpha=alpha, rng=seed),
        controls=controls(measured, floors),
        details={"tau": agreements(measured), "literature": LITERATURE},
    )


def controls(measured, floors):
    """The subject must look at images, and heads at the asked object more than at where another item's object is."""
    return [
        pooled_grounding(floors, measured.items, 0.10),
        worth_something(
            "overlap with the own object against another item's", "negative", measured.own_minus_elsewhere(), measured.clusters
        ),
    ]


def agreements(measured) -> dict[str, float]:
    """Kendall's τ of the ranking at the mean with that at every other threshold."""
    sample = np.ones((1, len(set(measured.clusters))))
    return {name: float(threshold_agreement(measured, name)(sample)[0]) for name in measured.thresholds if name != "mean"}
