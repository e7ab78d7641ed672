"""H3: the student is worth its training: what every arm came to and took, and what the student costs beside its teacher."""

import pytest

from fixtures.arms import ARMS
from fixtures.student_results import UNTRAINED
from hypotheses.h2.controls import nothing_saves_nothing
from reports import exhibits
from reports.exhibits.students import Stage
from vlm_core.stats import Claim, Superiority

CHEAPER = Claim(
    id="H3.student_cost",
    sentence="The student takes at least a quarter less time to its first token than its teacher.",
    effect="1 - seconds(student) / seconds(teacher) to the first token of a batch, per paired round",
    test=Superiority(0.25),
    source="after LLaVA-KD, Cai et al. 2024, arXiv:2410.16236",
    tier="exploratory",
    unit="paired round",
)


@pytest.mark.claim(CHEAPER)
@pytest.mark.trained(*ARMS)
def test_the_student_answers_sooner_than_its_teacher(results, spent, beside_the_teacher, evidence):
    found = results()
    stages = {name: Stage(arm.label, arm.reduced, ARMS[arm.after].label if arm.after else "before training") for name, arm in ARMS.items()}
    untrained = {name: Stage("before training", reduced, None) for name, reduced in UNTRAINED.items()}
    exhibits.students.students(evidence, found.answers, {**untrained, **stages})
    words = {"before_reduced": "before, fewer tokens", **{name: arm.words for name, arm in ARMS.items()}}
    exhibits.students.ablations(evidence, found.contrasts().replace({"arm": words, "against": words}))
    exhibits.students.costs(evidence, spent())
    costs, rounds = beside_the_teacher()
    exhibits.students.student_against_teacher(evidence, costs)
    times = rounds.pivot(index="round", columns="model", values="first_token")
    saved = {model: (1 - times[model] / times["teacher"]).rename("saved").reset_index() for model in ("student", "teacher again")}
    evidence.decide(
        CHEAPER,
        saved["student"]["saved"],
        clusters=saved["student"]["round"],
        bounds=None,  # a round that something held up saves less than nothing, without limit
        controls=[nothing_saves_nothing(saved["teacher again"])],
        details={"arms without students": dict(found.missing)} if found.missing else None,
    )
