"""H2: half of the visual tokens can go from mid-depth on.

Policy and layer are chosen on discovery items, task by task; between policies that do equally well there, by how they do on all tasks and
by the margin of the answer. A dropped token leaves the sequence for good; kept tokens keep their
positions.
"""

import pandas as pd
import pytest

from hypotheses.h2.controls import LITERATURE, tokens_matter
from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.reduction.curves import choose_drop, early, losses, mid_depth
from vlm_core.stats import Claim, NonInferiority

NONINFERIOR = Claim(
    id="H2.noninferior",
    sentence="Dropping half of the visual tokens from mid-depth on costs less than 5 points of accuracy.",
    effect="accuracy(all tokens) - accuracy(half of them from the chosen layer on), paired per item",
    test=NonInferiority(0.05),
    source="Chen et al. 2024, arXiv:2403.06764",
)


@pytest.mark.claim(NONINFERIOR)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_half_of_the_tokens_can_go_from_mid_depth(task, subject, floors, curves, sensitivity, confirmed, policies, evidence):
    candidates = curves()[curves()["layer"].isin(mid_depth(subject)) & curves()["policy"].isin(policies.exact)]
    chosen, table = choose_drop(candidates, 0.5, task), curves()[curves()["task"] == task]
    lost = losses(confirmed(chosen, task), chosen)
    every = sensitivity()[sensitivity()["task"] == task]
    other_layers = every[~every["layer"].isin(table["layer"])]  # of evenly spaced tokens alone
    exhibits.tokens.drop_curves(evidence, pd.concat([table, other_layers]), task, early(subject))
    exhibits.tokens.layer_sensitivity(evidence, every, task, "stride", NONINFERIOR.test.margin)
    evidence.decide(
        NONINFERIOR,
        lost["loss"],
        clusters=lost["cluster"],
        baseline=floors.of(task),
        controls=[floors.grounded(task, NONINFERIOR.test.margin), tokens_matter(every, NONINFERIOR.test.margin)],
        details={
            "layer": chosen.layer, "policy": chosen.policy, "depth": subject.anatomy.n_layers, "literature": LITERATURE,
            "policies left out": dict(policies.missing),
        },
    )  # fmt: skip

