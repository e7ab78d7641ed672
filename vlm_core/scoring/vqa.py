"""VQA accuracy: agreement with ten annotators after the official normalisation of answers.

``VQA``          VQAv2: Antol et al. 2015, Goyal et al. 2017
``TEXTVQA``      TextVQA: the same accuracy, words split as its own evaluator does before
``normalised``   an answer as VQAv2's evaluator compares it

An answer is worth the mean over the leave-one-out sets of annotators of ``min(1, matches / 3)``. The normalisation is that of
``vqaEval.py`` (github.com/GT-Vision-Lab/VQA), with everything in it that looks like a slip:

* a punctuation mark vanishes where it touches a space anywhere in the answer, or where the answer has a digit, a comma and a digit in
  a row; elsewhere it becomes a space;
* a period vanishes unless a digit follows ("3.5" and ".5" stay); the thirty-third and later ones stay (a flag of the pattern, 32, is passed
  where the number of replacements belongs);
* of the contractions, those with a capital are never found, since the answer is in small letters by then, and "somebody'd" loses its
  apostrophe;
* "none" is 0.

``vqaEval.py`` leaves all of it away where the ten annotators wrote the same: "Yes" is then wrong where ten wrote "yes". It was written for
classifiers that give back an annotator's answer; evaluators of models that write (EvalAI's, lmms-eval) always normalise. So does the score;
the mean by the letter of ``vqaEval.py`` is in the summary, ``unanimous_unnormalised``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlm_core.scoring.scorer import Scorer, accepted

__all__ = ["CONTRACTIONS", "TEXTVQA", "VQA", "leave_one_out", "normalised"]

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COUNT = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNT)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = int(re.UNICODE)
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Every contraction by what it is with one of its apostrophes left out."""
    left_out = {
        word[:place] + word[place + 1 :]: word for word in _CONTRACTED.split() for place, letter in enumerate(word) if letter == "'"
    }
    return left_out | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
"""What the official table makes of a word, those of its entries that can be found and change something."""


def normalised(answer: str) -> str:
    """An answer as VQAv2's evaluator compares it."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    away = _DIGITS_WITH_COMMA.search(answer) is not None
    plain = answer
    for mark in _PUNCTUATION:
        plain = plain.replace(mark, "" if away or mark + " " in answer or " " + mark in answer else " ")
    plain = _PERIOD.sub("", plain, count=_PERIODS_AT_MOST)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def leave_one_out(output: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of ``min(1, matches / 3)``, each annotator's own answer left out: of texts as they are."""
    if len(answers) < 2:
        raise ValueError(f"VQA accuracy compares with several annotators, got {len(answers)}: give the item all its references")
    same = [answer == output for answer in answers]
    return float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))


def _vqa(output: str, item: Any) -> float:
    return leave_one_out(normalised(output), [normalised(answer) for answer in accepted(item)])


def _by_the_letter(output: str, answers: Sequence[str]) -> float:
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(answers)) > 1:
        return leave_one_out(normalised(output), [normalised(answer) for answer in answers])
    return leave_one_out(output.replace("\n", " ").replace("\t", " ").strip(), answers)


def _summary(table: pd.DataFrame) -> dict[str, float]:
    if "references" not in table:
        return {}
    each = [_by_the_letter(output, list(references)) for output, references in zip(table["output"], table["references"], strict=True)]
    return {"unanimous_unnormalised": float(np.mean(each))}


def _tokenised(answer: str) -> str:
    """Words as the evaluator of TextVQA (EvalAIAnswerProcessor of Pythia and MMF) splits them before it normalises."""
    return normalised(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _textvqa(output: str, item: Any) -> float:
    return leave_one_out(_tokenised(output), [_tokenised(answer) for answer in accepted(item)])


VQA = Scorer(
    "vqa",
    "VQA accuracy over the leave-one-out sets of the annotators, github.com/GT-Vision-Lab/VQA vqaEval.py, always normalised",
    _vqa,
    _summary,
    needs=("references",),
)
TEXTVQA = Scorer(
    "textvqa",
    "VQA accuracy with the word splitting of EvalAIAnswerProcessor (Pythia, MMF; Singh et al. 2019)",
    _textvqa,
    needs=("references",),
)
