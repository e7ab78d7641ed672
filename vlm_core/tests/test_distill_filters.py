"""What filters keep, and that they count all that they drop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core.distill import Kept, agreeing, deduplicated, self_consistent, within_length, writable
from vlm_core.tests.tiny import make_items, word_tokenizer


def test_the_same_question_about_the_same_picture_is_kept_once():
    items = make_items(5)
    items[2] = {**items[0], "id": "again", "image": items[0]["image"].convert("RGBA"), "prompt": f" {items[0]['prompt'].upper()}"}
    items[3] = {**items[1], "id": "more"}
    assert deduplicated(items) == Kept("deduplicated", (0, 1, 4), {"duplicate": 2})
    other = {**items[0], "image": items[4]["image"]}
    assert deduplicated([items[0], other]).dropped == {}


def test_duplicates_that_contradict_each_other_are_all_dropped():
    items = make_items(4)
    items[2], items[3] = {**items[0], "id": "a"}, {**items[1], "id": "b"}
    kept = deduplicated(items, ["red", "blue", "Red.", "green"])
    assert kept == Kept("deduplicated", (0,), {"duplicate": 1, "contradicting duplicates": 2})
    with pytest.raises(ValueError, match="4 items but 1 answers"):
        deduplicated(items, ["red"])


def test_answers_are_kept_by_their_words():
    answers = ["red", "", "  ", "a b c", "a b c d"]
    assert within_length(answers, 3) == Kept("within_length", (0, 3), {"shorter than 1": 2, "longer than 3": 1})
    assert within_length(answers, 2, 2, length=len) == Kept("within_length", (2,), {"shorter than 2": 1, "longer than 2": 3})
    for options, words in (({"at_most": 0}, "at_most"), ({"at_most": 3, "at_least": -1}, "at_least"), ({"at_most": 1.5}, "at_most")):
        with pytest.raises(ValueError, match=words):
            within_length(answers, **options)
    with pytest.raises(ValueError, match="answer 0 is None"):
        within_length([None], 3)


def test_answers_that_a_student_has_no_words_for_are_not_taught():
    kept = writable(["red", "a crimson hexagon", " ", "small blue square"], word_tokenizer())
    assert kept == Kept("writable", (0, 3), {"words that the student does not know": 1, "no token for it": 1})

    class Letters:
        unk_token_id = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

    assert writable(["a crimson hexagon", ""], Letters()) == Kept("writable", (0,), {"no token for it": 1})


def test_the_majority_answers_with_its_agreement():
    answers, agreement = self_consistent([("red", "Blue .", "blue", "green"), ("red", "blue"), ("red",)])
    assert answers == ["Blue .", "red", "red"] and agreement.tolist() == [0.5, 0.5, 1.0]
    for samples in ([()], ["red"], [("red", None)]):
        with pytest.raises(ValueError, match="the samples of item 0 are"):
            self_consistent(samples)


def test_items_are_kept_by_agreement():
    samples = [("a",) * 7 + ("b",) * 3, ("a",) * 6 + ("b",) * 4, ("a",) * 10]
    assert agreeing(samples, 0.7) == Kept("agreeing", (0, 2), {"agreement below 0.7": 1})
    assert agreeing(samples, 0).dropped == {}
    for share in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="at_least"):
            agreeing(samples, share)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6), max_size=12), st.floats(0, 1))
def test_nothing_is_lost_without_being_counted(samples, share):
    kept = agreeing(samples, share)
    assert len(kept.kept) + sum(kept.dropped.values()) == len(samples)
    assert kept.of(samples) == [samples[index] for index in kept.kept]
    lengths = within_length(["".join(said) for said in samples], 4, length=len)
    assert len(lengths.kept) + sum(lengths.dropped.values()) == len(samples)


def test_a_filter_is_asked_for_what_it_looked_at():
    kept = within_length(["red", ""], 3)
    assert kept.of([10, 20]) == [10]
    with pytest.raises(ValueError, match="'within_length' looked at 2 values, not at these 3"):
        kept.of([1, 2, 3])
