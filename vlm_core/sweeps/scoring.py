"""Candidates of an item as token sequences, and their scores from row logits.

``candidate_set(subject, item)``   the candidates of an item as rows, reads and terms; ``token_set`` those of token sequences
``RowScores``                      what rows say of their candidates, batch by batch
``score_candidates(...)``          the metrics

An item's candidates need one row per *maximal prefix* ``candidate[:-1]``: one-token candidates share a single row, the
prompt itself, and a row whose prefix extends another's also yields the other's log-probabilities.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_core.items import item_field
from vlm_core.subjects.rows import read_logits
from vlm_core.subjects.subject import Subject

__all__ = ["METRICS", "CandidateSet", "RowScores", "candidate_set", "score_candidates", "token_set"]

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
    telling : int
        Which of the terms is the answer's first token that tells candidates apart, the one after what all of them begin with: where every
        answer begins with a token for a space, that one chooses nothing. The answer's last token where every candidate begins with all of it.
    """

    prefixes: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, int], ...]
    terms: np.ndarray
    answer: int
    n: int
    telling: int


def candidate_set(subject: Subject, item) -> CandidateSet:
    """The candidates of ``item`` (its answer among them) as rows, reads and terms.

    Raises
    ------
    ValueError
        Where the answer is no candidate, or the only one, or two candidates have the same tokens.
    """
    candidates, answer = list(item_field(item, "candidates")), item_field(item, "answer")
    if answer not in candidates:
        raise ValueError(f"item {item_field(item, 'id')!r}: answer {answer!r} is not among its candidates {candidates}")
    if len(set(candidates)) == 1:
        raise ValueError(f"item {item_field(item, 'id')!r} has the single candidate {answer!r}, which nothing could beat: give it a wrong one too")
    tokens = [subject.continuation(candidate) for candidate in candidates]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"item {item_field(item, 'id')!r} has candidates that the tokenizer cannot tell apart")
    return token_set(tokens, candidates.index(answer))


def token_set(tokens: Sequence[tuple[int, ...]], right: int = 0) -> CandidateSet:
    """Distinct token sequences as rows, reads and terms; ``right`` is the index of the answer among them."""
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
    alike = len(os.path.commonprefix(tokens))
    telling = sum(map(len, tokens[:right])) + min(alike, len(tokens[right]) - 1)
    return CandidateSet(tuple(prefixes), tuple(reads), np.array(terms, dtype=np.int64), right, len(tokens), telling)


