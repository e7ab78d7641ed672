"""H1: what image tokens beside the asked object tell.

That hiding the background costs accuracy would not show that it *tells* something (attention that has nowhere to go is missed too). So the
object is hidden, in the item's own image and in another scene's: what the own background gives beyond the other one is information.
"""

import pytest

from hypotheses.h1.controls import pooled_baseline, pooled_grounding, worth_something
from reports import exhibits_tracing
from vlm_core.stats import Claim, Superiority, interval
from vlm_core.tracing.background import CONDITIONS

BACKGROUND = Claim(
    id="H1.background",
    sentence="With the asked object hidden from the text, the other image tokens still give at least 5 points over another scene's.",
    effect="accuracy(object's tokens hidden, own background) - accuracy(the same with another scene's background), paired per item",
    test=Superiority(0.05),
    source="Kim et al. 2025, arXiv:2509.17588; the design is ours",
    tier="exploratory",
)
LITERATURE = {"published": "image information is in background tokens too", "where": "LLaVA-1.5-7B and others, COCO"}


@pytest.mark.claim(BACKGROUND)
def test_the_background_tells_something_too(floors, without_object, evidence):
    exhibits_tracing.background(evidence, without_object, CONDITIONS)
    items, clusters, correct = without_object.correct.index, without_object.clusters, without_object.correct
    evidence.decide(
        BACKGROUND,
        without_object.gain(),
        clusters=clusters,
        baseline=pooled_baseline(floors, items),
        controls=[
            pooled_grounding(floors, items, BACKGROUND.test.threshold),
            worth_something("hiding the object against as many other tokens", "positive", without_object.object_worth(), clusters, 0.05),
        ],
        details={
            "gain": {name or "hidden": interval(without_object.gain(name), clusters).as_dict() for name in ("", "ring", "input")},
            "hiding the background costs": interval((correct["full"] - correct["own object"]).to_numpy(), clusters).as_dict(),
            "literature": LITERATURE,
        },
    )
