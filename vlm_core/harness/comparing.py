"""Two runs side by side, item by item.

``compare(a, b)``   differences of mean scores with intervals, items gained and lost
``runs_in(path)``   the runs that a folder holds, by the names of their sets
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vlm_core.harness.asked import ASKED_ALIKE
from vlm_core.harness.run_folder import RunFolder, differing
from vlm_core.harness.tables import OVERALL
from vlm_core.scoring import SCORERS
from vlm_core.stats import interval

__all__ = ["COLUMNS", "Comparison", "compare", "runs_in"]

COLUMNS = ("set", "mode", "task", "n", "clusters", "a", "b", "difference", "lower", "upper", "gained", "lost", "only_a", "only_b")
MOVED = ("set", "mode", "task", "item", "score_a", "score_b", "output_a", "output_b", "answer")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two runs have in common and what not.

    Attributes
    ----------
    table : DataFrame
        ``COLUMNS``: mean scores of the items that both answered, ``difference`` = b - a, paired by item, with its 95 % interval (clusters
        resampled), how many items score higher in b (``gained``) and lower (``lost``), and how many only one of them answered. One row for each
        set, mode and task, and over all tasks of a set (``"all"``).
    moved : DataFrame
        The items that were gained or lost, with what was said.
    notes : tuple of str
        What else is not the same: settings, versions, sets that only one run has.
    """

    table: pd.DataFrame
    moved: pd.DataFrame
    notes: tuple[str, ...]


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare two finished runs.

    Parameters
    ----------
    a, b : path
        Each the folder of a subject's answers to one set, or of a subject: then the sets that both have.

    Raises
    ------
    ValueError
        One sentence: no run, one that is not finished, nothing in common; items that were not the same question to both.
    """
    first, second = runs_in(a), runs_in(b)
    if all((Path(one) / "run.json").is_file() for one in (a, b)):
        (name, one), (_, other) = first.popitem(), second.popitem()
        pairs, notes = {name: (one, other)}, []
    else:
        pairs = {name: (first[name], second[name]) for name in first if name in second}
        notes = [f"the set {name} is only in {a}" for name in first if name not in second]
        notes += [f"the set {name} is only in {b}" for name in second if name not in first]
    if not pairs:
        raise ValueError(f"{a} has answers to {', '.join(first)} and {b} to {', '.join(second)}: they have no set in common")
    tables, moved = [], []
    for name, (one, other) in pairs.items():
        words = differing(one.about(), other.about(), ("asked", "versions"), ("in a", "in b"))
        notes += [f"{name}: {word}" for word in words]
        table, items = _compared(one, other)
        tables.append(table.assign(set=name))
        moved.append(items.assign(set=name))
    table, items = pd.concat(tables, ignore_index=True), pd.concat(moved, ignore_index=True)
    return Comparison(table[list(COLUMNS)], items[list(MOVED)], tuple(notes))


def runs_in(path: str | Path) -> dict[str, RunFolder]:
    """The runs that a folder holds, by the names of their sets: itself, or those of one subject.

    Raises
    ------
    ValueError
        One sentence: there are none, or they are several subjects'.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        return {path.name: RunFolder(path)}
    found = {file.parent.name: RunFolder(file.parent) for file in sorted(path.glob("*/run.json"))}
    if not found:
        subjects = sorted({file.parent.parent.name for file in path.glob("*/*/run.json")})
        several = f"it holds the subjects {', '.join(subjects)}: name one, {path}/{subjects[0]}" if subjects else "check the path"
        raise ValueError(f"{path} is neither a run nor a subject's folder of runs: {several}")
    return found


def _compared(a: RunFolder, b: RunFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    one, other = (_with_lists(run.finished_answers()) for run in (a, b))
    modes = [mode for mode in one["mode"].unique() if mode in set(other["mode"])]
    if not modes:
        raise ValueError(
            f"{a.path} was answered by {' and '.join(one['mode'].unique())} and {b.path} by {' and '.join(other['mode'].unique())}: there is "
            f"nothing to compare"
        )
    rows, moved = [], []
    for mode in modes:
        pair = one[one["mode"] == mode].merge(other[other["mode"] == mode], on="item", how="outer", suffixes=("_a", "_b"), indicator="in")
        both = pair[pair["in"] == "both"].copy()
        if both.empty:
            raise ValueError(f"{a.path} and {b.path} have no item in common: there is nothing to compare")
        _require_alike(both, mode, a, b)
        both["difference"] = both["score_b"].astype(float) - both["score_a"].astype(float)
        pair["task"] = pair["task_a"].fillna(pair["task_b"])
        both["task"], both["answer"] = both["task_a"], both["answer_a"]
        tasks = sorted(pair["task"].unique())
        for task in tasks if tasks == [OVERALL] else [*tasks, OVERALL]:
            of_task, every = (part if task == OVERALL else part[part["task"] == task] for part in (both, pair))
            alone = {name: int((every["in"] == side).sum()) for name, side in (("only_a", "left_only"), ("only_b", "right_only"))}
            rows.append({"mode": mode, "task": task, **_difference(of_task), **alone})
        moved.append(both[both["difference"] != 0].assign(mode=mode))
    return pd.DataFrame(rows), pd.concat(moved, ignore_index=True)


def _difference(both: pd.DataFrame) -> dict[str, float]:
    nan = float("nan")
    counts = {
        "n": len(both),
        "clusters": both["cluster_a"].nunique(),
        "gained": int((both["difference"] > 0).sum()),
        "lost": int((both["difference"] < 0).sum()),
    }
    if both.empty:
        return {**counts, **dict.fromkeys(("a", "b", "difference", "lower", "upper"), nan)}
    found = interval(both["difference"].to_numpy(), both["cluster_a"].to_numpy(), bounds=(-1.0, 1.0))
    means = {"a": both["score_a"].astype(float).mean(), "b": both["score_b"].astype(float).mean()}
    return {**counts, **means, "difference": found.estimate, "lower": found.lower, "upper": found.upper}


def _require_alike(both: pd.DataFrame, mode: str, a: RunFolder, b: RunFolder) -> None:
    """Refuse items that were not the same question to both, or are not scored alike."""
    among = mode == "candidates" or any("candidates" in SCORERS[name].needs for name in set(both["scorer_a"]) & set(SCORERS))
    scored = (*(() if mode == "candidates" else ("scorer",)), *(("candidates",) if among else ()))
    for name in (*ASKED_ALIKE, "references", *scored):
        others = [item for item, one, other in zip(both["item"], both[f"{name}_a"], both[f"{name}_b"], strict=True) if one != other]
        if others:
            raise ValueError(
                f"{len(others)} of {len(both)} items have another {name} in {a.path} than in {b.path} (the first is {others[0]!r}): they were "
                f"not asked the same, and cannot be compared"
            )


def _with_lists(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers in which an item without further accepted answers, or candidates, has none, whatever other items have."""
    lists = {name: answers[name] if name in answers else [None] * len(answers) for name in ("references", "candidates")}
    return answers.assign(**{name: [one if isinstance(one, list) else [] for one in given] for name, given in lists.items()})
