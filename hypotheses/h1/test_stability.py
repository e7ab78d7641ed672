"""H1: the ranking of heads belongs to the task, not to the scenes or the words it was measured with.

The rankings compared are those made on the discovery split: of two halves of its scenes, and of the same scenes with the question in other
words. No head is chosen, but tasks are, on these same items: those whose linear models predict unseen masks, and of these alone the claim
speaks. Items are fitted one by one, under masks of their own, so that halves have nothing in common but
the model.
"""

import pytest

from hypotheses.h1.controls import grounded_overall, usable_in_most_tasks
from vlm_core.heads.agreement import scene_agreement, wording_agreement
from vlm_core.stats import Claim, Superiority

STABILITY = Claim(
    id="H1.stability",
    sentence="The head ranking of tasks whose attribution predicts unseen masks agrees across disjoint scenes and across prompt paraphrases "
    "(Kendall's W of at least 0.7).",
    effect="Kendall's W to be expected of two rankings of all heads by attribution, on scenes drawn anew and as many as here: each on half "
    "of a task's discovery scenes, or both on the same scenes in two wordings; mean over the tasks whose attribution predicts unseen masks",
    test=Superiority(0.70),
    source="Kim et al. 2025, arXiv:2509.17588",
)


@pytest.mark.claim(STABILITY)
@pytest.mark.parametrize("across", ["scenes", "paraphrases"])
def test_rankings_agree(across, seed, floors, usable, reworded, evidence):
    rankings = usable()
    if across == "scenes":
        found = scene_agreement(rankings, parts=2, seed=seed)
    else:
        others = {task: reworded(task) for task in rankings}
        found = wording_agreement({task: (rankings[task].first(other.n_items), other) for task, other in others.items()})
    evidence.decide(
        STABILITY,
        found.estimate,
        controls=[grounded_overall(floors), usable_in_most_tasks(rankings, floors)],
        details={"by_task": found.by_task, "unrelated rankings would have": 0.5},
    )
