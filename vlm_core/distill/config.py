"""What one distillation is, as a declaration that fits in a file.

``DistillConfig``   teacher, student, data, answers, filters, evaluation sets, stages; from TOML, YAML or Python
``Stage.KINDS``     every kind of training by its name in a file: ``sft``, ``preference``, ``on_policy``

``example.toml`` beside this module is one. Paths are taken from the working directory; what is no path is a Hub id. ``factory`` names a
function ("module:function") that gives items, with its ``arguments``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from vlm_core.distill.grounded import TEMPLATE
from vlm_core.distill.lora import Lora
from vlm_core.distill.training import Budget
from vlm_core.interventions.numeric import integer
from vlm_core.settings import checked, declared, read_settings
from vlm_core.sources import CheckpointAt, Items

__all__ = [
    "Answers",
    "CostSettings",
    "DistillConfig",
    "Filters",
    "OnPolicy",
    "Pairs",
    "Preference",
    "SFT",
    "Stage",
    "TeacherAt",
    "Where",
]


@dataclass(frozen=True)
class TeacherAt:
    """Who is learnt from: a checkpoint (``path``, ``revision``), or what a model said (``recorded``: see `vlm_core.distill.teachers`)."""

    path: str | None = None
    revision: str | None = None
    recorded: str | None = None

    def __post_init__(self) -> None:
        checked(self)
        if (self.path is None) == (self.recorded is None):
            raise ValueError("it is either a checkpoint (path = a directory or Hub id) or recorded = a file of answers: name one of them")
        if self.recorded is not None and self.revision is not None:
            raise ValueError("recorded answers have no revision: leave it away")


@dataclass(frozen=True)
class Where:
    """How it is known where the thing is that an item asks about: one of ``box``, ``question``, ``function``.

    Parameters
    ----------
    box : str, optional
        The item's field with its box, or a list of boxes: (left, top, right, bottom) in pixels.
    question : str, optional
        What the teacher itself is asked about each picture; the answer is the place.
    function : str, optional
        ``"module:function"``: item → words, or None where the place is unknown.
    rows, columns : int
        Of the grid whose cell names the place of a box.
    """

    box: str | None = None
    question: str | None = None
    function: str | None = None
    rows: int = 3
    columns: int = 3

    def __post_init__(self) -> None:
        checked(self)
        named = [name for name in ("box", "question", "function") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"one of box, question and function says where things are, got {' and '.join(named) or 'none of them'}")
        for name in ("rows", "columns"):
            integer(getattr(self, name), name, least=1)


@dataclass(frozen=True)
class Answers:
    """What of the teacher is taught.

    Parameters
    ----------
    kind : {"plain", "grounded", "self-consistent"}
        Its greedy answer; the same with the place of what is asked about; the answer most frequent among samples.
    where : Where, optional
        For grounded answers.
    template : str
        How a grounded answer is written, of ``{answer}`` and ``{where}``.
    samples, temperature
        For self-consistent answers.
    max_new_tokens : int
        Where an answer of a checkpoint is cut off, the student's for pairs too.
    """

    kind: Literal["plain", "grounded", "self-consistent"] = "plain"
    where: Where | None = None
    template: str = TEMPLATE
    samples: int = 5
    temperature: float = 1.0
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        checked(self)
        if (self.kind == "grounded") != (self.where is not None):
            raise ValueError("where (a table with box, question or function) is what grounded answers need, and others do not take")
        integer(self.samples, "samples", least=2)
        integer(self.max_new_tokens, "max_new_tokens", least=1)
        _positive(self.temperature, "temperature")


@dataclass(frozen=True)
class Filters:
    """What is not taught; what is dropped is counted in the data card.

    Parameters
    ----------
    deduplicated : bool
        Of items with the same picture and question the first only.
    shortest, longest : int
        Words of an answer.
    agreement : float, optional
        Least share of self-consistent samples that agree, in (0, 1].
    """

    deduplicated: bool = True
    shortest: int = 1
    longest: int = 64
    agreement: float | None = None

    def __post_init__(self) -> None:
        checked(self)
        integer(self.shortest, "shortest", least=1)
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest} words and longest {self.longest}: no answer is left")
        if self.agreement is not None and not 0 < self.agreement <= 1:
            raise ValueError(f"agreement must be a share above 0 and at most 1, got {self.agreement}")


@dataclass(frozen=True)
class Pairs:
    """Where pairs of a chosen and a rejected answer come from.

    Parameters
    ----------
    source : {"ranked", "against-student", "rubric"}
        Samples that the teacher ranks; what is taught against what the student says; samples that equal the known answer against those
        that do not.
    of : {"student", "teacher"}
        Whose samples: the student's as it enters the stage, or the teacher's.
    samples, temperature
        How many an item, and how they are drawn.
    """

    source: Literal["ranked", "against-student", "rubric"] = "ranked"
    of: Literal["student", "teacher"] = "student"
    samples: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checked(self)
        integer(self.samples, "samples", least=2)
        _positive(self.temperature, "temperature")


@dataclass(frozen=True)
class Stage:
    """One training run, from the student that the stage before left.

    Parameters
    ----------
    steps, batch_size, learning_rate
        See `Budget`; ``batch_size`` counts for each process.
    name : str, optional
        In files and tables; default: its kind.
    lora : Lora, optional
        Train low-rank changes of some layers in place of all weights.
    recipe : str, optional
        A `vlm_core.Recipe` on disk (``token-recipe.json``), in force while training; the result is evaluated with and without it.
    """

    KINDS: ClassVar[dict[str, type[Stage]]] = {}

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    name: str | None = None
    lora: Lora | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        checked(self)
        integer(self.steps, "steps", least=1)
        integer(self.batch_size, "batch_size", least=1)
        _positive(self.learning_rate, "learning_rate")
        if self.name is None:
            object.__setattr__(self, "name", self.kind)
        if not all(letter.isalnum() or letter in "_-" for letter in self.name):
            raise ValueError(f"'{self.name}' cannot name a stage: use letters, digits, '_' and '-'")

    @property
    def kind(self) -> str:
        """Its name in a file."""
        return next(name for name, kind in Stage.KINDS.items() if kind is type(self))

    @property
    def budget(self) -> Budget:
        """What the run may spend."""
        return Budget(self.steps, self.batch_size, self.learning_rate)


@dataclass(frozen=True)
class SFT(Stage):
    """Supervised fine-tuning on the teacher's answers."""


