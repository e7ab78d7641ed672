"""H1: which heads an item uses follows what is asked for and what is shown, not what the image looks like.

Each item's attribution comes from its own masks alone; only its direction counts. What is asked for is the task. What is shown is the answer's label
among items of one task, so that the question is the same and the scene alone tells one from another.
"""

from collections import Counter

import numpy as np
import pytest

from hypotheses.h1.controls import grounded_overall, prediction_of_unseen_masks
from reports import exhibits
from vlm_core import HeadAttribution
from vlm_core.heads.semantics import appearance, appearance_within, compare_labels, flat_map, usage
from vlm_core.stats import Claim, Superiority

SEMANTICS = Claim(
    id="H1.semantics",
    sentence="Head usage clusters by what is asked for and shown, more than by low-level appearance.",
    effect="mean silhouette of head attributions by task (asked), or by answer among the items of each task (shown) - that by the strongest of "
    "brightness, texture and colours, as many groups each; labels exchanged between the two, whole scenes together, must rarely do as much, nor "
    "may answers shuffled within tasks do as well",
    test=Superiority(0.0),
    source="Kim et al. 2025, arXiv:2509.17588",
    tier="exploratory",
)


@pytest.mark.claim(SEMANTICS)
@pytest.mark.parametrize("about", ["asked", "shown"])
def test_items_that_mean_alike_use_the_same_heads(about, probes, profile, seed, floors, attribution, pooled_attribution, evidence):
    ranked, items = pooled_attribution, probes.some("discovery", profile.map_items)
    if about == "shown":  # there are more answers than tasks: every item that has an attribution
        ranked = HeadAttribution.pooled([attribution(task) for task in probes.tasks])
        items = probes.some("discovery", profile.discovery_items)
    used, rows = usage(ranked.per_item)
    without, items = len(items) - len(rows), [items[row] for row in rows]
    kept = np.arange(len(items)) if about == "asked" else told_apart(items)
    used, items = used[kept], [items[k] for k in kept]
    tasks, answers, images, clusters = ([item[name] for item in items] for name in ("task", "answer", "image", "scene_id"))
    if len(set(tasks)) < (2 if about == "asked" else 1):
        said = f"the items that some head matters in are all of task {tasks[0]}" if tasks else "no task has two answers of which one is given twice"
        return evidence.decide(SEMANTICS, None, missing=f"{said}: there are no groups to compare")
    if about == "asked":
        found = compare_labels(used, tasks, appearance(images, len(set(tasks)), seed), clusters, seed=seed)
        named = {"task" if name == "semantic" else name: value for name, value in found.agreement.items()}
        exhibits.heads.usage_map(evidence, flat_map(used, seed), tasks, [item["id"] for item in items], named, found.p_value)
    else:
        found = compare_labels(used, answers, appearance_within(images, answers, tasks, seed), clusters, within=tasks, seed=seed)
        exhibits.heads.shuffled_answers(evidence, found, Counter(tasks))
    evidence.decide(
        SEMANTICS,
        found.gain,
        p_value=found.p_value,
        controls=[grounded_overall(floors, 0.2), prediction_of_unseen_masks(ranked)],
        details={
            "agreement": found.agreement,
            "items without attribution, left out": without,
            "strongest_look": found.strongest,
            "p_by_look": found.by_look,
            "p_of_labels_shuffled_within_tasks": found.p_shuffled,
            "items_by_task": dict(Counter(tasks)),
        },
    )


def told_apart(items) -> list[int]:
    """Items of tasks with two answers or more, one of them given twice: those whose answers can agree with anything."""
    answers = {task: Counter(item["answer"] for item in items if item["task"] == task) for task in {item["task"] for item in items}}
    some = {task for task, given in answers.items() if len(given) > 1 and max(given.values()) > 1}
    return [k for k, item in enumerate(items) if item["task"] in some]
