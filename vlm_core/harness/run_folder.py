"""One subject's answers to one set, on disk.

    run.json        who was asked what and how: what the answers follow from
    answers.jsonl   one line for each item and way of answering, in the order of the items
    metrics.csv     the mean score of each task with its interval, once all is answered

``RunFolder``        one such folder: begun, gone on with, read
``differing(a, b)``  in words, what two ``run.json`` do not share

Answers are appended window by window (``WINDOW`` items). After a kill the last line may be torn and the last window a part: the file is cut
back to the end of the last whole window, so that each window is answered in one piece, and what comes out is what an undisturbed run
writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_core.files import write_whole

__all__ = ["OtherAnswers", "WINDOW", "RunFolder", "differing"]

WINDOW = 64
"""Items that are answered and written together: what a killed run does again at most."""
_FOLLOWS_FROM = {
    "subject": ("weights", "device", "dtype", "quantization"),
    "data": ("digest",),
    "asked": ("modes", "max_new_tokens", "logits", "seed"),
    "versions": None,
}


class OtherAnswers(ValueError):
    """A folder holds answers of another run: to other items, of other weights or code, or asked in another way."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with the answers of one subject to one set."""

    path: Path

    @property
    def answers_file(self) -> Path:
        """``answers.jsonl``."""
        return self.path / "answers.jsonl"

    @property
    def metrics_file(self) -> Path:
        """``metrics.csv``."""
        return self.path / "metrics.csv"

    @property
    def begun(self) -> bool:
        """Whether there are answers."""
        return self.answers_file.is_file() and self.answers_file.stat().st_size > 0

    # -- what it is ---------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises
        ------
        ValueError
            One sentence: no run, or a damaged one.
        """
        file = self.path / "run.json"
        if not file.is_file():
            raise ValueError(f"{self.path} holds no run: it has no run.json")
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            return {name: about[name] for name in _FOLLOWS_FROM}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): evaluate into a new folder") from error

    def require(self, about: dict[str, Any]) -> None:
        """Make sure that answers here, if there are any, follow from what ``about`` says.

        Raises
        ------
        OtherAnswers
            One sentence: they follow from something else.
        """
        if self.begun:
            others = differing(self.about(), about)
            if others:
                raise OtherAnswers(f"{self.path} holds answers of another run ({'; '.join(others)}): evaluate into a new folder (out)")

    def begin(self, about: dict[str, Any]) -> None:
        """Write what the answers will follow from; where there are answers already, see `require`."""
        self.require(about)
        if not self.begun:
            write_whole(self.path / "run.json", json.dumps(about, indent=1, ensure_ascii=False))

    # -- what was answered --------------------------------------------------------------------------------------------

    def whole(self, expected: Sequence[tuple[str, str]], window: int) -> int:
        """How many of the expected answers are there, window by window; what is beyond the last whole window is cut off.

        Parameters
        ----------
        expected : sequence of (item, mode)
            All lines, in order.
        window : int
            Lines that are written together.

        Raises
        ------
        ValueError
            One sentence: a line that is damaged, or not the one expected there.
        """
        if not self.answers_file.is_file():
            return 0
        lines = self.answers_file.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for number, (line, due) in enumerate(zip(lines, expected, strict=False), start=1):
            found = self._parsed(line, number)
            if (found.get("item"), found.get("mode")) != due:
                raise ValueError(f"line {number} of {self.answers_file} is not the answer to {due[0]!r} by {due[1]}: evaluate into a new folder")
        if len(lines) > len(expected):
            raise ValueError(f"{self.answers_file} has {len(lines)} lines where {len(expected)} are due: evaluate into a new folder")
        kept = len(lines) if len(lines) == len(expected) else len(lines) // window * window
        size = sum(map(len, lines[:kept]))
        if size < self.answers_file.stat().st_size:
            os.truncate(self.answers_file, size)
        return kept

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write answers at the end, onto the disk."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with self.answers_file.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def finished_answers(self) -> pd.DataFrame:
        """All answers of a finished run.

        Raises
        ------
        ValueError
            One sentence: it is not finished.
        """
        if not self.metrics_file.is_file():
            raise ValueError(f"{self.path} holds no finished run: go on with it first, by the command that began it")
        return self.all_answers()

    def all_answers(self) -> pd.DataFrame:
        """One row for each line; a field that a line lacks is NaN."""
        lines = self.answers_file.read_bytes().splitlines()
        return pd.DataFrame([self._parsed(line, number) for number, line in enumerate(lines, start=1)])

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {self.answers_file} is damaged ({error}): evaluate into a new folder") from error
        if not isinstance(found, dict):
            raise ValueError(f"line {number} of {self.answers_file} is no answer: evaluate into a new folder")
        return found


def differing(
    one: dict[str, Any], other: dict[str, Any], parts: Sequence[str] = tuple(_FOLLOWS_FROM), where: tuple[str, str] = ("there", "now")
) -> list[str]:
    """In words, what of that which answers follow from is not the same in two ``run.json``.

    Parameters
    ----------
    parts : sequence of {"subject", "data", "asked", "versions"}
    where : tuple of str
        What the words call the two.
    """
    words = []
    for part in parts:
        for name in _FOLLOWS_FROM[part] or sorted({*one[part], *other[part]}):
            found = [about[part].get(name) for about in (one, other)]
            if found[0] != found[1]:
                words.append(f"{part} {name} {_short(found[0])} {where[0]}, {_short(found[1])} {where[1]}")
    return words


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:10]}…"
