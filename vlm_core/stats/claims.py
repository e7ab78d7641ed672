"""What a research claim declares before anything is measured.

``Superiority``, ``NonInferiority``, ``Equivalence``, ``Trend``
    the four questions a claim can put to an effect
``Claim``
    a frozen declaration; its content hash goes into every record
``CONTROL_KINDS``
    of what is checked beside a claim
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import ClassVar

CONTROL_KINDS = ("negative", "positive", "floor", "ceiling", "placebo", "condition", "info")
"""What can be checked beside a claim."""


def _require_number(owner: str, name: str, value: float, *, positive: bool) -> None:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "positive" if positive else "zero or more"
        raise ValueError(f"{owner}: the {name} must be a finite number, {wanted}, not {value!r}")


@dataclass(frozen=True)
class Superiority:
    """The effect exceeds ``threshold``, the smallest effect of interest (a drop or a gain, positive = as claimed)."""

    threshold: float
    kind: ClassVar[str] = "superiority"

    def __post_init__(self) -> None:
        _require_number("Superiority", "threshold", self.threshold, positive=False)

    @property
    def limit(self) -> float:
        """The number the interval is compared with."""
        return float(self.threshold)

    def describe(self) -> str:
        return f"superiority: the effect is above {self.threshold:g}"


@dataclass(frozen=True)
class NonInferiority:
    """The loss stays below ``margin`` (positive effect = loss)."""

    margin: float
    kind: ClassVar[str] = "non-inferiority"

    def __post_init__(self) -> None:
        _require_number("NonInferiority", "margin", self.margin, positive=True)

    @property
    def limit(self) -> float:
        """The number the interval is compared with."""
        return float(self.margin)

    def describe(self) -> str:
        return f"non-inferiority: the loss is below {self.margin:g}"


@dataclass(frozen=True)
class Equivalence:
    """The effect lies between ``-margin`` and ``+margin`` (two one-sided tests)."""

    margin: float
    kind: ClassVar[str] = "equivalence"

    def __post_init__(self) -> None:
        _require_number("Equivalence", "margin", self.margin, positive=True)

    @property
    def limit(self) -> float:
        """The number the interval is compared with, on both sides."""
        return float(self.margin)

    def describe(self) -> str:
        return f"equivalence: the effect lies within ±{self.margin:g}"


@dataclass(frozen=True)
class Trend:
    """Items follow the predicted order of conditions (see :mod:`vlm_core.stats.trend`)."""

    kind: ClassVar[str] = "trend"

    @property
    def limit(self) -> float:
        """The number the interval is compared with: no slope."""
        return 0.0

    def describe(self) -> str:
        return "trend: the contrast over the ordered conditions is above 0"


ClaimTest = Superiority | NonInferiority | Equivalence | Trend

_ID = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)+")


@dataclass(frozen=True)
class Claim:
    """One sentence about a model, declared so that a number can contradict it.

    Parameters
    ----------
    id
        ``"H1.necessity"``: hypothesis, dot, name.
    sentence
        What is claimed, in plain words, with its numbers.
    effect
        The estimand, per item (``"accuracy(full) - accuracy(ablated), paired per item"``).
    test
        ``Superiority``, ``NonInferiority``, ``Equivalence`` or ``Trend``.
    source
        Where the claim comes from.
    tier
        ``"confirmatory"`` (gates) or ``"exploratory"`` (reported, never gates).
    alpha
        One-sided error rate of the whole family; `decide` divides it by the family's size.
    unit
        What is resampled (``"scene"``).
    min_clusters, min_seeds
        Fewer make the claim *invalid*. ``min_seeds > 1`` declares a seeds × items design.
    direction
        ``"drop"`` or ``"gain"``: which way the model needs room to move (see `decide`).
    """

    id: str
    sentence: str
    effect: str
    test: ClaimTest
    source: str
    tier: str = "confirmatory"
    alpha: float = 0.05
    unit: str = "scene"
    min_clusters: int = 30
    min_seeds: int = 1
    direction: str = "drop"

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"claim id {self.id!r} must read 'hypothesis.name', such as 'H1.necessity'")
        if not isinstance(self.test, ClaimTest):
            raise TypeError(
                f"{self.id}: test must be Superiority, NonInferiority, Equivalence or Trend, not {self.test!r}"
            )
        if self.tier not in ("confirmatory", "exploratory"):
            raise ValueError(f"{self.id}: tier must be 'confirmatory' or 'exploratory', not {self.tier!r}")
        if self.direction not in ("drop", "gain"):
            raise ValueError(f"{self.id}: direction must be 'drop' or 'gain', not {self.direction!r}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"{self.id}: alpha must lie between 0 and 0.5, not {self.alpha!r}")
        if self.min_clusters < 2 or self.min_seeds < 1:
            raise ValueError(f"{self.id}: min_clusters must be at least 2 and min_seeds at least 1")

    @property
    def hypothesis(self) -> str:
        """The part of the id before the first dot."""
        return self.id.split(".", 1)[0]

    def as_dict(self) -> dict:
        """The declaration in builtins, ready for JSON."""
        declared = asdict(self)
        declared["test"] = {"kind": self.test.kind, **asdict(self.test)}
        return declared

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the declaration's canonical JSON: any changed word changes it."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
