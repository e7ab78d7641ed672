"""Items as a configuration names them: of a function, or of a set that ``datasets`` reads.

``items_of(source, name)``   a list of items
"""

from __future__ import annotations

from pathlib import Path

import datasets

from vlm_core.distill.config import Items
from vlm_core.distill.instructions import items_from
from vlm_core.items import item_field, require_distinct, require_items, take

__all__ = ["items_of"]

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_NEEDED = ("id", "scene_id", "task", "image", "prompt")


def items_of(source: Items, name: str, answered: bool = False) -> list[dict]:
    """Items of one source.

    Parameters
    ----------
    name : str
        The setting, for messages.
    answered : bool
        Whether each needs a known answer.

    Raises
    ------
    ValueError
        One sentence: what cannot be found, read or used as items.
    """
    try:
        items = _called(source) if source.factory is not None else items_from(_read(source), source.columns, source.limit)
        require_items(items, (*_NEEDED, "answer") if answered else _NEEDED)
        require_distinct(items)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not items:
        raise ValueError(f"{name}: it holds no items")
    return items


def _called(source: Items) -> list[dict]:
    function = source.called()
    try:
        made = function(**source.arguments)
    except TypeError as error:
        raise ValueError(f"{source.factory} does not take its arguments {dict(source.arguments)} ({error})") from error
    require_items(made, ("id",))
    n = len(made) if source.limit is None else min(source.limit, len(made))
    names = getattr(made, "column_names", None)
    return [one if isinstance(one, dict) else {name: item_field(one, name) for name in names or vars(one)} for one in take(made, range(n))]


def _read(source: Items) -> datasets.Dataset:
    path = Path(source.path)
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if source.split not in splits:
                raise ValueError(f"{path} has no split '{source.split}': it has {', '.join(splits)}")
            return splits[source.split]
        if path.is_file():
            if path.suffix not in _READERS:
                raise ValueError(f"{path} is no file that datasets reads: it takes {', '.join(_READERS)}, a folder or a Hub id")
            return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"the set '{source.path}' could not be read ({' '.join(str(error).split()):.300})") from error
