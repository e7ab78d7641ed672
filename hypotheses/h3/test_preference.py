"""H3: a preference stage lifts the trained student further.

The student's own samples and the teacher's answer are ranked by the teacher; direct preference optimisation goes on from the trained student with the
likeliest answer over the least likely one, an image-conditional term (the same answer given its image over it given another) and the answer's own loss.
As many steps on as many images are what it is compared with: of more supervised training on the teacher's answers, and (exploratory) on the chosen answers
of the same pairs, which says what the rejected ones add.
"""

import pytest

from fixtures.students import PREFERENCE, crossed
from hypotheses.h3.controls import gains, surely_above, whole
from vlm_core.stats import Claim, Control, Superiority

RAFAILOV = "Rafailov et al. 2023, arXiv:2305.18290; mDPO, Wang et al. 2024, arXiv:2406.11839"
PREFERRED = Claim(
    id="H3.preference",
    sentence="A preference stage on pairs that the teacher ranked lifts the student at least 1 point, over the student it goes on from and over as many more steps of supervised training.",
    effect="accuracy(after the preference stage) - accuracy(reference), paired per item, seeds crossed with items",
    test=Superiority(0.01),
    source=RAFAILOV,
    direction="gain",
    min_seeds=3,
)
REJECTED = Claim(
    id="H3.rejected",
    sentence="The rejected answers teach something: the preference stage is at least 1 point better than as many steps on the chosen answers alone.",
    effect="accuracy(after the preference stage) - accuracy(after as many steps on the chosen answers), paired per item, seeds crossed with items",
    test=Superiority(0.01),
    source=RAFAILOV,
    tier="exploratory",
    direction="gain",
    min_seeds=3,
)


def chosen_are_right(facts) -> Control:
    """Control: the teacher's ranking must know better than chance, or a gain is not its."""
    better = min(one["chosen right"] - one["rejected right"] for one in facts)
    return Control("chosen answers right more often than rejected ones", "positive", better > 0.1, better, "by more than 0.1 in every run")


@pytest.mark.claim(PREFERRED)
@pytest.mark.trained("preference", "swapped", "more")
@pytest.mark.parametrize("reference", ["sft", "more"])
def test_preferences_lift_the_student_further(reference, subject, floors, lessons, ranked, student_answers, pair_facts, runs_of, profile, evidence):
    runs = runs_of("preference", "swapped", reference)
    after, against = ([student_answers(arm, run) for run in runs] for arm in ("preference", reference))
    swapped = [student_answers("swapped", run) for run in runs]
    gain = crossed(gains(after, against), after[0])
    facts = [pair_facts(run) for run in runs]
    if reference == "sft":
        evidence.document("instruction-card.md", lessons.card({"kind": "subject", **subject.identity()}, ranked(0)))
    evidence.decide(
        PREFERRED,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(against, [student_answers("sft", run, blind="swap") for run in runs], floors),
        controls=[
            chosen_are_right(facts),
            surely_above("own images against another scene's", crossed(gains(after, swapped), after[0]), kind="condition"),
        ],
        details={"reference": reference, "steps": profile.stage_steps, "images_a_step": profile.stage_batch, **PREFERENCE, "pairs": facts},
    )


@pytest.mark.claim(REJECTED)
@pytest.mark.trained("preference", "chosen")
def test_rejected_answers_teach_something(floors, student_answers, pair_facts, runs_of, evidence):
    runs = runs_of("preference", "chosen")
    after, against = ([student_answers(arm, run) for run in runs] for arm in ("preference", "chosen"))
    gain = crossed(gains(after, against), after[0])
    evidence.decide(
        REJECTED,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(against, [student_answers("sft", run, blind="swap") for run in runs], floors),
        controls=[chosen_are_right([pair_facts(run) for run in runs])],
    )
