"""What one evaluation is, as a declaration that fits in a file.

``EvaluationConfig``   subjects, sets, how they are asked; from TOML, YAML or Python
``SubjectAt``          a checkpoint, where it runs, and its name in what comes out
``ItemSet``            items, as anywhere in this library, and how they are asked where that is not what the others are

``example.toml`` beside this module is one. Paths are taken from the working directory; what is no path is a Hub id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_core.interventions.numeric import integer
from vlm_core.scoring import scorer_of
from vlm_core.settings import checked, declared, read_settings
from vlm_core.sources import Items

__all__ = ["MODES", "EvaluationConfig", "ItemSet", "SubjectAt"]

MODES = ("candidates", "greedy")
"""How an item is answered, in the order of what comes out; ``"both"`` is both of them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SubjectAt:
    """A checkpoint that is evaluated.

    Parameters
    ----------
    path : str
        A directory or Hub id.
    revision : str, optional
    device, dtype, quantization : str
        As `vlm_core.load_vlm` takes them.
    name : str, optional
        Its folder in what comes out; default: the last part of its path.
    """

    path: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        checked(self)
        if self.name is None:
            object.__setattr__(self, "name", Path(self.path).resolve().name if Path(self.path).exists() else Path(self.path).name)
        _require_name(self.name, "a subject")

    @property
    def loading(self) -> dict[str, Any]:
        """How `vlm_core.load_vlm` is to load it."""
        return {"device": self.device, "dtype": self.dtype, "quantization": self.quantization}


@dataclass(frozen=True)
class ItemSet(Items):
    """Items that subjects answer.

    Parameters
    ----------
    mode : {"candidates", "greedy", "both"}, optional
        How, where it is not how the other sets are answered.
    scorer : str, optional
        What scores generated answers (`vlm_core.scoring.SCORERS`), in place of what each item names.
    """

    mode: Literal["candidates", "greedy", "both"] | None = None
    scorer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer is not None:
            scorer_of({"scorer": self.scorer})


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation: every subject answers every item of every set.

    Parameters
    ----------
    subjects : tuple of SubjectAt
    sets : mapping of name to ItemSet
    out : str
        Folder of everything that comes out.
    mode : {"candidates", "greedy", "both"}
        ``"candidates"``: the candidate of the highest summed log-probability; ``"greedy"``: what is generated, token by token the
        likeliest, scored by the item's scorer (`vlm_core.scoring`).
    max_new_tokens : int
        Where a generated answer is cut off.
    logits : bool
        Also write every candidate's summed log-probability.
    batch_rows : int, optional
        Rows per batch. Default: by the memory that the device has left.
    seed : int
        Of everything random, for models that draw.
    """

    subjects: tuple[SubjectAt, ...]
    sets: Mapping[str, ItemSet]
    out: str
    mode: Literal["candidates", "greedy", "both"] = "candidates"
    max_new_tokens: int = 16
    logits: bool = False
    batch_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self)
        integer(self.max_new_tokens, "max_new_tokens", least=1)
        integer(self.seed, "seed", least=0)
        if self.batch_rows is not None:
            integer(self.batch_rows, "batch_rows", least=1)
        if not self.subjects:
            raise ValueError("subjects is empty: there is nobody to answer; write [[subjects]] with a path")
        if not self.sets:
            raise ValueError("sets is empty: there is nothing to answer; write [sets.NAME]")
        names = [subject.name for subject in self.subjects]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"subjects[{number}]: the name '{name}' is taken: give each subject its own (name = ...)")
        for name in self.sets:
            _require_name(name, "a set")
        if self.logits and not any("candidates" in self.modes(name) for name in self.sets):
            raise ValueError("logits are those of candidates, which no set is answered by: leave it away, or ask for mode = 'both'")

    def modes(self, name: str) -> tuple[str, ...]:
        """How the items of one set are answered."""
        mode = self.sets[name].mode or self.mode
        return MODES if mode == "both" else (mode,)

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> EvaluationConfig:
        """From a ``.toml``, ``.yaml`` or ``.yml`` file.

        Parameters
        ----------
        **changes
            Settings in place of those in the file.

        Raises
        ------
        ValueError
            One sentence: no such file, not TOML or YAML, a setting that is unknown, missing or of another type.
        """
        content = read_settings(path, "an evaluation's configuration", "subjects, sets and out")
        try:
            return cls.from_dict({**content, **changes})
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EvaluationConfig:
        """From what a file says."""
        return declared(cls, content)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only; ``from_dict`` reads it back."""
        return json.loads(json.dumps(asdict(self), default=list))


def _require_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' cannot name {what}: use letters, digits, '.', '_' and '-'")
