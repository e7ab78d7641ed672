"""Rows of a few prompts that start from what these prompts leave behind.

``RecordedRows``   records the prompts' trunks, grows their stems, and runs batches of rows on them

Answers after one prompt run side by side, as branches of one row, where rows share its prefix (``vlm_core.sweeps.branches``); rows that differ
in nothing but their answers are then one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.branches import Branches
from vlm_core.sweeps.prefix import Sprout, forward_shared, grow_stems
from vlm_core.sweeps.resume import forward_resumed, spares_last_layer
from vlm_core.sweeps.sharing import SuffixRow
from vlm_core.sweeps.trunk import Stem, record_trunks

if TYPE_CHECKING:
    from vlm_core.sweeps.engine import Engine

__all__ = ["RecordedRows"]

# Of more answers' tokens in one sequence, the attention among them would cost more than the prompt again.
_BRANCH_TOKENS = 256

Key = tuple[int, tuple[int, ...]]
"""A prompt and an answer prefix: what a row is, before any intervention."""


class RecordedRows:
    """Some rows of an engine whose prompts are recorded together.

    Parameters
    ----------
    engine : Engine
        Whose rows, prompts and batches they are.
    prompts : sequence of int
        Those that are recorded.
    shared, resumed : sequence of int
        Numbers of the rows that share their prompt's prefix, and of those that resume from the residual stream.
    """

    def __init__(self, engine: Engine, prompts: Sequence[int], shared: Sequence[int], resumed: Sequence[int]) -> None:
        self.engine, self.prompts, self.shared, self.resumed = engine, prompts, shared, resumed
        last = engine.anatomy.n_layers - 1
        self._starts = {number: engine.start(number) for number in resumed}
        self._entries = {number: min(engine.first_touched(engine.rows[number].intervention), last) for number in shared}
        self._branched = self._side_by_side()
        merged: dict[object, list[int]] = {}
        for number in shared:
            branches = self._branched.get(self._key(number))
            merged.setdefault(number if branches is None else (branches, id(engine.rows[number].intervention)), []).append(number)
        self._units = {members[0]: members for members in merged.values()}

    def _key(self, number: int) -> Key:
        return self.engine.rows[number].prompt, self.engine.rows[number].prefix

    def _side_by_side(self) -> dict[Key, Branches]:
        """The answer prefixes that each prompt and prefix of shared rows runs beside; without those that run alone."""
        asked: dict[int, set[tuple[int, ...]]] = {}
        for number in self.shared:
            prompt, prefix = self._key(number)
            asked.setdefault(prompt, set()).add(prefix)
        found = {}
        for prompt, prefixes in asked.items():
            for together in _within_tokens(sorted(prefixes)):
                if len(together) > 1:
                    found.update(dict.fromkeys(((prompt, prefix) for prefix in together), Branches(tuple(together))))
        return found

    # -- recording --------------------------------------------------------------------------------------------------

    def record(self, subject: Subject) -> None:
        """Run the prompts once, and what follows their prefixes."""
        engine, branched, n_layers = self.engine, self._branched, self.engine.anatomy.n_layers
        place, longest = self._trunks()
        layers = sorted({*self._starts.values(), *self._entries.values()})
        single = dict.fromkeys(
            self._key(number) for number in (*self.shared, *self.resumed) if number in self._starts or self._key(number) not in branched
        )
        grown = len(single) > len(longest) or bool(branched)
        self.recording = record_trunks(
            subject,
            longest,
            keys_from=0 if grown else min(self._entries.values(), default=n_layers),
            keys_to=n_layers if self.shared else layers[-1],
            hidden_at=sorted(set(self._starts.values())),
            suffix_at=sorted(set(self._entries.values())),
        )
        sprouts: dict[object, Sprout] = {key: Sprout(place[key], (engine.sequence(*key),), engine.items[key[0]]) for key in single}
        for (prompt, _), branches in branched.items():
            if branches not in sprouts:
                sequences = tuple(engine.sequence(prompt, prefix) for prefix in branches.prefixes)
                laid_out = engine.sequence(prompt, branches.tokens)
                sprouts[branches] = Sprout(place[prompt, branches.prefixes[0]], sequences, engine.items[prompt], laid_out, branches)
        self._stems: Mapping[object, Stem] = dict(zip(sprouts, grow_stems(subject, self.recording, list(sprouts.values()), layers), strict=True))

    def _trunks(self) -> tuple[dict[Key, int], list[Encoded]]:
        """Which trunk each prompt with its prefix grows on, and of each trunk the longest sequence."""
        engine = self.engine
        prefixes: dict[int, dict[tuple[int, ...], None]] = {prompt: {} for prompt in self.prompts}
        for prompt, prefix in map(self._key, (*self.shared, *self.resumed)):
            prefixes[prompt][prefix] = None
        # Where the prompt sees itself both ways, nothing can grow on a trunk: each sequence runs as a trunk of its own.
        forked = "shared_prefix" in engine.anatomy.family.refusals
        trunks: dict[object, list[Key]] = {}
        for key in ((prompt, prefix) for prompt, known in prefixes.items() for prefix in known):
            trunks.setdefault(key if forked else engine.trunk_of(key[0]), []).append(key)
        place = {key: number for number, together in enumerate(trunks.values()) for key in together}
        return place, [max((engine.sequence(*key) for key in together), key=len) for together in trunks.values()]

    # -- rows that share their prefix -------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens that the longest shared row runs."""
        return max(self._shared_stem(number).n_suffix for number in self._units)

    def ordered(self) -> list[int]:
        """Shared rows, one for all that are run as one: those of one entry and trunk side by side."""
        return sorted(self._units, key=lambda number: (self._entries[number], self._shared_stem(number).trunk.number))

    def run_shared(self, firsts: Sequence[int]) -> None:
        """Run rows of ``ordered()``, and deliver those that are run as one with them."""
        engine = self.engine
        batch = [SuffixRow(self._shared_stem(first), engine.rows[first].intervention, self._reads(self._units[first])) for first in firsts]
        numbers = [number for first in firsts for number in self._units[first]]
        engine.deliver(numbers, forward_shared(engine.subject, self.recording, batch, [self._entries[first] for first in firsts]))

    def _shared_stem(self, number: int) -> Stem:
        key = self._key(number)
        return self._stems[self._branched.get(key, key)]

    def _reads(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """What rows that run as one read, row by row."""
        found: list[int] = []
        for number in numbers:
            row, branches = self.engine.rows[number], self._branched.get(self._key(number))
            n_prompt = self.engine.prompts[row.prompt].n_prompt
            found += row.reads if branches is None else branches.reads(row.prefix, row.reads, n_prompt)
        return tuple(found)

    # -- rows that resume -------------------------------------------------------------------------------------------

    def alike(self) -> Iterator[tuple[int, list[int]]]:
        """Resumed rows that go well together, and the tokens that the longest of them has left.

        A batch cuts its last layer short where all its rows allow it, and carries no places that only some of its rows need.
        """
        engine, alike = self.engine, {}
        for number in self.resumed:
            intervention = engine.rows[number].intervention
            spares = spares_last_layer(intervention, engine.anatomy.n_layers)
            alike.setdefault((spares, self._starts[number], engine.shortened(intervention)), []).append(number)
        before = None
        for (_, start, shortened), numbers in sorted(alike.items()):
            if start != before:
                # Rows that start elsewhere see something else: what policies saw would pile up, layer by layer.
                self._forget_seen()
            before = start
            longest = max(_left(self._stem(number).sequence, shortened) for number in numbers)
            yield longest, sorted(numbers, key=lambda number: self._stem(number).trunk.number)

    def run_resumed(self, numbers: Sequence[int]) -> None:
        """Run rows of one of ``alike()``, and deliver them."""
        engine = self.engine
        distinct = list(dict.fromkeys(map(self._stem, numbers)))
        trunk = np.array([distinct.index(self._stem(number)) for number in numbers])
        interventions, start = [engine.rows[number].intervention for number in numbers], min(self._starts[number] for number in numbers)
        try:
            hidden = forward_resumed(engine.subject, self.recording, distinct, trunk, interventions, start, engine.wanted(numbers))
        except RuntimeError:
            # Where memory ran out, what policies saw takes some of it, and may be half done.
            self._forget_seen()
            raise
        engine.deliver(numbers, hidden)

    def _forget_seen(self) -> None:
        for stem in self._stems.values():
            stem.seen.clear()

    def _stem(self, number: int) -> Stem:
        return self._stems[self._key(number)]


def _left(sequence: Encoded, shortened: tuple[tuple[int, float], ...]) -> int:
    """Tokens that a row has left from where it is first shortened on."""
    if not shortened:
        return len(sequence)
    n_image = int(sequence.image.sum())
    return len(sequence) - n_image + round(n_image * shortened[0][1])


def _within_tokens(prefixes: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Answer prefixes in order, as many together as have few enough tokens."""
    found: list[list[tuple[int, ...]]] = []
    n = 0
    for prefix in prefixes:
        if not found or n + len(prefix) > _BRANCH_TOKENS:
            found.append([])
            n = 0
        found[-1].append(prefix)
        n += len(prefix)
    return found
