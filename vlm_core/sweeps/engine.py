"""Every row on the fastest path that is exact for it.

``run_rows(...)``     run (prompt, answer prefix, intervention) rows, and hand over the final hidden states that were asked for
``choose_path(...)``  which path one row can take, and why not a faster one

Paths
-----
``shared prefix``   only tokens after the last image token run; the prefix is stored once for all rows of all prompts that begin with it
``resume``          rows start from the stored residual stream that enters the first layer they touch
``whole``           the prompt runs with the row's batch (`vlm_core.subjects.rows.forward_rows`), shared up to the first layer touched
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions import DropTokens, ImageKV, MergeTokens, ReplaceImageKV, Row, parts, touches
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.rows import forward_rows
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.budget import NOTHING_FITS, Budget, in_batches, out_of_memory
from vlm_core.sweeps.recorded import RecordedRows
from vlm_core.sweeps.sharing import why_not_shared
from vlm_core.sweeps.trunk import Unshareable, same_prefixes

__all__ = ["PATHS", "PathCounts", "RowJob", "choose_path", "run_rows"]

PATHS = ("shared prefix", "resume", "whole")


@dataclass(frozen=True, eq=False)
class RowJob:
    """One row to run.

    Parameters
    ----------
    prompt : int
        Index of its prompt.
    prefix : tuple of int
        Answer tokens appended to the prompt.
    intervention : Intervention, tuple of them or None
    reads : tuple of int
        Positions of the sequence whose final hidden state is wanted; text after the last image token.
    """

    prompt: int
    prefix: tuple[int, ...]
    intervention: Row
    reads: tuple[int, ...]


@dataclass
class PathCounts:
    """How many rows took each path, and how many could not take a faster one for which reason."""

    paths: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)

    def add(self, path: str, reason: str | None, n: int = 1) -> None:
        """Count ``n`` rows."""
        self.paths[path] += n
        if reason is not None:
            self.reasons[f"{path}: {reason}"] += n

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Builtins only."""
        return {"paths": dict(self.paths), "reasons": dict(self.reasons)}


def _resume_layer(intervention: Row, n_layers: int, contiguous: bool) -> int:
    """The layer that a row has to start at: the first it touches, or the one before where it reads what to do there."""
    layers = [n_layers]
    for part in parts(intervention):
        layer = part.touches(n_layers, contiguous).layer
        looks_back = isinstance(part, DropTokens | MergeTokens) and part.looks_back
        layers.append(max(0, layer - 1) if looks_back and layer < n_layers else layer)
    return min(layers)


def _source_tokens(intervention: Row) -> tuple[tuple[str, int], ...]:
    """For which queries a row takes other images' keys and values token by token, and how many tokens those have."""
    replaced = [part for part in parts(intervention) if isinstance(part, ReplaceImageKV) and isinstance(part.means, ImageKV)]
    return tuple(sorted((repr(part.queries), part.means.keys.shape[2]) for part in replaced))


@dataclass(frozen=True)
class _Shape:
    """What of a prompt decides the paths of its rows."""

    why_whole: str | None
    contiguous: bool
    n_deepstack: int

    @classmethod
    def of(cls, sequence: Encoded) -> _Shape:
        image = sequence.image.nonzero()[:, 0]
        n = len(image)
        first, last = (int(image[0]), int(image[-1])) if n else (0, -1)
        why = None
        if not n:
            why = "the prompt has no image tokens in its sequence"
        elif last >= sequence.n_prompt - 1:
            why = "the prompt ends with its image, so there is nothing after it to run alone"
        return cls(why, last - first + 1 == n, len(sequence.deepstack))


def choose_path(anatomy: Anatomy, sequence: Encoded, intervention: Row) -> tuple[str, str | None]:
    """The fastest path that is exact for a row, and why no faster one is (None where there is none).

    Returns
    -------
    path : {"shared prefix", "resume", "whole"}
    reason : str or None
    """
    return _path(anatomy, _Shape.of(sequence), intervention)


