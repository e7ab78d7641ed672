"""Checkpoints and items as a configuration names them: where they are, what they hold.

``CheckpointAt``                a directory or Hub id with its revision; ``located`` finds it, ``checkpoint_digest`` says what is in it
``Items``                       a function that gives items, or a set that ``datasets`` reads
``items_of(source, name)``      those items; ``items_on_asking`` reads each when it is asked for
``Columns``, ``items_from``     items from any ``datasets.Dataset`` with pictures, questions and answers
``named_function(name, ...)``   the function that ``"module:function"`` names
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from vlm_core.identity import digest, picture_digest
from vlm_core.images import stored_image
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_field, require_distinct, require_items
from vlm_core.settings import checked
from vlm_core.subjects.checkpoint import inspect_checkpoint

__all__ = [
    "CheckpointAt",
    "Columns",
    "Items",
    "checkpoint_digest",
    "items_from",
    "items_of",
    "items_on_asking",
    "located",
    "named_function",
]

_USUAL = {
    "image": ("image", "images", "picture"),
    "prompt": ("prompt", "question", "query", "instruction"),
    "answer": ("answer", "answers", "multiple_choice_answer", "label", "response"),
    "id": ("id", "question_id", "questionId", "qid"),
    "scene": ("scene_id", "image_id", "imageId"),
    "task": ("task", "question_type", "category"),
}



@dataclass(frozen=True)
class CheckpointAt:
    """Where a checkpoint is: a directory or Hub id, and its revision."""

    path: str
    revision: str | None = None

    def __post_init__(self) -> None:
        checked(self)



_NEVER_READ = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py")
"""Files of a checkpoint that are neither loaded nor executed, and need not be downloaded."""


def located(path: str, revision: str | None = None) -> str:
    """A directory that holds the checkpoint, downloaded where it is a Hub id.

    Raises
    ------
    SubjectError
        One sentence: not found, or no vision-language model that can be measured.
    """
    checkpoint = inspect_checkpoint(path, revision)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, revision=checkpoint.commit or revision, ignore_patterns=list(_NEVER_READ))


def checkpoint_digest(path: str) -> str:
    """Hash of the weights and of the settings of model, processor and tokenizer in a directory."""
    checkpoint = inspect_checkpoint(path)
    return digest([checkpoint.sha256(), checkpoint.content()])


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set are what.

    Parameters
    ----------
    image, prompt : str
    answer : str or None
        None where nobody has answered yet.
    id, scene, task : str or None
        Without ``id`` an item is named by its row, without ``scene`` its picture is its scene, without ``task`` all items are one task.
    """

    image: str = "image"
    prompt: str = "question"
    answer: str | None = "answer"
    id: str | None = None
    scene: str | None = None
    task: str | None = None

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> Columns:
        """Columns found by the names that public sets use.

        Raises
        ------
        ValueError
            Where no column looks like the image or the prompt.
        """
        found = cls.usual(dataset.column_names)
        for what in ("image", "prompt"):
            if found[what] is None:
                raise ValueError(
                    f"no column of the data set looks like the {what} (it has {', '.join(dataset.column_names)}): name it, "
                    f"Columns({what}=...)"
                )
        return cls(**found)

    @staticmethod
    def usual(names: Iterable[str]) -> dict[str, str | None]:
        """The column of each field among these, None where none has a usual name."""
        names = list(names)
        return {field: next((one for one in known if one in names), None) for field, known in _USUAL.items()}


@dataclass(frozen=True)
class Items:
    """Where items come from: a function (``factory``, ``arguments``), or a set that ``datasets`` reads (``path`` and what follows it).

    Parameters
    ----------
    factory : str, optional
        ``"module:function"``; it gives items with ``id, scene_id, task, image, prompt, answer`` and, to be scored by them, ``candidates``.
    path : str, optional
        A Hub id, a folder, a file of JSON, CSV or Parquet, or what ``Dataset.save_to_disk`` wrote.
    columns : Columns, optional
        Which columns hold what; default: found by the names that public sets use.
    limit : int, optional
        Only so many items, the first ones.
    """

    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Columns | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        checked(self)
        if (self.factory is None) == (self.path is None):
            raise ValueError('items come from factory = "module:function" or from path = a set that datasets reads: name one of them')
        if self.limit is not None:
            integer(self.limit, "limit", least=1)

    def called(self) -> Callable:
        """The function that ``factory`` names."""
        return named_function(self.factory, "factory")


def items_from(
    dataset: datasets.Dataset,
    columns: Columns | None = None,
    limit: int | None = None,
    folder: str | Path | Sequence[str | Path] | None = None,
) -> list[dict]:
    """Items from any data set with pictures, prompts and answers.

    Parameters
    ----------
    dataset : datasets.Dataset
    columns : Columns, optional
        Default: ``Columns.of(dataset)``.
    limit : int, optional
        Only the first so many rows.
    folder : path or several, optional
        Where pictures lie that the data gives as paths, which cannot leave it; without it every picture must be in the data.

    Returns
    -------
    list of dict
        ``id``, ``scene_id`` (the picture's digest where no column names the scene), ``task``, ``image``, ``prompt``, ``answer`` (None
        without such a column). Of several answers (VQA's ten annotators) the commonest, the first of those that tie.

    Raises
    ------
    ValueError
        A column that is not there, a row without a picture, a picture that cannot be decoded, is too large or lies elsewhere, a prompt or
        answer that is no text.
    """
    return list(_rows(dataset, columns, limit, folder))


