"""H3: distilling a teacher into a small student improves it.

The teacher is the subject under test, the student a small VLM of this repository, weakly pre-trained. Every run starts from the same student
and takes the same number of optimiser steps on the same number of images; runs differ in the order of the data. The teacher answers balanced
questions of all grounding tasks about new images; "the data it already had" is the student's own pre-training mix, in which some of them
are rare. The gain over it is therefore that of what a teacher adds, questions and answers together.
"""

import numpy as np
import pandas as pd
import pytest

from fixtures.students import ARMS
from probes import GROUNDING_TASKS
from reports import exhibits_students
from reports.exhibits_students import Stage
from vlm_core.stats import Baseline, Claim, Control, NonInferiority, Superiority

SOURCE = "Hinton et al. 2015, arXiv:1503.02531; LLaVA-KD, Cai et al. 2024, arXiv:2410.16236"
STAGES = {
    "before": Stage("baseline", False, None),
    "same data": Stage("more of the data it already had", False, "baseline"),
    "teacher": Stage("SFT on the teacher's answers", False, "baseline"),
}
LITERATURE = {"published": "54.7 to 57.9 mean score (LLaVA-KD, 0.5 B student)", "where": "five VQA benchmarks"}

SFT = Claim(
    id="H3.sft",
    sentence="Training the student on the teacher's answers lifts it at least 5 points, over itself before and over as many steps of the data it already had.",
    effect="accuracy(trained on the teacher's answers) - accuracy(reference), paired per item, seeds crossed with items",
    test=Superiority(0.05),
    source=SOURCE,
    direction="gain",
    min_seeds=3,
)
RETENTION = Claim(
    id="H3.retention",
    sentence="No task of the probe set falls by more than 5 points when the student is trained on the teacher's answers.",
    effect="accuracy(student before) - accuracy(trained on the teacher's answers), paired per item, seeds crossed with items",
    test=NonInferiority(0.05),
    source=SOURCE,
    min_seeds=3,
)


@pytest.mark.claim(SFT)
@pytest.mark.parametrize("reference", ["before", "same_data"])
def test_the_teachers_answers_lift_the_student(reference, floors, teacher_frame, student_answers, profile, evidence):
    runs = range(profile.sft_seeds)
    before, taught = [student_answers(None)], [student_answers("teacher", run) for run in runs]
    against = before * len(runs) if reference == "before" else [student_answers("same_data", run) for run in runs]
    gain = crossed([after["correct"].astype(float) - other["correct"].astype(float) for after, other in zip(taught, against, strict=True)], before[0])
    same = [student_answers(arm, r) for arm in ARMS[1:] for r in runs]
    exhibits_students.students(evidence, {"before": before, "same data": same, "teacher": taught}, STAGES)
    evidence.decide(
        SFT,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(before[0], student_answers(None, blind="swap"), floors),
        controls=[teacher_is_right(teacher_frame[1], before[0], SFT.test.threshold)],
        details={"reference": reference, "steps": profile.sft_steps, "images_a_step": profile.sft_batch, "literature": LITERATURE},
    )


@pytest.mark.claim(RETENTION)
@pytest.mark.parametrize("task", GROUNDING_TASKS)
def test_no_task_is_lost(task, student_answers, profile, floors, evidence):
    before = student_answers(None)
    mine = before["task"] == task
    loss = crossed([before["correct"].astype(float) - student_answers("teacher", run)["correct"].astype(float) for run in range(profile.sft_seeds)], before)
    rows = loss[loss["task"] == task]
    evidence.decide(
        RETENTION,
        rows["effect"],
        clusters=rows["cluster"],
        seeds=rows["seed"],
        baseline=Baseline(float(before[mine]["correct"].mean()), blind_accuracy(student_answers(None, blind="swap"), task), floors.chance[task]),
        details={"steps": profile.sft_steps, "runs": profile.sft_seeds},
    )


def crossed(effects, about) -> pd.DataFrame:
    """One row an (item, seed): effect, cluster, task, seed."""
    frames = [about[["item", "cluster", "task"]].assign(effect=np.asarray(effect), seed=seed) for seed, effect in enumerate(effects)]
    return pd.concat(frames, ignore_index=True)


def blind_accuracy(answers, task) -> float:
    """Accuracy of answers given to another scene's image."""
    return float(answers[answers["task"] == task]["correct"].mean())


def whole(before, blind, floors) -> Baseline:
    """The student before training, over all grounding tasks."""
    return Baseline(float(before["correct"].mean()), float(blind["correct"].mean()), float(np.mean(list(floors.chance.values()))))


def teacher_is_right(taught, before, threshold) -> Control:
    """The very answers that are taught must be right more often than the student already is; else a gain is not theirs, or a loss is one of form."""
    right, floor = float(taught["correct"].mean()), float(before["correct"].mean()) + threshold
    return Control("taught answers that are right", "positive", right > floor, right, f"more than {floor:.2f}")
