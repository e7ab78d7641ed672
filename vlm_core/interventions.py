"""What can be done to a forward pass, as small frozen declarations.

``ZeroHeads``, ``MeanHeads``         gate heads: their output becomes zero, or its mean
``ReplaceImageKV``                   image keys and values of a head become their mean (HeAr, Kim et al. 2509.17588)
``DropTokens``                       image tokens leave the sequence from a layer on (FastV and its baselines)
``KnockOut``                         attention edges from one token group to another are cut

A row's intervention is ``None``, one of these, or a tuple of them applied together. Nothing here touches a model:
``vlm_core.plan`` compiles the declarations of a whole batch into tensors and ``vlm_core.seam`` applies them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from vlm_core.anatomy import HeadId

__all__ = [
    "TOKEN_GROUPS",
    "DropTokens",
    "HeadMeans",
    "ImageKVMeans",
    "Intervention",
    "KnockOut",
    "MeanHeads",
    "ReplaceImageKV",
    "ZeroHeads",
    "describe",
]

TOKEN_GROUPS = ("image", "text", "last", "bos", "all")
DROP_POLICIES = ("random", "stride", "attention")


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class HeadMeans:
    """Mean output of every head: ``values`` ``[layer, head, head_dim]``."""

    values: torch.Tensor
    count: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self.values))


@dataclass(frozen=True, eq=False)
class ImageKVMeans:
    """Mean image key and value of every query head: ``keys``, ``values`` ``[layer, head, head_dim]``.

    Keys are taken as the seam sees them, after rotary embedding, and averaged over image positions and items. The mean
    of rotated keys is not the rotation of a mean key: high-frequency components average towards zero. It is the same
    constant at every image position, which is what makes the replaced tokens indistinguishable.
    """

    keys: torch.Tensor
    values: torch.Tensor
    count: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self.keys, self.values))


def _as_heads(heads: Iterable) -> tuple[HeadId, ...]:
    return tuple(sorted({HeadId(int(layer), int(head)) for layer, head in heads}))


def _name(kind: str, heads: tuple[HeadId, ...], *rest: str) -> str:
    shown = " ".join(map(str, heads)) if len(heads) <= 4 else f"{len(heads)} heads {_heads_digest(heads)}"
    return f"{kind}({', '.join((shown, *rest))})"


def _heads_digest(heads: tuple[HeadId, ...]) -> str:
    return hashlib.sha256(repr([tuple(head) for head in heads]).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class ZeroHeads:
    """The outputs of ``heads`` (before the output projection) become zero at every position."""

    heads: tuple[HeadId, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _as_heads(self.heads))

    def describe(self) -> str:
        """A short unique label."""
        return _name("zero", self.heads)


@dataclass(frozen=True)
class MeanHeads:
    """The outputs of ``heads`` become their ``means`` at every position."""

    heads: tuple[HeadId, ...]
    means: HeadMeans

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _as_heads(self.heads))

    def describe(self) -> str:
        """A short unique label."""
        return _name("mean", self.heads, self.means.digest)


@dataclass(frozen=True)
class ReplaceImageKV:
    """In ``heads``, the keys and values of all image tokens become their ``means``.

    The head keeps working on text; it can no longer tell one image from another. Under grouped-query attention the
    replacement is per *query* head: the other query heads of the group still see the original keys and values.

    Notes
    -----
    Kim et al. 2025, arXiv:2509.17588. All queries are affected, those of image tokens included.
    """

    heads: tuple[HeadId, ...]
    means: ImageKVMeans

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _as_heads(self.heads))

    def describe(self) -> str:
        """A short unique label."""
        return _name("image-kv", self.heads, self.means.digest)


@dataclass(frozen=True)
class DropTokens:
    """From ``layer`` on, only a fraction ``keep`` of the image tokens stays in the sequence.

    Parameters
    ----------
    layer : int
        First layer that no longer sees the dropped tokens. 0 drops them before the first layer.
    keep : float
        Fraction of the *original* image tokens that stays, in [0, 1]. ``round(keep * n)`` tokens stay, at least one
        where ``keep > 0``. 1 is the identity; 0 removes every image token.
    policy : {"random", "stride", "attention"}
        ``random``: a uniform subset, drawn from ``seed`` and the item, so an item loses the same tokens in every batch.
        ``stride``: evenly spaced tokens in sequence order. ``attention``: the tokens with the highest attention in
        the layer before, averaged over heads, from the last query (FastV, Chen et al. 2024, code reading).
    seed : int
        For ``random`` only.

    Notes
    -----
    The drop is physical: later layers run on a shorter sequence and their KV caches are shorter. Kept tokens keep their
    positions.
    """

    layer: int
    keep: float
    policy: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep must be a fraction between 0 and 1, got {self.keep}")
        if self.policy not in DROP_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(DROP_POLICIES)}, got '{self.policy}'")
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")
        if self.policy == "attention" and self.layer == 0 and 0.0 < self.keep < 1.0:
            raise ValueError("policy 'attention' needs a layer before the drop to read attention from: use layer >= 1")

    def count(self, n_image: int) -> int:
        """How many of ``n_image`` tokens stay."""
        return 0 if self.keep == 0.0 else max(1, min(n_image, round(self.keep * n_image)))

    def describe(self) -> str:
        """A short unique label."""
        seed = f", seed {self.seed}" if self.policy == "random" and 0.0 < self.keep < 1.0 else ""
        return f"drop(layer {self.layer}, keep {self.keep:g}, {self.policy}{seed})"


@dataclass(frozen=True)
class KnockOut:
    """Queries of one token group can no longer attend to keys of another, in ``layers``.

    Parameters
    ----------
    queries, keys : {"image", "text", "last", "bos", "all"}
        Token groups. ``text`` is every token that is not an image token; ``last`` is the last token of the prompt
        (every new token while generating). A token's attention to itself is never cut.
    layers : tuple of int
        Layers in which the edges are cut.
    """

    queries: str
    keys: str
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for group in (self.queries, self.keys):
            if group not in TOKEN_GROUPS:
                raise ValueError(f"token group must be one of {', '.join(TOKEN_GROUPS)}, got '{group}'")
        object.__setattr__(self, "layers", tuple(sorted({int(layer) for layer in self.layers})))

    def describe(self) -> str:
        """A short unique label."""
        layers = ",".join(map(str, self.layers))
        return f"knockout({self.queries}->{self.keys}, layers {layers})"


Intervention = ZeroHeads | MeanHeads | ReplaceImageKV | DropTokens | KnockOut


def describe(intervention: Intervention | tuple[Intervention, ...] | None) -> str:
    """A label for what is done to a row: ``"none"``, one label, or labels joined by ``" + "``."""
    if intervention is None:
        return "none"
    if isinstance(intervention, tuple):
        return " + ".join(part.describe() for part in intervention) or "none"
    return intervention.describe()
