"""Sequences that get shorter on the way: drops and merges of one run.

``Shortening``    which tokens leave before a layer, how many each of the rest stands for, what must be read for it
``Weighed``       how many tokens each token stands for
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlm_core.errors import NotMeasurable
from vlm_core.interventions import DropTokens
from vlm_core.interventions.policy import Policy, Seen, Visual
from vlm_core.seam.dropping import branched, kept_image_tokens, shortened
from vlm_core.seam.merging import merge_rounds
from vlm_core.seam.plan import EMBEDDING, Program
from vlm_core.seam.positions import Positioned
from vlm_core.seam.views import AttentionView, Tokens

__all__ = ["Shortening", "Weighed"]


@dataclass(frozen=True, eq=False)
class Weighed:
    """How many tokens each token stands for.

    ``sizes`` ``[element, token]``; ``proportional`` ``[element]``: whether they count in attention.
    """

    sizes: torch.Tensor
    proportional: torch.Tensor

    def gathered(self, elements: torch.Tensor) -> Weighed:
        """Of the elements of a batch whose rows were gathered anew."""
        return Weighed(self.sizes[elements], self.proportional[elements])

    def log_sizes(self, length: int) -> torch.Tensor | None:
        """What is added to the score of each key, ``[element, length]``; None where nothing is. Generated tokens weigh 1."""
        if not bool(self.proportional.any()):
            return None
        logs = torch.where(self.proportional[:, None], self.sizes.log(), 0.0)
        return torch.nn.functional.pad(logs, (0, length - logs.shape[1]))


class Shortening:
    """The drops and merges of a program on one incoming batch.

    Parameters
    ----------
    where : Positioned
    trunk : int array ``[row]``
        Sequence of each row.
    items : sequence of int, one per sequence
        Seeds of random choices.
    visual : sequence of Visual or None, one per sequence
        What is known of their image tokens outside the decoder.
    seen : sequence of dict, one per sequence, optional
        What policies see of them, kept from pass to pass by whoever runs the same sequences again. Default: only within a pass.
    """

    def __init__(
        self,
        program: Program,
        where: Positioned,
        trunk: np.ndarray,
        items: Sequence[int],
        visual: Sequence[Visual | None] | None = None,
        seen: Sequence[dict] | None = None,
    ) -> None:
        self.program = program
        self.where = where
        self.trunk = trunk
        self.items = items
        self.visual = visual
        self._known = seen
        self.layers = frozenset((*program.drops, *program.merges))
        self.scored = frozenset(
            layer - 1
            for layer, drops in program.drops.items()
            if any(drop is not None and drop.policy == "attention" and drop.decides for drop in drops)
        )
        self.keyed = frozenset(
            layer - 1
            for layer, merges in program.merges.items()
            if any(merge is not None and merge.similarity == "keys" for merge in merges)
        )
        asked = {
            kind: frozenset(
                layer - 1 for layer, drops in program.drops.items() if any(drop is not None and kind in drop.reads for drop in drops)
            )
            for kind in ("attention", "unrotated")
        }
        self.viewed, self.unrotated = asked["attention"], asked["unrotated"]
        self._embedded = frozenset(row for row, _ in program.edits.get((EMBEDDING, 0), ()))
        self.reading = self.scored | self.keyed | self.viewed | self.unrotated
        self._counts: dict = {}
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier pass left."""
        self.weighed: Weighed | None = None
        self._scores: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._views: dict[str, tuple[AttentionView, torch.Tensor]] = {}

    def look(self, view: AttentionView, kind: str = "attention") -> None:
        """Keep what a layer attends with, for policies that ask about it before the next.

        Raises
        ------
        NotMeasurable
            For kind "unrotated" where nothing is rotated.
        """
        found = view.unrotated if kind == "unrotated" else view
        if found is None:
            raise NotMeasurable(
                f"layer {view.layer} has no rotary positions that could be left out: take a policy that reads its attention as it is, such "
                f"as FastV()"
            )
        self._views[kind] = found, torch.arange(view.query.shape[0], device=view.query.device)

    def read(self, scores: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> None:
        """Keep what a layer's attention tells the next: attention per token, ``[element, token]``, mean keys ``[element, token, size]``."""
        self._scores = self._scores if scores is None else scores
        self._keys = self._keys if keys is None else keys

    def branch(self, elements: torch.Tensor) -> None:
        """Follow the rows of a batch that were gathered anew."""
        self.weighed = None if self.weighed is None else self.weighed.gathered(elements)
        self._scores = None if self._scores is None else self._scores[elements.to(self._scores.device)]
        self._keys = None if self._keys is None else self._keys[elements.to(self._keys.device)]
        self._views = {kind: (view, places[elements.to(places.device)]) for kind, (view, places) in self._views.items()}

    def apply(self, layer: int, hidden: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, Tokens]:
        """What enters ``layer`` after its drops and merges; the arguments themselves where nothing leaves."""
        rows = tokens.rows.tolist()
        kept = tokens.valid
        if layer in self.program.drops:
            drops = [self.program.drops[layer][row] for row in rows]
            candidates = self._candidates(tokens, drops)
            started = self._started(rows, drops)
            declared = [drop if drop is not None and drop.decides and isinstance(drop.policy, Policy) else None for drop in drops]
            chosen = kept_image_tokens(
                candidates,
                [drop if policy is None else None for drop, policy in zip(drops, declared, strict=True)],
                n_image=started,
                items=[self.items[int(self.trunk[row])] for row in rows],
                scores=self._scores,
            )
            kept = kept & (~candidates | chosen)
            if any(drop is not None for drop in declared):
                hidden, kept = self._choose(layer, hidden, tokens, declared, candidates, started, kept)
        if layer in self.program.merges:
            merges = [self.program.merges[layer][row] for row in rows]
            hidden, kept = self._merge(hidden, tokens, merges, self._started(rows, merges), kept)
        if torch.equal(kept, tokens.valid):
            return hidden, tokens
        shorter, order = shortened(tokens, kept)
        if self.weighed is not None:
            self.weighed = replace(self.weighed, sizes=self.weighed.sizes.gather(1, order))
        return torch.take_along_dim(hidden, order[:, :, None].to(hidden.device), dim=1), shorter

    def _candidates(self, tokens: Tokens, parts: Sequence) -> torch.Tensor:
        candidates = tokens.image & tokens.valid
        for positions in {part.tokens for part in parts if part is not None} - {"image"}:
            among = torch.tensor([part is not None and part.tokens == positions for part in parts], device=candidates.device)
            candidates = candidates & (~among[:, None] | self.where.members(tokens, positions))
        return candidates

    def _started(self, rows: Sequence[int], parts: Sequence) -> list[int]:
        """Candidates that each element started with."""
        counts = []
        for row, part in zip(rows, parts, strict=True):
            positions = "image" if part is None else part.tokens
            if positions not in self._counts:
                start = self.where.tokens
                members = start.group("image") & self.where.members(start, positions)
                self._counts[positions] = members.sum(1).tolist()
            counts.append(self._counts[positions][int(self.trunk[row])])
        return counts

    def _choose(self, layer: int, hidden, tokens: Tokens, drops: Sequence[DropTokens | None], candidates, started: Sequence[int], kept):
        """Ask the policies, each about its own prompt; what stays, and what that carries."""
        kept, changed = kept.clone(), None
        passing: list[dict] = [{} for _ in self.items]
        for element, drop in enumerate(drops):
            at = candidates[element].nonzero()[:, 0]
            if drop is None or (count := drop.count(started[element])) >= len(at):
                continue
            row = int(tokens.rows[element])
            # Rows of one prompt to which nothing was done before see the same.
            untouched = self.program.first[row] == layer and row not in self._embedded
            seen = (passing if self._known is None else self._known)[int(self.trunk[row])] if untouched else {}
            key = (layer, drop.tokens, *sorted(self._views))
            if key not in seen:
                seen[key] = self._seen(layer, hidden, tokens, element, at, started[element])
            with torch.no_grad():
                choice = drop.policy.choose(seen[key], count)
            choice.require_fit(drop.policy, len(at), count)
            there = choice.kept.to(at.device)
            kept[element, at] = False
            kept[element, at[there]] = True
            if choice.mix is not None:
                changed = hidden.clone() if changed is None else changed
                columns = at.to(hidden.device)
                mixed = choice.mix.to(hidden.device, torch.float32) @ hidden[element, columns].float()
                changed[element, columns[there.to(hidden.device)]] = mixed.to(hidden.dtype)
            if choice.sizes is not None:
                weighed = self._weighed(kept)
                sizes, proportional = weighed.sizes.clone(), weighed.proportional.clone()
                sizes[element, at[there]] = choice.sizes.to(sizes)
                proportional[element] = choice.proportional
                self.weighed = Weighed(sizes, proportional)
        return hidden if changed is None else changed, kept

    def _weighed(self, like: torch.Tensor) -> Weighed:
        if self.weighed is None:
            plain = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)
            self.weighed = Weighed(torch.ones(like.shape, device=like.device), plain)
        return self.weighed

    def _seen(self, layer: int, hidden, tokens: Tokens, element: int, at: torch.Tensor, started: int) -> Seen:
        sequence = int(self.trunk[int(tokens.rows[element])])
        start = self.where.tokens
        origin = at if tokens.index is None else tokens.index[element, at]
        ordinals = (start.image & start.valid)[sequence].cumsum(0)[origin] - 1
        asked = tokens.group("question")[element] & tokens.prompt[element]
        device = hidden.device
        views = {}
        for kind, (view, places) in self._views.items():
            one = places[element : element + 1]
            whole = view.mask is None or view.mask.shape[0] == 1
            views[kind] = replace(
                view,
                **{name: getattr(view, name)[one] for name in ("query", "key", "value", "output")},
                mask=view.mask if whole else view.mask[one],
                tokens=branched(view.tokens, one, view.tokens.rows[one]),
                entered=None,
                flat=None,
                _kept={},
            )
        return Seen(
            layer=layer,
            stream=hidden[element].detach(),
            candidates=at.to(device),
            question=asked.nonzero()[:, 0].to(device),
            ordinals=ordinals.to(device),
            n_started=started,
            item=self.items[sequence],
            sizes=None if self.weighed is None else self.weighed.sizes[element, at].to(device),
            before=views.get("attention"),
            unrotated=views.get("unrotated"),
            visual=None if self.visual is None else self.visual[sequence],
        )

    def _merge(self, hidden, tokens: Tokens, merges: Sequence, started: Sequence[int], kept: torch.Tensor):
        candidates = self._candidates(tokens, merges)
        weighed = self._weighed(kept)
        sizes, proportional = weighed.sizes.clone(), weighed.proportional.clone()
        kept, changed = kept.clone(), None
        for element, merge in enumerate(merges):
            if merge is None:
                continue
            proportional[element] = merge.proportional
            at = candidates[element].nonzero()[:, 0]
            keep = min(merge.count(started[element]), len(at))
            if keep == len(at):
                continue
            there = at.to(hidden.device)
            stream = hidden[element, there]
            compared = stream if merge.similarity == "hidden" else self._keys[element, at.to(self._keys.device)].to(hidden.device)
            left, merged, weights = merge_rounds(stream, compared, sizes[element, at].to(hidden.device), keep)
            changed = hidden.clone() if changed is None else changed
            changed[element, there] = merged
            sizes[element, at] = weights.to(sizes.device)
            gone = torch.ones(len(at), dtype=torch.bool, device=at.device)
            gone[left.to(at.device)] = False
            kept[element, at[gone]] = False
        self.weighed = Weighed(sizes, proportional)
        return hidden if changed is None else changed, kept
