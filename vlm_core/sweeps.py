"""Many interventions x many items -> one tidy table.

``sweep(subject, items, interventions)``   ``DataFrame[item, cluster, task, intervention, metric, value]``

The engine owns the speed. Items are processed in blocks: image features and merged embeddings once per item, then rows
``(item, intervention)`` sorted by what shortens them alike and by length, each batch sharing its trunks up to the first
layer touched. Finished blocks are stored as shards, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vlm_core.embed import Encoded, encode_items
from vlm_core.interventions import DropTokens, Intervention, describe
from vlm_core.items import item_field, item_number, take
from vlm_core.plan import first_layer, parts
from vlm_core.rows import forward_rows, read_logits
from vlm_core.scoring import METRICS, CandidateSet, candidate_set, score_candidates
from vlm_core.subject import Subject

__all__ = ["sweep"]

COLUMNS = ("item", "cluster", "task", "intervention", "metric", "value")
_BLOCK_ITEMS = 128

Row = Intervention | tuple[Intervention, ...] | None


def sweep(
    subject: Subject,
    items: Sequence,
    interventions: Mapping[str, Row] | Sequence[Row],
    *,
    batch_rows: int | None = None,
    metrics: Sequence[str] = ("correct", "logit", "margin"),
    progress: Callable[[int, int], None] | None = None,
    assignments: Sequence[tuple[int, str]] | None = None,
    store: str | Path | None = None,
) -> pd.DataFrame:
    """Score every item under every intervention.

    Parameters
    ----------
    subject : Subject
    items : sequence of items
        With ``id, scene_id, task, image, prompt, answer, candidates``.
    interventions : mapping of label to intervention, or sequence
        ``None`` (nothing), an intervention, or a tuple of them applied together. A sequence is labelled by
        ``describe``.
    batch_rows : int, optional
        Rows per forward pass. Default: ``subject.batch_rows``.
    metrics : sequence of str
        Of ``correct, logit, logprob, margin, choice, candidate 0, candidate 1, ...``; see ``vlm_core.scoring.score_candidates``. Candidates are
        compared by summed log-probability. ``logit`` is the raw logit of a one-token answer (what attribution by
        logits needs), the summed log-probability of a longer one.
    progress : callable, optional
        Called with (rows done, rows in all).
    assignments : sequence of (item index, label), optional
        The rows to run, in place of the full product (random masks drawn per item).
    store : directory, optional
        Finished blocks are kept there and found again by content.

    Returns
    -------
    DataFrame
        Columns ``item, cluster, task, intervention, metric, value``, in the order of items, then rows, then metrics.
    """
    table = _labelled(interventions)
    unknown = {metric for metric in metrics if metric not in METRICS and not re.fullmatch(r"candidate \d+", metric)}
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}: choose from {', '.join(METRICS)}")
    by_item = _rows_by_item(len(items), table, assignments)
    indices = [index for index in range(len(items)) if by_item[index]]
    n_rows, done, pieces = sum(map(len, by_item)), 0, []
    folder = None if store is None else Path(store)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(indices), _BLOCK_ITEMS):
        block = indices[start : start + _BLOCK_ITEMS]
        chunk = take(items, block)
        rows = [(position, label) for position, index in enumerate(block) for label in by_item[index]]
        shard = None if folder is None else folder / f"{_shard_name(subject, chunk, rows, table, metrics)}.parquet"
        if shard is not None and shard.is_file():
            piece = pd.read_parquet(shard)
        else:
            piece = _sweep_block(subject, chunk, rows, table, metrics, batch_rows or subject.batch_rows)
            if shard is not None:
                _write_shard(piece, shard)
        pieces.append(piece)
        done += len(rows)
        if progress is not None:
            progress(done, n_rows)
    if not pieces:
        return pd.DataFrame({column: pd.Series(dtype=float if column == "value" else str) for column in COLUMNS})
    return pd.concat(pieces, ignore_index=True)


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


def _sweep_block(subject, items, rows, table, metrics, batch_rows) -> pd.DataFrame:
    encoded = encode_items(subject, items)
    candidates = [candidate_set(subject, item) for item in items]
    numbers = [item_number(item) for item in items]
    width = max(one.n for one in candidates)
    scores = np.full((len(rows), width), -np.inf)
    logits = np.zeros(len(rows))
    for batch in _batches(subject, rows, table, encoded, candidates, batch_rows):
        _score_batch(subject, batch, rows, table, encoded, candidates, numbers, scores, logits)
    values = score_candidates([candidates[position] for position, _ in rows], scores, logits)
    per_row = {
        "item": [str(item_field(items[position], "id")) for position, _ in rows],
        "cluster": [str(item_field(items[position], "scene_id")) for position, _ in rows],
        "task": [str(item_field(items[position], "task")) for position, _ in rows],
        "intervention": [label for _, label in rows],
    }
    repeat = len(metrics)
    columns = {name: np.repeat(np.array(column, dtype=object), repeat) for name, column in per_row.items()}
    columns["metric"] = np.tile(np.array(metrics, dtype=object), len(rows))
    columns["value"] = np.stack([values[metric] for metric in metrics], axis=1).reshape(-1)
    return pd.DataFrame(columns)


def _batches(subject, rows, table, encoded, candidates, batch_rows) -> list[list[tuple[int, int]]]:
    """Batches of (row, prefix), rows of alike cost together."""
    anatomy = subject.anatomy
    shapes = {
        label: tuple(sorted((part.layer, part.keep) for part in parts(row) if isinstance(part, DropTokens)))
        for label, row in table.items()
    }
    firsts = {label: first_layer(row, anatomy.n_layers, anatomy.n_heads) for label, row in table.items()}
    order = []
    for number, (position, label) in enumerate(rows):
        for prefix, tokens in enumerate(candidates[position].prefixes):
            length = len(encoded[position]) + len(tokens)
            order.append(((shapes[label], length, position, prefix, firsts[label]), number, prefix))
    order.sort(key=lambda entry: entry[0])
    pairs = [(number, prefix) for _, number, prefix in order]
    return [pairs[start : start + batch_rows] for start in range(0, len(pairs), batch_rows)]


def _score_batch(subject, batch, rows, table, encoded, candidates, numbers, scores, logits) -> None:
    sequences: list[Encoded] = []
    items: list[int] = []
    known: dict[tuple[int, int], int] = {}
    trunk, interventions, wanted_rows, wanted_positions = [], [], [], []
    term_rows, term_candidates, term_reads, term_tokens = [], [], [], []
    for row, (number, prefix) in enumerate(batch):
        position, label = rows[number]
        one: CandidateSet = candidates[position]
        if (position, prefix) not in known:
            known[position, prefix] = len(sequences)
            sequences.append(encoded[position].extended(subject, one.prefixes[prefix]))
            items.append(numbers[position])
        trunk.append(known[position, prefix])
        interventions.append(table[label])
        read_at = {}
        for read, (read_prefix, offset) in enumerate(one.reads):
            if read_prefix == prefix:
                read_at[read] = len(wanted_rows)
                wanted_rows.append(row)
                wanted_positions.append(encoded[position].n_prompt - 1 + offset)
        for candidate, read, token in one.terms.tolist():
            if read in read_at:
                term_rows.append(number)
                term_candidates.append(candidate)
                term_reads.append(read_at[read])
                term_tokens.append(token)
    hidden, _ = forward_rows(
        subject, sequences, np.array(trunk), interventions, items, (np.array(wanted_rows), np.array(wanted_positions))
    )
    read = read_logits(subject, hidden)
    with torch.inference_mode():
        normaliser = read.logsumexp(1)
        index = torch.tensor(term_reads, device=read.device)
        raw = read[index, torch.tensor(term_tokens, device=read.device)]
        log_probabilities = (raw - normaliser[index]).cpu().numpy().astype(float)
    raw = raw.cpu().numpy()
    term_rows, term_candidates = np.array(term_rows), np.array(term_candidates)
    touched = scores[term_rows, term_candidates]
    scores[term_rows, term_candidates] = np.where(np.isneginf(touched), 0.0, touched)
    np.add.at(scores, (term_rows, term_candidates), log_probabilities)
    for term, (number, candidate) in enumerate(zip(term_rows.tolist(), term_candidates.tolist(), strict=True)):
        one = candidates[rows[number][0]]
        if candidate == one.answer:
            single = (one.terms[:, 0] == candidate).sum() == 1
            logits[number] = raw[term] if single else scores[number, candidate]


def _shard_name(subject, items, rows, table, metrics) -> str:
    digest = hashlib.sha256()
    digest.update(repr(subject.fingerprint).encode())
    for item in items:
        fields = ("id", "scene_id", "task", "prompt", "answer", "candidates")
        digest.update(repr([item_field(item, name) for name in fields]).encode())
        digest.update(item_field(item, "image").tobytes())
    labels = sorted({label for _, label in rows})
    digest.update(repr([(label, describe(table[label]), _content(table[label])) for label in labels]).encode())
    digest.update(repr((rows, tuple(metrics))).encode())
    return digest.hexdigest()[:24]


def _content(row: Row) -> list:
    return [
        (type(part).__name__, [getattr(value, "digest", value) for value in vars(part).values()]) for part in parts(row)
    ]


def _write_shard(piece: pd.DataFrame, shard: Path) -> None:
    partial = shard.with_suffix(f".{os.getpid()}.partial")
    piece.to_parquet(partial, index=False)
    os.replace(partial, shard)