def _path(anatomy: Anatomy, shape: _Shape, intervention: Row) -> tuple[str, str | None]:
    refusals, contiguous = anatomy.family.refusals, shape.contiguous
    if shape.why_whole is not None:
        return "whole", shape.why_whole
    reason = refusals.get("shared_prefix") or why_not_shared(intervention, anatomy.n_layers, contiguous)
    if reason is None:
        return "shared prefix", None
    layer = _resume_layer(intervention, anatomy.n_layers, contiguous)
    if shape.n_deepstack:
        if layer < shape.n_deepstack:
            return "whole", f"{reason}, and visual features are added again up to layer {shape.n_deepstack}"
    elif "resume" in refusals:
        return "whole", refusals["resume"]
    return "resume", reason


def run_rows(
    subject: Subject,
    prompts: Sequence[Encoded],
    rows: Sequence[RowJob],
    items: Sequence[int],
    consume: Callable[[Sequence[int], torch.Tensor], None],
    budget: Budget,
) -> PathCounts:
    """Run rows, each on its fastest exact path.

    Parameters
    ----------
    prompts : sequence of Encoded
    rows : sequence of RowJob
    items : sequence of int, one per prompt
        Seeds of random token choices.
    consume : callable
        Called once per batch with row numbers and ``hidden [n, hidden]``: the final hidden states of their reads, row by row.
    budget : Budget

    Returns
    -------
    PathCounts
    """
    return Engine(subject, prompts, rows, items, consume, budget).run()


