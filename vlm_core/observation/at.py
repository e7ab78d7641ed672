"""``At``: an observer of attention in some layers and heads only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.observation.declaring import freeze_numbers
from vlm_core.seam.views import AttentionView, Tokens

__all__ = ["At"]


@dataclass(frozen=True)
class At:
    """``observer`` in some ``layers`` and ``heads`` only (default: all). Heads that are not asked for cost nothing."""

    observer: Any
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        freeze_numbers(self, "layers", "heads")
        if not hasattr(self.observer, "attention"):
            raise ValueError(f"At restricts observers of attention, {type(self.observer).__name__} is none")

    @property
    def axes(self) -> tuple | None:
        """The observer's, with the heads' own numbers."""
        axes = getattr(self.observer, "axes", None)
        if axes is None or self.heads is None:
            return axes
        return tuple(("head", self.heads) if name == "head" else (name, labels) for name, labels in axes)

    @property
    def reads_hidden(self) -> bool:
        """The observer's."""
        return getattr(self.observer, "reads_hidden", True)

    @property
    def reads_unrotated(self) -> bool:
        """The observer's."""
        return getattr(self.observer, "reads_unrotated", False)

    @property
    def ragged(self) -> dict[int, str]:
        """The observer's."""
        return getattr(self.observer, "ragged", {})

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a head or layer that the model does not have, and what the observer refuses."""
        for name, chosen, n in (("layer", self.layers, anatomy.n_layers), ("head", self.heads, anatomy.n_heads)):
            outside = [number for number in chosen or () if not 0 <= number < n]
            if outside:
                raise ValueError(f"At({type(self.observer).__name__}): there is no {name} {outside[0]}: this model has {n} {name}s, counted from 0")
        if hasattr(self.observer, "require_there"):
            self.observer.require_there(anatomy, tokens)

    def prepare(self, subject, items) -> At:
        """The same, prepared on a subject."""
        prepare = getattr(self.observer, "prepare", None)
        return self if prepare is None else At(prepare(subject, items), self.layers, self.heads)

    def attention(self, view: AttentionView) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """What the observer sees, None in other layers."""
        if self.layers is not None and view.layer not in self.layers:
            return None
        return self.observer.attention(view if self.heads is None else view.narrowed(self.heads))
