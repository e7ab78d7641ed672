"""Yes or no: POPE in both readings that are in use.

``POPE``                  the scorer; its score is the strict reading
``strict(output)``        "yes", "no", or None for anything else
``first_sentence(output)``  "no" where the first sentence has "No", "no" or "not" as a word, else "yes"

The two differ for whoever writes sentences, or nonsense: POPE's own evaluator takes every text without a "no" for a yes, the strict reading
takes it for neither. The summary has accuracy, precision, recall, F1 and the share of yes of both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from vlm_core.scoring.scorer import Scorer, accepted

__all__ = ["POPE", "first_sentence", "strict"]


def strict(output: str) -> str | None:
    """The whole answer is "yes" or "no", in any case."""
    said = output.strip().lower()
    return said if said in ("yes", "no") else None


def first_sentence(output: str) -> str:
    """As ``evaluate.py`` of POPE (github.com/RUCAIBox/POPE) reads it: up to the first period, commas left out, words split at spaces."""
    words = output.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _pope(output: str, item: Any) -> float:
    return float(strict(output) == accepted(item)[0].strip().lower())


def _measures(said: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Yes is the positive class. A text that is neither counts as an item: no yes was said, and no right no."""
    hits = float(np.sum((said == "yes") & (truth == "yes")))
    claimed, positive = float(np.sum(said == "yes")), float(np.sum(truth == "yes"))
    precision = hits / claimed if claimed else 0.0
    recall = hits / positive if positive else 0.0
    return {
        "accuracy": float(np.mean(said == truth)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": float(np.mean(said == "yes")),
    }


def _summary(table: pd.DataFrame) -> dict[str, float]:
    truth = np.array([answer.strip().lower() for answer in table["answer"]], dtype=object)
    readings = {"strict": strict, "first_sentence": first_sentence}
    return {
        f"{name}_{measure}": value
        for name, reading in readings.items()
        for measure, value in _measures(np.array([reading(output) for output in table["output"]], dtype=object), truth).items()
    }


POPE = Scorer(
    "pope",
    "Li et al. 2023 (POPE): strict yes or no; github.com/RUCAIBox/POPE evaluate.py beside it in the summary",
    _pope,
    _summary,
)