class Engine:
    """Rows of some prompts, on their way; see ``run_rows`` for what it is made of."""

    def __init__(self, subject, prompts, rows, items, consume, budget: Budget) -> None:
        self.subject, self.prompts, self.rows, self.items, self.consume, self.budget = subject, prompts, rows, items, consume, budget
        self.anatomy: Anatomy = subject.anatomy
        self.counts = PathCounts()
        self.extended: dict[tuple[int, tuple[int, ...]], Encoded] = {}
        self._sizes: dict[str, int] = {}
        self._delivered: set[int] = set()
        # What an intervention alone decides, found once for all its rows: by identity, as ``rows`` keeps every one of them.
        self._touched: dict[int, int] = {}
        self._shapes: dict[int, _Shape] = {}
        self._began: dict[int, int] | None = None

    def run(self) -> PathCounts:
        decided = self._decide()
        fast: dict[int, dict[str, list[int]]] = {}
        for number, (path, _) in enumerate(decided):
            if path != "whole":
                fast.setdefault(self.rows[number].prompt, {}).setdefault(path, []).append(number)
        refused: str | None = None
        for group in self._groups(fast):
            shared, resumed = ([number for prompt in group for number in fast[prompt].get(path, ())] for path in PATHS[:2])
            if refused is None:
                try:
                    self._run_fast(group, shared, resumed)
                except Unshareable as unshareable:
                    refused = str(unshareable)
            if refused is not None:
                # Of a group that ran in halves, one may have run before the other was refused.
                for number in {*shared, *resumed} - self._delivered:
                    decided[number] = ("whole", refused)
        self._run_whole([number for number, (path, _) in enumerate(decided) if path == "whole"])
        for path, reason in decided:
            self.counts.add(path, reason)
        return self.counts

    def _decide(self) -> list[tuple[str, str | None]]:
        untouched = self._untouched_prompts()
        beginning = {prompt: self._beginning(prompt) for prompt in untouched}
        sequences = Counter(beginning[prompt] for prompt, _ in {(row.prompt, row.prefix) for row in self.rows} if prompt in untouched)
        known: dict[tuple, tuple[str, str | None]] = {}
        decided = []
        for row in self.rows:
            if row.prompt in untouched:
                # A prefix pays where several sequences begin with it.
                together = beginning[row.prompt] is not None and sequences[beginning[row.prompt]] > 1
                decided.append(("shared prefix" if together else "whole", None))
                continue
            shape = self._shape(row.prompt)
            key = (id(row.intervention), shape)
            if key not in known:
                known[key] = _path(self.anatomy, shape, row.intervention)
            decided.append(known[key])
        # A trunk pays where some row starts after the first layer.
        pays = {row.prompt for row, (path, _) in zip(self.rows, decided, strict=True) if path == "shared prefix"}
        resumed = [number for number, (path, _) in enumerate(decided) if path == "resume"]
        pays |= {self.rows[number].prompt for number in resumed if self.start(number) > 0}
        for number in resumed:
            if self.rows[number].prompt not in pays:
                decided[number] = ("whole", f"{decided[number][1]}, from the first layer on")
        return decided

    def _untouched_prompts(self) -> set[int]:
        touched = {row.prompt for row in self.rows if self.first_touched(row.intervention) < self.anatomy.n_layers}
        return set(range(len(self.prompts))) - touched

    def _shape(self, prompt: int) -> _Shape:
        if prompt not in self._shapes:
            self._shapes[prompt] = _Shape.of(self.prompts[prompt])
        return self._shapes[prompt]

    def _beginning(self, prompt: int) -> int | None:
        """The first prompt whose prefix, up to the last image token, this one begins with; None where no prefix can be shared."""
        if self._began is None:
            self._began = same_prefixes(self.prompts) if "shared_prefix" not in self.anatomy.family.refusals else {}
        return self._began.get(prompt) if self._shape(prompt).why_whole is None else None

    def first_touched(self, intervention: Row) -> int:
        """The first layer that an intervention touches; the number of layers for none."""
        if id(intervention) not in self._touched:
            self._touched[id(intervention)] = touches(intervention, self.anatomy.n_layers).layer
        return self._touched[id(intervention)]

    def shortened(self, intervention: Row) -> tuple[tuple[int, float], ...]:
        """Where an intervention shortens its row, and to what share of the image tokens: rows alike in this stay of one length."""
        return tuple(sorted((part.layer, part.keep) for part in parts(intervention) if isinstance(part, DropTokens | MergeTokens)))

    def deliver(self, numbers: Sequence[int], hidden: torch.Tensor) -> None:
        """Hand over what some rows read, each row once."""
        self.consume(numbers, hidden)
        self._delivered.update(numbers)

    def sequence(self, prompt: int, prefix: tuple[int, ...]) -> Encoded:
        """A prompt with answer tokens, made once."""
        if (prompt, prefix) not in self.extended:
            self.extended[prompt, prefix] = self.prompts[prompt].extended(self.subject, prefix)
        return self.extended[prompt, prefix]

    # -- whole ------------------------------------------------------------------------------------------------------

    def _run_whole(self, numbers: list[int]) -> None:
        """Batches of rows of alike cost: the same drops, then alike length."""
        def cost(number: int) -> tuple:
            row = self.rows[number]
            length = len(self.prompts[row.prompt]) + len(row.prefix)
            return self.shortened(row.intervention), length, row.prompt, row.prefix, self.first_touched(row.intervention)

        ordered = sorted(numbers, key=cost)
        longest = max((len(self.prompts[self.rows[number].prompt]) + len(self.rows[number].prefix) for number in ordered), default=1)
        self.batched("whole", ordered, self.budget.whole(longest, self.subject.batch_rows), self._whole_batch)

    def _whole_batch(self, numbers: Sequence[int]) -> None:
        sequences, items, trunk = self._distinct(numbers)
        hidden, _ = forward_rows(
            self.subject, sequences, trunk, [self.rows[number].intervention for number in numbers], items, self.wanted(numbers)
        )
        self.deliver(numbers, hidden)

    def _distinct(self, numbers: Sequence[int]) -> tuple[list[Encoded], list[int], np.ndarray]:
        known: dict[tuple, int] = {}
        trunk = []
        for number in numbers:
            row = self.rows[number]
            trunk.append(known.setdefault((row.prompt, row.prefix), len(known)))
        return (
            [self.sequence(prompt, prefix) for prompt, prefix in known],
            [self.items[prompt] for prompt, _ in known],
            np.array(trunk),
        )

    def wanted(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which hidden states rows read: places among ``numbers``, and positions."""
        pairs = [(place, read) for place, number in enumerate(numbers) for read in self.rows[number].reads]
        places, reads = zip(*pairs, strict=True)
        return np.array(places), np.array(reads)

    def batched(self, path: str, numbers: list[int], size: int, run: Callable[[Sequence[int]], None]) -> None:
        """Run rows of a path in batches of at most ``size``, of fewer where one ran out of memory."""
        for together in self._stackable(numbers):
            # A size that ran out of memory once is not tried again.
            size = min(size, self._sizes.get(path, size))
            found = in_batches(together, size, run)
            if found < size:
                self._sizes[path] = found

    def _stackable(self, numbers: list[int]) -> list[list[int]]:
        """Rows whose sources one batch can hold: images of another size give keys and values of another shape."""
        apart: dict[tuple, list[int]] = {}
        for number in numbers:
            apart.setdefault(_source_tokens(self.rows[number].intervention), []).append(number)
        return list(apart.values()) if len(apart.keys() - {()}) > 1 else [numbers]

    # -- from recorded trunks ---------------------------------------------------------------------------------------

    def _groups(self, fast: dict[int, dict]) -> list[list[int]]:
        """Prompts that are recorded together: those of one prefix, then of alike length, within the tokens in flight and the bytes stored."""
        anatomy = self.anatomy
        bytes_per_token = anatomy.embedding.weight.element_size() * anatomy.n_layers * (
            anatomy.hidden_size + 2 * anatomy.n_kv_heads * anatomy.head_dim
        )
        together: dict[int, list[int]] = {}
        for prompt in sorted(fast):
            beginning = self._beginning(prompt)
            together.setdefault(prompt if beginning is None else beginning, []).append(prompt)
        groups: list[list[int]] = []
        tokens = 0
        for prompts in sorted(together.values(), key=lambda prompts: max(len(self.prompts[prompt]) for prompt in prompts)):
            # Of a prefix that several share, the others have only what follows it.
            n = sum(len(self.prompts[prompt]) for prompt in prompts) - (len(prompts) - 1) * self._n_prefix(prompts[0])
            full = tokens + n > max(n, 4 * self.budget.tokens) or (tokens + n) * bytes_per_token > self.budget.stored
            if groups and not full:
                groups[-1] += prompts
                tokens += n
            else:
                groups.append(list(prompts))
                tokens = n
        return groups

    def _n_prefix(self, prompt: int) -> int:
        image = self.prompts[prompt].image.nonzero()
        return int(image[-1]) + 1 if len(image) else 0

    def _run_fast(self, group: list[int], shared: list[int], resumed: list[int]) -> None:
        try:
            self._run_group(group, shared, resumed)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(group) == 1:
                raise SubjectError(NOTHING_FITS) from error
        else:
            return
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            members = set(half)
            self._run_fast(half, *([n for n in numbers if self.rows[n].prompt in members] for numbers in (shared, resumed)))

    def _run_group(self, group: list[int], shared: list[int], resumed: list[int]) -> None:
        rows = RecordedRows(self, group, shared, resumed)
        rows.record(self.subject)
        if shared:
            self.batched(PATHS[0], rows.ordered(), self.budget.batch(rows.longest), rows.run_shared)
        for longest, numbers in rows.alike():
            self.batched(PATHS[1], numbers, self.budget.batch(longest), rows.run_resumed)

    def trunk_of(self, prompt: int) -> tuple[str, int]:
        """What tells trunks apart: the prefix, or a prompt that shares none."""
        beginning = self._beginning(prompt)
        return ("prompt", prompt) if beginning is None else ("prefix", beginning)

    def start(self, number: int) -> int:
        """The layer that a row has to start at where it resumes."""
        row = self.rows[number]
        return _resume_layer(row.intervention, self.anatomy.n_layers, self._shape(row.prompt).contiguous)
