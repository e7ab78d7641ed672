"""What a student is taught from: TRL data sets, built from items and answers.

``instruction_set``  a conversational data set (an image, its questions and answers) for supervised fine-tuning
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets

__all__ = ["instruction_set"]


def instruction_set(items: Sequence, answers: Sequence[str]) -> datasets.Dataset:
    """A multimodal instruction set in TRL's conversational form: one row a scene, its questions as turns of one conversation.

    Parameters
    ----------
    items : sequence of items
        With ``scene_id``, ``image`` and ``prompt``.
    answers : sequence of str
        What the student shall learn to say, one an item.

    Returns
    -------
    datasets.Dataset
        Columns ``images`` (a list of one image) and ``messages``.

    Raises
    ------
    ValueError
        If items and answers differ in number.
    """
    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items but {len(answers)} answers: an instruction set needs one answer an item")
    scenes: dict[str, dict] = {}
    for item, answer in zip(items, answers, strict=True):
        row = scenes.setdefault(item["scene_id"], {"images": [item["image"]], "messages": []})
        row["messages"] += [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": answer}]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(message)})
    return datasets.Dataset.from_list(list(scenes.values()), features=features)
