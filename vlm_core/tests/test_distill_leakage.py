"""Pictures that are both taught and tested are found by their pixels; the card says what was built."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from vlm_core.distill import Kept, Pair, data_card, leaks, require_disjoint
from vlm_core.distill.card import content_digest
from vlm_core.tests.tiny import make_items


def saved_again(image, **options):
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.fixture
def sets():
    """Six items that are taught, and two sets of others that are tested."""
    return make_items(6), {"test": make_items(4, seed=1), "dev": make_items(3, seed=2)}


def test_sets_without_a_common_picture_are_disjoint(sets):
    items, evaluated = sets
    assert len(leaks(items, evaluated)) == 0
    require_disjoint(items, evaluated)


def test_a_picture_that_was_saved_again_is_found(sets):
    items, evaluated = sets
    evaluated["test"][2] |= {"image": saved_again(items[4]["image"], compress_level=1, optimize=True), "prompt": "another question ?"}
    evaluated["dev"][0] |= {"image": items[4]["image"].convert("RGBA"), "prompt": items[4]["prompt"].upper()}
    found = leaks(items, evaluated)
    assert [tuple(row) for row in found.itertuples(index=False)] == [
        ("item-4", "test", "item-2", "picture"), ("item-4", "dev", "item-0", "picture and prompt")
    ]
    with pytest.raises(ValueError, match=r"1 of 6 items that are taught show a picture that is evaluated on \(picture of item 'item-4'"):
        require_disjoint(items, evaluated)


def test_a_picture_among_several_and_a_partners_are_found(sets):
    items, evaluated = sets
    items[1]["image"] = [items[1]["image"], items[0]["image"]]
    evaluated["test"][3]["image"] = [evaluated["test"][3]["image"], saved_again(items[1]["image"][1])]
    assert leaks(items, evaluated)["item"].tolist() == ["item-0", "item-1"]
    for item in evaluated["dev"]:
        item["partner"] = None
    evaluated["dev"][1]["partner"] = items[5]["image"]
    assert leaks(items, {"dev": evaluated["dev"]}).empty
    assert leaks(items, {"dev": evaluated["dev"]}, ("image", "partner"))["item"].tolist() == ["item-5"]


def test_what_cannot_be_compared_is_one_sentence(sets):
    items, evaluated = sets
    with pytest.raises(ValueError, match="evaluated must be a mapping of names to items, got a list"):
        leaks(items, evaluated["test"])
    with pytest.raises(ValueError, match="has no field 'partner'"):
        leaks(items, evaluated, ("partner",))


# -- card -------------------------------------------------------------------------------------------------------------


def table(card, title):
    """Rows of the table under a heading, cells by column."""
    section = card.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (section[0], *section[2:])]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_card_counts_what_was_built(sets):
    items, evaluated = sets
    items[1]["image"] = items[0]["image"]
    answers = [item["answer"] for item in items]
    wrong = next(word for word in ("red", "green") if word != answers[0])
    answers[0] = wrong
    answers[1] += " at row one column two"
    filters = [Kept("deduplicated", tuple(range(6)), {"duplicate": 3}), Kept("within_length", tuple(range(6)))]
    pairs = [Pair(name, "red", "blue", "rubric", margin) for name, margin in (("item-0", 0.5), ("item-1", 1.5))]
    pairs.append(Pair("item-0", "a", "b", "teacher_ranked"))
    kinds, teacher = ["plain", "grounded", *["plain"] * 4], {"kind": "recorded", "models": ["m"]}
    card = data_card(
        "colours", items, answers, licence="CC0", kinds=kinds, teacher=teacher, filters=filters,
        pairs=pairs, leakage=leaks(items, evaluated), evaluated=list(evaluated), source="made here", n_examples=4,
    )  # fmt: skip
    facts = ("Questions: 6", "Pictures: 5", "Scenes: 3", "Kinds of answers: grounded (1), plain (5)", "Source: made here", "Licence: CC0")
    assert all(f"* {fact}\n" in card for fact in facts)
    assert f"`{content_digest(items, answers)}`" in card
    by_task = {row["task"]: row for row in table(card, "Tasks")}
    assert by_task["color"]["questions"] == "3" and by_task["all"]["questions"] == "6"
    assert {task: row["right"] for task, row in by_task.items()} == {"color": "66.7% of 3", "shape": "100.0% of 3", "all": "83.3% of 6"}
    assert "* models: ['m']" in card and "Of 6 questions whose answer is known, 83.3% are answered right." in card
    assert "Words: least 1, median 1, 95th percentile 5, most 6." in card
    assert table(card, "Filters") == [
        {"filter": "deduplicated", "looked at": "9", "kept": "6", "dropped": "duplicate: 3"},
        {"filter": "within_length", "looked at": "6", "kept": "6", "dropped": "nothing"},
    ]
    assert table(card, "Preference pairs") == [
        {"source": "rubric", "pairs": "2", "items": "2", "median margin": "1.00"},
        {"source": "teacher_ranked", "pairs": "1", "items": "1", "median margin": "not scored"},
    ]
    assert "No picture is shared with test, dev" in card
    examples = table(card, "Examples")
    assert [row["task"] for row in examples] == ["color", "shape", "color", "shape"]
    assert examples[0]["answer"] == wrong and examples[0]["known"] == items[0]["answer"]


def test_the_card_says_what_leaked_and_what_was_not_looked_at(sets):
    items, evaluated = sets
    evaluated["test"][0]["image"] = items[0]["image"]
    unknown = [{**item, "answer": None, "prompt": "a | b\nc ?"} for item in items]
    card = data_card("colours", unknown, ["red"] * 6, licence="CC0", leakage=leaks(items, evaluated), evaluated=["test"])
    assert "Compared by pixels with test: 1 items share a picture" in card
    assert "was not measured" in card and "No teacher is named." in card
    assert {row["right"] for row in table(card, "Tasks")} == {"not known"}
    assert r"a \| b c ?" in card
    assert "Not compared with any set that is evaluated on." in data_card("colours", unknown, ["red"] * 6, licence="CC0")
    assert len(re.findall(r"None\.", card)) == 2


def test_the_digest_is_of_pictures_prompts_and_answers_whatever_their_order(sets):
    items, answers = sets[0], [item["answer"] for item in sets[0]]
    digest = content_digest(items, answers)
    assert digest == content_digest(items[::-1], answers[::-1])
    assert digest == content_digest([{**item, "id": "x", "image": saved_again(item["image"])} for item in items], answers)
    for changed in (
        content_digest(items, ["other", *answers[1:]]),
        content_digest([{**items[0], "prompt": "other"}, *items[1:]], answers),
        content_digest([{**items[0], "image": items[0]["image"].rotate(90)}, *items[1:]], answers),
    ):
        assert changed != digest


@pytest.mark.parametrize(
    ("items", "answers", "kinds", "words"),
    [
        (0, 0, "plain", "needs at least one item"),
        (2, 1, "plain", "2 items but 1 answers"),
        (2, 2, ["plain"], "2 items but 1 kinds"),
    ],
)
def test_a_card_of_nothing_is_one_sentence(items, answers, kinds, words):
    with pytest.raises(ValueError, match=words):
        data_card("colours", make_items(items), ["red"] * answers, licence="CC0", kinds=kinds)
