"""Which candidate a sentence names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_core.scoring import SCORERS, score_answer
from vlm_core.scoring.spoken import named

COLORS = ("red", "green", "blue", "dark red")
NUMBERS = ("one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left", "right")
YES = ("yes", "no")

SENTENCES = [
    # articles, case, punctuation, sentences
    (COLORS, "red", "red"),
    (COLORS, "Red.", "red"),
    (COLORS, "**RED**", "red"),
    (COLORS, "The circle is red.", "red"),
    (COLORS, "The color of the circle in the image is blue, on a gray background.", "blue"),
    (COLORS, "It's green!", "green"),
    (("circle", "square"), "These are circles.", "circle"),
    (("circle", "square"), "A square", "square"),
    # one candidate in another
    (COLORS, "It is dark red.", "dark red"),
    (COLORS, "It is red; more precisely, dark red.", "dark red"),
    # several, none
    (COLORS, "It is red or blue.", None),
    (COLORS, "Red and green.", None),
    (COLORS, "The circle is hundred percent infrared.", None),
    (COLORS, "I do not know.", None),
    (COLORS, "", None),
    # negation
    (COLORS, "It is not red but blue.", "blue"),
    (COLORS, "It is blue, not red.", "blue"),
    (COLORS, "It isn't red, it's blue.", "blue"),
    (COLORS, "Red is not the color; it is green.", "green"),
    (COLORS, "Neither red nor green: blue.", "blue"),
    (COLORS, "Blue rather than red.", "blue"),
    (COLORS, "Instead of red, it is green.", "green"),
    (COLORS, "It is not red.", None),
    (("red", "blue"), "It is not red.", None),
    (COLORS, "There is no red circle in the image.", None),
    (COLORS, "It can't be red.", None),
    # numbers
    (NUMBERS, "2", "two"),
    (NUMBERS, "There are two squares.", "two"),
    (NUMBERS, "I count 3 diamonds.", "three"),
    (NUMBERS, "There are three, the red one among them.", "three"),
    (NUMBERS, "There is one square.", "one"),
    (NUMBERS, "12", None),
    (NUMBERS, "There are 2 or 3.", None),
    (("2", "3"), "Three.", "3"),
    (("0", "1", "2"), "There are no squares.", "0"),
    (("0", "1", "2"), "None.", "0"),
    (("1", "2"), "There are no squares.", None),
    # places
    (PLACES, "The star is in the top-left corner.", "top left"),
    (PLACES, "It is at the upper right.", "top right"),
    (PLACES, "On the left.", None),
    (SIDES, "The diamond is to the left of the triangle.", "left"),
    (SIDES, "It is left, not right, of the triangle.", "left"),
    # yes and no
    (YES, "Yes.", "yes"),
    (YES, "Answer: no", "no"),
    (YES, "The answer is yes, there is no green cross.", "yes"),
    (YES, "The correct answer is no.", "no"),
    (YES, "The answer is unclear.", None),
    (YES, "No, there isn't.", "no"),
    (YES, "Yes, there is a purple square and no green cross.", "yes"),
    (YES, "There is a purple square and a green cross.", "yes"),
    (YES, "There is no purple square.", "no"),
    (YES, "The purple square is not there.", "no"),
    (YES, "The image doesn't show a purple square: there is a blue one.", "no"),
    (YES, "Yes and no.", None),
    (YES, "It is not clear.", None),
    (YES, "I cannot tell whether there is a square.", None),
    (YES, "A purple square", None),
]


@pytest.mark.parametrize(("candidates", "sentence", "expected"), SENTENCES, ids=[sentence or "nothing" for _, sentence, _ in SENTENCES])
def test_what_a_sentence_names(candidates, sentence, expected):
    assert named(sentence, candidates) == expected
    for candidate in candidates:
        item = {"id": "one", "answer": candidate, "candidates": list(candidates), "scorer": "spoken"}
        assert score_answer(sentence, item) == float(candidate == expected)


def test_it_is_a_scorer_that_needs_candidates():
    assert SCORERS["spoken"].needs == ("candidates",)
    with pytest.raises(ValueError, match="candidates"):
        score_answer("red", {"id": "one", "answer": "red", "candidates": None, "scorer": "spoken"})


@settings(deadline=None)
@given(st.sampled_from([COLORS, NUMBERS, PLACES, SIDES, YES]), st.data())
def test_a_candidate_by_itself_is_named_however_it_is_written(candidates, data):
    one = data.draw(st.sampled_from(candidates))
    written = data.draw(st.sampled_from(["{}", " {} ", "{}.", "A {}!", "**{}**", "'{}'\n"])).format(data.draw(st.sampled_from([one, one.upper(), one.title()])))
    assert named(written, candidates) == one
    assert named(written, candidates[::-1]) == one
