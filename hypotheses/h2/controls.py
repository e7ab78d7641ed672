"""Controls that several claims of H2 share."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hypotheses.h1.controls import pooled_baseline
from vlm_core.reduction.curves import Cell, losses
from vlm_core.stats import Baseline, Control, interval

LITERATURE = {"published": "after layer 2 of 32, half of the visual tokens can go at no cost", "where": "Chen et al. 2024 (FastV), LLaVA-1.5-7B"}


def tokens_matter(sensitivity: pd.DataFrame, margin: float) -> Control:
    """Dropping every token before the first layer must hurt; a drop that cannot hurt proves nothing when it does not."""
    lost = losses(sensitivity, Cell(int(sensitivity["layer"].min()), 0.0, "stride"))
    lost = interval(lost["loss"].to_numpy(), lost["cluster"])
    return Control("every token dropped before the first layer", "positive", lost.lower > margin, lost.lower, f"a loss surely above {margin:g}")


def nothing_saves_nothing(pairs: pd.DataFrame, limit: float = 0.1) -> Control:
    """The same work timed against itself must show no saving: else the clock, or the order, decides."""
    saved = interval(pairs["saved"].to_numpy(), pairs["round"], confidence=0.99)
    passed = -limit < saved.lower and saved.upper < limit
    return Control("a run timed against itself", "negative", passed, saved.estimate, f"a saving surely within ±{limit:g}")


def left_by(floors, lost: pd.DataFrame) -> Baseline:
    """What is left of accuracy over all tasks under a reduction (its losses by item): what there is to lose from there, and to gain."""
    pooled = pooled_baseline(floors, lost.index)
    left = pooled.accuracy - float(lost["loss"].mean())
    return Baseline(left, min(pooled.blind, left), min(pooled.chance, left), min(pooled.majority, left))


def as_many_tokens(ours: float, even: float, tolerance: float = 0.02) -> Control:
    """Condition: on average no more tokens than the budget that is compared with, but for ``tolerance`` of it."""
    return Control("tokens on average, of those of the even budget", "condition", ours <= (1 + tolerance) * even, ours / even, f"at most {1 + tolerance:g}")


def better_than(name: str, gain, clusters) -> Control:
    """Control: a gain whose lower 95 % bound is above 0."""
    found = interval(np.asarray(gain, dtype=float), clusters, confidence=0.90)
    return Control(name, "positive", found.lower > 0, found.lower, "a gain surely above 0")
