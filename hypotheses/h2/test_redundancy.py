"""H2: visual tokens grow more alike with depth."""

import pytest

from hypotheses.h1.controls import grounded_overall
from reports import exhibits
from vlm_core.stats import Claim, Trend, linear_contrast, page_p

SOURCE = "Chen et al. 2024, arXiv:2403.06764"
RANK = Claim(
    id="H2.redundancy_rank",
    sentence="The effective rank of an image's tokens falls with depth.",
    effect="slope per layer of exp(entropy of the singular values' shares), per item, counted downwards",
    test=Trend(),
    source=SOURCE,
    tier="exploratory",
)
NEAREST = Claim(
    id="H2.redundancy_nearest",
    sentence="The similarity of an image token to the most similar other one rises with depth.",
    effect="slope per layer of the mean cosine similarity to the nearest other token, per item",
    test=Trend(),
    source=SOURCE,
    tier="exploratory",
)
MEASURES = {RANK.id: ("effective rank", True), NEAREST.id: ("nearest", False)}


@pytest.mark.claim(RANK)
def test_the_rank_falls(floors, token_redundancy, evidence):
    decide(RANK, floors, token_redundancy, evidence)


@pytest.mark.claim(NEAREST)
def test_neighbours_come_closer(floors, token_redundancy, evidence):
    decide(NEAREST, floors, token_redundancy, evidence)


def decide(claim, floors, token_redundancy, evidence):
    found = token_redundancy()
    measure, falling = MEASURES[claim.id]
    values = found.of(measure)
    if values.shape[1] < 3:
        pytest.skip("a trend needs three places in the depth, and the subject has two")
    exhibits.tokens.redundancy(evidence, found, measure)
    evidence.decide(
        claim,
        linear_contrast(values, falling=falling),
        clusters=found.clusters,
        controls=[grounded_overall(floors)],
        p_value=page_p(values, found.clusters, falling=falling),
        details={"by layer": values.mean(0).tolist(), "layers": "what enters each layer, and last what enters the final norm"},
    )
