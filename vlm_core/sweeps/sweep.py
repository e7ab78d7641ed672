"""Many interventions x many items -> one tidy table.

``sweep(subject, items, interventions)``   ``DataFrame[item, cluster, task, intervention, metric, value]``
``progress_bar``                           a progress bar with an estimate of what is left

The engine owns the speed. Items are processed in blocks: every image is encoded once, every prompt runs once, and every row
``(item, intervention)`` takes the fastest path that is exact for it (``vlm_core.sweeps.engine``). Finished blocks are stored as shards, so that a
killed run goes on where it stopped and processes that ask for the same sweep share it; blocks run in this process or on an executor.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from tqdm import tqdm

from vlm_core.identity import item_digest
from vlm_core.interventions import Row, describe, parts
from vlm_core.items import SCORED, item_field, item_number, require_distinct, require_item, take
from vlm_core.seam.plan import forget, require_possible
from vlm_core.seam.seam import require_asleep
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.groups import Groups, grouped, with_groups
from vlm_core.subjects.remembering import tower_key
from vlm_core.subjects.subject import Subject
from vlm_core.subjects.visual import asked_outside
from vlm_core.sweeps.asked import require_asked
from vlm_core.sweeps.budget import Budget
from vlm_core.sweeps.engine import RowJob, run_rows
from vlm_core.sweeps.executors import SubjectSource, open_subject
from vlm_core.sweeps.features import KnownFeatures, Prompt, encode_distinct, prompts_of, vision_tower
from vlm_core.sweeps.scoring import CandidateSet, RowScores, candidate_set, score_candidates
from vlm_core.sweeps.shards import ShardStore

__all__ = ["progress_bar", "sweep"]

COLUMNS = ("item", "cluster", "task", "intervention", "metric", "value")
# Small enough that processes which need the same sweep have something to share.
_BLOCK_ITEMS = 64
_BLOCK_ROWS = 2048


@dataclass(eq=False)
class _Shared:
    """Image features of a subject in one state, and the sweeps in this process that share them."""

    state: tuple
    features: KnownFeatures
    sweeps: set[str] = field(default_factory=set)


# What this process has encoded: one store for each subject, whatever sweeps are at it.
_KNOWN: WeakKeyDictionary[Subject, _Shared] = WeakKeyDictionary()
_KNOWN_LOCK = threading.Lock()


def sweep(
    subject: SubjectSource,
    items: Sequence,
    interventions: Mapping[str, Row] | Sequence[Row],
    *,
    batch_rows: int | None = None,
    metrics: Sequence[str] = ("correct", "logit", "margin"),
    progress: Callable[[int, int], None] | bool | None = None,
    assignments: Sequence[tuple[int, str]] | None = None,
    store: str | Path | None = None,
    groups: Groups | None = None,
    executor: Executor | None = None,
) -> pd.DataFrame:
    """Score every item under every intervention.

    Parameters
    ----------
    subject : Subject, or what an executor's workers can make one of
        A path or model id, or a picklable callable without arguments that gives a ``Subject``.
    items : sequence of items
        With ``id, scene_id, task, image, prompt, answer, candidates``. Without items, or without rows, the table is empty.
    interventions : mapping of label to intervention, or sequence
        ``None`` (nothing), an intervention, or a tuple of them applied together. A sequence is labelled by
        ``describe``.
    batch_rows : int, optional
        Rows per forward pass. Default: what the machine's caches or free memory allow. A batch that runs out of memory is halved.
    metrics : sequence of str
        Of ``correct, logit, logprob, margin, choice, candidate 0, candidate 1, ...``; see ``vlm_core.sweeps.scoring.score_candidates``.
        Candidates are compared by summed log-probability. ``logit`` is a raw logit whatever the answer's length: that of its first token
        that tells the candidates apart.
    progress : callable or bool, optional
        Called with (rows done, rows in all) after every block; True for ``progress_bar()``. One with a method ``found`` is told before
        how many of those rows were in the store, so that no speed is made of them.
    assignments : sequence of (item index, label), optional
        The rows to run, in place of the full product (random masks drawn per item).
    store : directory, optional
        Finished blocks are kept there and found again by content. Processes that share it share the work.
    groups : callable, optional
        ``groups(item, prompt)`` gives token groups of an item's prompt by name, boolean arrays ``[token]`` (others are refused), for
        interventions to refer to. ``prompt`` (``vlm_core.sweeps.features.Prompt``) holds the prompt's tokens and which of them are image
        tokens: what it takes no model to know, so that a stored block is found without one.
    executor : concurrent.futures.Executor, optional
        Where blocks run (``vlm_core.sweeps.executors``). Workers in other processes need ``subject`` as a path, id or callable, and reach
        ``store`` under the same path.

    Returns
    -------
    DataFrame
        Columns ``item, cluster, task, intervention, metric, value``, in the order of items, then rows, then metrics.
        ``attrs["paths"]``: rows per path that the engine took (``vlm_core.sweeps.engine.PATHS``; one per answer prefix of a row);
        ``attrs["reasons"]``: rows per reason not to take a faster one. A row in which the model's numbers stop being finite is NaN in
        every metric: neither right nor wrong.

    Raises
    ------
    TypeError, ValueError
        One sentence for what cannot be meant, before anything runs (``vlm_core.sweeps.asked``): two items of one id, an item that cannot
        be scored, an unknown metric, assignments of no intervention, a layer or head that is not there. Items of a lazy sequence, and
        token groups, are looked at when their block is read.
    SubjectError
        Where the subject cannot write a candidate.
    """
    require_asked(
        subject, items, interventions, batch_rows=batch_rows, metrics=metrics, progress=progress, assignments=assignments, store=store,
        groups=groups, executor=executor,
    )
    table = _labelled(interventions)
    require_distinct(items)
    by_item = _rows_by_item(len(items), table, assignments)
    plan = _Plan(uuid.uuid4().hex, table, tuple(metrics), batch_rows, None if store is None else str(store), groups)
    blocks = _blocks(by_item)
    progress = progress_bar() if progress is True else progress or None
    n_rows, done, pieces = sum(map(len, by_item)), 0, {}
    source = open_subject(subject) if executor is None else subject
    run = partial(_run_here, source) if executor is None else partial(_run_on, executor, source)
    try:
        if isinstance(source, Subject):
            require_asleep(source.anatomy, "a sweep")
            for row in table.values():
                require_possible(row, source.anatomy, named=groups is not None)
        for number, piece, computed in run(plan, items, by_item, blocks):
            pieces[number] = piece
            rows = sum(len(by_item[index]) for index in blocks[number])
            done += rows
            if not computed and hasattr(progress, "found"):
                progress.found(rows)
            if progress is not None:
                progress(done, n_rows)
    finally:
        forget()
        _let_go(plan.sweep)
    return _joined([pieces[number] for number in sorted(pieces)])


class _ProgressBar:
    """See ``progress_bar``."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self._started = time.time()
        self._found = 0

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            # Without smoothing the speed is that of all rows but the initial ones.
            self.bar = tqdm(total=total, unit="row", dynamic_ncols=True, smoothing=0)
            self.bar.start_t = self._started
        self.bar.initial = self._found
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()

    def found(self, rows: int) -> None:
        """So many of the rows done next took no time here."""
        self._found += rows


