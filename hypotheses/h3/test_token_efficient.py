"""H3: a student trained and run with H2's recipe keeps what it gains, at fewer operations."""

import pytest

from fixtures.students import crossed
from hypotheses.h3.controls import by_task, gains, some_gain, whole
from vlm_core.stats import Claim, Control, NonInferiority

MOST = 0.75  # of the operations of a prompt
EFFICIENT = Claim(
    id="H3.token_efficient",
    sentence="Trained and run with H2's recipe, the student loses less than 5 points, at no more than 75 % of the operations.",
    effect="accuracy(trained and run with all visual tokens) - accuracy(trained and run with the recipe), paired per item, seeds crossed with items",
    test=NonInferiority(0.05),
    source="after LLaVA-PruMerge, Shang et al. 2024, arXiv:2403.15388",
    min_seeds=3,
)


@pytest.mark.claim(EFFICIENT)
@pytest.mark.trained("reduced", "sft")
def test_fewer_tokens_cost_little(floors, student_recipe, student_operations, student_answers, runs_of, evidence):
    runs = runs_of("reduced", "sft")
    whole_tokens, fewer = ([student_answers(arm, run) for run in runs] for arm in ("sft", "reduced"))
    loss = crossed(gains(whole_tokens, fewer), whole_tokens[0])
    share = student_operations(reduced=True) / student_operations(reduced=False)
    recipe = student_recipe()
    evidence.decide(
        EFFICIENT,
        loss["effect"],
        clusters=loss["cluster"],
        seeds=loss["seed"],
        baseline=whole(whole_tokens, [student_answers("sft", run, blind="swap") for run in runs], floors),
        controls=[
            some_gain(fewer, student_answers(None)),
            Control("operations of a prompt, of those with all tokens", "condition", share <= MOST, share, f"at most {MOST:g}"),
        ],
        details={"policy": recipe.policy, "kept": recipe.keep, "by task": by_task(loss)},
    )
