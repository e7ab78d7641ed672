"""H2: a learned gate chooses as well as the best heuristic.

The gate is trained on discovery items against the whole model's own next token, and needs no answers; the heuristic it is held against is the best of all exact policies on
discovery items.
"""

import pytest

from fixtures.token_measurements import KEPT
from hypotheses.h1.controls import grounded_overall
from hypotheses.h2.controls import better_than, left_by
from vlm_core.reduction.curves import Cell, choose_drop, early, losses
from vlm_core.stats import Claim, NonInferiority

GATE = Claim(
    id="H2.gate",
    sentence="At 25 % kept from an early layer on, a learned gate is less than 2 points worse than the best heuristic.",
    effect="accuracy(best heuristic) - accuracy(learned gate), paired per item, all tasks together",
    test=NonInferiority(0.02),
    source="after Rao et al. 2021, arXiv:2106.02034",
    tier="exploratory",
)


@pytest.mark.claim(GATE)
def test_a_learned_gate_is_no_worse_than_the_best_heuristic(subject, floors, policies, early_curves, confirmed, gated, evidence):
    layer, table = early(subject), early_curves()
    chosen = choose_drop(table[table["policy"].isin(policies.exact)], keep=KEPT)
    learned = losses(gated(layer, KEPT), Cell(layer, KEPT, "gate")).set_index("item")
    best = losses(confirmed(chosen), chosen).set_index("item").loc[learned.index]
    blind = losses(confirmed(Cell(layer, KEPT, "random")), Cell(layer, KEPT, "random")).set_index("item").loc[best.index]
    evidence.decide(
        GATE,
        learned["loss"] - best["loss"],
        clusters=best["cluster"],
        baseline=left_by(floors, best),
        controls=[grounded_overall(floors), better_than("the best heuristic against random tokens", blind["loss"] - best["loss"], best["cluster"])],
        details={"heuristic": chosen.policy, "layer": layer, "lost by the gate": float(learned["loss"].mean()), "by the heuristic": float(best["loss"].mean())},
    )
