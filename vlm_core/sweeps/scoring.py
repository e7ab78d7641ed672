"""Candidates of an item as token sequences, and their scores from row logits.

An item's candidates need one row per *maximal prefix* ``candidate[:-1]``: one-token candidates share a single row, the
prompt itself, and a row whose prefix extends another's also yields the other's log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_core.items import item_field
from vlm_core.subjects.subject import Subject

__all__ = ["METRICS", "CandidateSet", "candidate_set", "score_candidates"]

METRICS = ("correct", "logit", "logprob", "margin", "choice")


@dataclass(frozen=True)
class CandidateSet:
    """How to score one item.

    Parameters
    ----------
    prefixes : tuple of token tuples
        One row each, appended to the prompt.
    reads : tuple of (prefix, offset)
        Positions whose next-token distribution is read; ``offset`` 0 is the last prompt token.
    terms : int array ``[term, 3]``
        ``(candidate, read, token)``: a candidate's score sums the log-probabilities of its terms.
    answer : int
        Index of the right candidate.
    n : int
        Number of candidates.
    """

    prefixes: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, int], ...]
    terms: np.ndarray
    answer: int
    n: int


def candidate_set(subject: Subject, item) -> CandidateSet:
    """The candidates of ``item`` (its answer among them) as rows, reads and terms.

    Raises
    ------
    ValueError
        Where the answer is no candidate, or two candidates have the same tokens.
    """
    candidates, answer = list(item_field(item, "candidates")), item_field(item, "answer")
    if answer not in candidates:
        raise ValueError(f"item {item_field(item, 'id')!r}: answer {answer!r} is not among its candidates {candidates}")
    tokens = [subject.continuation(candidate) for candidate in candidates]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"item {item_field(item, 'id')!r} has candidates that the tokenizer cannot tell apart")
    needed = {candidate[:-1] for candidate in tokens}
    prefixes = sorted(
        prefix for prefix in needed if not any(prefix != other and other[: len(prefix)] == prefix for other in needed)
    )
    reads: dict[tuple[int, int], int] = {}
    terms = []
    for number, candidate in enumerate(tokens):
        row = next(i for i, prefix in enumerate(prefixes) if prefix[: len(candidate) - 1] == candidate[:-1])
        for offset, token in enumerate(candidate):
            terms.append((number, reads.setdefault((row, offset), len(reads)), token))
    return CandidateSet(
        tuple(prefixes), tuple(reads), np.array(terms, dtype=np.int64), candidates.index(answer), len(candidates)
    )


def score_candidates(
    sets: Sequence[CandidateSet], candidate_scores: np.ndarray, answer_logits: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of rows from their candidates' summed log-probabilities.

    Parameters
    ----------
    candidate_scores : array ``[row, candidate]``
        Summed log-probabilities, ``-inf`` beyond an item's own candidates.
    answer_logits : array ``[row]``
        Raw logit of the right answer where it is one token, else its summed log-probability.

    Returns
    -------
    dict of array ``[row]``
        ``correct``: 1 where the right candidate scores strictly above every other, else 0 (a tie is wrong).
        ``logit``: ``answer_logits``. ``logprob``: summed log-probability of the right answer.
        ``margin``: that minus the best wrong candidate's. ``choice``: index of the best candidate.
    """
    rows = np.arange(len(sets))
    answers = np.array([candidates.answer for candidates in sets], dtype=np.int64)
    right = candidate_scores[rows, answers]
    wrong = candidate_scores.copy()
    wrong[rows, answers] = -np.inf
    # An item with a single candidate has nothing to be wrong with.
    margin = right - wrong.max(1, initial=-np.inf)
    return {
        "correct": (margin > 0).astype(float),
        "logit": answer_logits.astype(float),
        "logprob": right.astype(float),
        "margin": margin.astype(float),
        "choice": candidate_scores.argmax(1).astype(float),
        **{candidate_metric(k): candidate_scores[:, k].astype(float) for k in range(candidate_scores.shape[1])},
    }


def candidate_metric(number: int) -> str:
    """Name of the metric that holds one candidate's summed log-probability (``-inf`` where an item has fewer candidates)."""
    return f"candidate {number}"
