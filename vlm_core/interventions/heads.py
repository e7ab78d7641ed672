"""Interventions inside the attention: heads, image keys and values, edges.

``ZeroHeads``, ``MeanHeads``, ``ResampleHeads``    the output of heads becomes zero, its mean, or another run's
``RedirectHeads``      the output of heads keeps its length and gets another direction
``ReplaceImageKV``     image keys and values of a head become their mean or another image's
``KnockOut``           attention edges from one token group to another are cut
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions.declaration import (
    Declared,
    Positions,
    Touch,
    as_heads,
    as_layers,
    as_positions,
    label,
    require_kind,
    scope_of,
    short,
    shown_heads,
    touch_heads,
)
from vlm_core.interventions.sources import Activations, HeadDirections, HeadMeans, ImageKV, ImageKVMeans

__all__ = ["KnockOut", "MeanHeads", "RedirectHeads", "ReplaceImageKV", "ResampleHeads", "ZeroHeads"]


@dataclass(frozen=True, eq=False)
class ZeroHeads(Declared):
    """The outputs of ``heads`` (before the output projection) become zero at the tokens ``queries``."""

    heads: tuple[HeadId, ...]
    queries: Positions = "all"
    capability: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        self._seal(heads=as_heads(self.heads), queries=as_positions(self.queries, "queries"))

    def describe(self) -> str:
        """A short unique label."""
        return label("zero", shown_heads(self.heads), queries=self.queries)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return touch_heads(self.heads, self.queries, n_layers)


@dataclass(frozen=True, eq=False)
class MeanHeads(Declared):
    """The outputs of ``heads`` become their ``means`` at the tokens ``queries``."""

    heads: tuple[HeadId, ...]
    means: HeadMeans
    queries: Positions = "all"
    capability: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        require_kind(self.means, (HeadMeans,), "means of MeanHeads")
        self._seal(heads=as_heads(self.heads), queries=as_positions(self.queries, "queries"))

    def describe(self) -> str:
        """A short unique label."""
        return label("mean", shown_heads(self.heads), self.means.digest, queries=self.queries)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return touch_heads(self.heads, self.queries, n_layers)


@dataclass(frozen=True, eq=False)
class RedirectHeads(Declared):
    """The outputs of ``heads`` keep their length at every one of the tokens ``queries`` and point where ``directions`` say.

    With random directions (``HeadDirections.random``) this is the norm-matched placebo of an ablation: as much is written, none of it meant.
    """

    heads: tuple[HeadId, ...]
    directions: HeadDirections
    queries: Positions = "all"
    capability: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        require_kind(self.directions, (HeadDirections,), "directions of RedirectHeads")
        self._seal(heads=as_heads(self.heads), queries=as_positions(self.queries, "queries"))

    def describe(self) -> str:
        """A short unique label."""
        return label("redirect", shown_heads(self.heads), self.directions.digest, queries=self.queries)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return touch_heads(self.heads, self.queries, n_layers)


@dataclass(frozen=True, eq=False)
class ResampleHeads(Declared):
    """The outputs of ``heads`` become another run's at the tokens ``queries`` (``source`` captured at the site ``head``).

    Members of a group are matched in order: the other prompt needs as many of them.
    """

    heads: tuple[HeadId, ...]
    source: Activations
    queries: Positions = "all"
    capability: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        require_kind(self.source, (Activations,), "source of ResampleHeads")
        self._seal(heads=as_heads(self.heads), queries=as_positions(self.queries, "queries"))
        for layer in {head.layer for head in self.heads}:
            self.source.at("head", layer)

    def describe(self) -> str:
        """A short unique label."""
        return label("resample", shown_heads(self.heads), self.source.digest, queries=self.queries)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return touch_heads(self.heads, self.queries, n_layers)


@dataclass(frozen=True, eq=False)
class ReplaceImageKV(Declared):
    """In ``heads``, the keys and values of all image tokens become their ``means`` (or another image's), as ``queries`` see them.

    The head keeps working on text; it can no longer tell one image from another. Under grouped-query attention the
    replacement is per *query* head: the other query heads of the group still see the original keys and values.

    Parameters
    ----------
    means : ImageKVMeans or ImageKV
        ``ImageKV`` replaces token by token: the prompt needs as many image tokens as the one it comes from.
    queries : group name or positions
        Other queries still see the original keys and values. With ``"question"`` or ``"last"`` nothing up to the last image token
        changes; nor with ``"text"`` where no text lies between image tokens (a preamble cannot see the image).

    Notes
    -----
    Kim et al. 2025, arXiv:2509.17588. By default all queries are affected, those of image tokens included.
    """

    heads: tuple[HeadId, ...]
    means: ImageKVMeans | ImageKV
    queries: Positions = "all"
    capability: ClassVar[str] = "image_kv"

    def __post_init__(self) -> None:
        require_kind(self.means, (ImageKVMeans, ImageKV), "means of ReplaceImageKV")
        self._seal(heads=as_heads(self.heads), queries=as_positions(self.queries, "queries"))

    def describe(self) -> str:
        """A short unique label."""
        return label("image-kv", shown_heads(self.heads), self.means.digest, queries=self.queries)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are.

        Parameters
        ----------
        contiguous : bool
            Whether the prompt's image tokens lie side by side. Where text lies between them (tiles, rows, several images),
            ``queries="text"`` reaches it too.
        """
        touch = touch_heads(self.heads, self.queries, n_layers)
        return touch._replace(scope="question") if self.queries == "text" and contiguous else touch


@dataclass(frozen=True, eq=False)
class KnockOut(Declared):
    """Queries of one token group can no longer attend to keys of another, in ``layers``.

    Parameters
    ----------
    queries, keys : group name or positions
        ``text`` is every token that is not an image token; ``last`` is the last token of the prompt
        (every new token while generating). A token's attention to itself is never cut.
    layers : tuple of int
        Layers in which the edges are cut.
    heads : tuple of int
        Heads, in each of the layers, that lose the edges; all of them where none is named.
    """

    queries: Positions
    keys: Positions
    layers: tuple[int, ...]
    heads: tuple[int, ...] = ()
    capability: ClassVar[str] = "knock_out"

    def __post_init__(self) -> None:
        self._seal(
            queries=as_positions(self.queries, "queries"),
            keys=as_positions(self.keys, "keys"),
            layers=as_layers(self.layers),
            heads=as_layers(self.heads, "heads"),
        )

    def describe(self) -> str:
        """A short unique label."""
        layers = f"layers {short(self.layers)}"
        heads = (f"heads {short(self.heads)}",) if self.heads else ()
        return label("knockout", f"{short(self.queries)}->{short(self.keys)}", layers, *heads)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are.

        Parameters
        ----------
        contiguous : bool
            Whether the prompt's image tokens lie side by side, see ``ReplaceImageKV.touches``.
        """
        if not self.layers:
            return Touch(n_layers, "question")
        # A causal query sees nothing after itself: what cuts keys of the question cuts queries of the question.
        after = "question" in (scope_of(self.queries), scope_of(self.keys))
        after = after or (self.queries == "text" and self.keys == "image" and contiguous)
        return Touch(self.layers[0], "question" if after else "all")
