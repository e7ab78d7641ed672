"""Items of a benchmark: rows read one at a time, chosen by hash, each picture decoded once within limits, kept on disk.

``load(name, n=..., seed=...)``   a ``datasets.Dataset`` of items
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

import vlm_core.images
import vlm_core.paths
from vlm_core.identity import picture_digest
from vlm_core.images import open_image, stored_image
from vlm_core.paths import cache_root, within

from .choosing import chosen, rank
from .declaration import Benchmark, Row
from .local import local
from .reading import files_of, folder_of, missing, stream
from .registry import BENCHMARKS

__all__ = ["load"]

BATCH = 16
"""Items that are in memory before they are written."""


def load(
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str | None = None,
    source: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    scorer: str | None = None,
) -> datasets.Dataset:
    """Items of a benchmark, or of data of your own.

    Parameters
    ----------
    name : str
        One of ``BENCHMARKS``; ``"local"`` for data of your own.
    n : int, optional
        So many items, those of the lowest hash of ``(seed, id)``: the same whatever the order of the set, and those of a smaller ``n`` are
        among those of a larger. Default: as many as the published set has, in the set's order.
    seed : int
        Of that choice, and of the order of options where the set has the right one first.
    split : str, optional
        Default: the one that the benchmark declares.
    source : path, optional
        A file or folder in the benchmark's own schema, in place of the Hub.
    columns : mapping, optional
        For ``"local"``: ``{"image": ..., "prompt": ..., "answer": ..., "id": ..., "scene": ..., "task": ..., "candidates": ...}``, the
        columns of each; those left out are found by the names that public sets use.
    prompt, scorer : str, optional
        For ``"local"``: what is asked of every picture where no column says; one of ``vlm_core.scoring.SCORERS``, default ``"exact"``.

    Returns
    -------
    datasets.Dataset
        ``id, scene_id, task, image, prompt, answer, references, scorer``; ``candidates`` where the benchmark has them, and what else it
        declares. It is kept in ``$VLM_CLAIMS_CACHE/benchmarks`` and read from there again: what the Hub changes is seen once that is gone.

    Raises
    ------
    ValueError
        One sentence: an unknown name or split, data that is not here and how it is had, a column that is missing, a row without an answer,
        a picture that cannot be decoded, is too large or lies elsewhere.
    """
    if name != "local" and name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark '{name}': it is one of {', '.join(sorted(BENCHMARKS))}, or local")
    if name != "local" and (columns or prompt or scorer):
        raise ValueError(f"columns, prompt and scorer describe data of your own: with them load('local', ...), not '{name}'")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n must be a whole number of at least 1, got {n!r}: leave it away for all items")
    source = None if source is None else Path(source)
    if name == "local":
        if source is None:
            raise ValueError("local data lies somewhere: name its file or folder, source=...")
        benchmark = local(source, columns or {}, prompt, scorer, split)
    else:
        benchmark = BENCHMARKS[name]
    split = split or benchmark.split
    n = benchmark.n if n is None else n
    path = _kept(benchmark, split, n, seed, source, [dict(columns or {}), prompt, scorer])
    if not path.exists():
        _write(benchmark, split, n, seed, source, path)
    items = datasets.Dataset.from_file(str(path))
    if n is None:
        return items
    order = sorted(range(len(items)), key=lambda number: (rank(seed, ids[number]), ids[number])) if (ids := items["id"][:]) else []
    return items.select(order)


def _kept(benchmark: Benchmark, split: str, n: int | None, seed: int, source: Path | None, own: list) -> Path:
    """The file of what is asked for: named by the declaration, this code, and the files of ``source``."""
    here = None
    if source is not None:
        if not source.exists():
            raise missing(benchmark, f"there is nothing at {source}")
        here = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(source)]
    code = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(vlm_core.images.__file__), Path(vlm_core.paths.__file__)):
        code.update(file.read_bytes())
    asked = json.dumps([benchmark.name, benchmark.ids, benchmark.config, split, n, seed, here, own, code.hexdigest()])
    return cache_root() / "benchmarks" / f"{benchmark.name}-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.arrow"


def _write(benchmark: Benchmark, split: str, n: int | None, seed: int, source: Path | None, path: Path) -> None:
    """Items into a file that is there whole or not at all; of the pictures only a few are in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    features = benchmark.features
    try:
        with ArrowWriter(features=features, path=str(part), writer_batch_size=BATCH) as writer:
            count = 0
            for item in _items(benchmark, split, n, seed, source):
                writer.write(features.encode_example(item))
                count += 1
            writer.finalize()
        if not count:
            raise ValueError(f"the benchmark '{benchmark.name}' has no items in the split '{split}'{f' of {source}' if source else ''}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _items(benchmark: Benchmark, split: str, n: int | None, seed: int, source: Path | None) -> Iterator[dict[str, Any]]:
    folder = folder_of(source)
    wanted = None if n is None else set(chosen(_ids(benchmark, _rows(benchmark, split, source, benchmark.key or None)), n, seed))
    named = _named(benchmark, _rows(benchmark, split, source), wanted)
    for name, row, shown in named if benchmark.join is None else _joined(benchmark, named, split, source):
        where = f"the image of item '{name}' of {benchmark.name}"
        stored, image = _picture(shown, where, folder)
        fields = benchmark.item(row, name, seed)
        answers = fields["references"]
        if any(not isinstance(one, str) for one in answers) or not any(one.strip() for one in answers):
            raise ValueError(f"item '{name}' of {benchmark.name} has no answer: the split '{split}' seems to keep them, choose another")
        yield {
            "id": name,
            "scene_id": picture_digest(image)[:16] if benchmark.scene is None else benchmark.scene(row),
            "image": stored,
            "scorer": benchmark.scorer,
            **fields,
        }


def _rows(benchmark: Benchmark, split: str, source: Path | None, columns: tuple[str, ...] | None = None) -> Iterator[Row]:
    if benchmark.rows is not None:
        if source is None:
            raise missing(benchmark, "it is not on the Hub")
        yield from benchmark.rows(source, split)
        return
    needed = columns or benchmark.columns
    for number, row in enumerate(stream(benchmark, benchmark.config, split, source, columns)):
        lacking = [column for column in needed if column not in row]
        if lacking:
            raise ValueError(
                f"row {number} of {source or benchmark.ids[0]} has no column '{lacking[0]}' (it has {', '.join(row)}): it is not the "
                f"schema "
                f"of {benchmark.name}, whose columns are {', '.join(benchmark.columns)}"
            )
        yield row


def _ids(benchmark: Benchmark, rows: Iterator[Row]) -> Iterator[str]:
    """Each row's id; rows of one id are told apart by their order, ``a``, ``a#2``."""
    seen: Counter[str] = Counter()
    for row in rows:
        name = benchmark.id(row)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _named(benchmark: Benchmark, rows: Iterator[Row], wanted: set[str] | None) -> Iterator[tuple[str, Row, Any]]:
    """``(id, row, picture as stored)`` of the wanted rows; the set is read no further than to the last of them."""
    left = None if wanted is None else len(wanted)
    passed: list[Row] = []

    def passing() -> Iterator[Row]:
        for row in rows:
            passed[:] = [row]
            yield row

    for name in _ids(benchmark, passing()):
        if left == 0:
            return
        if wanted is None or name in wanted:
            left = None if left is None else left - 1
            yield name, passed[0], None if benchmark.join else passed[0].get(benchmark.image)


def _joined(benchmark: Benchmark, named: Iterator[tuple[str, Row, Any]], split: str, source: Path | None) -> Iterator[tuple[str, Row, Any]]:
    """Questions with their pictures, in the order of these: questions are light and held, pictures come one at a time."""
    join = benchmark.join
    asked: dict[str, list[tuple[str, Row]]] = {}
    for name, row, _ in named:
        asked.setdefault(str(row[join.on]), []).append((name, row))
    for row in stream(benchmark, join.config, split, source):
        for name, question in asked.pop(str(row[join.key]), ()):
            yield name, question, row[join.image]
        if not asked:
            return
    raise ValueError(
        f"{sum(map(len, asked.values()))} questions of {benchmark.name} name pictures that {join.config} lacks, such as "
        f"'{next(iter(asked))}': fetch both parts of the set anew"
    )


def _picture(shown: Any, where: str, folder: Path | None) -> tuple[dict[str, Any], Any]:
    """A picture as it is stored in a set, and decoded."""
    if isinstance(shown, list | tuple):
        if len(shown) != 1:
            raise ValueError(f"{where} are {len(shown)} images: one was expected")
        shown = shown[0]
    if isinstance(shown, Path):  # of rows that this package makes itself, within their folder
        return {"bytes": shown.read_bytes(), "path": None}, open_image(shown, where)
    image = stored_image(shown, where, folder)
    content = shown.get("bytes") if isinstance(shown, dict) else None
    if not content:
        content = within(folder, shown["path"] if isinstance(shown, dict) else shown, where, absolute=isinstance(shown, dict)).read_bytes()
    return {"bytes": content, "path": None}, image


