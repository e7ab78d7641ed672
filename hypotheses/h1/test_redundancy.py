"""H1: single heads hardly matter one by one."""

import numpy as np
import pytest

from hypotheses.h1.controls import grounded_overall
from probes import GROUNDING_TASKS
from reports import exhibits_ablation as exhibits
from vlm_core.stats import Claim, Control, Superiority, interval

TOLERANCE = 0.05  # of the untouched logit

REDUNDANCY = Claim(
    id="H1.redundancy",
    sentence="At least 80 % of single-head ablations change the answer logit by less than 5 %.",
    effect="share of heads without whose sight of the image the answer logit changes by less than 5 % of its untouched size, per item",
    test=Superiority(0.80),
    source="Kim et al. 2025, arXiv:2509.17588",
)
LITERATURE = {"published": "80 % of single-head ablations change the logit by less than 5 %", "where": "LLaVA-1.5-7B, COCO"}


@pytest.mark.claim(REDUNDANCY)
def test_most_single_heads_change_little(floors, single_heads, evidence):
    measured = {task: single_heads(task, "confirmation", "logit") for task in GROUNDING_TASKS}
    unchanged, clusters = (np.concatenate(parts) for parts in zip(*((one.unchanged(TOLERANCE), one.clusters) for one in measured.values()), strict=True))
    exhibits.single_head_costs(evidence, measured, TOLERANCE)
    evidence.decide(
        REDUNDANCY,
        unchanged,
        clusters=clusters,
        controls=[grounded_overall(floors), all_heads_matter(measured)],
        bounds=(0.0, 1.0),
        details={
            "by_task": {task: float(one.unchanged(TOLERANCE).mean()) for task, one in measured.items()},
            "within 5 % of what the image does for the logit": {task: within_effect(one) for task, one in measured.items()},
            "literature": LITERATURE,
        },
    )


def all_heads_matter(measured) -> Control:
    """Without all heads at once the same logit must change by more than 5 % on most items: single heads do not pass because nothing does anything."""
    changed = np.concatenate([one.all_change(TOLERANCE) for one in measured.values()]).astype(float)
    found = interval(changed, np.concatenate([one.clusters for one in measured.values()]), bounds=(0.0, 1.0))
    return Control("all heads at once change the logit", "positive", found.lower > 0.5, found.lower, "a lower bound above half of the items")


def within_effect(one) -> float:
    """The same share with what the image does for the logit as the yardstick, which no constant added to all logits can change."""
    effect = np.abs(one.untouched - one.without_any)[:, None, None]
    return float((np.abs(one.cost) < TOLERANCE * effect).mean())
