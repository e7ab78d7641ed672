"""H3: on-policy distillation: the student answers, the teacher says token by token what it would have said."""

import pytest

from fixtures.students import DIVERGENCE, crossed
from hypotheses.h3.controls import gains, whole
from vlm_core.stats import Claim, Superiority

ON_POLICY = Claim(
    id="H3.on_policy",
    sentence="Distillation on the student's own answers is at least 1 point better than as many more steps of supervised training on the teacher's.",
    effect="accuracy(after on-policy distillation) - accuracy(after more supervised training), paired per item, seeds crossed with items",
    test=Superiority(0.01),
    source="Agarwal et al. 2024, arXiv:2306.13649",
    tier="exploratory",
    direction="gain",
    min_seeds=3,
)


@pytest.mark.claim(ON_POLICY)
@pytest.mark.trained("on_policy", "more")
def test_on_policy_beats_more_supervised_training(floors, student_answers, runs_of, profile, evidence):
    runs = runs_of("on_policy", "more")
    after, against = ([student_answers(arm, run) for run in runs] for arm in ("on_policy", "more"))
    gain = crossed(gains(after, against), after[0])
    started = crossed(gains(after, [student_answers("sft", run) for run in runs]), after[0])
    evidence.decide(
        ON_POLICY,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(against, [student_answers("sft", run, blind="swap") for run in runs], floors),
        details={
            "over the student it goes on from": float(started["effect"].mean()),
            "divergence": "forward KL" if DIVERGENCE == 0 else DIVERGENCE,
            "steps": profile.stage_steps,
            "prompts_a_step": profile.stage_batch,
        },
    )