@dataclass(frozen=True)
class Preference(Stage):
    """Preference optimisation (DPO) on pairs; see `vlm_core.distill.preference`."""

    beta: float = 0.1
    image_term: float = 0.0
    anchor_term: float = 0.0
    answer_term: float = 0.0
    pairs: Pairs = field(default_factory=Pairs)

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.beta, "beta")
        for name in ("image_term", "anchor_term", "answer_term"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a weight, 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class OnPolicy(Stage):
    """Distillation on what the student itself writes; see `vlm_core.distill.on_policy`."""

    divergence: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.temperature, "temperature")
        integer(self.max_new_tokens, "max_new_tokens", least=1)
        if not 0 <= self.divergence <= 1:
            raise ValueError(f"divergence goes from 0 (forward KL) to 1 (reverse KL), got {self.divergence}")


Stage.KINDS.update(sft=SFT, preference=Preference, on_policy=OnPolicy)


@dataclass(frozen=True)
class CostSettings:
    """How student and teacher are timed on the first evaluation set: prompts a batch, paired rounds (0: not timed), generated tokens."""

    batch: int = 8
    rounds: int = 10
    tokens: int = 8

    def __post_init__(self) -> None:
        checked(self)
        for name, least in (("batch", 1), ("rounds", 0), ("tokens", 1)):
            integer(getattr(self, name), name, least=least)


@dataclass(frozen=True)
class DistillConfig:
    """One distillation.

    Parameters
    ----------
    teacher : TeacherAt
    student : CheckpointAt
        What training starts from; it is not changed.
    data : Items
        What the teacher answers and the student is taught.
    evaluation : mapping of name to Items
        Sets that the student is measured on before and after, and that no picture of the data may be in.
    stages : tuple of Stage
        In order, each from the one before.
    out : str
        Folder of everything that comes out.
    leaked : {"refuse", "drop"}
        What happens when a picture of the data is in an evaluation set: nothing is trained, or such items are dropped and counted.
    licence : str
        Of the data, for its card.
    seed : int
        Order of the data, samples and everything else random.
    """

    teacher: TeacherAt
    student: CheckpointAt
    data: Items
    evaluation: Mapping[str, Items]
    stages: tuple[Stage, ...]
    out: str
    answers: Answers = field(default_factory=Answers)
    filters: Filters = field(default_factory=Filters)
    leaked: Literal["refuse", "drop"] = "refuse"
    licence: str = "not stated"
    costs: CostSettings = field(default_factory=CostSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self)
        integer(self.seed, "seed", least=0)
        if not self.evaluation:
            raise ValueError("evaluation names no set: what is learnt cannot be measured; write [evaluation.NAME]")
        if not self.stages:
            raise ValueError(f"stages is empty: a distillation needs at least one, of kind {', '.join(Stage.KINDS)}")
        names = [stage.name for stage in self.stages]
        for number, name in enumerate(names):
            if name in (*names[:number], "before", "teacher"):
                raise ValueError(
                    f"stages[{number}]: the name '{name}' is taken: give each stage its own (name = ...), other than before and teacher"
                )
        if self.filters.agreement is not None and self.answers.kind != "self-consistent":
            raise ValueError(
                f"filters.agreement is a share of samples that agree, but answers are {self.answers.kind}: make them self-consistent, or "
                f"leave it away"
            )
        for number, stage in enumerate(self.stages):
            ranked = isinstance(stage, Preference) and stage.pairs.source == "ranked" and stage.pairs.of == "student"
            if ranked and self.teacher.path is None:
                raise ValueError(
                    f"stages[{number}]: a recorded teacher cannot rank what the student says: name a checkpoint (teacher.path), or take "
                    f"pairs with of = 'teacher', or source = 'against-student'"
                )
            if isinstance(stage, OnPolicy) and self.teacher.path is None:
                raise ValueError(
                    f"stages[{number}]: on_policy needs the teacher's probabilities, which recorded answers do not hold: name a checkpoint "
                    f"(teacher.path)"
                )

    @classmethod
    def from_file(cls, path: str | Path) -> DistillConfig:
        """From a ``.toml``, ``.yaml`` or ``.yml`` file.

        Raises
        ------
        ValueError
            One sentence: no such file, not TOML or YAML, a setting that is unknown, missing or of another type.
        """
        content = read_settings(path, "a distillation's configuration", "teacher, student, data, evaluation, stages and out")
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DistillConfig:
        """From what a file says."""
        return declared(cls, content)

    def to_dict(self) -> dict[str, Any]:
        """Builtins only; ``from_dict`` reads it back."""
        content = asdict(self)
        content["stages"] = [{"kind": stage.kind, **asdict(stage)} for stage in self.stages]
        return json.loads(json.dumps(content, default=list))


def _positive(value: float, name: str) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
