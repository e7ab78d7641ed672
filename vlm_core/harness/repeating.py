"""Whether a run says the same again.

``repeat(path)``   ask a finished run's subject the same items again, as it was asked then
``TOLERANCES``     how far numbers may lie apart, by the dtype that the subject computes in
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_core.harness.answering import answer
from vlm_core.harness.asked import AskedSet
from vlm_core.harness.comparing import runs_in
from vlm_core.harness.config import ItemSet, SubjectAt
from vlm_core.harness.run_folder import WINDOW, RunFolder, differing
from vlm_core.harness.running import versions
from vlm_core.items import take
from vlm_core.settings import declared
from vlm_core.sources import checkpoint_digest, located
from vlm_core.subjects.load import load_vlm
from vlm_core.subjects.subject import Subject

__all__ = ["TOLERANCES", "Repetition", "repeat"]

TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""Of scores, margins and summed log-probabilities. On one machine, in the same batches, they are the same to the last bit; other batches and
other machines sum in another order, which moves logits of size ten by a few units in the last place, layer after layer."""


@dataclass(frozen=True, eq=False)
class Repetition:
    """What was said again.

    Attributes
    ----------
    table : DataFrame
        ``set, mode, items, same, largest, tolerance``: items asked again, how many answers are the same (text and number of tokens), and the
        largest difference of a score, margin or log-probability.
    first : str or None
        The first item of which something is not the same, in words.
    notes : tuple of str
        Versions that are not those of the run.
    """

    table: pd.DataFrame
    first: str | None
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every answer is the same and every number within the tolerance."""
        return self.first is None

    def __str__(self) -> str:
        table = self.table
        n, same, largest = table["items"].sum(), table["same"].sum(), table["largest"].max()
        stated = " or ".join(f"{one:g}" for one in sorted(table["tolerance"].unique()))
        verdict = "the run is reproduced" if self.agrees else f"the run is not reproduced: {self.first}"
        return f"{same} of {n} answers are the same, numbers differ by at most {largest:.2g} (tolerance {stated}): {verdict}"


def repeat(
    path: str | Path,
    *,
    items: int | None = None,
    tolerance: float | None = None,
    batch_rows: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Repetition:
    """Ask again, and hold what is said against what was said.

    Parameters
    ----------
    path : path
        The folder of a subject's answers to one set, or of a subject.
    items : int, optional
        At least so many of each set, the first ones: as many as are answered together (`vlm_core.harness.run_folder.WINDOW`) or a multiple.
        Default: all.
    tolerance : float, optional
        In place of the one of the subject's dtype.
    batch_rows : int, optional
        Rows per batch, in place of those that the run was given: whether answers depend on it.
    say : callable, optional
        Told, in words, what happens.

    Raises
    ------
    ValueError, SubjectError
        One sentence: no finished run; a checkpoint or items that are not those of the run.
    """
    rows, firsts, notes = [], [], []
    subject: Subject | None = None
    for name, folder in runs_in(path).items():
        about, known = folder.about(), folder.finished_answers()
        asked, then, weights_at = _same_as_then(folder, about, name)
        notes += [f"{name}: {word}" for word in _other_versions(about)]
        if subject is None:
            subject = load_vlm(weights_at, **then.loading)
        dtype = subject.identity()["dtype"]
        allowed = TOLERANCES[dtype] if tolerance is None else tolerance
        n = len(asked.items) if items is None else min(len(asked.items), -(-items // WINDOW) * WINDOW)
        again: list[dict[str, Any]] = []
        for start in range(0, n, WINDOW):
            some = range(start, min(start + WINDOW, n))
            again += answer(
                subject,
                take(asked.items, some),
                [asked.facts[number] for number in some],
                asked.modes,
                max_new_tokens=about["asked"]["max_new_tokens"] or 1,
                logits=about["asked"]["logits"],
                batch_rows=about["asked"].get("batch_rows") if batch_rows is None else batch_rows,
                seed=about["asked"]["seed"],
            )
            if say is not None:
                say(f"{some.stop} of {n} items of {name} asked again")
        before = known.iloc[: len(again)].to_dict("records")
        for mode in asked.modes:
            pairs = [(old, new) for old, new in zip(before, again, strict=True) if new["mode"] == mode]
            row, first = _held_together(pairs, allowed)
            rows.append({"set": name, "mode": mode, **row, "tolerance": allowed})
            firsts += [] if first is None else [f"{name}, {first}"]
    return Repetition(pd.DataFrame(rows), firsts[0] if firsts else None, tuple(notes))


def _same_as_then(folder: RunFolder, about: dict[str, Any], name: str) -> tuple[AskedSet, SubjectAt, str]:
    """The set, the subject and its checkpoint's folder, if all are what they were."""
    then = SubjectAt(**{one.name: about["subject"][one.name] for one in fields(SubjectAt)})
    weights_at = located(then.path, then.revision)
    if checkpoint_digest(weights_at) != about["subject"]["weights"]:
        raise ValueError(f"the checkpoint {then.path} is not the one that {folder.path} was answered by: its weights or settings are others")
    source = declared(ItemSet, {key: value for key, value in about["data"]["source"].items() if value is not None})
    asked = AskedSet.read(name, source, tuple(about["asked"]["modes"]))
    if asked.digest != about["data"]["digest"]:
        raise ValueError(f"the items of {folder.path} are not those that were answered: what the set gives has changed")
    return asked, then, weights_at


def _other_versions(about: dict[str, Any]) -> list[str]:
    return differing(about, {**about, "versions": versions()}, ("versions",))


def _held_together(pairs: Sequence[tuple[dict, dict]], allowed: float) -> tuple[dict[str, Any], str | None]:
    same, largest, first = 0, 0.0, None
    for old, new in pairs:
        alike = old["output"] == new["output"] and (new["mode"] != "greedy" or int(old["tokens"]) == new["tokens"])
        apart = max(_apart(old.get(name), new.get(name)) for name in ("score", "margin", "logits"))
        same, largest = same + alike, max(largest, apart)
        if first is None and not (alike and apart <= allowed):
            first = f"item {new['item']!r} said {old['output']!r} and says {new['output']!r}, its numbers differ by {apart:.2g}"
    return {"items": len(pairs), "same": same, "largest": largest}, first


def _apart(old: Any, new: Any) -> float:
    """How far two numbers, or two tables of numbers, lie apart; where only one of them is a number, infinitely."""
    if isinstance(new, dict):
        return max((_apart(old.get(name), value) for name, value in new.items()), default=0.0)
    old = None if old is None or old != old else old
    if old is None or new is None:
        return 0.0 if old is new else float("inf")
    return abs(old - new)