def score_candidates(
    sets: Sequence[CandidateSet], candidate_scores: np.ndarray, answer_logits: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of rows from their candidates' summed log-probabilities.

    Parameters
    ----------
    candidate_scores : array ``[row, candidate]``
        Summed log-probabilities, ``-inf`` beyond an item's own candidates.
    answer_logits : array ``[row]``
        Raw logit of the right answer's first token that tells candidates apart (``CandidateSet.telling``), after the tokens before it.

    Returns
    -------
    dict of array ``[row]``
        ``correct``: 1 where the right candidate scores strictly above every other, else 0 (a tie is wrong).
        ``logit``: ``answer_logits``. ``logprob``: summed log-probability of the right answer.
        ``margin``: that minus the best wrong candidate's. ``choice``: index of the best candidate.
        All of them are NaN in a row that has a candidate whose score is.
    """
    rows = np.arange(len(sets))
    answers = np.array([candidates.answer for candidates in sets], dtype=np.int64)
    right = candidate_scores[rows, answers]
    wrong = candidate_scores.copy()
    wrong[rows, answers] = -np.inf
    margin = right - wrong.max(1)
    metrics = {
        "correct": margin > 0,
        "logit": answer_logits,
        "logprob": right,
        "margin": margin,
        "choice": candidate_scores.argmax(1),
        **{candidate_metric(k): candidate_scores[:, k] for k in range(candidate_scores.shape[1])},
    }
    unknown = np.isnan(candidate_scores).any(1)
    return {name: np.where(unknown, np.nan, values.astype(float)) for name, values in metrics.items()}


def candidate_metric(number: int) -> str:
    """Name of the metric that holds one candidate's summed log-probability (``-inf`` where an item has fewer candidates)."""
    return f"candidate {number}"


@dataclass(frozen=True, eq=False)
class _Terms:
    """The terms that the reads of one prefix of an item say.

    Parameters
    ----------
    candidates, places, tokens : int arrays ``[term]``
        A term's candidate, its read among those of this prefix, and its token.
    telling : tuple of int
        Which of these terms, if any, is ``CandidateSet.telling``.
    n_reads : int
    """

    candidates: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    telling: tuple[int, ...]
    n_reads: int

    @classmethod
    def of(cls, one: CandidateSet, prefix: int) -> _Terms:
        own = [read for read, (read_prefix, _) in enumerate(one.reads) if read_prefix == prefix]
        place = {read: number for number, read in enumerate(own)}
        chosen = [number for number, (_, read, _) in enumerate(one.terms.tolist()) if read in place]
        terms = one.terms[chosen].reshape(-1, 3)
        telling = tuple(k for k, number in enumerate(chosen) if number == one.telling)
        return cls(terms[:, 0], np.array([place[read] for read in terms[:, 1].tolist()], dtype=np.int64), terms[:, 2], telling, len(own))


class RowScores:
    """Summed log-probabilities ``[row, candidate]`` and answer logits ``[row]``, filled batch by batch.

    What is read from numbers that are not finite is NaN: a model that overflows has not answered.

    Parameters
    ----------
    candidates : sequence of CandidateSet, one per item
    rows : sequence of (item, label)
        Positions among the items.
    pairs : sequence of (row, prefix)
        What ``consume`` is told the numbers of.
    """

    def __init__(
        self, subject: Subject, candidates: Sequence[CandidateSet], rows: Sequence[tuple[int, str]], pairs: Sequence[tuple[int, int]]
    ) -> None:
        self.subject, self.candidates, self.rows, self.pairs = subject, candidates, rows, pairs
        self.sums = np.full((len(rows), max(one.n for one in candidates)), -np.inf)
        self.logits = np.zeros(len(rows))
        self._terms: dict[tuple[int, int], _Terms] = {}

    def _terms_of(self, item: int, prefix: int) -> _Terms:
        if (item, prefix) not in self._terms:
            self._terms[item, prefix] = _Terms.of(self.candidates[item], prefix)
        return self._terms[item, prefix]

    def consume(self, jobs: Sequence[int], hidden: torch.Tensor) -> None:
        """Add what the reads of some (row, prefix) pairs say; ``hidden`` ``[n, hidden]`` job by job."""
        rows, numbers, reads, tokens, telling = [], [], [], [], []
        start = terms = 0
        for job in jobs:
            row, prefix = self.pairs[job]
            own = self._terms_of(self.rows[row][0], prefix)
            rows.append(np.full(len(own.candidates), row))
            numbers.append(own.candidates)
            reads.append(own.places + start)
            tokens.append(own.tokens)
            telling += [(row, terms + term) for term in own.telling]
            start += own.n_reads
            terms += len(own.candidates)
        rows, numbers, reads, tokens = map(np.concatenate, (rows, numbers, reads, tokens))
        read = read_logits(self.subject, hidden)
        with torch.inference_mode():
            normaliser = read.logsumexp(1)
            index = torch.as_tensor(reads, device=read.device)
            raw = read[index, torch.as_tensor(tokens, device=read.device)]
            finite = raw.isfinite() & normaliser[index].isfinite()
            raw = raw.masked_fill(~finite, torch.nan)
            log_probabilities = (raw - normaliser[index]).cpu().numpy().astype(float)
        raw = raw.cpu().numpy()
        touched = self.sums[rows, numbers]
        self.sums[rows, numbers] = np.where(np.isneginf(touched), 0.0, touched)
        np.add.at(self.sums, (rows, numbers), log_probabilities)
        for row, term in telling:
            self.logits[row] = raw[term]
