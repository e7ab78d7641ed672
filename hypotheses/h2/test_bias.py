"""H2: attention-based keeping leans to one side of the image, and keeping without rotary positions does not.

To which side is chosen on discovery items. Half of the tokens go at the early layer, whatever the question.
"""

import pytest

from hypotheses.h1.controls import grounded_overall
from reports import exhibits
from vlm_core.stats import Claim, Control, Equivalence, Superiority

SMALL = 0.1  # Cohen's w that counts as a small effect (Cohen 1988)
SOURCE = "Endo et al. 2024, arXiv:2412.13180"
LITERATURE = {"published": "at a quarter kept, tokens chosen by attention lie at 80.7 % of the image's height on average, 50 % being even", "where": "LLaVA-1.5-7B"}
LEANS = Claim(
    id="H2.bias",
    sentence="Tokens kept by attention lie at least 5 % of the image's height to one side of where tokens lie on average.",
    effect="mean height of an item's kept tokens less that of all, towards the side found on discovery items",
    test=Superiority(0.05),
    source=SOURCE,
    tier="exploratory",
)
EVEN = Claim(
    id="H2.bias_removed",
    sentence="Tokens kept by attention without rotary positions lie within 5 % of the image's height of where tokens lie on average.",
    effect="mean height of an item's kept tokens less that of all; no row favoured by more than a small effect",
    test=Equivalence(0.05),
    source=SOURCE,
    tier="exploratory",
)


@pytest.mark.claim(LEANS)
def test_attention_leans_to_one_side(floors, rows_kept, evidence):
    side = 1.0 if rows_kept("discovery", "fastv").bias().mean() >= 0 else -1.0
    found = rows_kept("confirmation", "fastv")
    exhibits.tokens.kept_rows(evidence, found, "fastv")
    fit = found.fit()
    evidence.decide(
        LEANS,
        side * found.bias(),
        clusters=found.clusters,
        controls=[grounded_overall(floors)],
        p_value=fit.p_value,
        details={"towards": "the bottom" if side > 0 else "the top", "Cohen's w": fit.w, "chi2": fit.chi2, "literature": LITERATURE},
    )


@pytest.mark.claim(EVEN)
def test_without_rotary_positions_it_does_not(floors, rows_kept, policies, evidence):
    if "debiased" not in policies.reducers:
        evidence.decide(EVEN, None, missing=policies.missing.get("debiased", "no layer's attention takes rotary positions"))
        return
    found = rows_kept("confirmation", "debiased")
    exhibits.tokens.kept_rows(evidence, found, "debiased")
    fit = found.fit()
    evidence.decide(
        EVEN,
        found.bias(),
        clusters=found.clusters,
        controls=[grounded_overall(floors), Control("rows kept as evenly as a small effect allows", "condition", fit.w < SMALL, fit.w, f"Cohen's w below {SMALL:g}")],
        details={"chi2": fit.chi2, "p": fit.p_value, "literature": LITERATURE},
    )
