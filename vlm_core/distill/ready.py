"""What of a training step can be done once, done once: rows encoded, pictures seen by the frozen vision tower.

``ready_rows(data, collator, encode)``  a data set and a collator that give the batches of TRL's collator, each row encoded once
``encoded_conversations(collator)``     how rows of an instruction set are encoded
``encoded_by(collator)``                how rows of any set are encoded: by TRL's collator itself, alone
``features_once(subject)``              context manager: each picture passes the vision tower once, alone
``sharing(limit)``                      context manager: trainings in it share what was done once, where it is the same

TRL renders, tokenizes and normalises every row of every batch anew, which for small models costs as much as the training itself.
Its collator stays the authority: rows encoded once are put together and compared with its batches of the same rows (the shortest alone; the
shortest, the longest and the first ones), bit by bit but for the ids of padding, and where they differ, or a family's fields cannot be put
together, its collator makes every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from trl.data_utils import prepare_multimodal_messages

from vlm_core.memory import Bounded
from vlm_core.subjects.fingerprint import processor_settings, weights_digest
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.features import KnownFeatures, recalling, vision_tower

__all__ = ["ReadyRows", "encoded_by", "encoded_conversations", "features_once", "ready_rows", "sharing"]

_COMPARED = 4
"""Rows of the batch on which TRL's collator and the rows put together are compared."""
_ENCODED = "encoded"

_CHUNK = 32
"""Rows that are encoded together."""
_TOWERS = 4
"""Vision towers whose features find room in what trainings share: a student's, its teacher's, and as many for rows."""

_SHARED: ContextVar[Bounded | None] = ContextVar("shared by trainings", default=None)

Sequences = tuple[dict[str, torch.Tensor], ...]
Encode = Callable[[Sequence[dict[str, Any]]], list[Sequences]]


class ReadyRows(Dataset):
    """Rows of a data set, encoded: what a trainer takes as its ``train_dataset``, with ``collate`` as its ``data_collator``.

    Parameters
    ----------
    sample : dict
        A row as it was: TRL tells kinds of data sets by their columns.
    rows : sequence of tuple of dict
        Of each row its sequences (one, or one that is chosen and one that is rejected), of each sequence its fields, without padding:
        ``[token]``, or ``[part of an image, ...]``.
    pad_token_id : int
    """

    def __init__(self, sample: dict[str, Any], rows: Sequence[Sequences], pad_token_id: int) -> None:
        self._sample, self._rows = sample, list(rows)
        self._padding = {"input_ids": pad_token_id, "labels": -100}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self._sample, _ENCODED: self._rows[row]}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(value.nbytes for sequences in self._rows for one in sequences for value in one.values())

    def lengths(self) -> list[int]:
        """Tokens of each row's longest sequence."""
        return [max(len(one["input_ids"]) for one in sequences) for sequences in self._rows]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: first sequences first, padded on the right; parts of images one after the other."""
        sequences = [one for part in zip(*(row[_ENCODED] for row in rows), strict=True) for one in part]
        return {name: self._joined(name, [one[name] for one in sequences], sequences) for name in sequences[0]}

    def _joined(self, name: str, values: list[torch.Tensor], sequences: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        if all(value.ndim == 1 and len(value) == len(one["input_ids"]) for value, one in zip(values, sequences, strict=True)):
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self._padding.get(name, 0))
        return torch.cat(values)


def ready_rows(data: Dataset, collator: Callable, encode: Encode) -> tuple[Dataset, Callable, bool]:
    """Encode every row of a set once, if that gives what a collator gives.

    Parameters
    ----------
    data : datasets.Dataset
    collator : callable
        TRL's: rows → batch, with ``processor``.
    encode : callable
        Rows → the sequences of each; see `encoded_conversations` and `encoded_by`.

    Returns
    -------
    data, collator, encoded
        What a trainer takes; ``encoded`` tells whether the rows were encoded (else both are those that came in).
    """
    shared, key = _SHARED.get(), None
    if shared is not None and hasattr(data, "_fingerprint"):
        key = ("rows", data._fingerprint, type(collator).__name__, encode.__qualname__, processor_settings(collator.processor))
        known = shared.get(key)
        if known is not None:
            return known, known.collate, True
    rows = _encoded_rows(data, collator, encode)
    if rows is None:
        return data, collator, False
    if key is not None:
        shared.keep(key, rows, rows.nbytes)
    return rows, rows.collate, True


def _encoded_rows(data: Dataset, collator: Callable, encode: Encode) -> ReadyRows | None:
    """Every row encoded; None where that does not give what the collator gives."""
    tokenizer = collator.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        chunks = ([data[row] for row in range(start, min(start + _CHUNK, len(data)))] for start in range(0, len(data), _CHUNK))
        rows = ReadyRows(data[0], [one for chunk in chunks for one in encode(chunk)], pad)
        lengths = rows.lengths()
        ends = [int(np.argmin(lengths)), int(np.argmax(lengths))]
        batches = [ends[:1], list(dict.fromkeys([*ends, *range(min(_COMPARED, len(data)))]))[:_COMPARED]]
        same = all(_equal(rows.collate([rows[row] for row in some]), collator([data[row] for row in some])) for some in batches)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None  # fields of other shapes than these: the collator knows them
    return rows if same else None


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bit by bit, but for the ids of padding, for which TRL takes one of several."""

    def same(name: str) -> bool:
        one, other = ours[name], theirs[name]
        if name == "input_ids":
            one, other = (ids.masked_fill(theirs["attention_mask"] == 0, 0) for ids in (one, other))
        return one.dtype == other.dtype and torch.equal(one, other)

    return ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape and same(name) for name in theirs)


