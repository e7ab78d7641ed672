"""What single answers score, whatever candidates the items have.

``answer_scores(subject, items, answers)``   summed log-probability of one answer an item
``written(subject, answer)``                 an answer's tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_core.errors import SubjectError
from vlm_core.identity import picture_digest
from vlm_core.items import SHOWN, item_field, item_number, require_items, take
from vlm_core.subjects.subject import Subject, require_subject
from vlm_core.subjects.wording import require_texts
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import RowJob, run_rows
from vlm_core.sweeps.features import KnownFeatures, encode_distinct
from vlm_core.sweeps.scoring import RowScores, token_set

__all__ = ["answer_scores", "written"]

_BLOCK = 64


def answer_scores(subject: Subject, items: Sequence, answers: Sequence[str], *, batch_rows: int | None = None) -> np.ndarray:
    """Summed log-probability of each answer's tokens as they follow the item's prompt.

    Parameters
    ----------
    items : sequence of items
        With ``id``, ``image`` and ``prompt``. An item may be there several times, with other answers: its prompt runs once.
    answers : sequence of str
        One an item.

    Returns
    -------
    float array ``[item]``
        ``-inf`` where the subject cannot write the answer: no token, or one that its tokenizer does not know. NaN where the model's
        numbers are not finite.

    Raises
    ------
    ValueError
        If items and answers differ in number, or are no items and texts.
    """
    require_subject(subject)
    require_items(items, SHOWN)
    require_texts(answers, "answers")
    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items but {len(answers)} answers: give one answer an item")
    items = take(items, range(len(items)))
    prompts: dict[tuple[str, str], int] = {}
    asked: list = []
    wanted: list[dict[tuple[int, ...], list[int]]] = []
    found = np.full(len(items), -np.inf)
    for number, (item, answer) in enumerate(zip(items, answers, strict=True)):
        tokens = written(subject, answer)
        if tokens is None:
            continue
        place = prompts.setdefault((picture_digest(item_field(item, "image")), item_field(item, "prompt")), len(asked))
        if place == len(asked):
            asked.append(item)
            wanted.append({})
        wanted[place].setdefault(tokens, []).append(number)
    known = KnownFeatures.of(subject)
    for start in range(0, len(asked), _BLOCK):
        block = slice(start, start + _BLOCK)
        sums = _sums(subject, asked[block], [list(answers) for answers in wanted[block]], known, batch_rows)
        for answers_of, row in zip(wanted[block], sums, strict=True):
            for numbers, value in zip(answers_of.values(), row, strict=False):
                found[numbers] = value
    return found


def written(subject: Subject, answer: str) -> tuple[int, ...] | None:
    """The answer's tokens; None where the subject cannot write it, which no pass is made for."""
    try:
        return subject.continuation(answer) if answer.strip() else None
    except SubjectError:
        return None


def _sums(subject: Subject, items: list, tokens: list[list[tuple[int, ...]]], known: KnownFeatures, batch_rows: int | None) -> np.ndarray:
    """Scores ``[item, answer]``, ``-inf`` beyond an item's own answers."""
    encoded = encode_distinct(subject, items, known)
    sets = [token_set(one) for one in tokens]
    pairs = [(row, prefix) for row, one in enumerate(sets) for prefix in range(len(one.prefixes))]
    jobs = []
    for row, prefix in pairs:
        last = encoded[row].n_prompt - 1
        reads = tuple(last + offset for read_prefix, offset in sets[row].reads if read_prefix == prefix)
        jobs.append(RowJob(row, sets[row].prefixes[prefix], None, reads))
    scores = RowScores(subject, sets, [(row, "") for row in range(len(items))], pairs)
    run_rows(subject, encoded, jobs, [item_number(item) for item in items], scores.consume, Budget.of(subject, batch_rows))
    return scores.sums
