"""H3: low-rank updates of the layers that H1 ranks top gain more than of others.

The ranking is Head Impact, of the student's own heads on discovery items: how much their attention overlaps with the object that is asked about. Adapters are
of rank 8 on queries, keys and values of as many layers in each arm, so parameters and steps are equal.
"""

import numpy as np
import pytest

from fixtures.students import crossed
from hypotheses.h3.controls import correct, gains, some_gain, whole
from vlm_core.stats import Baseline, Claim, NonInferiority, Superiority, estimate_mean

SOURCE = "Sergeev & Kotelnikov 2025, arXiv:2511.23375"
INFORMED = Claim(
    id="H3.head_informed",
    sentence="Low-rank tuning of the layers whose heads overlap most with objects gains at least 2 points more than of the other layers.",
    effect="accuracy(top layers tuned) - accuracy(other layers tuned), paired per item, seeds crossed with items",
    test=Superiority(0.02),
    source=SOURCE,
    direction="gain",
    min_seeds=3,
)
FORGETTING = Claim(
    id="H3.forgetting",
    sentence="Tuning the top layers costs less than 5 points on a task that is not trained.",
    effect="accuracy(before) - accuracy(top layers tuned) on captions, paired per item, seeds crossed with items",
    test=NonInferiority(0.05),
    source=SOURCE,
    tier="exploratory",
    min_seeds=3,
)
PUBLISHED = {"published": "perplexity 9.85 to 8.88 (top four layers, PaliGemma2), others negligible", "where": "image captioning"}


def perplexity(frame) -> float:
    """Of the right answers, each as a whole."""
    return float(np.exp(-np.mean([scores[answer] for scores, answer in zip(frame["logits"], frame["answer"], strict=True)])))


@pytest.mark.claim(INFORMED)
@pytest.mark.trained("top", "bottom", "random")
@pytest.mark.parametrize("against", ["bottom", "random"])
def test_top_layers_gain_more(against, floors, student_impact, adapted_layers, student_answers, runs_of, profile, evidence):
    before, runs = student_answers(None), runs_of("top", against)
    tuned = {arm: [student_answers(arm, run) for run in runs] for arm in ("top", against)}
    gain = crossed(gains(tuned["top"], tuned[against]), before)
    over_before = {arm: crossed(gains(frames, [before] * len(runs)), before) for arm, frames in tuned.items()}
    evidence.decide(
        INFORMED,
        gain["effect"],
        clusters=gain["cluster"],
        seeds=gain["seed"],
        baseline=whole(tuned[against], [student_answers(None, blind="swap")], floors),
        controls=[some_gain(tuned["top"], before)],
        details={
            "layers": {arm: [list(getattr(adapted_layers(run), arm)) for run in runs] for arm in tuned},
            "head impact by layer": student_impact.scores.mean(1).tolist(),
            "gain over the student before": {arm: float(rows["effect"].mean()) for arm, rows in over_before.items()},
            "perplexity of whole right answers": {"before": perplexity(before), **{arm: float(np.mean(list(map(perplexity, frames)))) for arm, frames in tuned.items()}},
            "steps": profile.lora_steps,
            "literature": PUBLISHED,
        },
    )


@pytest.mark.claim(FORGETTING)
@pytest.mark.trained("top", "bottom", "random", "sft")
def test_little_is_forgotten(forgotten_items, student_answers, runs_of, evidence):
    runs = runs_of("top", "bottom", "random", "sft")
    before, blind = student_answers(None, forgotten=True), student_answers(None, blind="swap", forgotten=True)
    lost = {
        arm: crossed(gains([before] * len(runs), [student_answers(arm, run, forgotten=True) for run in runs]), before)
        for arm in ("top", "bottom", "random", "sft")
    }
    others = {arm: estimate_mean(rows["effect"], rows["cluster"], rows["seed"]) for arm, rows in lost.items()}
    evidence.decide(
        FORGETTING,
        lost["top"]["effect"],
        clusters=lost["top"]["cluster"],
        seeds=lost["top"]["seed"],
        baseline=Baseline(float(correct(before).mean()), float(correct(blind).mean()), float(np.mean([1 / len(item["candidates"]) for item in forgotten_items]))),
        details={"lost on captions": {arm: [found.value, *found.bounds(0.025)] for arm, found in others.items()}},
    )
