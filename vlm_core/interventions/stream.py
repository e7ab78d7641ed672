"""Interventions on the residual stream and what modules add to it.

``Patch``            activations become another run's (denoising, noising), or get Gaussian noise
``Steer``            a direction is added to the residual stream
``ReplaceTokens``    tokens are replaced in embedding space
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions.declaration import (
    Declared,
    Positions,
    Touch,
    as_heads,
    as_layers,
    as_positions,
    as_vector,
    label,
    require_kind,
    scope_of,
    short,
    shown_heads,
)
from vlm_core.interventions.numeric import integer, real, shown
from vlm_core.interventions.sources import SITES, Activations, GaussianNoise, Vector

__all__ = ["Patch", "ReplaceTokens", "Steer"]


@dataclass(frozen=True, eq=False)
class Patch(Declared):
    """Activations at a site become another run's, or get noise.

    With ``source`` from a clean prompt in a corrupted one this is denoising (what suffices), the other way round noising (what is
    necessary).

    Parameters
    ----------
    site : {"residual", "attention", "mlp", "head"}
        ``residual``: the stream that enters each of ``layers`` (``n_layers`` for the final norm). ``attention``, ``mlp``: what the module
        gives back. ``head``: outputs of heads before the output projection.
    layers : tuple of int
        May be left empty where ``heads`` name them.
    source : Activations or GaussianNoise
        Activations *replace*, noise is *added*. Members of a group are matched in order: the other prompt needs as many of them.
    positions : group name or positions
        Positions of a tuple are the same in both prompts. Only tokens of the prompt are patched, none that is generated.
    heads : tuple of HeadId
        For the site ``head``; all heads of ``layers`` where none is named.
    """

    site: str
    layers: tuple[int, ...]
    source: Activations | GaussianNoise
    positions: Positions = "all"
    heads: tuple[HeadId, ...] = ()
    capability: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"'{self.site}' is not a site: choose from {', '.join(SITES)}")
        require_kind(self.source, (Activations, GaussianNoise), "source of Patch")
        layers, heads = as_layers(self.layers), as_heads(self.heads)
        if heads and self.site != "head":
            raise ValueError(f"heads can be patched at the site 'head' only, not at '{self.site}'")
        named = as_layers(head.layer for head in heads)
        if heads and layers and layers != named:
            raise ValueError(f"the heads lie in layers {short(named)}, not in {short(layers)}: leave layers empty")
        layers = layers or named
        if isinstance(self.source, Activations):
            for layer in layers:
                self.source.at(self.site, layer)
        self._seal(layers=layers, heads=heads, positions=as_positions(self.positions, "positions"))

    def describe(self) -> str:
        """A short unique label."""
        where = shown_heads(self.heads) if self.heads else f"layers {short(self.layers)}"
        source = "noise " if isinstance(self.source, GaussianNoise) else ""
        return label("patch", self.site, where, source + self.source.digest, positions=self.positions)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        if not self.layers:
            return Touch(n_layers, "question")
        return Touch(min(self.layers[0], n_layers - 1), scope_of(self.positions))


@dataclass(frozen=True, eq=False)
class Steer(Declared):
    """``scale * direction`` is added to the residual stream that enters ``layer``, at ``positions``.

    Parameters
    ----------
    layer : int
        ``n_layers`` for what enters the final norm.
    direction : Vector, or Tensor ``[hidden]``
        Added as it is: normalise it where its length should not count.
    positions : group name or positions
        Groups include generated tokens where they belong to them.
    """

    layer: int
    direction: Vector
    scale: float = 1.0
    positions: Positions = "all"
    capability: ClassVar[str] = "steer"

    def __post_init__(self) -> None:
        self._seal(
            layer=integer(self.layer, "layer of Steer"),
            direction=as_vector(self.direction),
            scale=real(self.scale, "scale of Steer"),
            positions=as_positions(self.positions, "positions"),
        )

    def describe(self) -> str:
        """A short unique label."""
        return label("steer", f"layer {self.layer}", f"{shown(self.scale)} x {self.direction.digest}", positions=self.positions)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return Touch(min(self.layer, n_layers - 1), scope_of(self.positions))


@dataclass(frozen=True, eq=False)
class ReplaceTokens(Declared):
    """Tokens are replaced before the first layer: by a mean token, by another prompt's, or noised.

    Parameters
    ----------
    by : Vector (or Tensor ``[hidden]``), Activations or GaussianNoise
        A vector takes the place of each token (mean ablation keeps the norm in distribution: Neo et al. 2025). Activations, captured at
        the site ``residual`` of layer 0, replace token by token. Noise is *added*.
    tokens : group name or positions
        Which tokens of the prompt; none that is generated.

    Notes
    -----
    "Embedding space" is the residual stream that enters the first layer: text embeddings and projected image features, after any
    scaling of the family. Visual features that a family adds again in later layers (Qwen3-VL) are not replaced.
    """

    by: Vector | Activations | GaussianNoise
    tokens: Positions = "image"
    capability: ClassVar[str] = "replace_tokens"

    def __post_init__(self) -> None:
        by = as_vector(self.by) if isinstance(self.by, torch.Tensor) else self.by
        require_kind(by, (Vector, Activations, GaussianNoise), "'by' of ReplaceTokens")
        if isinstance(by, Activations):
            by.at("residual", 0)
        self._seal(by=by, tokens=as_positions(self.tokens, "tokens"))

    def describe(self) -> str:
        """A short unique label."""
        return label("tokens", f"by {type(self.by).__name__} {self.by.digest}", tokens=self.tokens)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return Touch(0, scope_of(self.tokens))
