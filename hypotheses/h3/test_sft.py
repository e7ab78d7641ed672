"""H3: training a small student on a teacher's answers improves it.

The teacher is the subject under test, the student a small VLM of this repository, weakly pre-trained. Every run starts from the same student
and takes the same number of optimiser steps on the same number of images; runs differ in the order of the data. The teacher answers balanced
questions of all grounding tasks about new images; "the data it already had" is the student's own pre-training mix, in which some of them
are rare. The gain over it is therefore that of what a teacher adds, questions and answers together.
"""

import pytest

from fixtures.students import crossed
from hypotheses.h3.controls import HINTON, LITERATURE, LLAVA_KD, by_task, correct, gains, teacher_is_right, whole
from probes import GROUNDING_TASKS
from reports import exhibits
from vlm_core.stats import Baseline, Claim, NonInferiority, Superiority

SFT = Claim(
    id="H3.sft",
    sentence="Training the student on the teacher's answers lifts it at least 5 points, over itself before and over as many steps of the data it already had.",
    effect="accuracy(trained on the teacher's answers) - accuracy(reference), paired per item, seeds crossed with items",
    test=Superiority(0.05),
    source=f"{HINTON}; {LLAVA_KD}",
    direction="gain",
    min_seeds=3,
)
RETENTION = Claim(
    id="H3.retention",
    sentence="No task of the probe set falls by more than 5 points when the student is trained on the teacher's answers.",
    effect="accuracy(student before) - accuracy(trained on the teacher's answers), paired per item, seeds crossed with items",
    test=NonInferiority(0.05),
    source=f"{HINTON}; {LLAVA_KD}",
    min_seeds=3,
)


@pytest.mark.claim(SFT)
@pytest.mark.trained("sft", "same_data")
@pytest.mark.parametrize("reference", ["before", "same_data"])
def test_the_teachers_answers_lift_the_student(reference, probes, floors, lessons, student_answers, runs_of, profile, evidence):
    before, runs = student_answers(None), runs_of("sft", "same_data")
    if reference == "before":
        images = {item["id"]: item["image"] for item in probes.some("confirmation")}
        exhibits.students.errors(evidence, before, [student_answers("sft", run) for run in runs], images.get)
    against = [before if reference == "before" else student_answers("same_data", run) for run in runs]
    gain = crossed(gains([student_answers("sft", run) for run in runs], against), before)
    evidence.decide(
        SFT,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole([before], [student_answers(None, blind="swap")], floors),
        controls=[teacher_is_right(lessons, before, SFT.test.threshold)],
        details={"reference": reference, "steps": profile.sft_steps, "images_a_step": profile.sft_batch, "by task": by_task(gain), "literature": LITERATURE},
    )


@pytest.mark.claim(RETENTION)
@pytest.mark.trained("sft")
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_no_task_is_lost(task, student_answers, runs_of, profile, floors, evidence):
    before, blind, runs = student_answers(None), student_answers(None, blind="swap"), runs_of("sft")
    loss = crossed(gains([before] * len(runs), [student_answers("sft", run) for run in runs]), before)
    rows = loss[loss["task"] == task]
    accuracy, floor = (float(correct(frame[frame["task"] == task]).mean()) for frame in (before, blind))
    evidence.decide(
        RETENTION,
        rows["effect"],
        clusters=rows["cluster"],
        seeds=rows["seed"],
        baseline=Baseline(accuracy, floor, floors.chance[task]),
        controls=[floors.grounded(task, RETENTION.test.margin)],
        details={"steps": profile.sft_steps, "runs": len(runs)},
    )
