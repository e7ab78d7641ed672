"""Answers in numbers: mean scores with intervals, subjects side by side.

``metrics_table(answers, name)``   one set of one subject, per task and over all
``summary_table(out)``             all subjects and sets in a folder
``shown(table)``                   a table of scores for a terminal
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vlm_core.evaluation import accuracy_table
from vlm_core.harness.run_folder import RunFolder
from vlm_core.scoring import SCORERS

__all__ = ["OVERALL", "metrics_table", "shown", "summary_table"]

OVERALL = "all"
"""The task of a row over all tasks."""


def metrics_table(answers: pd.DataFrame, name: str) -> pd.DataFrame:
    """Mean scores of one set, clusters resampled.

    Parameters
    ----------
    answers : DataFrame
        Rows of ``answers.jsonl``.
    name : str
        The set's.

    Returns
    -------
    DataFrame
        ``set, task, mode, n, clusters, score, lower, upper``: a 95 % interval, and one row over all tasks (``"all"``). Further columns are
        ``cut_off``, the share of generated answers that had not ended, and what the scorers sum up (`vlm_core.scoring.Scorer.summary`), where
        all answers of a row have the same scorer.
    """
    tables = []
    for mode, rows in answers.groupby("mode", sort=False):
        parts = [rows] if set(rows["task"]) == {OVERALL} else [rows, rows.assign(task=OVERALL)]
        for part in parts:
            scores = accuracy_table(part.assign(correct=part["score"].astype(float))).rename(columns={"accuracy": "score"})
            scores.insert(1, "mode", mode)
            summaries = pd.DataFrame([_summary(part[part["task"] == task]) for task in scores["task"]])
            tables.append(pd.concat([scores, summaries], axis=1))
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "set", name)
    return table


def _summary(rows: pd.DataFrame) -> dict[str, float]:
    scorers = set(rows["scorer"])
    summary = SCORERS[scorers.pop()].summary if len(scorers) == 1 else None
    generated = "cut_off" in rows and rows["cut_off"].notna().all()
    return {**({"cut_off": float(rows["cut_off"].astype(float).mean())} if generated else {}), **({} if summary is None else summary(rows))}


def summary_table(out: str | Path) -> pd.DataFrame:
    """Mean scores of all subjects that have finished a set in ``out``.

    Returns
    -------
    DataFrame
        ``set, mode, task, subject, data`` (hash of the items), ``n``, ... as in ``metrics.csv``; rows of subjects that answered the same stand
        together.
    """
    tables = []
    for file in sorted(Path(out).glob("*/*/metrics.csv")):
        about = RunFolder(file.parent).about()
        tables.append(pd.read_csv(file).assign(subject=file.parent.parent.name, data=about["data"]["digest"]))
    table = pd.concat(tables, ignore_index=True).sort_values(["set", "mode", "task", "subject"], ignore_index=True)
    first = ["set", "mode", "task", "subject", "data"]
    return table[[*first, *(name for name in table.columns if name not in first)]]


def shown(table: pd.DataFrame) -> str:
    """A table for a terminal: scores as shares of one, with their intervals in one column."""
    score = [f"{row.score:.3f} [{row.lower:.3f}, {row.upper:.3f}]" for row in table.itertuples()]
    return table.assign(**{"score [95 %]": score})[["set", "mode", "task", "subject", "n", "clusters", "score [95 %]"]].to_string(index=False)
