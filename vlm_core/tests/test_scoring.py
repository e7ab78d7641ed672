"""Scores of answers: who scores what, and each scorer against its definition and the numbers of its official evaluator."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vlm_core.scoring import SCORERS, score_answer, scorer_of
from vlm_core.scoring.option import letter_in
from vlm_core.scoring.text import levenshtein
from vlm_core.scoring.vqa import CONTRACTIONS, normalised


def score(scorer: str, output: str, *references: str, **fields) -> float:
    return score_answer(output, {"id": "a", "answer": references[0], "references": list(references), "scorer": scorer, **fields})


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


@pytest.mark.parametrize(("scorer", "field"), [("vqa", "references"), ("textvqa", "references"), ("option", "candidates")])
def test_an_item_without_what_its_scorer_needs_is_named(scorer, field):
    with pytest.raises(ValueError, match=rf"item 'q7' has no {field}, which the scorer '{scorer}' needs"):
        score_answer("x", {"id": "q7", "answer": "x", field: None, "scorer": scorer})
    with pytest.raises(ValueError, match=field):
        score_answer("x", {"id": "q7", "answer": "x", "scorer": scorer})


# What PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA (commit a013f004, run with print as a function) gives:
# processDigitArticle(processPunctuation(text)).
NORMALISED = {
    "Black, and white.": "black and white",
    "3.5": "3.5",
    "1,000 , 2": "1000 2",
    "a.b.": "ab",
    ".5": ".5",
    "x-ray": "x ray",
    "yes/no": "yes no",
    '"stop"': "stop",
    "3 .": "3",
    "12,5": "125",
    "a - b": "b",
    "one two ten eleven none": "1 2 10 eleven 0",
    "the a an": "",
    "Id've cant dont": "id've can't don't",
    "somebody'd": "somebodyd",
    "." * 40 + "a b": "." * 8 + "a b",
}


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items())
def test_answers_are_normalised_as_the_official_code_does(text, expected):
    assert normalised(text) == expected


def test_the_contractions_are_those_of_the_official_table():
    # SHA-256 of the entries of vqaEval.py's table in small letters that change something, as sorted JSON.
    digest = hashlib.sha256(json.dumps(CONTRACTIONS, sort_keys=True).encode()).hexdigest()
    assert digest == "9540dcfd9682782c55fd90fcc8aa5106862b098d4dfd79dfb273593941405690"


# VQAEval.evaluate of the same file, of one question whose answers have ids 1 to 10.
OFFICIAL = [
    ("table", ["down"] * 7 + ["at table", "skateboard", "table"], 0.3),
    ("2", ["two"] * 2 + ["2"] + ["three"] * 7, 0.9),
    ("the dog", ["dog"] * 2 + ["a dog", "cats"] + ["cat"] * 6, 0.9),
    ("Yes", ["yes"] * 9 + ["no"], 1.0),
    ("dont know", ["don't know"] * 3 + ["no"] * 7, 0.9),
    ("black-white", ["black white"] * 4 + ["gray"] * 6, 1.0),
    ("3.5", ["3.5"] * 2 + ["35"] * 8, 0.6),
    ("none", ["0"] * 2 + ["nothing"] * 8, 0.6),
    ("a", ["the"] * 5 + ["b"] * 5, 1.0),
    ("new york\n", ["new york"] * 3 + ["nyc"] * 7, 0.9),
    ("10:30", ["10:30"] + ["1030"] * 9, 0.3),
]


@pytest.mark.parametrize(("output", "answers", "expected"), OFFICIAL)
def test_vqa_accuracy_is_the_official_one_where_annotators_differ(output, answers, expected):
    assert score("vqa", output, *answers) == pytest.approx(expected)


def test_vqa_accuracy_of_unanimous_annotators_is_normalised_and_the_official_one_is_in_the_summary():
    assert score("vqa", "Yes", *["yes"] * 10) == 1.0
    table = pd.DataFrame(
        {"output": ["Yes", "yes\n", "table"], "references": [["yes"] * 10, ["yes"] * 10, OFFICIAL[0][1]], "score": [1.0, 1.0, 0.3]}
    )
    # vqaEval.py: 0, 1 and 0.3.
    assert SCORERS["vqa"].summary(table) == {"unanimous_unnormalised": pytest.approx(1.3 / 3)}


def test_vqa_accuracy_needs_several_annotators():
    with pytest.raises(ValueError, match="several annotators, got 1"):
        score("vqa", "yes", "yes")


# EvalAIAnswerProcessor as github.com/EvolvingLMMs-Lab/lmms-eval (75571cfe) has it from Pythia, and the mean it is used in there.
@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        ("Nokia", ["nokia"] * 9 + ["nokia phone"], 1.0),
        ("the dog's bone", ["dogs bone"] * 8 + ["dog 's bone"] * 2, 0.6),
        ("12,000?", ["12000"] * 2 + ["12"] * 8, 0.6),
        ("A Stop sign.", ["stop sign"] + ["sign"] * 9, 0.3),
    ],
)
def test_textvqa_splits_words_before(output, answers, expected):
    assert score("textvqa", output, *answers) == pytest.approx(expected)


def test_textvqa_and_vqa_differ_in_the_genitive():
    answers = ["dog 's bone"] * 5 + ["bone"] * 5
    assert score("textvqa", "dog's bone", *answers) == 1.0
    assert score("vqa", "dog's bone", *answers) == 0.0


def test_the_distance_of_texts_is_levenshteins():
    # Textbook distances (Wagner & Fischer 1974), and against the recursion of the definition.
    assert [levenshtein(*pair) for pair in (("kitten", "sitting"), ("saturday", "sunday"), ("", "abc"), ("ab", "ba"))] == [3, 3, 3, 2]

    def slow(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        return min(
            slow(first[1:], second) + 1, slow(first, second[1:]) + 1, slow(first[1:], second[1:]) + (first[0] != second[0])
        )  # fmt: skip

    draws = np.random.default_rng(0)
    for _ in range(40):
        first, second = ("".join(draws.choice(list("abc"), size=draws.integers(0, 6))) for _ in range(2))
        assert levenshtein(first, second) == slow(first, second)


@pytest.mark.parametrize(
    ("output", "references", "expected"),
    [
        ("coca cola", ["coca cola"], 1.0),
        ("Coca  Cola", ["coca cola company"], 9 / 17),
        ("coka cola", ["pepsi", "Coca Cola"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0.5),  # exactly one half is kept: "0 below"
        ("abc", ["abxyz"], 0.0),
        ("a  b", ["a b"], 1.0),
        ("abcde   ", ["abcdx"], 1 - 1 / 8),  # the length is that of the text as it is
        ("", ["x"], 0.0),
    ],
)
def test_anls_is_one_minus_the_normalised_distance_and_nothing_below_one_half(output, references, expected):
    # By hand from Biten et al. 2019, section 4.1, with the threshold of the evaluator at rrc.cvc.uab.es.
    assert score("anls", output, *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-100", "100", 0),
        ("10.4%", "10%", 1),
        ("0.1", "10%", 1),
        ("10", "10%", 0),
        ("0.01", "0", 0),
        ("0", "0", 1),
        ("1,000", "1000", 0),
        (" Yes ", "yes", 1),
        ("Yess", "Yes", 0),
        ("2019.0", "2020", 1),
        ("nan", "5", 0),
    ],
)
def test_relaxed_accuracy_is_within_five_percent_or_the_same_text(output, reference, expected):
    # relaxed_correctness of Qwen-VL's evaluate_vqa.py and of lmms-eval (75571cfe), run on these pairs.
    assert score("relaxed", output, reference) == expected


@pytest.mark.parametrize(
    ("output", "reference", "dataset", "expected"),
    [
        ("The sign says STOP\nhere", "stop here", "IIIT5K", 1),
        ("s top", "stop", "IIIT5K", 0),
        (r"\frac { 1 } { X }", r"\frac{1}{X}", "HME100k", 1),
        (r"\frac{1}{x}", r"\frac{1}{X}", "HME100k", 0),
        ("stop", "stop", None, 1),
    ],
)
def test_ocrbench_looks_for_the_text_anywhere(output, reference, dataset, expected):
    # OCRBench/example.py of github.com/Yuliang-Liu/MultimodalOCR (794c36d6), read rule by rule.
    assert score("ocrbench", output, "nothing of it", reference, dataset=dataset) == expected


@pytest.mark.parametrize("scorer", ["ocrbench", "contains"])
def test_a_blank_reference_is_in_no_text(scorer):
    assert score(scorer, "whatever", " ") == score(scorer, "", "") == 0.0
    assert score(scorer, "a dog", "", "dog") == 1.0


def test_ocrbench_counts_points():
    assert SCORERS["ocrbench"].summary(pd.DataFrame({"score": [1.0, 0.0, 1.0]})) == {"points": 2.0}


@pytest.mark.parametrize(("output", "expected"), [("T-Shirt.", 1), (" tshirt", 1), ("t shirt", 0), ("a t-shirt", 0)])
def test_gqa_is_equality_without_case_and_marks(output, expected):
    # exact_match with ignore_case and ignore_punctuation of Hugging Face's evaluate: string.punctuation is taken out, spaces stay.
    assert score("gqa", output, "t-shirt") == expected


@pytest.mark.parametrize(
    ("output", "expected"), [("A Dog lies there.", 1), ("two dogs", 1), ("a hot-dog", 1), ("dogma", 0), ("a cat", 0)]
)
def test_contains_finds_the_name_as_a_word(output, expected):
    assert score("contains", output, "dog") == expected


# label and what POPE's evaluate.py (github.com/RUCAIBox/POPE, 3df3ba1b) makes of the text
READINGS = [
    ("yes", "yes", "yes", "yes"),
    ("Yes", "yes", "yes", "yes"),
    ("no", "no", "no", "no"),
    ("No, there is not. Yes.", "no", None, "no"),
    ("There is no dog", "yes", None, "no"),
    ("NO", "no", "no", "yes"),
    ("I cannot see it. no", "no", None, "yes"),
    ("Yes, there is a dog.", "yes", None, "yes"),
    ("", "no", None, "yes"),
    ("no.", "no", None, "no"),
    ("It is not there", "no", None, "no"),
]


def test_pope_is_read_both_ways():
    from vlm_core.scoring.yes_no import first_sentence, strict

    assert [strict(text) for text, *_ in READINGS] == [row[2] for row in READINGS]
    assert [first_sentence(text) for text, *_ in READINGS] == [row[3] for row in READINGS]
    assert [score("pope", text, label) for text, label, *_ in READINGS] == [float(row[2] == row[1]) for row in READINGS]


def test_popes_summary_has_both_readings_with_the_measures_of_sklearn():
    from sklearn.metrics import precision_recall_fscore_support

    truth = np.array([label == "yes" for _, label, *_ in READINGS])
    found = SCORERS["pope"].summary(pd.DataFrame({"output": [row[0] for row in READINGS], "answer": [row[1] for row in READINGS]}))
    for name, column in (("strict", 2), ("first_sentence", 3)):
        said = np.array([row[column] == "yes" for row in READINGS])
        precision, recall, f1, _ = precision_recall_fscore_support(truth, said, average="binary")
        measured = [found[f"{name}_{one}"] for one in ("precision", "recall", "f1", "yes_ratio")]
        assert measured == pytest.approx([precision, recall, f1, said.mean()])
        assert found[f"{name}_accuracy"] == np.mean([row[column] == row[1] for row in READINGS])
    never = SCORERS["pope"].summary(pd.DataFrame({"output": ["no", "no"], "answer": ["yes", "no"]}))
    assert never["strict_f1"] == never["strict_precision"] == 0.0


LETTERED = [
    ("A", "A"),
    ("b", "B"),
    (" (C) ", "C"),
    ("D.", "D"),
    ("**B**", "B"),
    ("A. cat", "A"),
    ("(B) dog", "B"),
    ("C: bird", "C"),
    ("D) fish", "D"),
    ("B\nbecause of the ears", "B"),
    ("The answer is B", "B"),
    ("the correct answer is (c).", "C"),
    ("Answer: D", "D"),
    ("I think option B fits", "B"),
    ("I choose A because of its fur", "A"),
    ("A is wrong, B is wrong, so the answer is C", "C"),
    ("It must be (B), clearly", "B"),
    ("Looks like B to me", "B"),
    ("A cat sits there", "A"),
    ("A bird, since it flies", "C"),
    ("It is the bird", "C"),
    ("B or C", None),
    ("The answer is B. No, the answer is C.", None),
    ("(A) or (B)", None),
    ("A or B", None),
    ("A/B", None),
    ("A, B", None),
    ("A and more A", "A"),
    ("a cat or a dog", None),
    ("I do not know", None),
    ("a dolphin", None),
    ("E", None),
    ("", None),
    ("The answer isn't clear", None),
    ("The answer is a dog.", "B"),
    ("I choose a bird", "C"),
    ("Answer: a fish", "D"),
    ("the answer is a", "A"),
    ("The answer is a.", "A"),
    ("answer: a\nbecause it purrs", "A"),
    ("The answer is 'B'.", "B"),
    ("It is 'B'", "B"),
    ("The answer is B's twin", None),
]


@pytest.mark.parametrize(("output", "expected"), LETTERED)
def test_the_letter_is_found_or_nothing_is(output, expected):
    assert letter_in(output, "ABCD", ["cat", "dog", "bird", "fish"]) == expected


def test_an_option_within_a_longer_one_does_not_count():
    assert letter_in("it is dark red", "AB", ["red", "dark red"]) == "B"
    assert letter_in("it is red", "AB", ["red", "dark red"]) == "A"


def test_an_options_score_is_one_for_the_right_letter_and_nothing_for_none():
    item = {"candidates": ["A", "B"], "options": ["cat", "dog"]}
    assert score("option", "The answer is B.", "B", **item) == 1.0
    assert score("option", "dog", "B", **item) == 1.0
    assert score("option", "A", "B", **item) == 0.0
    assert score("option", "A or B", "B", **item) == 0.0
    with pytest.raises(ValueError, match="candidates are the letters of its options"):
        score("option", "A", "dog", **item)
