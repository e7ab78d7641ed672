"""Data of your own as a benchmark: a folder of pictures, Parquet, JSON lines or CSV, with a map of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from vlm_core.scoring import SCORERS
from vlm_core.sources import Columns

from .declaration import Benchmark, Row
from .documents import content_id
from .questions import majority
from .reading import stream

__all__ = ["local"]

FIELDS = ("image", "prompt", "answer", "id", "scene", "task", "candidates")


def local(source: Path, columns: Mapping[str, str], prompt: str | None, scorer: str | None, split: str | None) -> Benchmark:
    """The declaration of data in files.

    Parameters
    ----------
    columns : mapping
        Field to column; those left out are found by the names that public sets use (`vlm_core.sources.Columns`).
    prompt : str, optional
        What is asked of every picture, where no column says.

    Raises
    ------
    ValueError
        An unknown field, scorer or column; no column that looks like the picture, the question or the answer.
    """
    for field in columns:
        if field not in FIELDS:
            raise ValueError(f"columns name no field '{field}' of an item: there are {', '.join(FIELDS)}")
    if scorer is not None and scorer not in SCORERS:
        raise ValueError(f"there is no scorer '{scorer}': it is one of {', '.join(sorted(SCORERS))}")
    bare = Benchmark(
        "local", (), split or "train", lambda row, name, seed: {}, str, "exact", "yours", "yours", "", get="name what is there"
    )  # fmt: skip
    read = stream(bare, None, bare.split, source)
    # Of JSON the types are not known before it is read; names are enough.
    features = read.features or dict.fromkeys(next(iter(read), {}))
    named = _named(features, columns, prompt is not None)
    answers = features[named["answer"]]
    labels = answers.names if isinstance(answers, datasets.ClassLabel) else None

    def item(row: Row, name: str, seed: int) -> dict[str, Any]:
        asked = prompt if named["prompt"] is None else row[named["prompt"]]
        references = _references(row[named["answer"]], labels)
        if not isinstance(asked, str) or not asked.strip():
            raise ValueError(f"item '{name}' has the prompt {asked!r:.60}: each picture needs its question, or all one (prompt=...)")
        made = {
            "task": "local" if named["task"] is None else _text(row[named["task"]], features[named["task"]]),
            "prompt": asked,
            "answer": majority(references),
            "references": references,
        }
        if named["candidates"] is not None:
            made["candidates"] = [str(one) for one in row[named["candidates"]] or ()]
        elif labels:
            made["candidates"] = list(labels)
        return made

    return Benchmark(
        name="local",
        ids=(),
        split=bare.split,
        item=item,
        id=lambda row: (
            str(row[named["id"]])
            if named["id"]
            else content_id(str(prompt if named["prompt"] is None else row[named["prompt"]]), image=_first(row[named["image"]]))
        ),
        scene=(lambda row: str(row[named["scene"]])) if named["scene"] else None,
        image=named["image"],
        key=(named["id"],) if named["id"] else (),
        scorer=scorer or "exact",
        licence="yours",
        citation="yours",
        verified="yours",
        columns={name: features[name] for name in named.values() if name is not None},
        candidates=named["candidates"] is not None or labels is not None,
        get=bare.get,
    )


def _named(features: Mapping[str, Any], columns: Mapping[str, str], asked: bool) -> dict[str, str | None]:
    for field, column in columns.items():
        if column not in features:
            raise ValueError(f"the data has no column '{column}' for the {field} (it has {', '.join(features)})")
    usual = {**Columns.usual(features), "candidates": "candidates" if "candidates" in features else None}
    named = {field: columns.get(field, usual.get(field)) for field in FIELDS}
    if asked and "prompt" not in columns:
        named["prompt"] = None
    for field in ("image", "prompt", "answer"):
        if named[field] is None and not (field == "prompt" and asked):
            raise ValueError(
                f"no column of the data looks like the {field} (it has {', '.join(features)}): name it, columns={{'{field}': ...}}"
                f"{', or ask one thing of every picture, prompt=...' if field == 'prompt' else ''}"
            )
    return named


def _references(value: Any, labels: list[str] | None) -> list[str]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    texts = [one["answer"] if isinstance(one, dict) and "answer" in one else one for one in values]
    return [labels[one] if labels and isinstance(one, int) else str(one) for one in texts if one is not None and str(one).strip()]


def _text(value: Any, feature: Any) -> str:
    return feature.int2str(value) if isinstance(feature, datasets.ClassLabel) and isinstance(value, int) else str(value)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value


