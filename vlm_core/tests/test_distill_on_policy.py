"""On-policy distillation: its divergence is that of full distributions, its prompts are TRL's, and a teacher that cannot fit is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import trl
from transformers import AutoProcessor

from vlm_core import evaluate, load_vlm
from vlm_core.distill import Budget, on_policy, prompt_set
from vlm_core.tests.distill_students import TEMPLATE, save_student, weights
from vlm_core.tests.tiny import make_items, tiny_llava

MODULE = sys.modules["vlm_core.distill.on_policy"]
BUDGET = Budget(steps=3, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint on disk."""
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another one, deeper, with the same words."""
    return save_student(tmp_path_factory.mktemp("teacher"), seed=7, layers=3)


@pytest.fixture(scope="module")
def prompts():
    """Ten prompts."""
    return prompt_set(make_items(10))


def plain_divergence(student, teacher, inputs, divergence, temperature):
    """Mean over the tokens of all completions, row by row without padding, of full distributions."""
    found = []
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1]
        said = inputs["completion_ids"][row][inputs["completion_mask"][row] == 1]
        ids = torch.cat([prompt, said])[None]
        with torch.no_grad():
            p, q = (
                torch.softmax(one(input_ids=ids, pixel_values=inputs["pixel_values"][row : row + 1]).logits[0] / temperature, -1)
                for one in (teacher, student)
            )
        for place in range(len(prompt) - 1, len(ids[0]) - 1):
            t, s = p[place].double(), q[place].double()

            def kl(a, b):
                return float((a * (a.log() - b.log())).sum())

            if divergence in (0.0, 1.0):
                found.append(kl(t, s) if divergence == 0.0 else kl(s, t))
            else:
                m = (1 - divergence) * s + divergence * t
                found.append(divergence * kl(t, m) + (1 - divergence) * kl(s, m))
    return sum(found) / len(found)


@pytest.mark.parametrize(("divergence", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_the_loss_is_the_divergence_of_full_distributions_on_what_the_student_said(
    divergence, temperature, student, teacher, prompts, tmp_path, monkeypatch
):
    seen, teaching = [], load_vlm(teacher, check=False).model

    class Recording(trl.DistillationTrainer):
        def _compute_loss(self, model, inputs, total):
            found = super()._compute_loss(model, inputs, total)
            seen.append((float(found[0].detach()), plain_divergence(model, teaching, inputs, divergence, temperature), inputs))
            return found

    monkeypatch.setattr(trl, "DistillationTrainer", Recording)
    options = {"divergence": divergence, "temperature": temperature, "max_new_tokens": 5}
    out = on_policy(student, teacher, prompts, BUDGET, tmp_path / "out", **options)
    assert len(seen) == BUDGET.steps
    for fast, slow, inputs in seen:
        assert fast == pytest.approx(slow, rel=1e-4) and fast > 0.1
        assert inputs["completion_ids"].shape[1] <= 5
    log = json.loads((out / "training.json").read_text())
    assert log["kind"] == "on_policy" and {name: log[name] for name in options} == options and log["encoded_once"]
    assert log["images"] == 12
    assert log["supervised_tokens"] == sum(int(inputs["completion_mask"].sum()) for *_, inputs in seen)
    assert log["tokens"] == log["supervised_tokens"] + sum(int(inputs["prompt_mask"].sum()) for *_, inputs in seen)
    assert log["losses"] == pytest.approx([fast for fast, *_ in seen], rel=1e-5)


def test_prompts_encoded_once_train_as_those_that_trl_encodes_every_time(student, teacher, prompts, tmp_path, monkeypatch):
    once = on_policy(student, teacher, prompts, BUDGET, tmp_path / "once", seed=3)
    monkeypatch.setattr(MODULE, "_encoded_once", lambda *given: None)
    every = on_policy(student, teacher, prompts, BUDGET, tmp_path / "every", seed=3)
    assert [json.loads((out / "training.json").read_text())["encoded_once"] for out in (once, every)] == [True, False]
    first, second = weights(once), weights(every)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_that_come_out_otherwise_are_left_to_trl(student, teacher, prompts, tmp_path, monkeypatch):
    ids = MODULE._Prompts.ids
    monkeypatch.setattr(MODULE._Prompts, "ids", lambda self, rows: tuple(part + 1 for part in ids(self, rows)))
    out = on_policy(student, teacher, prompts, BUDGET, tmp_path / "out")
    assert json.loads((out / "training.json").read_text())["encoded_once"] is False


def test_the_student_comes_to_speak_like_the_teacher_and_its_tower_stays(student, teacher, prompts, tmp_path):
    out = on_policy(student, teacher, prompts, Budget(30, 8, 5e-3), tmp_path / "out", seed=1)
    log = json.loads((out / "training.json").read_text())
    assert log["losses"][-1] < 0.7 * log["losses"][0]
    before, after = weights(student), weights(out)
    for name, tensor in before.items():
        if "vision_tower" in name:
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim >= 2 and "embed_tokens" not in name:
            assert not torch.equal(tensor, after[name]), name
    assert len(evaluate(load_vlm(out), make_items(4))) == 4
    assert AutoProcessor.from_pretrained(out).tokenizer.padding_side == AutoProcessor.from_pretrained(student).tokenizer.padding_side


def test_the_teacher_is_not_changed(student, teacher, prompts, tmp_path):
    before = weights(teacher)
    on_policy(student, teacher, prompts, BUDGET, tmp_path / "out")
    assert all(torch.equal(tensor, weights(teacher)[name]) for name, tensor in before.items())


# -- what is refused, before anything is trained ----------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    """Training is an error."""
    monkeypatch.setattr(MODULE, "train", lambda *given, **named: pytest.fail("trained"))


def test_a_teacher_of_another_vocabulary_is_refused_in_one_sentence(student, prompts, tmp_path, no_training):
    other = save_student(tmp_path / "other")
    processor = AutoProcessor.from_pretrained(other)
    processor.tokenizer.add_tokens(["purple"])
    processor.save_pretrained(other)
    told = "has another vocabulary than student '.*' .1 tokens apart, such as 'purple'.*train on the teacher's answers"
    with pytest.raises(ValueError, match=told):
        on_policy(student, other, prompts, BUDGET, tmp_path / "out")


def test_a_teacher_that_sees_pictures_otherwise_is_refused(student, prompts, tmp_path, no_training):
    model, processor = tiny_llava(image_size=32, chat_template=TEMPLATE)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is given other inputs than student"):
        on_policy(student, tmp_path / "other", prompts, BUDGET, tmp_path / "out")


def test_fewer_prompts_than_a_batch_are_refused(student, teacher, prompts, tmp_path, no_training):
    with pytest.raises(ValueError, match="3 prompts are fewer than the 4 of a batch"):
        on_policy(student, teacher, prompts.select(range(3)), BUDGET, tmp_path / "out")
