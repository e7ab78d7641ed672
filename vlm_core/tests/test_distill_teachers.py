"""Teachers: what a subject answers, draws and scores, and the same from a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vlm_core import evaluate, sweep
from vlm_core.distill import RecordedTeacher, SubjectTeacher, Teacher, record_answers
from vlm_core.identity import picture_digest
from vlm_core.sampling import sample_answers
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture(scope="module")
def teacher(subject):
    return SubjectTeacher(subject)


def asked(n):
    """Items without an answer: all that a teacher needs."""
    return [{name: item[name] for name in ("id", "image", "prompt")} for item in make_items(n)]


def test_a_subject_answers_greedily_and_draws(teacher, subject):
    assert isinstance(teacher, Teacher)
    assert teacher.answers(asked(5)) == evaluate(subject, make_items(5), mode="greedy")["output"].tolist()
    assert teacher.samples(asked(5), 3, temperature=2.0, seed=4) == sample_answers(subject, asked(5), 3, temperature=2.0, seed=4)
    assert teacher.identity() == {"kind": "subject", **subject.identity()}


def test_scores_are_the_models_own_log_probabilities(teacher, subject):
    items = asked(3)
    answers = ["red", "dark blue", "big green circle"]
    expected = []
    for item, answer in zip(items, answers, strict=True):
        tokens = subject.tokenizer(answer, add_special_tokens=False)["input_ids"]
        batch = subject.encode([item["image"]], [item["prompt"]], [answer])
        with torch.inference_mode():
            found = subject.model(**batch.inputs).logits[0].double().log_softmax(-1)
        end = batch.inputs["input_ids"].shape[1]
        expected.append(sum(float(found[end - len(tokens) - 1 + place, token]) for place, token in enumerate(tokens)))
    assert teacher.scores(items, answers) == pytest.approx(np.array(expected), abs=1e-4)


def test_scores_are_those_by_which_a_sweep_compares_candidates(teacher, subject):
    items = make_items(6, multi_token=True)
    table = sweep(subject, items, {"none": None}, metrics=[f"candidate {k}" for k in range(4)])
    again = [item for item in items for _ in item["candidates"]]
    said = [candidate for item in items for candidate in item["candidates"]]
    assert teacher.scores(again, said) == pytest.approx(table["value"].to_numpy(), abs=1e-4)


def test_a_prompt_runs_once_for_all_its_answers():
    subject = tiny_subject()
    rows = []
    hook = subject.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args[0] if args else kwargs["hidden_states"]).shape[0]), with_kwargs=True
    )
    items = asked(1) * 4
    try:
        scores = SubjectTeacher(subject).scores(items, ["red", "green", "blue", "red"])
    finally:
        hook.remove()
    assert sum(rows) == 1 and scores[0] == scores[3] and np.isfinite(scores).all()


def test_what_a_subject_cannot_write_has_no_probability(teacher):
    scores = teacher.scores(asked(1) * 4, ["red", "", " ", "quokka"])
    assert np.isfinite(scores[0]) and (scores[1:] == -np.inf).all()


@pytest.mark.parametrize("answers", [None, 3, "red", ["red", None], ["red"]])
def test_scores_are_of_one_text_an_item(teacher, answers):
    with pytest.raises(ValueError, match="answers"):
        teacher.scores(asked(2), answers)


def test_a_file_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\r\n")
    assert RecordedTeacher(path).answers(asked(1)) == ["red"]


def test_no_answer_is_none_even_where_white_space_is_a_token(teacher, monkeypatch):
    monkeypatch.setattr(type(teacher.subject), "continuation", lambda subject, answer: (5,))
    assert np.isfinite(teacher.scores(asked(1), ["red"])).all() and teacher.scores(asked(1), [" "]).tolist() == [-np.inf]


def test_a_recorded_teacher_says_what_was_said(teacher, tmp_path):
    items = asked(4)
    path = record_answers(teacher, items, tmp_path / "new" / "said.jsonl", samples=3, temperature=2.0, seed=1, scores=True)
    recorded = RecordedTeacher(path)
    assert isinstance(recorded, Teacher)
    others = [{**item, "id": f"other {index}", "image": item["image"].convert("RGBA")} for index, item in enumerate(items)]
    assert recorded.answers(others) == teacher.answers(items)
    drawn = teacher.samples(items, 3, temperature=2.0, seed=1)
    assert recorded.samples(others, 3, temperature=2.0) == drawn
    assert recorded.samples(others, 2, temperature=2.0, seed=9) == [said[:2] for said in drawn]
    said = zip(others, teacher.answers(items), drawn, strict=True)
    flat = [(item, answer) for item, first, more in said for answer in (first, *more)]  # the last bits of a score depend on what else is scored
    scored = recorded.scores(*map(list, zip(*flat, strict=True)))
    assert scored.tolist() == teacher.scores(*map(list, zip(*flat, strict=True))).tolist()
    assert list((tmp_path / "new").iterdir()) == [path]


def test_a_line_holds_what_the_schema_says(teacher, tmp_path):
    items = asked(3)
    path = record_answers(teacher, [*items, items[0]], tmp_path / "said.jsonl", samples=1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    for line, item in zip(lines, items, strict=True):
        assert set(line) == {"image", "prompt", "answers", "temperature", "model"}
        assert line["image"] == picture_digest(item["image"]) and line["prompt"] == item["prompt"] and line["model"] == "tiny"
        assert len(line["answers"]) == 2
    identity = RecordedTeacher(path).identity()
    assert identity["models"] == ["tiny"] and identity["questions"] == 3 and len(identity["sha256"]) == 64


def test_an_answer_that_could_not_be_written_is_recorded_as_such(teacher, tmp_path):
    class Speechless(SubjectTeacher):
        def answers(self, items):
            return ["", "red"][: len(items)]

    path = record_answers(Speechless(teacher.subject), asked(2), tmp_path / "said.jsonl", scores=True)
    assert '"scores": [null]' in path.read_text().splitlines()[0]
    scores = RecordedTeacher(path).scores(asked(2), ["", "red"])
    assert scores[0] == -np.inf and np.isfinite(scores[1])


def line(**changes):
    item = asked(1)[0]
    whole = {"image": picture_digest(item["image"]), "prompt": item["prompt"], "answers": ["red", "blue"], "model": "m", **changes}
    return json.dumps({name: value for name, value in whole.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no recorded answers"),
        ("{", "line 1 of .* is no JSON"),
        ("[1]", "line 1 of .* is a list"),
        (line(image=...), "line 1 of .* has image None: a text is needed"),
        (line(prompt=3), "has prompt 3"),
        (line(answers="red"), "has answers 'red': a list of texts is needed"),
        (line(answers=[]), "at least one text is needed"),
        (line(answers=["red", None]), "at least one text is needed"),
        (line(model=None), "has model None"),
        (line(scores=[1.0]), "one number for each of its 2 answers"),
        (line(scores=[1.0, "2"]), "one number for each"),
        (line(scores=[1.0, float("nan")]), "one number for each"),
        (line(scores=[1.0, True]), "one number for each"),
        (line(scores=[1.0, float("inf")]), "one number for each"),
        (line(temperature="hot"), "has temperature 'hot'"),
        (line() + "\n\n" + line(answers=["blue"]), "line 3 of .* otherwise than an earlier line about that picture"),
        (b"\xff\xfe", "is no UTF-8 text"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(text, words, tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        RecordedTeacher(path)


def test_what_was_not_recorded_is_one_sentence(tmp_path, teacher):
    path = tmp_path / "said.jsonl"
    with pytest.raises(ValueError, match="there is no file of recorded answers"):
        RecordedTeacher(path)
    path.write_text("\n" + line(temperature=0.7) + "\n" + line(temperature=0.7) + "\n")
    recorded, items = RecordedTeacher(path), asked(2)
    assert recorded.answers(items[:1]) == ["red"]
    assert recorded.samples(items[:1], 1, temperature=0.7) == [("blue",)]
    with pytest.raises(ValueError, match="has no answer for item 'item-1'"):
        recorded.answers(items)
    with pytest.raises(ValueError, match="holds 1 samples for item 'item-0', 2 were asked for"):
        recorded.samples(items[:1], 2, temperature=0.7)
    with pytest.raises(ValueError, match="samples at temperature 0.7, not 1.0"):
        recorded.samples(items[:1], 1)
    with pytest.raises(ValueError, match="holds no score of the answer 'red' to item 'item-0'"):
        recorded.scores(items[:1], ["red"])
    with pytest.raises(ValueError, match="is a directory"):
        record_answers(teacher, items, tmp_path)
    with pytest.raises(ValueError, match="samples must be"):
        record_answers(teacher, items, path, samples=-1)
    with pytest.raises(TypeError, match="the subject must be a Subject"):
        SubjectTeacher("fixtures/embedded/vlm")
