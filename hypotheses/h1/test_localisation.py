"""H1: three heads' attention says where the asked object is.

The effect is an overlap, not an accuracy: whether the subject has accuracy to lose says nothing about it, so that the claim rests on controls alone
(it must look at images at all, and the heads at its own object more than at another item's).
"""

import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits
from vlm_core import attention_heatmap
from vlm_core.heads.draws import layer_free, layer_matched
from vlm_core.heads.localisation import set_scores
from vlm_core.stats import Claim, Superiority, monte_carlo_p

LOCALISATION = Claim(
    id="H1.localisation",
    sentence="The three localisation heads' attention overlaps the asked object by 5 points of IoU more than random heads' of their layers.",
    effect="IoU(localisation heads) - IoU(random heads of the same layers and number, mean over draws), paired per item",
    test=Superiority(0.05),
    source="Kang et al., CVPR 2025 (localisation heads); the comparison is ours",
    tier="exploratory",
)
HEADS = 3
LITERATURE = {"published": "three heads are enough for training-free grounding", "where": "LLaVA-1.5 and others, RefCOCO"}


@pytest.mark.claim(LOCALISATION)
def test_three_heads_say_where_the_object_is(subject, probes, profile, seed, localisation, impact, objects, floors, evidence):
    found, measured = localisation(), impact("confirmation")
    heads, overlap = found.heads, measured.at()
    if len(heads) < HEADS:
        evidence.decide(LOCALISATION, None, missing=f"{len(heads)} heads are candidates for localising, fewer than the {HEADS} compared")
        return
    try:
        sets = {name: draw(heads, subject, profile.random_draws, seed) for name, draw in (("same", layer_matched), ("any", layer_free))}
    except ValueError as reason:
        evidence.decide(LOCALISATION, None, missing=str(reason), details={"heads": [list(head) for head in heads]})
        return
    matched, anywhere = (set_scores(overlap, sets[name]) for name in ("same", "any"))
    (targeted,) = set_scores(overlap, [heads])
    (elsewhere,) = set_scores(measured.elsewhere[..., measured.thresholds.index("mean")], [heads])
    p_value = monte_carlo_p(targeted.mean(), matched.mean(1))
    exhibits.masks.localisation(evidence, heads, float(targeted.mean()), matched.mean(1), p_value, len(measured.items))
    for item in [one for one in probes.spread("confirmation", 1) if one["id"] in set(measured.items)][:3]:
        mask = objects(item)
        exhibits.heads.attention_overlay(
            evidence, item, attention_heatmap(subject, item, heads, mask.shape), mask, f"{item['task']}: where the localisation heads look"
        )
    aware = localisation(sinks=True).heads
    evidence.decide(
        LOCALISATION,
        targeted - matched.mean(0),
        clusters=measured.clusters,
        controls=[
            pooled_grounding(floors, measured.items, 0.10),
            worth_something("overlap with the own object against another item's", "negative", targeted - elsewhere, measured.clusters),
        ],
        details={
            "heads": [list(head) for head in heads],
            "chosen on so many discovery items": {str(head): float(found.frequency[head]) for head in heads},
            "elbow": {"attention sum": found.threshold, "candidates": int(found.candidates.sum())},
            "monte_carlo_p": p_value,
            "monte_carlo_p, any layer": monte_carlo_p(targeted.mean(), anywhere.mean(1)),
            "overlap": {"targeted": targeted.mean(), "random, same layers": matched.mean(), "random, any layer": anywhere.mean()},
            "sink-aware": {"heads": [list(head) for head in aware], "overlap": set_scores(overlap, [aware]).mean() if aware else None},
            "literature": LITERATURE,
        },
    )
