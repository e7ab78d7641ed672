"""H1, exploratory: where attribution lies, and whether attention gives it away.

Attributions are those of the discovery split. No head is chosen; depth is averaged over the tasks whose attribution predicts unseen masks on
these same items, and speaks of these alone.
"""

import pytest

from hypotheses.h1.controls import grounded_overall, prediction_of_unseen_masks, usable_in_most_tasks
from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.heads.agreement import attention_agreement, attribution_depth
from vlm_core.stats import Claim, Equivalence, Superiority

SOURCE = "Kim et al. 2025, arXiv:2509.17588"

DEPTH = Claim(
    id="H1.depth",
    sentence="Attribution of tasks in which it predicts unseen masks lies in the middle-to-late layers: its weighted mean depth is above one half.",
    effect="mean depth of heads, (layer + 0.5) / layers, weighted by positive attribution; mean over the tasks whose attribution predicts unseen masks",
    test=Superiority(0.5),
    source=SOURCE,
    tier="exploratory",
)
ATTENTION = Claim(
    id="H1.attention_is_not_attribution",
    sentence="Image attention does not predict attribution: their rank correlation over heads is below 0.3 in size.",
    effect="Spearman's ρ over heads between attention mass on the image and attribution, corrected for attenuation, task by task",
    test=Equivalence(0.3),
    source=SOURCE,
    tier="exploratory",
)


@pytest.mark.claim(DEPTH)
def test_attribution_lies_deep(floors, usable, seed, evidence):
    found = attribution_depth(usable(), smallest_alpha=evidence.alpha, rng=seed)
    exhibits.ablation.depth_profile(evidence, usable())
    evidence.decide(
        DEPTH,
        found.estimate,
        controls=[grounded_overall(floors), usable_in_most_tasks(usable(), floors)],
        details={"by_task": found.by_task, "literature": {"published": "important heads lie mid-to-late", "where": "LLaVA-1.5-7B, COCO"}},
    )


@pytest.mark.claim(ATTENTION)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_attention_is_no_attribution(task, floors, attribution, attention_masses, seed, evidence):
    ranked, masses = attribution(task), attention_masses(task)
    found = attention_agreement(ranked, masses, seed=seed)
    exhibits.ablation.attention_against_attribution(evidence, {task: ranked}, {task: masses})
    evidence.decide(
        ATTENTION,
        found.estimate,
        controls=[floors.grounded(task, 0.10), prediction_of_unseen_masks(ranked)],
        details={
            "measured": found.measured,
            "reliability of attribution": found.reliability,
            "literature": {"published": "attribution does not correlate with image attention", "where": "LLaVA-1.5-7B"},
        },
    )
