"""H1: what heads look at while answering, against the pixels of the asked object (Head Impact).

Published with p-values: heads' overlap differs between layers (p < 0.001) and not within (p > 0.05). p-values turn on how many items there
are, so the claim is decided on effect sizes, layers must explain more of the variance of ranks than the heads of a layer do; both published
p-values are conditions beside. Within layers the test is Friedman's, the same images were shown to every head, and no layer may be significant
after Holm's correction over layers: a condition that few scenes meet easily, and that is why it decides nothing alone. Few heads cannot reach
p < 0.001 between layers whatever they look at, and then nothing is claimed. Every other threshold is a claim of its own, with bounds of its
own: the ranking survives other thresholds where all of them hold.
"""

import itertools

import numpy as np
import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits
from vlm_core import attention_heatmap, layer_ranking
from vlm_core.heads.impact import THRESHOLDS, between_minus_within, layer_test, least_layer_p, threshold_agreement
from vlm_core.stats import Claim, Control, Superiority, holm, jackknife_statistic

SOURCE = "Sergeev & Kotelnikov 2025, arXiv:2511.23375"
LEAST_P = 0.001
WITHIN_P = 0.05
OVERLAYS = 50  # items whose pictures are shown
LITERATURE = {"published": "between layers p < 0.001, within layers p > 0.05", "where": "PaliGemma2, Qwen2-VL, SmolVLM"}

LAYERS = Claim(
    id="H1.head_impact",
    sentence="Head Impact differs between layers (Kruskal-Wallis p < 0.001) and not within one (Friedman p not below 0.05 in any layer, after Holm).",
    effect="ε² of Head Impact between layers - mean over layers of ε² among their heads; conditions: Kruskal-Wallis over heads, p < 0.001; Friedman "
    "among the heads of each layer, scenes as blocks, Holm-adjusted p of at least 0.05 in all of them",
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
    n_layers, n_heads = measured.scores.shape
    if (least := least_layer_p(n_layers, n_heads)) >= LEAST_P:
        said = f"{n_layers} layers of {n_heads} heads: Kruskal-Wallis between layers cannot come below p = {least:.2g}, and {LEAST_P:g} is asked for"
        return evidence.decide(LAYERS, None, missing=said)
    found, ranking = layer_test(measured.at(), measured.clusters), layer_ranking(measured.scores, seed=seed)
    exhibits.masks.head_impact(evidence, measured, ranking, agreements(measured))
    show_overlays(evidence, subject, probes, objects, measured)
    evidence.decide(
        LAYERS,
        jackknife_statistic(between_minus_within(measured.at(), measured.clusters), measured.clusters),
        controls=[*controls(measured, floors), layers_differ(found), alike_within(found)],
        details={
            "Kruskal-Wallis between layers": {"p": found.p_heads, "epsilon²": found.epsilon_heads, "unit": "a head's mean over items"},
            "between layers, item by item": {"p": found.p_items, "epsilon²": found.epsilon_items, "unit": "a head on an item"},
            "Friedman within layers": {"p": found.p_within, "W": found.w_within, "unit": "heads compared on the same scene, layer by layer"},
            "epsilon² within layers": found.epsilon_within,
            "as published": layers_differ(found).passed and alike_within(found).passed,
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


def alike_within(found) -> Control:
    """Heads of one layer must not differ: the smallest p over layers, adjusted for their number."""
    least = float(holm(found.p_within).min())
    return Control("Friedman within layers", "condition", least >= WITHIN_P, least, f"no layer's p, after Holm, below {WITHIN_P:g}")


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
    exhibits.masks.overlays(evidence, f"Where head {best[0]}.{best[1]} looks, the one with the highest Head Impact", shown)


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
