"""Controls that several claims of H2 share."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlm_core.reduction.curves import Cell, losses
from vlm_core.stats import Control, interval

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


def better_than(name: str, gain, clusters) -> Control:
    """Control: a gain whose lower 95 % bound is above 0."""
    found = interval(np.asarray(gain, dtype=float), clusters, confidence=0.90)
    return Control(name, "positive", found.lower > 0, found.lower, "a gain surely above 0")
