"""Baselines and controls that several claims of H3 share."""

from __future__ import annotations

import numpy as np

from fixtures.students import crossed
from vlm_core.scoring import SCORERS
from vlm_core.stats import Baseline, Control, estimate_mean

HINTON = "Hinton et al. 2015, arXiv:1503.02531"
LLAVA_KD = "LLaVA-KD, Cai et al. 2024, arXiv:2410.16236"
LITERATURE = {"published": "54.7 to 57.9 mean score (LLaVA-KD, 0.5 B student)", "where": "five VQA benchmarks"}


def correct(frame) -> np.ndarray:
    """1 for a right answer, 0 for a wrong one."""
    return frame["correct"].to_numpy(float)


def gains(after, before) -> list[np.ndarray]:
    """Right answers gained, one array a seed."""
    return [correct(one) - correct(other) for one, other in zip(after, before, strict=True)]


def whole(answers, blind, floors) -> Baseline:
    """Accuracy over all grounding tasks of what is started from (one frame a seed), what it answers to another scene's image, and chance."""
    mean = [float(np.mean([correct(frame).mean() for frame in frames])) for frames in (answers, blind)]
    return Baseline(*mean, float(np.mean(list(floors.chance.values()))))


def teacher_is_right(lessons, before, threshold) -> Control:
    """Condition: the very answers that are taught must be right more often than the student already is, or a gain is not theirs.

    Right is what names the answer and no other candidate (`vlm_core.scoring`, "spoken"); the student's accuracy is that of its choice among
    candidates, which is easier.
    """
    right = float(np.mean([SCORERS["spoken"].score(said, item) for item, said in zip(lessons.items, lessons.answers, strict=True)]))
    floor = float(before["correct"].mean()) + threshold
    return Control("taught answers that are right", "condition", right > floor, right, f"more than {floor:.2f}")


def some_gain(after, before) -> Control:
    """Condition: what is compared has learnt something; of two students that lost, one always lost less."""
    return surely_above("a gain over the student before", crossed(gains(after, [before] * len(after)), before), kind="condition")


def by_task(rows) -> dict[str, float]:
    """Mean effect of crossed rows in every task."""
    return {str(task): float(part["effect"].mean()) for task, part in rows.groupby("task", sort=False)}


def surely_above(name: str, rows, limit: float = 0.0, kind: str = "positive") -> Control:
    """Control: the mean effect of crossed rows (`fixtures.students.crossed`) has a lower 95 % bound above ``limit``."""
    lower = estimate_mean(rows["effect"], rows["cluster"], rows["seed"]).bounds(0.05)[0]
    return Control(name, kind, lower > limit, lower, f"a mean surely above {limit:g}")
