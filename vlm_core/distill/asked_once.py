"""A teacher that is asked everything once: what it said is on disk, in pieces, and found again after a kill.

``AskedOnce(make, key, folder)``   a `vlm_core.distill.Teacher` around one that is only loaded where something was not yet asked
``rows_digest(data)``              hash of a data set's rows, pictures included
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from vlm_core.distill.teachers import Teacher
from vlm_core.files import write_whole
from vlm_core.identity import digest, picture_digest
from vlm_core.items import item_field, take

__all__ = ["AskedOnce", "rows_digest"]

PIECE = 64
"""Items in a piece: what a killed run asks again at most."""


class AskedOnce:
    """A teacher whose every word is kept.

    Parameters
    ----------
    make : callable
        ``make()``: the teacher itself.
    key : JSON
        What its words follow from beside the items: weights, and how it is asked.
    folder : Path
    say : callable
        Told, in words, how far it is.

    Attributes
    ----------
    operations : dict of str to float
        Floating-point operations of the answers, samples and scores that were asked for here, also of those that were found: of each piece
        once. NaN where the teacher itself counts none.
    """

    def __init__(self, make: Callable[[], Teacher], key: Any, folder: Path, say: Callable[[str], None]) -> None:
        self._make, self._folder, self._say = make, folder / digest(key), say
        self._teacher: Teacher | None = None
        self.operations: dict[str, float] = {}
        self._added: set[str] = set()

    def identity(self) -> dict[str, Any]:
        """The teacher's."""
        return self._kept("identity", lambda: self._asked.identity())

    def answers(self, items: Sequence) -> list[str]:
        """The teacher's, piece by piece."""
        return self._pieces("answers", [], items, lambda some, _: self._asked.answers(some))

    def samples(self, items: Sequence, n: int, *, temperature: float = 1.0, seed: int = 0) -> list[tuple[str, ...]]:
        """The teacher's, piece by piece."""
        drawn = self._pieces(
            "samples", [n, temperature, seed], items, lambda some, _: self._asked.samples(some, n, temperature=temperature, seed=seed)
        )
        return [tuple(one) for one in drawn]

    def scores(self, items: Sequence, answers: Sequence[str]) -> np.ndarray:
        """The teacher's, piece by piece."""
        found = self._pieces("scores", [], items, lambda some, said: np.asarray(self._asked.scores(some, said)).tolist(), answers)
        return np.array(found, dtype=float)

    def close(self) -> None:
        """Give back the memory of the teacher itself."""
        self._teacher = None

    @property
    def _asked(self) -> Teacher:
        if self._teacher is None:
            self._teacher = self._make()
        return self._teacher

    def _pieces(self, what: str, how: list, items: Sequence, ask: Callable, answers: Sequence[str] | None = None) -> list:
        items, found = take(items, range(len(items))), []
        for start in range(0, len(items), PIECE):
            some = items[start : start + PIECE]
            said = None if answers is None else list(answers[start : start + PIECE])
            asked = [(str(item_field(item, "id")), picture_digest(item_field(item, "image")), item_field(item, "prompt")) for item in some]
            name = f"{what}-{digest([how, asked, said])}"
            new = not self._path(name).is_file()
            piece = self._kept(name, lambda some=some, said=said: self._counted(what, partial(ask, some, said)))
            if name not in self._added:
                self._added.add(name)
                self.operations[what] = self.operations.get(what, 0) + (math.nan if piece["flops"] is None else piece["flops"])
            found += piece["said"]
            if new and start // PIECE % 8 == 7:
                self._say(f"{what}: {min(start + PIECE, len(items))} of {len(items)}")
        return found

    def _counted(self, what: str, ask: Callable[[], list]) -> dict[str, Any]:
        """What is said, and the operations that it took."""
        before = getattr(self._asked, "operations", {}).get(what, 0)
        said = ask()
        after = getattr(self._asked, "operations", {}).get(what)
        return {"said": said, "flops": None if after is None else after - before}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self._path(name)
        if not path.is_file():
            write_whole(path, json.dumps(make(), ensure_ascii=False, default=str))
        return json.loads(path.read_text(encoding="utf-8"))


def rows_digest(data: datasets.Dataset) -> str:
    """Hash of what a data set of images and texts holds, in its order."""
    found = hashlib.sha256()
    for row in data.with_format("arrow").data.table.to_pylist():
        for name in sorted(row):
            for one in row[name]:
                found.update(one["bytes"] if "bytes" in one else json.dumps([name, one], sort_keys=True).encode())
    return found.hexdigest()[:20]
