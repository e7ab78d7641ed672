"""H3: answers that name where teach more than answers alone.

Where every arm is trained, a placebo stands beside them: answers as long that name other items' places.
"""

import pytest

from fixtures.students import crossed
from hypotheses.h3.controls import gains, some_gain, surely_above, teacher_is_right, whole
from vlm_core.stats import Claim, Superiority

GROUNDED = Claim(
    id="H3.grounded_answers",
    sentence="Trained on answers that go on to name where, the student is at least 1 point better than trained on the answers alone.",
    effect="accuracy(trained on grounded answers) - accuracy(trained on the answers alone), paired per item, seeds crossed with items",
    test=Superiority(0.01),
    source="after Chen et al. 2023 (Shikra), arXiv:2306.15195",
    direction="gain",
    min_seeds=3,
)


@pytest.mark.claim(GROUNDED)
@pytest.mark.trained("grounded", "sft", "misplaced")
def test_answers_that_name_where_teach_more(floors, lessons, student_answers, runs_of, profile, evidence):
    before, runs = student_answers(None), runs_of("grounded", "sft")
    after, against = ([student_answers(arm, run) for run in runs] for arm in ("grounded", "sft"))
    gain = crossed(gains(after, against), before)
    placebo = []
    if profile.every_arm:
        misplaced = [student_answers("misplaced", run) for run in runs_of("grounded", "misplaced")]
        over = crossed(gains(after[: len(misplaced)], misplaced), before)
        placebo = [surely_above("own places against other items' places", over, kind="condition")]
    evidence.decide(
        GROUNDED,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(against, [student_answers("sft", run, blind="swap") for run in runs], floors),
        controls=[teacher_is_right(lessons, before, 0.0), some_gain(after, before), *placebo],
        details={
            "steps": profile.sft_steps, "images_a_step": profile.sft_batch, "places": "rows and columns of all objects asked about, from the scene",
            "placebo": "other items' places" if placebo else "not trained in this profile",
        },
    )  # fmt: skip
