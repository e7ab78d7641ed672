"""What a program does to activations outside the attention weights: patches, directions, replaced tokens.

``StreamEdits``    edits of one site and layer, found again by the tokens' places in the incoming batch
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlm_core.interventions import Activations, GaussianNoise, Patch, Positions, ReplaceTokens, Steer, Vector
from vlm_core.seam.plan import Program, place_of, require_width, source_of
from vlm_core.seam.positions import Positioned
from vlm_core.seam.views import Tokens

__all__ = ["StreamEdits"]


class StreamEdits:
    """The edits of a program on one incoming batch.

    Parameters
    ----------
    where : Positioned
    trunk : int array ``[row]``
        Sequence of each row.
    items : sequence of int, one per sequence
        Seeds of noise, beside its own.
    widths : dict of site to tuple of int
        What one token has at a site.

    Raises
    ------
    ValueError
        Where a source does not fit: other widths, or another number of tokens than are to be replaced.
    """

    def __init__(
        self,
        program: Program,
        where: Positioned,
        trunk: np.ndarray,
        items: Sequence[int],
        widths: dict[str, tuple[int, ...]],
    ) -> None:
        self.program = program
        self.where = where
        self.trunk = trunk
        self.items = items
        self.widths = widths
        self._sources: dict[tuple, torch.Tensor] = {}
        for (site, layer), edits in program.edits.items():
            for row, edit in edits:
                require_width(edit, site, layer, widths["residual"][0], *widths["head"])
                if not isinstance(edit, Steer):
                    self._places(edit, int(trunk[row]))

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self.program.edits

    def _places(self, edit: Patch | ReplaceTokens, sequence: int) -> torch.Tensor:
        """For each column of the incoming batch the source's token, -1 where nothing is replaced, ``[column]``."""
        positions = edit.tokens if isinstance(edit, ReplaceTokens) else edit.positions
        source = source_of(edit)
        key = (source, positions, sequence)
        if key not in self._sources:
            columns = self.where.columns(positions, sequence)
            if isinstance(source, Activations):
                numbers = _members(source, positions)
                if len(numbers) != len(columns):
                    raise ValueError(
                        f"{edit.describe()} replaces {len(columns)} tokens ('{positions}') by {len(numbers)}: take activations of a "
                        f"prompt with as many of them, or restrict both to a group of one size"
                    )
            else:
                numbers = columns - int(self.where.first[sequence])
            places = torch.full_like(self.where.tokens.valid[sequence], -1, dtype=torch.long)
            places[columns] = numbers.to(columns.device)
            self._sources[key] = places
        return self._sources[key]

    def apply(
        self, site: str, layer: int, hidden: torch.Tensor, elements: np.ndarray, tokens: Tokens, length: int | None = None
    ) -> torch.Tensor:
        """``hidden`` ``[element, token, ...]`` edited (a copy; itself where nothing is to be done).

        Parameters
        ----------
        elements : int array ``[row]``
            Where each row is in the batch.
        tokens : Tokens
            Of the prompt at this layer.
        length : int, optional
            While generating: tokens so far; ``hidden`` then holds the newest of them, which only directions reach.
        """
        edits = self.program.edits.get((site, layer), ())
        edited = None
        for row, edit in edits:
            element = int(elements[row])
            if isinstance(edit, Steer):
                members = self.where.members(tokens, edit.positions, length)[element, -hidden.shape[1] :].to(hidden.device)
                added = (edit.scale * edit.direction.values.to(hidden.device)).to(hidden.dtype)
                edited = hidden.clone() if edited is None else edited
                edited[element] = torch.where(members[:, None], edited[element] + added, edited[element])
            elif length is None:
                places = self._places(edit, int(self.trunk[row])).to(tokens.valid.device)
                original = self.where.original(tokens)
                places = places[original[element if original.shape[0] > 1 else 0]]
                at = ((places >= 0) & tokens.valid[element]).nonzero()[:, 0]
                if len(at):
                    edited = hidden.clone() if edited is None else edited
                    self._overwrite(edited[element], at.to(hidden.device), places[at].to(hidden.device), edit, site, layer, row)
        return hidden if edited is None else edited

    def _overwrite(self, one: torch.Tensor, at, numbers, edit, site: str, layer: int, row: int) -> None:
        """Change ``one`` ``[token, ...]`` in place, at the tokens ``at``; ``numbers`` are the source's tokens."""
        source = source_of(edit)
        if isinstance(source, GaussianNoise):
            item, width = int(self.items[int(self.trunk[row])]), int(np.prod(one.shape[1:]))
            noise = source.draw(item, place_of(site), layer, int(numbers.max()) + 1, width).view(-1, *one.shape[1:])
            new = one[at] + noise.to(one.device, one.dtype)[numbers]
        elif isinstance(source, Vector):
            new = source.values.to(one.device, one.dtype).expand(len(at), *one.shape[1:])
        else:
            values = source.at(place_of(site), layer)
            new = values.to(one.device, one.dtype)[numbers]
        heads = [head.head for head in getattr(edit, "heads", ()) if head.layer == layer]
        if heads:
            chosen = torch.tensor(heads, device=one.device)
            one[at[:, None], chosen[None]] = new[:, chosen]
        else:
            one[at] = new


def _members(source: Activations, positions: Positions) -> torch.Tensor:
    """Tokens of the source's prompt that ``positions`` name, in order."""
    n = source.image.shape[0]
    every = torch.ones(1, n, dtype=torch.bool, device=source.image.device)
    rows = torch.zeros(1, dtype=torch.long, device=source.image.device)
    named = {name: members[None] for name, members in source.groups.items()}
    where = Positioned(Tokens(image=source.image[None], valid=every, rows=rows, named=named))
    where.check([frozenset([positions])], [0])
    return where.columns(positions, 0)
