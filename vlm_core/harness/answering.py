"""A subject answers some items: one row for each item and way of answering.

``answer(subject, items, facts, modes, ...)``   rows of ``answers.jsonl``
``deterministic(seed)``                         context manager: the same inputs give the same numbers
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vlm_core.evaluation import evaluate, generated
from vlm_core.scoring import score_answer
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.budget import in_batches

__all__ = ["answer", "deterministic"]


def answer(
    subject: Subject,
    items: Sequence[dict],
    facts: Sequence[dict[str, Any]],
    modes: Sequence[str],
    *,
    max_new_tokens: int = 16,
    logits: bool = False,
    batch_rows: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of ``answers.jsonl``, item by item and for each item mode by mode.

    Parameters
    ----------
    items : sequence of items
    facts : sequence of dict
        What follows from each item alone (`vlm_core.harness.asked.AskedSet.facts`).
    modes : sequence of {"candidates", "greedy"}

    Returns
    -------
    list of dict
        The facts with ``mode``, ``output`` and ``score`` in [0, 1]. In mode ``"candidates"`` the score is 1 where the right candidate scores
        above every other, ``margin`` is its summed log-probability minus the best wrong one's, and ``logits``, where asked for, has every
        candidate's. In mode ``"greedy"`` the item's scorer scores, ``tokens`` is how many were generated, and
        ``cut_off`` whether there would have been more. A number that is not finite is None.

    Raises
    ------
    SubjectError
        Where the model's numbers are not finite, or a single item does not fit into memory.
    ValueError
        Where an item lacks what its scorer needs.
    """
    answered: dict[str, list[dict[str, Any]]] = {}
    with deterministic(seed):
        if "candidates" in modes:
            answered["candidates"] = _chosen(subject, items, logits, batch_rows)
        if "greedy" in modes:
            answered["greedy"] = _written(subject, items, max_new_tokens, batch_rows)
    return [{**fact, "mode": mode, **answered[mode][number]} for number, fact in enumerate(facts) for mode in modes]


def _chosen(subject: Subject, items: Sequence[dict], logits: bool, batch_rows: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def choose(some: Sequence[dict]) -> None:
        for one in evaluate(subject, some, logits=logits, batch_rows=batch_rows).to_dict("records"):
            each = {"logits": {name: _finite(value) for name, value in one["logits"].items()}} if logits else {}
            rows.append({"output": one["output"], "score": float(one["correct"]), "margin": _finite(one["score"]), **each})

    # The sweep within sees to its own memory, but for what pictures take on their way into it.
    in_batches(items, len(items), choose)
    return rows


def _written(subject: Subject, items: Sequence[dict], max_new_tokens: int, batch_rows: int | None) -> list[dict[str, Any]]:
    found = generated(subject, items, max_new_tokens=max_new_tokens, batch_rows=batch_rows)
    return [
        {"output": one.text, "score": float(score_answer(one.text, item)), "tokens": one.tokens, "cut_off": one.cut_off}
        for item, one in zip(items, found, strict=True)
    ]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """In this context torch takes deterministic algorithms where it has them, and what is drawn follows from the seed.

    Afterwards everything is as it was, the states of the generators included.
    """
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            torch.utils.deterministic.fill_uninitialized_memory = False
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            torch.utils.deterministic.fill_uninitialized_memory = filled
            random.setstate(states[0])
            np.random.set_state(states[1])
