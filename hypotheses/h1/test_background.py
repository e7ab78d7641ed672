"""H1: what image tokens beside the asked object tell.

That hiding the background costs accuracy would not show that it *tells* something (attention that has nowhere to go is missed too). So the
object is hidden, in the item's own image and in another scene's: what the own background gives beyond the other one is information. Another
scene's image may also mislead, and then any background beats it: that the own one beats no image at all is a condition.
"""

import pytest

from hypotheses.h1.controls import pooled_baseline, pooled_grounding, worth_something
from reports import exhibits
from vlm_core.stats import Claim, Control, Superiority, estimate_mean, interval
from vlm_core.tracing.background import CONDITIONS

BACKGROUND = Claim(
    id="H1.background",
    sentence="With the asked object hidden from the text, the other image tokens still give at least 5 points over another scene's.",
    effect="accuracy(object's tokens hidden, own background) - accuracy(the same with another scene's background), paired per item; condition: "
    "accuracy(object's tokens hidden, own background) - accuracy(every image token hidden) is above 0",
    test=Superiority(0.05),
    source="Kim et al. 2025, arXiv:2509.17588; the design is ours",
    tier="exploratory",
)
LITERATURE = {"published": "image information is in background tokens too", "where": "LLaVA-1.5-7B and others, COCO"}


@pytest.mark.claim(BACKGROUND)
def test_the_background_tells_something_too(floors, without_object, evidence):
    exhibits.tracing.background(evidence, without_object, CONDITIONS)
    items, clusters, correct = without_object.correct.index, without_object.clusters, without_object.correct
    evidence.decide(
        BACKGROUND,
        without_object.gain(),
        clusters=clusters,
        baseline=pooled_baseline(floors, items),
        controls=[
            pooled_grounding(floors, items, BACKGROUND.test.threshold),
            worth_something("hiding the object against as many other tokens", "positive", without_object.object_worth(), clusters, 0.05),
            beats_nothing(without_object, evidence),
        ],
        details={
            "gain": {name or "hidden": interval(without_object.gain(name), clusters).as_dict() for name in ("", "ring", "input")},
            "own background beyond no image": interval(without_object.beyond_nothing(), clusters).as_dict(),
            "hiding the background costs": interval((correct["full"] - correct["own object"]).to_numpy(), clusters).as_dict(),
            "literature": LITERATURE,
        },
    )


def beats_nothing(without_object, evidence) -> Control:
    """The own background must tell something, not only mislead less than another scene's."""
    alpha = evidence.alpha
    lower, _ = estimate_mean(without_object.beyond_nothing(), without_object.clusters, smallest_alpha=alpha, rng=evidence.seed).bounds(alpha)
    return Control("own background against no image", "condition", lower > 0, lower, "a lower bound above 0")
