"""Controls that claims over several tasks share."""

from __future__ import annotations

import numpy as np

from vlm_core.stats import Baseline, Control, interval


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


def worth_something(name: str, kind: str, effect, clusters, limit: float = 0.0) -> Control:
    """Control: an effect whose lower 99.5 % bound is above ``limit``."""
    found = interval(np.asarray(effect, dtype=float), clusters, confidence=0.99)
    return Control(name, kind, found.lower > limit, found.lower, f"a lower bound above {limit:g}")
