"""Scores of short written answers that one text or number decides.

``ANLS``        normalised Levenshtein similarity, 0 below one half: DocVQA
``RELAXED``     numbers within 5 %, words exactly: ChartQA
``OCRBENCH``    the expected text is somewhere in the answer: OCRBench
``GQA``         equality without case and punctuation marks: GQA
``CONTAINS``    the thing is named somewhere in the answer: object identification
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

import pandas as pd

from vlm_core.scoring.scorer import Scorer, accepted

__all__ = ["ANLS", "CONTAINS", "GQA", "OCRBENCH", "RELAXED", "levenshtein"]

_LEAST_SIMILARITY = 0.5
_RELATIVE_CHANGE = 0.05


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and substitutions that make one text the other."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        corner, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (letter != other))
    return row[-1]


def _anls(output: str, item: Any) -> float:
    """The best over the references. The distance is of texts in small letters with single spaces, the length of the texts as they are: so
    does the evaluator of the Robust Reading Competition, and its threshold keeps a similarity of exactly one half."""
    distances = []
    for reference in accepted(item):
        distance = levenshtein(" ".join(reference.lower().split()), " ".join(output.lower().split()))
        # At least one letter: two empty texts are the same. In capitals, as there: "ß" has two.
        distances.append(distance / max(len(reference.upper()), len(output.upper()), 1))
    similarity = 1.0 - min(distances)
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed(output: str, item: Any) -> float:
    """Relative to the reference; "5%" is 0.05, "1,000" is no number, and beside a reference of 0 only the same text is right."""
    output = output.strip()
    found = _number(output)
    for reference in accepted(item):
        expected = _number(reference)
        if found is not None and expected:
            right = abs(found - expected) / abs(expected) <= _RELATIVE_CHANGE
        else:
            right = output.lower() == reference.lower()
        if right:
            return 1.0
    return 0.0


def _written(item: Any) -> list[str]:
    """Accepted answers that say something: a blank one lies in every text."""
    return [reference for reference in accepted(item) if reference.strip()]


def _ocrbench(output: str, item: Any) -> float:
    """Formulas (HME100k) with their case and without spaces, all else in small letters, line breaks as spaces."""
    formula = (item.get("dataset") if isinstance(item, Mapping) else getattr(item, "dataset", None)) == "HME100k"

    def read(text: str) -> str:
        text = (text if formula else text.lower()).strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text

    return float(any(read(reference) in read(output) for reference in _written(item)))


def _points(table: pd.DataFrame) -> dict[str, float]:
    return {"points": float(table["score"].sum())}


_MARKS = str.maketrans("", "", string.punctuation)


def _gqa(output: str, item: Any) -> float:
    def read(text: str) -> str:
        return text.strip().lower().translate(_MARKS)

    return float(read(output) in {read(reference) for reference in accepted(item)})


def _contains(output: str, item: Any) -> float:
    said = output.casefold()
    return float(any(re.search(rf"\b{re.escape(reference.casefold())}(?:e?s)?\b", said) for reference in _written(item)))


ANLS = Scorer("anls", "average normalised Levenshtein similarity, Biten et al. 2019, as rrc.cvc.uab.es evaluates DocVQA", _anls)
RELAXED = Scorer("relaxed", "relaxed accuracy, Masry et al. 2022 (ChartQA), section 5.1, as Pix2Struct and Qwen-VL evaluate it", _relaxed)
OCRBENCH = Scorer("ocrbench", "github.com/Yuliang-Liu/MultimodalOCR OCRBench/example.py; points are out of 1000", _ocrbench, _points)
GQA = Scorer("gqa", "exact match without case and string.punctuation, as lmms-eval evaluates GQA (Hudson & Manning 2019)", _gqa)
CONTAINS = Scorer(
    "contains",
    "the name as a word, also in the plural; github.com/clemneo/llava-interp takes it as a part of a word too",
    _contains,
)
