"""What a student is taught from: TRL data sets built from items and answers.

``instruction_set``   a conversational data set (an image, its questions and answers) for supervised fine-tuning
``prompt_set``        images and prompts alone, for training on what the student itself says
``conversations``     rows of images and messages as a data set
``stored_images``     the images of items as a data set stores them, each picture encoded once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from vlm_core.identity import picture_digest
from vlm_core.items import item_field, require_items, take

__all__ = ["conversations", "instruction_set", "prompt_set", "require_answers", "stored_images"]


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
