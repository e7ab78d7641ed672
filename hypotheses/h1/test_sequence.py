"""H1: what comes first to where the answer is read, text or image."""

import pytest

from hypotheses.h1.controls import pooled_grounding, worth_something
from reports import exhibits
from vlm_core.stats import Claim, Superiority, estimate_statistic

SEQUENCE = Claim(
    id="H1.sequence",
    sentence="The question reaches the role tokens and the last token in earlier layers than the image reaches the text.",
    effect="mean depth at which the image's information leaves its tokens for the text after them - mean depth at which the question's "
    "reaches role and last tokens, as shares of all layers, pooled over items; depth: area under what cutting edges from a layer on "
    "costs, of what cutting all costs",
    test=Superiority(0.0),
    source="Kim et al. 2025, arXiv:2509.17588; the measure of depth is ours",
    tier="exploratory",
)
LITERATURE = {"published": "text reaches role tokens and the last token before the image does", "where": "LLaVA-1.5-7B and others, COCO"}


@pytest.mark.claim(SEQUENCE)
def test_text_arrives_before_the_image(floors, arrivals, evidence):
    exhibits.tracing.arrival_curves(evidence, arrivals)
    alpha = evidence.alpha
    whole = {route: arrivals.lost[route][:, 0] for route in arrivals.lost}
    others = {
        "image, direct to role and last tokens": arrivals.lag("image, direct"),
        "cut up to a layer instead of from it on": arrivals.lag(before=True),
    }
    evidence.decide(
        SEQUENCE,
        estimate_statistic(arrivals.lag(), arrivals.clusters, smallest_alpha=alpha, rng=evidence.seed),
        controls=[
            pooled_grounding(floors, arrivals.items, 0.05),
            worth_something("the question is needed where the answer is read", "positive", whole["text"], arrivals.clusters),
            worth_something("the image is needed by the text", "positive", whole["image"], arrivals.clusters),
        ],
        details={
            "depth": {route: exhibits.tracing.share_with_interval(arrivals.depth(route), arrivals.clusters) for route in arrivals.lost},
            "depth_difference": {name: exhibits.tracing.share_with_interval(lag, arrivals.clusters) for name, lag in others.items()},
            "literature": LITERATURE,
        },
    )
