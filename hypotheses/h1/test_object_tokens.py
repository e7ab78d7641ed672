"""H1: what identifies an object sits in its own image tokens.

Its tokens become the mean visual token before the first layer, so that no layer ever sees them. How many rings of neighbours go with them is
chosen on discovery items: the smallest ring that costs more than 70 % of the accuracy, one ring where none does.

Controls are as many tokens from outside the object: random ones, and those of the highest norm. The latter are the method's register tokens
(norm above the mean by two standard deviations) as far as an image has them; it seldom has as many as an object has tokens, so they are called
what they are, and the details say how many are registers.
"""

import numpy as np
import pandas as pd
import pytest

from hypotheses.h1.controls import worth_something
from reports import exhibits
from vlm_core.stats import Baseline, Claim, Control, Superiority
from vlm_core.tracing.object_tokens import smallest_ring
from vlm_core.tracing.shares import estimate_share

SOURCE = "Neo et al., ICLR 2025"
LITERATURE = {"published": "object identification falls by more than 70 %", "where": "LLaVA-1.5-7B and others, COCO"}

OBJECT_TOKENS = Claim(
    id="H1.object_tokens",
    sentence="Mean-ablating the object's tokens costs at least 70 % of identification accuracy.",
    effect="(accuracy(full) - accuracy(object's tokens replaced)) / accuracy(full)",
    test=Superiority(0.70),
    source=SOURCE,
)
SPECIFIC = Claim(
    id="H1.object_tokens_specific",
    sentence="Mean-ablating the object's tokens costs at least 40 points of accuracy more than as many random, or high-norm, tokens.",
    effect="accuracy(other tokens replaced) - accuracy(object's tokens replaced), paired per item",
    test=Superiority(0.40),
    source=SOURCE,
)
NO_OTHERS = "every object, with its ring, fills more than half of the image's tokens: there are not as many others to compare with"


@pytest.mark.claim(OBJECT_TOKENS)
@pytest.mark.requires("replace_tokens")
def test_an_object_is_in_its_own_tokens(object_tokens, identification_floors, seed, evidence):
    ring, measured = smallest_ring(object_tokens("discovery")), object_tokens("confirmation")
    lost = measured.drop(f"object, ring {ring}")
    beyond_random = lost - measured.drop(f"random, ring {ring}")
    compared = np.isfinite(beyond_random)
    if not compared.any():
        evidence.decide(OBJECT_TOKENS, None, missing=NO_OTHERS)
        return
    baseline = identification_floors.of("identification")
    splits = {split: object_tokens(split) for split in ("discovery", "confirmation")}
    exhibits.masks.object_tokens(evidence, splits, ring, baseline.chance)
    evidence.table("baseline-metrics.csv", pd.DataFrame(identification_floors.rows))
    options = {"limits": (-1.0, 1.0), "smallest_alpha": evidence.alpha, "rng": seed}
    evidence.decide(
        OBJECT_TOKENS,
        estimate_share(lost, measured.correct["full"], measured.clusters, **options),
        missing="no answer is right with the object's tokens in place: there is no accuracy to lose",
        baseline=relative(baseline),
        controls=[
            identification_floors.grounded("identification", OBJECT_TOKENS.test.threshold * baseline.accuracy),
            worth_something("the object's tokens against random ones", "negative", beyond_random[compared], measured.clusters[compared]),
        ],
        details={
            "ring": ring,
            "discovery": {name: splits["discovery"].relative_drop(name) for name in splits["discovery"].replaced},
            "confirmation": {name: measured.relative_drop(name) for name in measured.replaced},
            "tokens replaced": measured.replaced,
            "literature": LITERATURE,
        },
    )


@pytest.mark.claim(SPECIFIC)
@pytest.mark.requires("replace_tokens")
@pytest.mark.parametrize("other", ["random", "high-norm"])
def test_other_tokens_do_not_hold_it(other, object_tokens, identification_floors, evidence):
    ring, measured = smallest_ring(object_tokens("discovery")), object_tokens("confirmation")
    effect = measured.drop(f"object, ring {ring}") - measured.drop(f"{other}, ring {ring}")
    compared = np.isfinite(effect)  # not where an object leaves fewer tokens outside than it has
    if not compared.any():
        evidence.decide(SPECIFIC, None, missing=NO_OTHERS)
        return
    evidence.decide(
        SPECIFIC,
        effect[compared],
        clusters=measured.clusters[compared],
        baseline=identification_floors.of("identification"),
        controls=[identification_floors.grounded("identification", SPECIFIC.test.threshold), as_many_others(compared)],
        details={
            "ring": ring,
            "tokens replaced": {name: float(measured.tokens[f"{name}, ring {ring}"][compared].mean()) for name in ("object", other)},
            "register tokens in an image": measured.registers,
            "register tokens among those of the highest norm": measured.registers_taken[ring],
            "literature": LITERATURE,
        },
    )


def as_many_others(compared) -> Control:
    """Objects that fill more than half of the image, ring included, have no counterpart of as many tokens and are left out."""
    out = int((~compared).sum())
    said = f"left out: {out} of {len(compared)} items, whose object with its ring leaves fewer tokens outside than it has" if out else ""
    return Control("items with as many tokens outside the object", "info", not out, float(np.mean(compared)), "all of them", said)


def relative(baseline) -> Baseline:
    """A baseline in the unit of a relative drop: shares of the untouched accuracy (of 1 where there is none)."""
    whole = baseline.accuracy or 1.0
    return Baseline(baseline.accuracy / whole, baseline.blind / whole, baseline.chance / whole)
