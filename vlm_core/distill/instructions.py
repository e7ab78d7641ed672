"""What a student is taught from: items of any data set, and TRL data sets built from items and answers.

``Columns``, ``items_from``   items from any ``datasets.Dataset`` with pictures, questions and answers
``instruction_set``           a conversational data set (an image, its questions and answers) for supervised fine-tuning
``prompt_set``                images and prompts alone, for training on what the student itself says
``conversations``             rows of images and messages as a data set
``stored_images``             the images of items as a data set stores them, each picture encoded once
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets
from PIL import Image

from vlm_core.identity import picture_digest
from vlm_core.images import require_image
from vlm_core.items import item_field, require_items, take

__all__ = ["Columns", "conversations", "instruction_set", "items_from", "prompt_set", "require_answers", "stored_images"]

_USUAL = {
    "image": ("image", "images", "picture"),
    "prompt": ("prompt", "question", "query", "instruction"),
    "answer": ("answer", "answers", "multiple_choice_answer", "label", "response"),
    "id": ("id", "question_id", "questionId", "qid"),
    "scene": ("scene_id", "image_id", "imageId"),
    "task": ("task", "question_type", "category"),
}


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
        found = {field: next((name for name in names if name in dataset.column_names), None) for field, names in _USUAL.items()}
        for field in ("image", "prompt"):
            if found[field] is None:
                raise ValueError(
                    f"no column of the data set looks like the {field} (it has {', '.join(dataset.column_names)}): name it, "
                    f"Columns({field}=...)"
                )
        return cls(**found)


def items_from(dataset: datasets.Dataset, columns: Columns | None = None, limit: int | None = None) -> list[dict]:
    """Items from any data set with pictures, prompts and answers.

    Parameters
    ----------
    dataset : datasets.Dataset
    columns : Columns, optional
        Default: ``Columns.of(dataset)``.
    limit : int, optional
        Only the first so many rows.

    Returns
    -------
    list of dict
        ``id``, ``scene_id`` (the picture's digest where no column names the scene), ``task``, ``image``, ``prompt``, ``answer`` (None
        without such a column). Of several answers (VQA's ten annotators) the commonest, the first of those that tie.

    Raises
    ------
    ValueError
        A column that is not there, a row without a picture, a prompt or answer that is no text.
    """
    if not isinstance(dataset, datasets.Dataset):
        remedy = "make it one with datasets.Dataset.from_list"
        if isinstance(dataset, dict):
            remedy = f"choose one of its splits, {', '.join(map(str, dataset))}" if dataset else "it is empty"
        elif isinstance(dataset, datasets.IterableDataset):
            remedy = "take a part of the stream, datasets.Dataset.from_list(list(dataset.take(1000)))"
        raise ValueError(f"items_from takes one datasets.Dataset, not the type {type(dataset).__name__}: {remedy}")
    columns = Columns.of(dataset) if columns is None else columns
    named = {field.name: getattr(columns, field.name) for field in fields(columns)}
    for field, name in named.items():
        if name is not None and name not in dataset.column_names:
            raise ValueError(f"the data set has no column {name!r} for the {field} (it has {', '.join(dataset.column_names)})")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a whole number of at least 1, got {limit!r}")
    read = dataset.select_columns(list(dict.fromkeys(name for name in named.values() if name is not None)))
    items = []
    for number in range(len(read) if limit is None else min(limit, len(read))):
        row = read[number]
        image = _picture(row[columns.image], number)
        items.append(
            {
                "id": str(number if columns.id is None else row[columns.id]),
                "scene_id": picture_digest(image) if columns.scene is None else str(row[columns.scene]),
                "task": "all" if columns.task is None else _text(row[columns.task], dataset.features[columns.task], "task", number),
                "image": image,
                "prompt": _text(row[columns.prompt], dataset.features[columns.prompt], "prompt", number),
                "answer": None if columns.answer is None else _answer(row[columns.answer], dataset.features[columns.answer], number),
            }
        )
    return items


def instruction_set(items: Sequence, answers: Sequence[str]) -> datasets.Dataset:
    """A multimodal instruction set in TRL's conversational form: one row a picture, its questions as turns of one conversation.

    Parameters
    ----------
    items : sequence of items
        With ``scene_id``, ``image`` and ``prompt``.
    answers : sequence of str
        What the student shall learn to say, one an item.

    Returns
    -------
    datasets.Dataset
        Columns ``images`` (a list of the images) and ``messages``. Items of one scene share a row where they show the same picture.

    Raises
    ------
    ValueError
        If items and answers differ in number, or are no items and texts.
    """
    require_answers(items, answers, "an instruction set")
    items = take(items, range(len(items)))
    rows: dict[tuple[str, str], dict] = {}
    for item, stored, answer in zip(items, stored_images(items), answers, strict=True):
        key = str(item_field(item, "scene_id")), picture_digest(item_field(item, "image"))
        row = rows.setdefault(key, {"images": stored, "messages": []})
        row["messages"] += [{"role": "user", "content": item_field(item, "prompt")}, {"role": "assistant", "content": answer}]
    return conversations(list(rows.values()), "messages")


def prompt_set(items: Sequence) -> datasets.Dataset:
    """Images and prompts alone, one row an item: what a student that is trained on its own answers is asked.

    Returns
    -------
    datasets.Dataset
        Columns ``images`` (a list) and ``prompt`` (one user message).
    """
    require_items(items, ("id", "image", "prompt"))
    items = take(items, range(len(items)))
    rows = [
        {"images": stored, "prompt": [{"role": "user", "content": item_field(item, "prompt")}]}
        for item, stored in zip(items, stored_images(items), strict=True)
    ]
    return conversations(rows, "prompt")


def conversations(rows: Sequence[dict], *columns: str) -> datasets.Dataset:
    """A data set of ``images`` and of ``columns`` that hold messages (``role``, ``content``); one without rows has them too."""
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {"images": datasets.List(datasets.Image()), **{name: datasets.List(message) for name in columns}}
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=datasets.Features(features))


def require_answers(items: Any, answers: Any, what: str) -> None:
    """Refuse answers that are not one text an item; ``what`` needs them.

    Raises
    ------
    ValueError
    """
    require_items(items, ("image", "prompt"))
    if isinstance(answers, str | bytes | Mapping) or not hasattr(answers, "__len__"):
        raise ValueError(f"answers must be a list of str, got {answers!r:.60} ({type(answers).__name__}): write [answer], also of one")
    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items but {len(answers)} answers: {what} needs one answer an item")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise ValueError(f"answer {number} is {answer!r:.60} ({type(answer).__name__}): {what} needs texts, one an item")


def stored_images(items: Sequence) -> list[list[dict]]:
    """The images of each item as a data set stores them (encoded bytes); a picture that several items share is encoded once."""
    encoder = datasets.Image()
    known: dict[str, list[dict]] = {}
    stored = []
    for item in items:
        image = item_field(item, "image")
        key = picture_digest(image)
        if key not in known:
            known[key] = [encoder.encode_example(one) for one in (image if isinstance(image, list | tuple) else [image])]
        stored.append(known[key])
    return stored


def _picture(value: Any, number: int) -> Any:
    if isinstance(value, list | tuple):
        return [_picture(one, number) for one in value]
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        value = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    elif isinstance(value, str):
        value = Image.open(value)
    require_image(value, f"the image of row {number}")
    return value


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
