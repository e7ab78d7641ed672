"""H1: what heads look at while answering, against the pixels of the asked object (Head Impact).

Published with p-values: heads' overlap differs between layers (p < 0.001) and not within (p > 0.05). p-values turn on how many items there
are, so the claim is decided on effect sizes, layers must explain more of the variance of ranks than the heads of a layer do; the published
p-value between layers is a condition beside. Within layers the test is Friedman's: the same images were shown to every head. Every other
threshold is a claim of its own, with bounds of its own: the ranking survives other thresholds where all of them hold.
"""

import itertools

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits_masks
from vlm_core import attention_heatmap, layer_ranking
from vlm_core.heads.impact import THRESHOLDS, between_minus_within, layer_test, threshold_agreement
from vlm_core.stats import Claim, Control, Superiority, jackknife_statistic

SOURCE = "Sergeev & Kotelnikov 2025, arXiv:2511.23375"
LEAST_P = 0.001
OVERLAYS = 50  # items whose pictures are shown
LITERATURE = {"published": "between layers p < 0.001, within layers p > 0.05", "where": "PaliGemma2, Qwen2-VL, SmolVLM"}

LAYERS = Claim(
    id="H1.head_impact",
    sentence="Head Impact differs between layers (Kruskal-Wallis p < 0.001), and more than among the heads of a layer.",
    effect="ε² of Head Impact between layers - mean over layers of ε² among their heads; condition: Kruskal-Wallis over heads, p < 0.001",
    test=Superiority(0.0),
    source=SOURCE,
    tier="exploratory",
)
SURVIVES = Claim(
    id="H1.head_impact_thresholds",
    sentence="The ranking of heads by Head Impact survives another threshold: Kendall's τ with the ranking at the mean is above 0.7.",
    effect="Kendall's τ between the rankings at the mean and at the other threshold, as found on this many scenes",
    test=Superiority(0.7),
    source=SOURCE,
    tier="exploratory",
)


@pytest.mark.claim(LAYERS)
def test_overlap_differs_between_layers_and_not_within(subject, probes, objects, impact, floors, seed, evidence):
    measured = impact("confirmation")
    if min(measured.scores.shape) < 2:
        n_layers, n_heads = measured.scores.shape
        evidence.decide(LAYERS, None, missing=f"{n_layers} layers of {n_heads} heads: differing between layers and within takes two of each")
        return
    found, ranking = layer_test(measured.at(), measured.clusters), layer_ranking(measured.scores, seed=seed)
    exhibits_masks.head_impact(evidence, measured, ranking, agreements(measured))
    show_overlays(evidence, subject, probes, objects, measured)
    evidence.decide(
        LAYERS,
        jackknife_statistic(between_minus_within(measured.at(), measured.clusters), measured.clusters),
        controls=[*controls(measured, floors), layers_differ(found)],
        details={
            "Kruskal-Wallis between layers": {"p": found.p_heads, "epsilon²": found.epsilon_heads, "unit": "a head's mean over items"},
            "between layers, item by item": {"p": found.p_items, "epsilon²": found.epsilon_items, "unit": "a head on an item"},
            "Friedman within layers": {"p": found.p_within, "W": found.w_within, "unit": "heads compared on the same scene, layer by layer"},
            "epsilon² within layers": found.epsilon_within,
            "as published": found.p_heads < LEAST_P and min(found.p_within) > 0.05,
            "layers": {"order": ranking.order, "top": ranking.top, "bottom": ranking.bottom, "random": ranking.random},
            "literature": LITERATURE,
        },
    )


@pytest.mark.claim(SURVIVES)
@pytest.mark.parametrize("threshold", [str(one) for one in THRESHOLDS if one != "mean"])
def test_the_ranking_survives_other_thresholds(threshold, impact, floors, evidence):
    measured = impact("confirmation")
    evidence.decide(
        SURVIVES,
        jackknife_statistic(threshold_agreement(measured, threshold), measured.clusters, limits=(-1.0, 1.0)),
        controls=controls(measured, floors),
        details={"tau": agreements(measured), "literature": LITERATURE},
    )


def layers_differ(found) -> Control:
    """The published test between layers, a head's mean over items being one observation."""
    return Control("Kruskal-Wallis between layers", "condition", found.p_heads < LEAST_P, found.p_heads, f"p below {LEAST_P:g}")


def show_overlays(evidence, subject, probes, objects, measured) -> None:
    """Where the head with the highest Head Impact looks, on the first items of all tasks in turn."""
    best = tuple(int(axis) for axis in np.unravel_index(measured.scores.argmax(), measured.scores.shape))
    overlap = dict(zip(measured.items, measured.at()[:, *best], strict=True))
    turns = itertools.zip_longest(*probes.confirmation.values())
    items = [item for turn in turns for item in turn if item is not None and item["id"] in overlap][:OVERLAYS]
    shown = []
    for item in items:
        mask = objects(item)
        shown.append({"item": item, "heat": attention_heatmap(subject, item, [best], mask.shape), "mask": mask, "iou": float(overlap[item["id"]])})
    exhibits_masks.overlays(evidence, f"Where head {best[0]}.{best[1]} looks, the one with the highest Head Impact", shown)


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
