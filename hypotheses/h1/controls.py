"""Controls that several claims of H1 share."""

from __future__ import annotations

import numpy as np

from fixtures.measurements import LEAST_R2
from vlm_core.heads.ranking import whole_heads
from vlm_core.stats import Baseline, Control, interval


def too_few_heads(subject, share: float) -> str:
    """Why a subject has no set of heads that is at most ``share`` of them; empty where it has."""
    n = len(subject.image_heads)
    return "" if whole_heads(n, share) else f"{n} heads of the subject see the image: one head is more than {share:.0%} of them"


def prediction_of_unseen_masks(ranked) -> Control:
    """The linear models behind a ranking must predict masks they never saw; a ranking by a model that does not fit means nothing.

    Decided on a lower bound over scenes, so that a ranking is not used by luck. It is a matter of linearity alone, and a blind subject passes: its
    answers follow masks little, and what they follow is all the more linear. That heads see anything is for the floors to say, so no claim has this
    control without one beside it (`grounded_overall`, or the task's own ``floors.grounded``). How alike the items are, whose mean ranks the heads, is said beside it and decides nothing.
    """
    lower = ranked.r2_lower()
    found = lower if np.isfinite(lower) else None
    detail = f"R² {ranked.r2:.2f}; of one model for all items {ranked.r2_task:.2f}"
    if np.isnan(ranked.r2):
        detail = "no mask is unseen: with so few heads every one occurs among those that the models were fitted to"
    elif found is None:
        detail += "; fewer than three scenes give no bound"
    expected = f"a lower 95 % bound of R² over scenes of at least {LEAST_R2:g}"
    return Control("attribution predicts unseen masks", "positive", lower >= LEAST_R2, found, expected, detail)


def usable_in_most_tasks(usable, floors) -> Control:
    """A claim over tasks rests on the tasks whose ranking may be used, and these must be most of the run's; the others are named with the verdict."""
    share = len(usable) / len(floors.tasks)
    named = ", ".join(task for task in floors.tasks if task not in usable)
    said = f"left out, as their attribution does not predict unseen masks (lower bound of R² below {LEAST_R2:g}): {named}" if named else ""
    return Control("tasks whose attribution predicts unseen masks", "positive", share > 0.5, share, "more than half", said)


def pooled_baseline(floors, items) -> Baseline:
    """Accuracy, blind floor, chance and majority over the tasks of some items (by id), each task weighted by its share of them."""
    seen, blind = (frame[frame["item"].isin(set(items))] for frame in (floors.seeing, floors.blind))
    chance, majority = (float(seen["task"].map(of).mean()) for of in (floors.chance, floors.majority))
    return Baseline(float(seen["correct"].mean()), float(blind["correct"].mean()), chance, majority)


def pooled_grounding(floors, items, limit: float) -> Control:
    """Control: on these items the scene's own image is worth more than ``limit`` of accuracy."""
    chosen = floors.seeing["item"].isin(set(items)).to_numpy()
    seen, blind = floors.seeing[chosen], floors.blind[chosen]
    worth = interval(seen["correct"].to_numpy(float) - blind["correct"].to_numpy(float), seen["cluster"], confidence=0.99)
    return Control("seeing against another scene's image", "floor", worth.lower > limit, worth.lower, f"a lower bound above {limit:g}")


def grounded_overall(floors, limit: float = 0.10) -> Control:
    """The same over every confirmation item of every task."""
    return pooled_grounding(floors, floors.seeing["item"], limit)


def worth_something(name: str, kind: str, effect, clusters, limit: float = 0.0) -> Control:
    """Control: an effect whose lower 99.5 % bound is above ``limit``."""
    found = interval(np.asarray(effect, dtype=float), clusters, confidence=0.99)
    return Control(name, kind, found.lower > limit, found.lower, f"a lower bound above {limit:g}")
