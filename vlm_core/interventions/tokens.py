"""Interventions that make the sequence shorter.

``DropTokens``     image tokens leave the sequence from a layer on (FastV and its baselines)
``MergeTokens``    image tokens are merged into their like from a layer on (ToMe)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlm_core.interventions.declaration import Declared, Positions, Touch, as_positions, label
from vlm_core.interventions.numeric import boolean, integer, real, shown
from vlm_core.interventions.policy import Policy

__all__ = ["DROP_POLICIES", "SIMILARITIES", "DropTokens", "MergeTokens"]

DROP_POLICIES = ("random", "stride", "attention")
SIMILARITIES = ("hidden", "keys")


def _checked(keep: float, layer: int) -> dict:
    """``keep`` and ``layer`` as plain numbers, or refused."""
    keep = real(keep, "keep")
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must be a fraction between 0 and 1, got {keep}")
    return {"layer": integer(layer, "layer", least=0), "keep": keep}


def _count(keep: float, n_image: int) -> int:
    return 0 if keep == 0.0 else max(1, min(n_image, round(keep * n_image)))


@dataclass(frozen=True, eq=False)
class DropTokens(Declared):
    """From ``layer`` on, only a fraction ``keep`` of the image tokens stays in the sequence.

    Parameters
    ----------
    layer : int
        First layer that no longer sees the dropped tokens. 0 drops them before the first layer.
    keep : float
        Fraction of the *original* image tokens that stays, in [0, 1]. ``round(keep * n)`` tokens stay, at least one
        where ``keep > 0``. 1 is the identity; 0 removes every image token.
    policy : {"random", "stride", "attention"} or Policy
        ``random``: a uniform subset, drawn from ``seed`` and the item, so an item loses the same tokens in every batch.
        ``stride``: evenly spaced tokens in sequence order. ``attention``: the tokens with the highest attention in
        the layer before, averaged over heads, from the last query (FastV, Chen et al. 2024, code reading). Every other policy is a
        declaration of its own (``vlm_core.reduction``); it may also say what the tokens that stay carry of the others.
    seed : int
        For ``random`` only.
    tokens : group name or positions
        Only image tokens among these are up for dropping, and ``keep`` is a fraction of them.

    Notes
    -----
    The drop is physical: later layers run on a shorter sequence and their KV caches are shorter. Kept tokens keep their
    positions.
    """

    layer: int
    keep: float
    policy: str | Policy = "random"
    seed: int = 0
    tokens: Positions = "image"
    capability: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        numbers = _checked(self.keep, self.layer) | {"seed": integer(self.seed, "seed", least=0)}
        if not isinstance(self.policy, Policy) and self.policy not in DROP_POLICIES:
            raise ValueError(f"policy must be one of {', '.join(DROP_POLICIES)}, or a Policy, got {self.policy!r}")
        if isinstance(self.policy, Policy):
            if self.decides:
                self.policy.require_layer(numbers["layer"])
        elif self.looks_back and self.layer == 0:
            raise ValueError(f"policy '{self.policy}' needs a layer before the drop to read attention from: use layer >= 1")
        self._seal(**numbers, tokens=as_positions(self.tokens, "tokens"))

    @property
    def decides(self) -> bool:
        """Whether there is anything to choose."""
        return 0.0 < self.keep < 1.0

    @property
    def looks_back(self) -> bool:
        """Whether the layer before is read."""
        return self.decides and (self.policy == "attention" if isinstance(self.policy, str) else self.policy.looks_back)

    @property
    def reads(self) -> frozenset[str]:
        """What its policy reads beside the residual stream; nothing where there is nothing to choose."""
        return self.policy.reads if self.decides and isinstance(self.policy, Policy) else frozenset()

    def count(self, n_image: int) -> int:
        """How many of ``n_image`` tokens stay."""
        return _count(self.keep, n_image)

    def describe(self) -> str:
        """A short unique label."""
        seed = (f"seed {self.seed}",) if self.policy == "random" and 0.0 < self.keep < 1.0 else ()
        policy = self.policy if isinstance(self.policy, str) else self.policy.describe()
        return label("drop", f"layer {self.layer}", f"keep {shown(self.keep)}", policy, *seed, tokens=self.tokens)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return Touch(self.layer, "all") if self.keep < 1.0 else Touch(n_layers, "question")


@dataclass(frozen=True, eq=False)
class MergeTokens(Declared):
    """From ``layer`` on, image tokens are merged into their like until a fraction ``keep`` of them is left.

    Parameters
    ----------
    layer : int
        First layer that sees the shorter sequence.
    keep : float
        Fraction of the *original* image tokens that is left, in (0, 1]; at least one.
    similarity : {"hidden", "keys"}
        What is compared by cosine: the residual stream that enters ``layer``, or the keys of the layer before (after rotary
        embedding, averaged over key heads; ToMe compares keys), which needs ``layer >= 1``.
    proportional : bool
        Proportional attention: in every later layer, ``log(size)`` is added to the attention score of a merged token, so that it
        weighs as the tokens it stands for. Attention that the family caps is capped before that.
    tokens : group name or positions
        Only image tokens among these are merged, and ``keep`` is a fraction of them.

    Notes
    -----
    Token Merging (Bolya et al. 2023, arXiv:2210.09461) in the residual stream: rounds of bipartite matching. The tokens that are left
    are numbered in sequence order; each even one finds the odd one that is most similar to it (the earlier of two alike); the
    ``r`` most similar pairs are merged, ``r`` being what is left to remove but at most all even tokens. A merged token is the
    size-weighted mean of the residual streams of its members and keeps the position of its odd member. Keys are merged alike for the next
    round. A target that lies before one of its members carries what comes after it. Text is never merged.
    """

    layer: int
    keep: float
    similarity: str = "hidden"
    proportional: bool = True
    tokens: Positions = "image"
    capability: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        numbers = _checked(self.keep, self.layer)
        if self.keep == 0.0:
            raise ValueError("merging leaves at least one token: keep must be above 0, or use DropTokens")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got '{self.similarity}'")
        if self.similarity == "keys" and self.layer == 0:
            raise ValueError("similarity 'keys' needs a layer before the merge to read keys from: use layer >= 1")
        self._seal(**numbers, proportional=boolean(self.proportional, "proportional"), tokens=as_positions(self.tokens, "tokens"))

    @property
    def looks_back(self) -> bool:
        """Whether the layer before is read."""
        return self.similarity == "keys" and self.keep < 1.0

    def count(self, n_image: int) -> int:
        """How many of ``n_image`` tokens are left."""
        return _count(self.keep, n_image)

    def describe(self) -> str:
        """A short unique label."""
        proportional = "proportional" if self.proportional else "plain"
        rest = (f"layer {self.layer}", f"keep {shown(self.keep)}", self.similarity, proportional)
        return label("merge", *rest, tokens=self.tokens)

    def touches(self, n_layers: int, contiguous: bool = True) -> Touch:
        """First layer touched, and whether tokens up to the last image token are."""
        return Touch(self.layer, "all") if self.keep < 1.0 else Touch(n_layers, "question")
