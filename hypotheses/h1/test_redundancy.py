"""H1: single heads hardly matter one by one.

One claim a task: a share over all tasks together would hide a task whose answers single heads do carry. The logit is raw, at the answer's first
token that tells the candidates apart: 5 % of a log-probability near zero would be nothing, and any head would be above it.
"""

import numpy as np
import pytest

from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.stats import Claim, Control, Superiority, interval

TOLERANCE = 0.05  # of the untouched logit

REDUNDANCY = Claim(
    id="H1.redundancy",
    sentence="At least 80 % of single-head ablations change the answer logit by less than 5 %.",
    effect="share of heads without whose sight of the image the answer logit changes by less than 5 % of its untouched size, per item; logit: raw, "
    "of the answer's first token that tells the candidates apart",
    test=Superiority(0.80),
    source="Kim et al. 2025, arXiv:2509.17588",
)
LITERATURE = {"published": "80 % of single-head ablations change the logit by less than 5 %", "where": "LLaVA-1.5-7B, COCO"}


@pytest.mark.claim(REDUNDANCY)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_most_single_heads_change_little(task, floors, single_heads, evidence):
    measured = single_heads(task, "confirmation", "logit")
    exhibits.ablation.single_head_costs(evidence, task, measured, TOLERANCE)
    evidence.decide(
        REDUNDANCY,
        measured.unchanged(TOLERANCE),
        clusters=measured.clusters,
        controls=[floors.grounded(task, 0.10), all_heads_matter(measured)],
        bounds=(0.0, 1.0),
        details={"within 5 % of what the image does for the logit": within_effect(measured), "literature": LITERATURE},
    )


def all_heads_matter(measured) -> Control:
    """Without all heads at once the same logit must change by more than 5 % on most items: single heads do not pass because nothing does anything."""
    found = interval(measured.all_change(TOLERANCE).astype(float), measured.clusters, bounds=(0.0, 1.0))
    return Control("all heads at once change the logit", "positive", found.lower > 0.5, found.lower, "a lower bound above half of the items")


def within_effect(one) -> float:
    """The same share with what the image does for the logit as the yardstick, which no constant added to all logits can change."""
    return float(one.within(TOLERANCE * np.abs(one.untouched - one.without_any)).mean())
