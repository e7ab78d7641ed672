"""What every declaration of an intervention shares: content, digest, label, and where it begins to matter.

``Declared``     base: frozen, compares and hashes by the digest of its content
``Touch``        first layer touched, and whether the prompt up to the last image token is
``Positions``    a token group by name, or positions in the prompt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from typing import ClassVar, NamedTuple

import torch

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions.numeric import integers
from vlm_core.interventions.sources import Source, Vector

__all__ = [
    "Declared",
    "Positions",
    "Touch",
    "as_heads",
    "as_layers",
    "as_positions",
    "as_vector",
    "label",
    "require_kind",
    "scope_of",
    "short",
    "shown_heads",
    "touch_heads",
]

Positions = str | tuple[int, ...]
"""A token group by name, or positions in the prompt."""


class Touch(NamedTuple):
    """Where an intervention begins to matter.

    ``layer``: the first layer whose output it can change, ``n_layers`` where it changes nothing. ``scope``:
    ``"question"`` where only tokens after the last image token can change, else ``"all"``.
    """

    layer: int
    scope: str


def scope_of(positions: Positions) -> str:
    """``"question"`` for positions that certainly lie after the last image token, else ``"all"``."""
    return "question" if positions in ("question", "last") else "all"


def as_heads(heads: Iterable) -> tuple[HeadId, ...]:
    """Heads once each, in order."""
    if isinstance(heads, str | HeadId) or not isinstance(heads, Iterable):
        raise ValueError(f"heads must be several (layer, head) pairs, got {heads!r}: pass a list, also of one head")
    return tuple(sorted({_head(pair) for pair in heads}))


def _head(pair) -> HeadId:
    try:
        if isinstance(pair, str):
            raise TypeError
        layer, head = pair
    except (TypeError, ValueError):
        raise ValueError(f"heads must be (layer, head) pairs, got {pair!r} among them: write HeadId(layer, head)") from None
    return HeadId(layer, head)


def as_layers(layers: int | Iterable[int], name: str = "layers") -> tuple[int, ...]:
    """Layers (or heads of a layer) once each, in order; a single integer is one of them."""
    return tuple(sorted(set(integers(layers, name, f"each of {name}"))))


def as_positions(positions: Positions | int, name: str) -> Positions:
    """A group name as it is; positions once each, in order."""
    if isinstance(positions, str):
        return positions
    positions = integers(positions, name, f"each of {name}")
    if not positions:
        raise ValueError(f"{name} must be a group name or at least one position, got none")
    return tuple(sorted(set(positions)))


def as_vector(values: Vector | torch.Tensor) -> Vector:
    """A tensor ``[hidden]`` as a ``Vector``."""
    if isinstance(values, Vector):
        return values
    try:
        return Vector(torch.as_tensor(values, dtype=torch.float32))
    except (TypeError, RuntimeError):
        raise ValueError(f"a direction must be a Vector or a tensor [hidden], got {type(values).__name__}: pass numbers") from None


def require_kind(source, kinds: tuple[type, ...], what: str) -> None:
    """Refuse a source of another kind, in one sentence."""
    if not isinstance(source, kinds):
        known = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{what} must be {known}, got {type(source).__name__}")


def short(value) -> str:
    """A group name, or numbers with commas."""
    return value if isinstance(value, str) else ",".join(map(str, value))


def shown_heads(heads: tuple[HeadId, ...]) -> str:
    """Up to four heads by name, more by number and digest."""
    if len(heads) <= 4:
        return " ".join(map(str, heads))
    digest = hashlib.sha256(repr([tuple(head) for head in heads]).encode()).hexdigest()[:8]
    return f"{len(heads)} heads {digest}"


def label(kind: str, *rest: str, **options: Positions) -> str:
    """A label that names ``options`` only where they are not what is usual."""
    usual = {"queries": "all", "positions": "all", "tokens": "image"}
    shown = [f"{key} {short(value)}" for key, value in options.items() if value != usual[key]]
    return f"{kind}({', '.join((*rest, *shown))})"


class Declared:
    """Equality and hash by content, and the content as JSON."""

    capability: ClassVar[str]
    digest: str

    def _seal(self, **normal) -> None:
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        content = json.dumps(self.to_dict(), sort_keys=True)
        object.__setattr__(self, "digest", hashlib.sha256(content.encode()).hexdigest()[:16])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.digest == self.digest

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def to_dict(self) -> dict:
        """Builtins only; tensors by their digest (``vlm_core.interventions.stored`` keeps them beside)."""
        content: dict = {"kind": type(self).__name__}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Source | Declared):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = [list(one) if isinstance(one, tuple) else one for one in value]
            content[entry.name] = value
        return content


def touch_heads(heads: tuple[HeadId, ...], positions: Positions, n_layers: int) -> Touch:
    """Where an edit of ``heads`` at ``positions`` begins to matter."""
    return Touch(heads[0].layer, scope_of(positions)) if heads else Touch(n_layers, "question")
