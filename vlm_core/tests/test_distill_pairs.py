"""Preference pairs by their three sources, and the data that controls train on."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core.distill import (
    Pair,
    SubjectTeacher,
    instruction_set,
    preference_set,
    prompt_set,
    rubric,
    shuffled_answers,
    swapped_images,
    swapped_preferences,
    teacher_against_student,
    teacher_ranked,
)
from vlm_core.tests.tiny import make_items


class Scorer:
    """A teacher with a score for each word."""

    def __init__(self, **scores):
        self.words, self.asked = scores, []

    def scores(self, items, answers):
        self.asked += [(item["id"], answer) for item, answer in zip(items, answers, strict=True)]
        return np.array([self.words[answer] for answer in answers])


def test_the_teacher_ranks_the_best_sample_above_the_worst():
    items = make_items(4)
    samples = [("blue", "red", "green"), ("red", "red"), ("Red", "red .", ""), ("blue", "green")]
    teacher = Scorer(red=-1.0, Red=-1.0, green=-1.5, blue=-3.0)
    pairs = teacher_ranked(items, samples, teacher)
    assert pairs == [
        Pair("item-0", "red", "blue", "teacher_ranked", 2.0), Pair("item-3", "green", "blue", "teacher_ranked", 1.5)
    ]
    assert Counter(teacher.asked).most_common(1)[0][1] == 1 and {item for item, _ in teacher.asked} == {"item-0", "item-3"}
    assert [pair.item for pair in teacher_ranked(items, samples, teacher, at_least=1.6)] == ["item-0"]
    assert teacher_ranked(items, samples, Scorer(red=0.0, green=0.0, blue=0.0)) == []
    assert teacher_ranked(items, samples, Scorer(red=0.0, green=-1.0, blue=-np.inf))[0].margin == np.inf
    assert teacher_ranked(items, samples, Scorer(red=-np.inf, green=-np.inf, blue=-np.inf)) == []
    with pytest.raises(ValueError, match="the teacher's score of 'green' for item 'item-0' is not a number"):
        teacher_ranked(items, samples, Scorer(red=0.0, green=np.nan, blue=0.0))


def test_a_subject_ranks_by_its_log_probabilities(subject):
    items, teacher = make_items(3), SubjectTeacher(subject)
    for pair, item in zip(teacher_ranked(items, [("red", "green", "blue")] * 3, teacher), items, strict=True):
        scores = dict(zip(("red", "green", "blue"), teacher.scores([item] * 3, ["red", "green", "blue"]), strict=True))
        assert pair.chosen == max(scores, key=scores.get) and pair.rejected == min(scores, key=scores.get)
        assert pair.margin == pytest.approx(max(scores.values()) - min(scores.values()))


def test_the_teachers_answer_is_preferred_where_the_student_says_another():
    items = make_items(5)
    taught, said = ["red", "Blue .", "green", "red", ""], ["blue", "blue", "red", "", "red"]
    pairs = teacher_against_student(items, taught, said)
    assert pairs == [
        Pair("item-0", "red", "blue", "teacher_against_student"), Pair("item-2", "green", "red", "teacher_against_student")
    ]
    scored = teacher_against_student(items, taught, said, Scorer(red=-1.0, blue=-2.5, green=-4.0))
    assert [pair.margin for pair in scored] == [1.5, -3.0]


def test_a_rubric_prefers_a_right_sample_to_the_commonest_wrong_one():
    items = [{**item, "answer": "red"} for item in make_items(4)]
    mixed, right, wrong = ("blue", "Red .", "green", "green"), ("red",) * 4, ("blue", "green", "blue", "")
    samples = [mixed, right, wrong, ("red", "red", "red", "blue")]
    assert rubric(items, samples) == [
        Pair("item-0", "Red .", "green", "rubric", -0.25), Pair("item-3", "red", "blue", "rubric", 0.5)
    ]
    with pytest.raises(ValueError, match="item 'item-0' has no known answer"):
        rubric([{**items[0], "answer": None}], samples[:1])


def test_a_preference_set_is_one_pair_a_row():
    items = make_items(3)
    data = preference_set(items, [Pair("item-2", "red", "blue", "rubric"), Pair("item-0", "green", "red", "rubric")])
    assert data.column_names == ["images", "prompt", "chosen", "rejected"]
    for row, item, chosen, rejected in zip(data, (items[2], items[0]), ("red", "green"), ("blue", "red"), strict=True):
        assert [image.tobytes() for image in row["images"]] == [item["image"].tobytes()]
        assert row["prompt"] == [{"role": "user", "content": item["prompt"]}]
        assert row["chosen"] == [{"role": "assistant", "content": chosen}]
        assert row["rejected"] == [{"role": "assistant", "content": rejected}]
    with pytest.raises(ValueError, match="a pair is about item 'item-9', which is not among the 3 items"):
        preference_set(items, [Pair("item-9", "red", "blue", "rubric")])
    with pytest.raises(ValueError, match="two items have the id 'item-0'"):
        preference_set([items[0], items[0]], [])
    assert len(preference_set(items, [])) == 0


def test_trl_takes_the_preference_set(subject):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    items = make_items(2)
    data = preference_set(items, [Pair("item-0", "red", "blue", "rubric"), Pair("item-1", "dark green", "red", "rubric")])
    batch = trl.DataCollatorForVisionPreference(subject.processor)([data[0], data[1]])
    assert batch["pixel_values"].shape[0] == 4
    words = subject.tokenizer.batch_decode(
        [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)], skip_special_tokens=True
    )
    assert [text.split(":")[-1].strip() for text in words] == ["red", "dark green", "blue", "red"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [("red", "Red .", "chosen and rejected are both 'red'"), ("", "red", "the chosen answer of item 'a' is ''"), ("red", None, "rejected")],
)
def test_a_pair_that_prefers_nothing_is_refused(chosen, rejected, words):
    with pytest.raises(ValueError, match=words):
        Pair("a", chosen, rejected, "rubric")


@pytest.mark.parametrize("samples", [[("red",)], [("red",), "red"], [("red",), (1,)]])
def test_samples_that_are_none_are_one_sentence(samples):
    with pytest.raises(ValueError, match="samples of"):
        teacher_ranked(make_items(2), samples, Scorer())


# -- controls ---------------------------------------------------------------------------------------------------------


def pictures(data):
    return [tuple(image.tobytes() for image in row["images"]) for row in data]


@pytest.mark.parametrize("made", ["instructions", "prompts", "selected"])
def test_swapped_images_are_never_the_own_and_stay_together(made):
    items = make_items(10)
    for index in (1, 2):
        items[index]["image"] = items[0]["image"].copy()  # one picture in two scenes is one picture
    data = prompt_set(items) if made == "prompts" else instruction_set(items, [item["answer"] for item in items])
    if made == "selected":
        data = data.select([5, 1, 3, 0])
    swapped = swapped_images(data, seed=0)
    assert swapped.column_names == data.column_names and swapped.features == data.features
    own, shown = pictures(data), pictures(swapped)
    assert all(one != other for one, other in zip(own, shown, strict=True))
    assert set(shown) == set(own)
    partner = {}
    assert all(partner.setdefault(one, other) == other for one, other in zip(own, shown, strict=True))
    text = next(name for name in data.column_names if name != "images")
    assert swapped[text] == data[text]
    assert pictures(swapped_images(data, seed=0)) == shown
    assert any(pictures(swapped_images(data, seed=seed)) != shown for seed in range(1, 5))


def test_one_picture_cannot_be_swapped():
    items = make_items(3)
    for item in items:
        item["image"] = items[0]["image"]
    with pytest.raises(ValueError, match="all 3 rows show one picture"):
        swapped_images(prompt_set(items), seed=0)
    with pytest.raises(ValueError, match=r"needs a column 'images' \(the data set has text\)"):
        swapped_images(datasets.Dataset.from_dict({"text": ["a"]}), seed=0)


def test_swapped_preferences_prefer_what_was_rejected():
    items = make_items(2)
    data = preference_set(items, [Pair("item-0", "red", "blue", "rubric"), Pair("item-1", "green", "red", "rubric")])
    swapped = swapped_preferences(data)
    assert swapped.column_names == data.column_names
    assert swapped["chosen"] == data["rejected"] and swapped["rejected"] == data["chosen"]
    assert swapped["prompt"] == data["prompt"] and pictures(swapped) == pictures(data)
    with pytest.raises(ValueError, match="needs a column 'chosen'"):
        swapped_preferences(prompt_set(items))


TASKS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["red", "green", "blue"])), min_size=1, max_size=24)


@settings(deadline=None)
@given(TASKS, st.integers(0, 2**32 - 1))
def test_shuffled_answers_keep_each_tasks_answers_and_as_few_in_place_as_can_be(rows, seed):
    image = make_items(1)[0]["image"]
    items = [{"id": str(number), "task": task, "image": image, "prompt": "what ?"} for number, (task, _) in enumerate(rows)]
    answers = [answer for _, answer in rows]
    shuffled = shuffled_answers(items, answers, seed)
    for task in {task for task, _ in rows}:
        own = [answer for (name, answer) in rows if name == task]
        dealt = [answer for (name, _), answer in zip(rows, shuffled, strict=True) if name == task]
        assert sorted(own) == sorted(dealt)
        kept = sum(one == other for one, other in zip(own, dealt, strict=True))
        assert kept == max(0, 2 * max(Counter(own).values()) - len(own))
    assert shuffled == shuffled_answers(items, answers, seed)


def test_a_shuffle_is_drawn():
    items = [{**item, "task": "one"} for item in make_items(40)]
    answers = ["red", "green", "blue", "yellow"] * 10
    drawn = shuffled_answers(items, answers, 0)
    assert drawn != shuffled_answers(items, answers, 1)
    assert len(set(zip(answers, drawn, strict=True))) == 12  # no answer always becomes the same other
