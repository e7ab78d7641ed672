"""Scores of answers: who scores what, and each scorer against its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlm_core.scoring import SCORERS, score_answer, scorer_of


def test_an_item_without_a_scorer_is_scored_by_equality_of_plain_text():
    item = {"id": "a", "answer": "Red circle"}
    assert score_answer("  red, circle.", item) == 1.0
    assert score_answer("a red circle", item) == 0.0
    assert score_answer("crimson disc", {**item, "references": ["red circle", "Crimson disc"]}) == 1.0
    assert score_answer("Red circle", {**item, "references": []}) == 1.0
    assert score_answer("red circle", SimpleNamespace(id="a", answer="Red circle")) == 1.0


def test_an_unknown_scorer_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"there is no scorer 'rouge': an item's scorer is one of .*exact"):
        scorer_of({"id": "a", "answer": "b", "scorer": "rouge"})


def test_every_scorer_says_where_it_is_defined_and_is_known_by_its_own_name():
    assert all(name == one.name and one.source for name, one in SCORERS.items())