def encoded_conversations(collator: Any) -> Encode:
    """Rows with ``images`` and ``messages`` as TRL's ``DataCollatorForVisionLanguageModeling`` encodes them, loss on answers only.

    The processor is asked for lists: it marks the assistant's tokens in a loop over all of them, ten times as long over tensors.
    """
    processor = collator.processor

    def encode(rows: Sequence[dict[str, Any]]) -> list[Sequences]:
        output = processor.apply_chat_template(
            [prepare_multimodal_messages(row["messages"], images=row["images"]) for row in rows],
            chat_template=collator.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            return_assistant_tokens_mask=True,
            processor_kwargs={"add_special_tokens": False},
        )
        lengths = list(map(len, output["input_ids"]))
        fields: dict[str, list[torch.Tensor]] = {}
        for name, value in output.items():
            if _lengths(value) == lengths:
                fields[name] = [torch.as_tensor(one) for one in value]
            elif len(rows) == 1:
                fields[name] = [_tensor(value)]
            elif len(value) == len(rows) and all(len(row["images"]) == 1 for row in rows):
                fields[name] = [_tensor(one)[None] for one in value]
            else:  # parts of images, and how many each row has is the processor's knowledge
                return [one for row in rows for one in encode([row])]
        taught = fields.pop("assistant_masks")
        fields["labels"] = [ids.masked_fill(mask == 0, -100) for ids, mask in zip(fields["input_ids"], taught, strict=True)]
        return [({name: values[number] for name, values in fields.items()},) for number in range(len(rows))]

    return encode


def encoded_by(collator: Callable) -> Encode:
    """Rows as the collator encodes them, without the padding: their sequences, each with its share of the parts of images.

    Where the parts of images are not one a sequence, how many each has is the processor's knowledge, and every row is encoded alone.
    """

    def encode(rows: Sequence[dict[str, Any]]) -> list[Sequences]:
        batch = collator([dict(row) for row in rows])
        valid = batch["attention_mask"].bool()
        per_token = {name: value.shape == valid.shape for name, value in batch.items()}
        if len(rows) > 1 and any(len(value) != len(valid) for value in batch.values()):
            return [one for row in rows for one in encode([row])]
        fields: list[dict[str, torch.Tensor]] = [{} for _ in valid]
        for name, value in batch.items():
            for number, part in enumerate(value if per_token[name] else value.chunk(len(valid))):
                fields[number][name] = part[valid[number]].clone() if per_token[name] else part.clone()
        return [tuple(fields[number :: len(rows)]) for number in range(len(rows))]

    return encode


def _lengths(value: Any) -> list[int] | None:
    return [len(one) if hasattr(one, "__len__") else 0 for one in value] if isinstance(value, list) else None


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))


@contextmanager
def features_once(subject: Subject) -> Iterator[KnownFeatures]:
    """In this context the subject's vision tower, which must not train, computes each picture once, alone.

    Alone, so that what a picture's features are does not depend on the batch that it came in first: the last bits may.
    """
    shared, tower = _SHARED.get(), vision_tower(subject)
    key = None if shared is None or tower is None else ("features", weights_digest(tower), str(subject.device))
    known = None if key is None else shared.get(key)
    if known is None:
        known = KnownFeatures.of(subject, alone=True)
        if key is not None:
            known.limit = min(known.limit, shared.limit // _TOWERS)
            shared.keep(key, known, known.limit)
    with recalling(subject, known):
        yield known


@contextmanager
def sharing(limit: int) -> Iterator[None]:
    """Trainings in this context (and thread) share encoded rows of the same set under the same processor, and features of the same vision tower.

    Parameters
    ----------
    limit : int
        Bytes that may be kept.
    """
    token = _SHARED.set(Bounded(limit))
    try:
        yield
    finally:
        _SHARED.reset(token)
