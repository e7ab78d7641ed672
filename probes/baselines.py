"""What can be answered without looking: majority and blind baselines of a probe set.

Exports: ``baselines``.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import datasets
import pandas as pd


def baselines(train: datasets.Dataset, test: datasets.Dataset) -> pd.DataFrame:
    """Accuracy without an image, task by task.

    Parameters
    ----------
    train, test : probe sets
        What is learnt (the most frequent answer of a task, and of each prompt) comes from ``train``.

    Returns
    -------
    pandas.DataFrame
        One row a task: ``task, items, answers, balance`` (most frequent over least frequent answer in ``test``), ``chance`` (one over the mean
        number of candidates), ``majority`` (the task's most frequent answer) and ``blind`` (the most frequent answer given the prompt).
    """
    by_task: dict[str, Counter] = defaultdict(Counter)
    by_prompt: dict[str, Counter] = defaultdict(Counter)
    for task, prompt, answer in zip(train["task"], train["prompt"], train["answer"]):
        by_task[task][answer] += 1
        by_prompt[prompt][answer] += 1
    rows = []
    frame = test.select_columns(["task", "prompt", "answer", "candidates"]).to_pandas()
    for task, items in frame.groupby("task", sort=False):
        majority = by_task[task].most_common(1)[0][0] if by_task[task] else None
        guesses = [by_prompt[p].most_common(1)[0][0] if by_prompt[p] else majority for p in items["prompt"]]
        counts = Counter(items["answer"])
        rows.append(
            {
                "task": task,
                "items": len(items),
                "answers": len(counts),
                "balance": max(counts.values()) / min(counts.values()),
                "chance": float((1 / items["candidates"].map(len)).mean()),
                "majority": float((items["answer"] == majority).mean()),
                "blind": float((items["answer"] == pd.Series(guesses, index=items.index)).mean()),
            }
        )
    return pd.DataFrame(rows)
