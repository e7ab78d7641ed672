"""H2: a budget that follows the image and the question does better than an even one of equal mean.

Tokens go as early as the question can be read as a whole: words have attended to one another in one layer, and the next has read them. The mean is 160 of 1,024 in proportion, between 64 and 400 for regions at that scale. Both budgets rank tokens by the same scores. The control asks
each image another item's question, and must lose.
"""

import pytest

from hypotheses.h1.controls import grounded_overall
from hypotheses.h2.controls import as_many_tokens, better_than, left_by
from reports import exhibits
from vlm_core.reduction.curves import Cell, asked_by, losses
from vlm_core.stats import Claim, Superiority

KEPT = 160 / 1024
RELEVANCE = Claim(
    id="H2.relevance",
    sentence="A budget that follows image and question is at least 2 points better than an even one of equal mean.",
    effect="accuracy(relevance budget) - accuracy(even budget), paired per item, all tasks together",
    test=Superiority(0.02),
    source="ARR-COC (seed document); a reconstruction",
    tier="exploratory",
    direction="gain",
)


@pytest.mark.claim(RELEVANCE)
def test_a_budget_that_follows_the_question_pays(subject, floors, budgets, budget_totals, budget_maps, evidence):
    layer = asked_by(subject)
    measured = budgets(layer, KEPT)
    ours, even, shuffled = (losses(measured, Cell(layer, KEPT, name)).set_index("item") for name in ("relevance", "even", "another question"))
    exhibits.tokens.relevance(evidence, *budget_maps(layer, KEPT))
    evidence.decide(
        RELEVANCE,
        even["loss"] - ours["loss"],
        clusters=ours["cluster"],
        baseline=left_by(floors, even),
        controls=[
            grounded_overall(floors),
            as_many_tokens(*budget_totals(layer, KEPT)),
            better_than("the item's own question against another item's", shuffled["loss"] - ours["loss"], ours["cluster"]),
        ],
        details={
            "layer": layer, "kept": KEPT, "tokens on average, relevance and even": budget_totals(layer, KEPT),
            "lost": {"relevance": float(ours["loss"].mean()), "even": float(even["loss"].mean()), "another question": float(shuffled["loss"].mean())},
        },
    )  # fmt: skip
