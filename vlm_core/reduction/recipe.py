"""What a measured reduction comes to, in a form that others can use.

``Recipe``    policy, layer and fraction, what they cost and save, where not to use them; to JSON and back
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions import DropTokens, MergeTokens, Row, parts, require_row, stored

__all__ = ["Recipe"]

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """A reduction of visual tokens, with the evidence behind it.

    Parameters
    ----------
    reduction : interventions that drop or merge tokens
        As measured, on a subject of ``n_layers`` layers.
    n_layers : int
    policy : str
        Name of the policy, for readers.
    keep : float
        Fraction of the image tokens that is left; of several stages, on average over the layers from the first on.
    expected : mapping
        ``loss`` of accuracy with ``lower`` and ``upper``, ``confidence``, ``items`` and ``scenes``, all tasks together.
    saving : mapping
        Shares saved: ``prefill_flops``, ``prefill_latency`` (in batches) and ``prefill_latency_alone``, ``decode_latency``, ``cache``,
        ``peak_memory``; negative where there is a cost.
    tasks : mapping
        Task → the same as ``expected``.
    not_for : sequence of str
        Tasks for which the loss is not surely below ``margin``.
    margin : float
    subject : mapping
        Identity of what it was measured on.
    data : mapping
        Hashes of the items: discovery (policy, layer and fraction were chosen on them) and confirmation (everything above).
    """

    reduction: Row
    n_layers: int
    policy: str
    keep: float
    expected: Mapping[str, float] = field(default_factory=dict)
    saving: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    not_for: tuple[str, ...] = ()
    margin: float = 0.05
    subject: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_row(self.reduction, "the recipe's reduction")
        shortening = parts(self.reduction)
        if not shortening or not all(isinstance(part, DropTokens | MergeTokens) for part in shortening):
            raise ValueError("a recipe needs a reduction: DropTokens, MergeTokens, or a tuple of them")
        last = max(part.layer for part in shortening)
        if not last < self.n_layers:
            raise ValueError(f"the recipe drops tokens at layer {last} of a subject with {self.n_layers} layers: layers count from 0")

    @property
    def layer(self) -> int:
        """First layer that sees fewer tokens, of the subject it was measured on."""
        return min(part.layer for part in parts(self.reduction))

    def row(self, anatomy: Anatomy) -> Row:
        """The reduction for a subject of any depth: layers at the same share of it.

        Where a policy reads the layer before, and where a family adds visual features to its first layers, the first possible layer.
        """
        found = []
        for part in parts(self.reduction):
            layer = part.layer if anatomy.n_layers == self.n_layers else round(part.layer / self.n_layers * anatomy.n_layers)
            layer = max(layer, 1 if part.looks_back else 0, anatomy.n_deepstack)
            found.append(replace(part, layer=min(layer, anatomy.n_layers - 1)))
        layers = [part.layer for part in found]
        if len(set(layers)) != len(layers):
            raise ValueError(
                f"the recipe's layers {[part.layer for part in parts(self.reduction)]} of {self.n_layers} fall together in a subject of "
                f"{anatomy.n_layers}: take a recipe with fewer stages"
            )
        return tuple(found) if len(found) > 1 else found[0]

    def to_dict(self) -> dict[str, Any]:
        """Builtins only: what ``save`` writes, but for tensors of a policy that has any."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "reduction"}
        content = {"recipe": VERSION, **plain, "version": stored.VERSION, "row": stored.to_dict(self.reduction)}
        return json.loads(json.dumps(content, default=dict))

    def save(self, path: str | Path) -> None:
        """Write it to ``path`` (JSON), the policy's tensors beside it where it has any."""
        path = Path(path)
        stored.save_interventions(path, self.reduction)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """What ``save`` wrote.

        Raises
        ------
        ValueError
            One sentence: no such file, no recipe, another version.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no recipe at {path}: a run of the suite writes one as token-recipe.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): a recipe is what Recipe.save writes") from error
        if not isinstance(content, dict) or content.get("recipe") != VERSION:
            found = content.get("recipe") if isinstance(content, dict) else None
            raise ValueError(f"{path} holds no recipe of version {VERSION} (found {found!r}): it must be what Recipe.save writes")
        names = {one.name for one in fields(cls)} - {"reduction"}
        given = {name: value for name, value in content.items() if name in names}
        return cls(stored.load_interventions(path), **{**given, "not_for": tuple(given.get("not_for", ()))})
