"""H3: what the student gains it sees: shown another scene's image it gains nothing."""

import pytest

from fixtures.students import crossed
from hypotheses.h3.controls import by_task, gains, surely_above
from vlm_core.stats import Claim, Equivalence

USES_IMAGE = Claim(
    id="H3.uses_image",
    sentence="Shown another scene's image, the trained student is within 3 points of the student before training: the gain vanishes.",
    effect="accuracy(trained, another scene's image) - accuracy(before, another scene's image), paired per item, seeds crossed with items",
    test=Equivalence(0.03),
    source="the blind baseline of Goyal et al. 2017, arXiv:1612.00837",
    min_seeds=3,
)


@pytest.mark.claim(USES_IMAGE)
@pytest.mark.trained("sft")
def test_the_gain_vanishes_without_the_image(student_answers, runs_of, evidence):
    before, blind, runs = student_answers(None), student_answers(None, blind="swap"), runs_of("sft")
    seeing = crossed(gains([student_answers("sft", run) for run in runs], [before] * len(runs)), before)
    unseeing = crossed(gains([student_answers("sft", run, blind="swap") for run in runs], [blind] * len(runs)), blind)
    evidence.decide(
        USES_IMAGE,
        unseeing["effect"],
        clusters=unseeing["cluster"],
        seeds=unseeing["seed"],
        controls=[surely_above("a gain with the own image", seeing, USES_IMAGE.test.margin)],
        details={"gain with the own image": float(seeing["effect"].mean()), "blind before": float(blind["correct"].mean()), "by task": by_task(unseeing)},
    )
