"""H2 meets H1: grounding heads look at few tokens, and fewer tokens move which heads matter."""

import numpy as np
import pytest

from fixtures.measurements import TOP_HEADS
from hypotheses.h1.controls import grounded_overall, too_few_heads, usable_in_most_tasks
from reports import exhibits
from vlm_core.stats import Claim, Superiority

SOURCE = "after Kim et al. 2025, arXiv:2509.17588"
FEW = Claim(
    id="H2.heads",
    sentence="The quarter of image tokens that a grounding head looks at most holds at least 60 % of its attention on the image.",
    effect="share of the image attention of the top 10 % of heads on an item's most attended quarter of tokens",
    test=Superiority(0.60),
    source=SOURCE,
    tier="exploratory",
)
FEWER = Claim(
    id="H2.heads_specific",
    sentence="Grounding heads hold more of their image attention on a quarter of the tokens than other heads of the same layers do.",
    effect="the same share, less that of all other heads of their layers, paired per item",
    test=Superiority(0.0),
    source=SOURCE,
    tier="exploratory",
)
INTERACTION = Claim(
    id="H2.interaction",
    sentence="Dropping three quarters of the tokens moves which heads matter: rankings agree less across it than between halves of scenes.",
    effect="Spearman's ρ of what heads are worth between halves of scenes (geometric mean with all and a quarter of the tokens), less that across",
    test=Superiority(0.0),
    source="ours",
    tier="exploratory",
)


@pytest.mark.claim(FEW)
def test_grounding_heads_look_at_few_tokens(subject, floors, usable, pooled_attribution, token_masses, evidence):
    if few := too_few_heads(subject, TOP_HEADS):
        evidence.decide(FEW, None, missing=few)
        return
    compared = token_masses().compare(pooled_attribution.top(TOP_HEADS))
    exhibits.tokens.head_shares(evidence, token_masses(), pooled_attribution.top(TOP_HEADS))
    evidence.decide(
        FEW, compared["heads"], clusters=compared["cluster"], bounds=(0.0, 1.0), controls=[grounded_overall(floors), usable_in_most_tasks(usable(), floors)]
    )


@pytest.mark.claim(FEWER)
def test_they_look_at_fewer_than_other_heads(subject, floors, usable, pooled_attribution, token_masses, evidence):
    if few := too_few_heads(subject, TOP_HEADS):
        evidence.decide(FEWER, None, missing=few)
        return
    heads = pooled_attribution.top(TOP_HEADS)
    layers = {head.layer for head in heads}
    others = [head for head in subject.image_heads if head.layer in layers and head not in set(heads)]
    compared = token_masses().compare(heads, others)
    evidence.decide(
        FEWER,
        compared["difference"],
        clusters=compared["cluster"],
        controls=[grounded_overall(floors), usable_in_most_tasks(usable(), floors)],
        details={"other heads": float(np.mean(compared["others"]))},
    )


@pytest.mark.claim(INTERACTION)
def test_fewer_tokens_move_which_heads_matter(floors, heads_and_tokens, evidence):
    cell, found = heads_and_tokens()
    if found is None:
        return evidence.decide(INTERACTION, None, missing="halves of so few scenes tell nothing of a ranking")
    evidence.decide(
        INTERACTION,
        found.estimate,
        controls=[grounded_overall(floors)],
        details={
            "policy": cell.policy, "layer": cell.layer, "kept": cell.keep, "agreement across": found.across,
            "between halves": {"all tokens": found.reliabilities[0], "a quarter": found.reliabilities[1]},
        },
    )  # fmt: skip