def _rows(dataset: datasets.Dataset, columns: Columns | None, limit: int | None, folder: Any) -> Sequence[dict]:
    if not isinstance(dataset, datasets.Dataset):
        remedy = "make it one with datasets.Dataset.from_list"
        if isinstance(dataset, dict):
            remedy = f"choose one of its splits, {', '.join(map(str, dataset))}" if dataset else "it is empty"
        elif isinstance(dataset, datasets.IterableDataset):
            remedy = "take a part of the stream, datasets.Dataset.from_list(list(dataset.take(1000)))"
        raise ValueError(f"items_from takes one datasets.Dataset, not the type {type(dataset).__name__}: {remedy}")
    columns = Columns.of(dataset) if columns is None else columns
    named = {one.name: getattr(columns, one.name) for one in fields(columns)}
    for what, name in named.items():
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"the data set has no column {name!r} for the {what} (it has {', '.join(dataset.column_names)})")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a whole number of at least 1, got {limit!r}")
    read = dataset.select_columns(list(dict.fromkeys(name for name in named.values() if name is not None)))
    feature = dataset.features[columns.image]
    # As stored: pictures are decoded here, within limits.
    if isinstance(feature, datasets.Image):
        read = read.cast_column(columns.image, datasets.Image(decode=False))
    elif isinstance(getattr(feature, "feature", None), datasets.Image):
        read = read.cast_column(columns.image, datasets.List(datasets.Image(decode=False)))

    def item(number: int) -> dict:
        row = read[number]
        image = stored_image(row[columns.image], f"the image of row {number}", folder)
        return {
            "id": str(number if columns.id is None else row[columns.id]),
            "scene_id": picture_digest(image) if columns.scene is None else str(row[columns.scene]),
            "task": "all" if columns.task is None else _text(row[columns.task], dataset.features[columns.task], "task", number),
            "image": image,
            "prompt": _text(row[columns.prompt], dataset.features[columns.prompt], "prompt", number),
            "answer": None if columns.answer is None else _answer(row[columns.answer], dataset.features[columns.answer], number),
        }

    return _OnAsking(len(read) if limit is None else min(limit, len(read)), item)


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_NEEDED = ("id", "scene_id", "task", "image", "prompt")


class _OnAsking(Sequence):
    """Items each made when it is asked for: their pictures need not be in memory together."""

    def __init__(self, n: int, make: Callable[[int], dict]) -> None:
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> dict:
        if not -self._n <= index < self._n:
            raise IndexError(f"there are {self._n} items, and none is number {index}")
        return self._make(index % self._n)

    def __iter__(self) -> Iterator[dict]:
        return map(self._make, range(self._n))


def items_of(source: Items, name: str, answered: bool = False) -> list[dict]:
    """Items of one source, all of them read.

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
    asked = items_on_asking(source, name)
    try:
        items = list(asked)
        require_items(items, (*_NEEDED, "answer") if answered else _NEEDED)
        require_distinct(items)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return items


def items_on_asking(source: Items, name: str) -> Sequence[dict]:
    """Items of one source, each read when it is asked for; whether it can be used is then for the asker to see.

    Raises
    ------
    ValueError
        One sentence: what cannot be found or read, or holds no items.
    """
    try:
        items = _called(source) if source.factory is not None else _rows(_read(source), source.columns, source.limit, _folder(source))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not len(items):
        raise ValueError(f"{name}: it holds no items")
    return items


def _called(source: Items) -> Sequence[dict]:
    function = source.called()
    try:
        made = function(**source.arguments)
    except TypeError as error:
        raise ValueError(f"{source.factory} does not take its arguments {dict(source.arguments)} ({error})") from error
    require_items(made, ("id",))
    names = getattr(made, "column_names", None)

    def item(number: int) -> dict:
        one = made[number]
        return one if isinstance(one, dict) else {name: item_field(one, name) for name in names or vars(one)}

    return _OnAsking(len(made) if source.limit is None else min(source.limit, len(made)), item)


def _folder(source: Items) -> tuple[Path, ...]:
    """Where pictures may lie that a set names by paths: beside it, or where what comes from the Hub is kept."""
    path = Path(source.path)
    if path.exists():
        return (path.parent if path.is_file() else path,)
    return Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)


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

def named_function(name: str, setting: str) -> Callable:
    """The function that ``"module:function"`` names, also of a module in the working directory.

    Raises
    ------
    ValueError
        One sentence: not such a name, no such module or function in it.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f'{setting} is {name!r}: name a function as "module:function"')
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"{setting} is {name!r}, which cannot be imported ({error}): run from where it lies, or install it") from error
    if not callable(found):
        raise ValueError(f"{setting} is {name!r}: the module {module} has no function '{function}'")
    return found


def _text(value: Any, feature: Any, what: str, number: int) -> str:
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return feature.int2str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {what} of row {number} is {value!r:.60} ({type(value).__name__}): filter out rows without a text before")
    return value


def _answer(value: Any, feature: Any, number: int) -> str:
    if not isinstance(value, list | tuple):
        return _text(value, feature, "answer", number)
    each = [one["answer"] if isinstance(one, dict) and "answer" in one else one for one in value]
    texts = [_text(one, getattr(feature, "feature", None), "answer", number) for one in each]
    if not texts:
        raise ValueError(f"row {number} has an empty list of answers: filter such rows out before")
    return Counter(texts).most_common(1)[0][0]
