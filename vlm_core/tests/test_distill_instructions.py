"""Items from any data set, and the data sets built from items."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from vlm_core.distill import Columns, instruction_set, items_from, prompt_set
from vlm_core.distill.asked_once import rows_digest
from vlm_core.distill.instructions import stored_images
from vlm_core.identity import picture_digest
from vlm_core.tests.tiny import make_items


def public(n=4, **columns):
    """A data set as public ones are: ten annotators' answers, a class label, numbers for ids."""
    items = make_items(n)
    return datasets.Dataset.from_dict(
        {
            "image": [item["image"] for item in items],
            "question": [item["prompt"] for item in items],
            "answers": [["blue", "red", "red"]] * n,
            "question_id": list(range(100, 100 + n)),
            "category": [index % 2 for index in range(n)],
            **columns,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answers": datasets.List(datasets.Value("string")),
                "question_id": datasets.Value("int64"),
                "category": datasets.ClassLabel(names=["color", "shape"]),
                **{name: datasets.Value("string") for name in columns},
            }
        ),
    )


def test_rows_are_known_by_pictures_answers_and_order():
    items = make_items(3)
    answers = ["red", "green", "blue"]
    first = rows_digest(instruction_set(items, answers))
    assert first == rows_digest(instruction_set(items, answers))
    redrawn = [{**items[0], "image": items[0]["image"].transpose(0)}, *items[1:]]
    assert first != rows_digest(instruction_set(redrawn, answers))
    assert first != rows_digest(instruction_set(items, answers[::-1]))


def test_items_of_a_public_set_have_ids_scenes_tasks_and_the_commonest_answer():
    made = make_items(4)
    found = items_from(public(image_id=["a", "a", "b", "b"]))
    assert [item["id"] for item in found] == ["100", "101", "102", "103"]
    assert [item["scene_id"] for item in found] == ["a", "a", "b", "b"]
    assert [item["task"] for item in found] == ["color", "shape", "color", "shape"]
    assert [item["answer"] for item in found] == ["red"] * 4
    assert [item["prompt"] for item in found] == [item["prompt"] for item in made]
    assert all(np.array_equal(np.asarray(one["image"]), np.asarray(two["image"])) for one, two in zip(found, made, strict=True))


def test_without_columns_rows_name_items_and_pictures_are_scenes():
    data = public()
    found = items_from(data, Columns(answer=None), limit=3)
    assert [item["id"] for item in found] == ["0", "1", "2"]
    assert [item["scene_id"] for item in found] == [picture_digest(image) for image in data["image"][:3]]
    assert [item["task"] for item in found] == ["all"] * 3 and [item["answer"] for item in found] == [None] * 3


def test_columns_are_found_by_their_usual_names():
    assert Columns.of(public()) == Columns(prompt="question", answer="answers", id="question_id", task="category")
    with pytest.raises(ValueError, match=r"no column of the data set looks like the image \(it has text\): name it, Columns\(image=...\)"):
        Columns.of(datasets.Dataset.from_dict({"text": ["a"]}))


def test_images_that_were_not_decoded_and_lists_of_answers_that_are_records_are_read():
    data = public().cast_column("image", datasets.Image(decode=False))
    assert isinstance(data[0]["image"], dict)
    assert items_from(data)[1]["image"].tobytes() == make_items(2)[1]["image"].tobytes()
    records = datasets.Dataset.from_list(
        [{"image": make_items(1)[0]["image"], "question": "what ?", "answers": [{"answer": "no", "by": 1}]}]
    )
    assert items_from(records)[0]["answer"] == "no"


def test_one_picture_has_one_digest_in_other_files_and_modes():
    image = make_items(1)[0]["image"]
    saved = io.BytesIO()
    image.save(saved, format="PNG")
    again = Image.open(io.BytesIO(saved.getvalue()))
    opaque = image.convert("RGBA")
    assert picture_digest(again) == picture_digest(opaque) == picture_digest(image)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    flat = Image.frombytes("RGB", (8, 32), image.tobytes())
    assert len({picture_digest(one) for one in (image, turned, flat)}) == 3
    assert picture_digest([image, turned]) == f"{picture_digest(image)}+{picture_digest(turned)}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.rename_column("image", "photo"), "looks like the image"),
        (lambda data: datasets.DatasetDict(train=data, test=data), "not the type DatasetDict: choose one of its splits, train, test"),
        (lambda data: list(data), "not the type list: make it one with"),
        (lambda data: data.to_iterable_dataset(), "not the type IterableDataset: take a part of the stream"),
    ],
)
def test_what_is_no_data_set_of_questions_is_one_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        items_from(change(public()))


def test_bad_columns_limits_and_rows_are_one_sentence():
    data = public()
    with pytest.raises(ValueError, match="no column 'reply' for the answer"):
        items_from(data, Columns(answer="reply"))
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="limit must be a whole number of at least 1"):
            items_from(data, limit=limit)
    image = make_items(1)[0]["image"]
    for row, words in (
        ({"image": None, "question": "what ?"}, "the image of row 0 must be a PIL image"),
        ({"image": image, "question": ""}, "the prompt of row 0 is ''"),
        ({"image": image, "question": "what ?", "answer": " "}, "the answer of row 0 is ' '"),
        ({"image": image, "question": "what ?", "answers": []}, "row 0 has an empty list of answers"),
        ({"image": image, "question": "what ?", "answer": 1.5}, "the answer of row 0 is 1.5"),
    ):
        rows = datasets.Dataset.from_list([row], features=None if row["image"] is not None else datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string")}
        ))
        with pytest.raises(ValueError, match=words):
            items_from(rows, Columns(answer=next((name for name in row if name.startswith("answer")), None)))


def test_items_of_one_scene_that_show_other_pictures_are_other_conversations():
    items = make_items(2)
    assert items[0]["scene_id"] == items[1]["scene_id"]
    data = instruction_set(items, ["red", "blue"])
    assert [row["images"][0].tobytes() for row in data] == [item["image"].tobytes() for item in items]
    assert [row["messages"][1]["content"] for row in data] == ["red", "blue"]


def test_several_pictures_of_a_prompt_stay_together():
    items = make_items(2)
    both = {**items[0], "image": [items[0]["image"], items[1]["image"]]}
    for data in (instruction_set([both], ["red"]), prompt_set([both])):
        assert [image.tobytes() for image in data[0]["images"]] == [item["image"].tobytes() for item in items]


def test_a_prompt_set_is_one_question_a_row():
    items = make_items(4)
    items[1]["image"] = items[0]["image"]
    data = prompt_set(items)
    assert data.column_names == ["images", "prompt"]
    assert [row["prompt"] for row in data] == [[{"role": "user", "content": item["prompt"]}] for item in items]
    assert [row["images"][0].tobytes() for row in data] == [item["image"].tobytes() for item in items]


def test_a_picture_that_items_share_is_encoded_once():
    items = make_items(3)
    items[1]["image"] = items[0]["image"].copy()
    stored = stored_images(items)
    assert stored[0] is stored[1] and stored[0] != stored[2]


def test_sets_of_nothing_have_their_columns():
    assert instruction_set([], []).column_names == ["images", "messages"]
    assert prompt_set([]).column_names == ["images", "prompt"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("red", "answers must be a list of str"),
        ({0: "red"}, "answers must be a list of str"),
        (["red"], "2 items but 1 answers"),
        (["red", None], "answer 1 is None"),
    ],
)
def test_answers_that_are_none_are_one_sentence(answers, words):
    with pytest.raises(ValueError, match=words):
        instruction_set(make_items(2), answers)
