"""H1: which heads an item uses follows what is asked for, not what the image looks like.

Each item's attribution comes from its own masks alone; only its direction counts.
"""

import pytest

from hypotheses.h1.controls import grounded_overall, prediction_of_unseen_masks
from reports import exhibits_h1
from vlm_core.heads.semantics import appearance, compare_labels, flat_map, usage
from vlm_core.stats import Claim, Superiority

SEMANTICS = Claim(
    id="H1.semantics",
    sentence="Head usage clusters by what is asked for, more than by low-level appearance.",
    effect="mean silhouette of head attributions by task - that by the strongest of brightness, texture and colours, as many groups each; "
    "labels exchanged between task and look, whole scenes together, must rarely do as much",
    test=Superiority(0.0),
    source="Kim et al. 2025, arXiv:2509.17588",
    tier="exploratory",
)


@pytest.mark.claim(SEMANTICS)
def test_items_that_ask_alike_use_the_same_heads(probes, profile, seed, floors, pooled_attribution, evidence):
    items = probes.some("discovery", profile.map_items)
    used, rows = usage(pooled_attribution.per_item)
    without, items = len(items) - len(rows), [items[row] for row in rows]
    tasks, clusters = [item["task"] for item in items], [item["scene_id"] for item in items]
    looks = appearance([item["image"] for item in items], len(set(tasks)), seed)
    found = compare_labels(used, tasks, looks, clusters, seed=seed)
    answers = compare_labels(used, [f"{item['task']}: {item['answer']}" for item in items], looks, clusters, seed=seed)
    exhibits_h1.usage_map(
        evidence,
        flat_map(used, seed),
        tasks,
        [item["id"] for item in items],
        {"task": found.agreement["semantic"], **{look: found.agreement[look] for look in looks}},
        found.p_value,
    )
    evidence.decide(
        SEMANTICS,
        found.gain,
        p_value=found.p_value,
        controls=[grounded_overall(floors, 0.2), prediction_of_unseen_masks(pooled_attribution)],
        details={
            "agreement": found.agreement,
            "items without attribution, left out": without,
            "strongest_look": found.strongest,
            "p_by_look": found.by_look,
            "agreement_by_task_and_answer": answers.agreement["semantic"],
        },
    )