def progress_bar() -> Callable[[int, int], None]:
    """A progress bar on the terminal, with the time that is left, for ``sweep(progress=...)``.

    The time left is that of rows computed by this sweep: what it finds in the store counts as done, not as speed.
    """
    return _ProgressBar()


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is asked of every block of a ``sweep``."""

    sweep: str
    table: dict[str, Row]
    metrics: tuple[str, ...]
    batch_rows: int | None
    store: str | None
    groups: Groups | None


@dataclass(frozen=True, eq=False)
class _Block:
    """Some items and their rows ``(position among the items, label)``."""

    plan: _Plan
    items: list
    rows: list[tuple[int, str]]

    @classmethod
    def of(cls, plan: _Plan, items: Sequence, by_item: list[list[str]], indices: list[int]) -> _Block:
        rows = [(position, label) for position, index in enumerate(indices) for label in by_item[index]]
        needed = {label: plan.table[label] for _, label in rows}
        chosen = take(items, indices)
        for item in chosen:
            require_item(item, SCORED)
        return cls(replace(plan, table=needed), chosen, rows)


def _blocks(by_item: list[list[str]]) -> list[list[int]]:
    blocks: list[list[int]] = []
    n_rows = 0
    for index, labels in enumerate(by_item):
        if not labels:
            continue
        if not blocks or len(blocks[-1]) == _BLOCK_ITEMS or n_rows + len(labels) > _BLOCK_ROWS:
            blocks.append([])
            n_rows = 0
        blocks[-1].append(index)
        n_rows += len(labels)
    return blocks


def _run_here(subject: Subject, plan: _Plan, items, by_item, blocks) -> Iterator[tuple[int, pd.DataFrame, bool]]:
    """Number and table of every block, and whether it was computed here."""
    if plan.store is None:
        for number, indices in enumerate(blocks):
            yield number, _measure(subject, _Block.of(plan, items, by_item, indices)), True
        return
    numbers: dict[str, list[int]] = {}
    computed: set[str] = set()

    def tasks() -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        for number, indices in enumerate(blocks):
            block = _Block.of(plan, items, by_item, indices)
            name, measure = _shard(subject, block)
            numbers.setdefault(name, []).append(number)
            yield name, partial(_noted, measure, name, computed)

    for name, piece in ShardStore(plan.store).compute(tasks()):
        yield numbers[name].pop(0), piece, name in computed
        computed.discard(name)


def _noted(measure: Callable[[], pd.DataFrame], name: str, computed: set[str]) -> pd.DataFrame:
    computed.add(name)
    return measure()


def _run_on(executor: Executor, source: SubjectSource, plan: _Plan, items, by_item, blocks) -> Iterator[tuple[int, pd.DataFrame, bool]]:
    if isinstance(source, Subject) and not getattr(executor, "in_process", isinstance(executor, ThreadPoolExecutor)):
        raise ValueError(
            f"{type(executor).__name__} runs in other processes, which cannot take a Subject in memory: give sweep the checkpoint's "
            f"path or id, or a picklable callable that makes the Subject"
        )
    at_once = 2 * getattr(executor, "max_workers", getattr(executor, "_max_workers", 4))
    todo, running = iter(enumerate(blocks)), {}
    try:
        while True:
            for number, indices in todo:
                running[executor.submit(_run_block, source, _Block.of(plan, items, by_item, indices))] = number
                if len(running) >= at_once:
                    break
            if not running:
                return
            finished: set[Future]
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), *future.result()
    finally:
        for future in running:
            future.cancel()


def _run_block(source: SubjectSource, block: _Block) -> tuple[pd.DataFrame, bool]:
    """One block, on whatever worker this is, and whether it was computed there."""
    subject = open_subject(source)
    if block.plan.store is None:
        return _measure(subject, block), True
    name, measure = _shard(subject, block)
    computed: set[str] = set()
    ((_, piece),) = ShardStore(block.plan.store).compute([(name, partial(_noted, measure, name, computed))])
    return piece, name in computed


def _shard(subject: Subject, block: _Block) -> tuple[str, Callable[[], pd.DataFrame]]:
    asked = block.plan.groups
    prompts = None if asked is None else grouped(prompts_of(subject, block.items), block.items, asked)
    return _shard_name(subject, block, prompts), partial(_measure, subject, block, prompts)


def _joined(pieces: list[pd.DataFrame]) -> pd.DataFrame:
    if not pieces:
        table = pd.DataFrame({column: pd.Series(dtype=float if column == "value" else str) for column in COLUMNS})
    else:
        table = pd.concat(pieces, ignore_index=True)
    attrs = [piece.attrs for piece in pieces]
    table.attrs = {key: dict(sum((Counter(one.get(key, {})) for one in attrs), Counter())) for key in ("paths", "reasons")}
    return table


def _labelled(interventions: Mapping[str, Row] | Sequence[Row]) -> dict[str, Row]:
    if isinstance(interventions, Mapping):
        return dict(interventions)
    table = {describe(intervention): intervention for intervention in interventions}
    if len(table) != len(interventions):
        raise ValueError("two interventions have the same description: pass a mapping with a label for each")
    return table


def _rows_by_item(n_items: int, table: dict[str, Row], assignments) -> list[list[str]]:
    if assignments is None:
        return [list(table) for _ in range(n_items)]
    rows: list[list[str]] = [[] for _ in range(n_items)]
    for index, label in assignments:
        if label not in table:
            raise ValueError(f"assignments name the intervention {label!r}, which is not among the interventions")
        rows[index].append(label)
    return rows


def _known(subject: Subject, sweep: str) -> KnownFeatures:
    """Image features that all blocks of a sweep share in this process, with those of other sweeps at the same subject."""
    with _KNOWN_LOCK:
        shared = _KNOWN.get(subject)
        if shared is None or sweep not in shared.sweeps:
            # A worker is not told when a sweep ends: the next finds what the last has encoded, unless the weights are others by then.
            state = subject.weights_state()
            if shared is None or shared.state != state:
                shared = _KNOWN[subject] = _Shared(state, _features(subject))
            shared.sweeps.add(sweep)
        return shared.features


def _features(subject: Subject) -> KnownFeatures:
    """Room for image features; those of all subjects with the same tower, where they share them (``vlm_core.subjects.remembering``)."""
    kept = tower_key(vision_tower(subject))
    if kept is None:
        return KnownFeatures.of(subject)
    known, key = kept
    if key not in known.towers:
        known.towers[key] = KnownFeatures.of(subject)
    return known.towers[key]


def _let_go(sweep: str) -> None:
    """Forget the features that no other sweep in this process shares."""
    with _KNOWN_LOCK:
        for subject, shared in list(_KNOWN.items()):
            shared.sweeps.discard(sweep)
            if not shared.sweeps:
                del _KNOWN[subject]


def _encode(subject: Subject, block: _Block, prompts: list[Prompt] | None) -> list[Encoded]:
    reads = asked_outside({block.plan.table[label] for _, label in block.rows})
    encoded = encode_distinct(subject, block.items, _known(subject, block.plan.sweep), reads=reads)
    if block.plan.groups is None:
        return encoded
    if prompts is None:
        prompts = grouped([Prompt.of(one) for one in encoded], block.items, block.plan.groups)
    return [with_groups(one, prompt.groups) for one, prompt in zip(encoded, prompts, strict=True)]


def _measure(subject: Subject, block: _Block, prompts: list[Prompt] | None = None) -> pd.DataFrame:
    """The table of one block; ``prompts`` with their token groups, where those are known already."""
    items, rows, plan = block.items, block.rows, block.plan
    table, metrics = plan.table, plan.metrics
    encoded = _encode(subject, block, prompts)
    candidates = [candidate_set(subject, item) for item in items]
    pairs = [(number, prefix) for number, (position, _) in enumerate(rows) for prefix in range(len(candidates[position].prefixes))]
    jobs = [_job(*rows[number], prefix, table, encoded, candidates) for number, prefix in pairs]
    scores = RowScores(subject, candidates, rows, pairs)
    counts = run_rows(
        subject, encoded, jobs, [item_number(item) for item in items], scores.consume, Budget.of(subject, plan.batch_rows)
    )
    values = score_candidates([candidates[position] for position, _ in rows], scores.sums, scores.logits)
    repeat = len(metrics)
    positions = np.repeat([position for position, _ in rows], repeat)
    names = {"item": "id", "cluster": "scene_id", "task": "task"}
    columns = {
        name: np.array([str(item_field(item, field)) for item in items], dtype=object)[positions] for name, field in names.items()
    }
    columns["intervention"] = np.repeat(np.array([label for _, label in rows], dtype=object), repeat)
    columns["metric"] = np.tile(np.array(metrics, dtype=object), len(rows))
    # Other blocks may hold items with more candidates.
    beyond = np.where(np.isnan(values["logit"]), np.nan, -np.inf)
    columns["value"] = np.stack([values.get(metric, beyond) for metric in metrics], axis=1).reshape(-1)
    piece = pd.DataFrame(columns)
    piece.attrs = counts.to_dict()
    return piece


def _job(position: int, label: str, prefix: int, table, encoded, candidates) -> RowJob:
    one: CandidateSet = candidates[position]
    last = encoded[position].n_prompt - 1
    reads = tuple(last + offset for read_prefix, offset in one.reads if read_prefix == prefix)
    return RowJob(position, one.prefixes[prefix], table[label], reads)


def _shard_name(subject: Subject, block: _Block, prompts: list[Prompt] | None) -> str:
    table = block.plan.table
    digest = hashlib.sha256()
    digest.update(repr(subject.fingerprint).encode())
    for item in block.items:
        digest.update(item_digest(item).encode())
    for one in prompts or ():
        digest.update(repr([(name, members.tolist()) for name, members in sorted(one.groups.items())]).encode())
    labels = sorted({label for _, label in block.rows})
    digest.update(repr([(label, describe(table[label]), _content(table[label])) for label in labels]).encode())
    digest.update(repr((block.rows, block.plan.metrics)).encode())
    return digest.hexdigest()[:24]


def _content(row: Row) -> list:
    return [(type(part).__name__, part.digest) for part in parts(row)]
