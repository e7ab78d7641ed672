"""Instruction sets, and what one training run changes, keeps, supervises and leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import trl

import vlm_core.distill.training
from vlm_core import SubjectError, evaluate, load_vlm
from vlm_core.distill import Budget, TrainingDiverged, instruction_set, sft
from vlm_core.tests.distill_students import save_student, weights
from vlm_core.tests.tiny import make_items

STAND_IN = """
from pathlib import Path
class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = open(Path(log_dir) / "events.txt", "w")
    def add_scalar(self, name, value, step):
        self.file.write(f"{name}:{step} ")
    def add_text(self, *given):
        pass
    def flush(self):
        self.file.flush()
    def close(self):
        self.file.close()
"""
BUDGET = Budget(steps=2, batch_size=3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint on disk."""
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def taught():
    """Twelve questions on six scenes, with answers of one and two words."""
    items = make_items(12)
    return items, instruction_set(items, [f"dark {item['answer']}" if i % 3 == 0 else item["answer"] for i, item in enumerate(items)])


@pytest.fixture(scope="module")
def run(student, taught, tmp_path_factory):
    """One training run: where it was saved, what it trained on and what it reported."""
    batches, seen, before = [], [], digest(student)

    class Recording(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
            return super().compute_loss(model, inputs, *args, **kwargs)

    out = tmp_path_factory.mktemp("trained") / "student"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trl, "SFTTrainer", Recording)
        path = sft(student, taught[1], BUDGET, out, seed=5, progress=lambda done, n: seen.append((done, n)))
    assert path == out
    return SimpleNamespace(path=path, batches=batches, seen=seen, student_before=before)


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# -- data -------------------------------------------------------------------------------------------------------------


def test_an_instruction_set_has_one_row_a_picture_and_its_turns_in_order():
    items = make_items(4)
    items[1]["image"], items[3]["image"] = items[0]["image"], items[2]["image"].copy()
    items = [items[0], items[2], items[1], items[3]]  # scenes 0, 1, 0, 1
    data = instruction_set(items, ["red", "green", "big red", "blue"])
    assert data.column_names == ["images", "messages"]
    assert len(data) == 2
    for row, mine, answers in zip(data, ((0, 2), (1, 3)), (("red", "big red"), ("green", "blue")), strict=True):
        (image,) = row["images"]
        assert image.tobytes() == items[mine[0]]["image"].tobytes()
        turns = [(message["role"], message["content"]) for message in row["messages"]]
        expected = [[("user", items[i]["prompt"]), ("assistant", answer)] for i, answer in zip(mine, answers, strict=True)]
        assert turns == [turn for pair in expected for turn in pair]


def test_an_instruction_set_needs_an_answer_an_item():
    with pytest.raises(ValueError, match="4 items but 3 answers: an instruction set needs one answer an item"):
        instruction_set(make_items(4), ["red"] * 3)


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_answers_only(run, taught, student):
    subject = load_vlm(student, check=False)
    expected = {}
    for row in taught[1]:
        prompts = [message["content"] for message in row["messages"] if message["role"] == "user"]
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        prompts[0] = f"<image> {prompts[0]}"
        text = " ".join(f"USER : {prompt} ASSISTANT : {answer} </s>" for prompt, answer in zip(prompts, answers, strict=True))
        ids = subject.processor(images=row["images"], text=text, return_tensors="pt")["input_ids"][0].tolist()
        expected[tuple(ids)] = subject.tokenizer(" ".join(f"{a} </s>" for a in answers))["input_ids"]
    assert len(run.batches) == BUDGET.steps
    for batch in run.batches:
        assert len(batch["labels"]) == BUDGET.batch_size
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            supervised = labels != -100
            assert labels[supervised].tolist() == ids[supervised].tolist()
            sequence = tuple(i for i in ids.tolist() if i != subject.tokenizer.pad_token_id)
            assert labels[supervised].tolist() == expected[sequence]


def test_the_tower_is_frozen_and_the_rest_learns(run, student):
    before, after = weights(student), weights(run.path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "vision_tower" in name:
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim >= 2 and "embed_tokens" not in name:
            assert not torch.equal(tensor, after[name]), name
    assert any("vision_tower" in name for name in before)


def test_the_checkpoint_it_started_from_is_not_changed(run, student):
    assert digest(student) == run.student_before


def test_the_result_is_a_subject_with_a_log(run):
    results = evaluate(load_vlm(run.path), make_items(4))
    assert len(results) == 4
    log = json.loads((run.path / "training.json").read_text())
    assert log["budget"] == {"steps": 2, "batch_size": 3, "learning_rate": 1e-3}
    assert log["seed"] == 5 and log["seconds"] > 0 and log["kind"] == "sft" and log["encoded_once"]
    assert log["images"] == BUDGET.steps * BUDGET.batch_size
    assert log["tokens"] == sum(int((batch["input_ids"] != 0).sum()) for batch in run.batches)
    assert log["supervised_tokens"] == sum(int((batch["labels"] != -100).sum()) for batch in run.batches)
    assert log["losses"] and all(math.isfinite(loss) and loss > 0 for loss in log["losses"])


def test_progress_is_told_step_by_step(run):
    assert run.seen == [(1, 2), (2, 2)]


def test_the_seed_decides_the_weights(run, student, taught, tmp_path):
    again = weights(sft(student, taught[1], BUDGET, tmp_path / "again", seed=5))
    other = weights(sft(student, taught[1], BUDGET, tmp_path / "other", seed=6))
    first = weights(run.path)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("steps", [2, 6])  # of two, one warms up, and no loss shows what the other did
def test_diverged_training_is_an_error_and_leaves_no_checkpoint(steps, student, taught, tmp_path):
    out = tmp_path / "diverged"
    with pytest.raises(TrainingDiverged, match="training of '.*' diverged: lower the learning rate"):
        sft(student, taught[1], Budget(steps=steps, batch_size=3, learning_rate=1e40), out)
    assert not (out / "model.safetensors").exists() and not (out / "training.json").exists()


def test_a_model_without_a_tower_to_freeze_is_refused(student, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm_core.distill.training, "vision_tower", lambda subject: None)
    with pytest.raises(SubjectError, match="student '.*' names no vision tower"):
        sft(student, taught[1], BUDGET, tmp_path / "never")


@pytest.mark.parametrize("killed_at", [3, 5, 11])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(killed_at, student, taught, tmp_path):
    budget = Budget(steps=12, batch_size=2)
    whole = sft(student, taught[1], budget, tmp_path / "whole", checkpoints=tmp_path / "undisturbed")

    def killing(done, steps):
        if done == killed_at:
            raise KeyboardInterrupt

    out, seen = tmp_path / "killed", []
    with pytest.raises(KeyboardInterrupt):
        sft(student, taught[1], budget, out, checkpoints=tmp_path / "checkpoints", progress=killing)
    sft(student, taught[1], budget, out, checkpoints=tmp_path / "checkpoints", progress=lambda done, steps: seen.append(done))
    assert seen == list(range(killed_at, 13)), "from the newest checkpoint, one step before it died"
    first, again = weights(whole), weights(out)
    assert all(torch.equal(first[name], again[name]) for name in first)
    logs = [json.loads((folder / "training.json").read_text()) for folder in (whole, out)]
    for name in ("losses", "images", "tokens", "supervised_tokens"):
        assert logs[0][name] == logs[1][name], name


def test_training_is_logged_to_tensorboard_where_that_is_installed(student, taught, tmp_path, monkeypatch):
    """A stand-in that writes lines, by the name of one of the two packages that transformers asks for."""
    written = {}
    for installed in (False, True):
        if installed:
            (tmp_path / "packages" / "tensorboardX").mkdir(parents=True)
            (tmp_path / "packages" / "tensorboardX" / "__init__.py").write_text(STAND_IN)
            monkeypatch.syspath_prepend(tmp_path / "packages")
        folder = tmp_path / f"log-{installed}"
        sft(student, taught[1], BUDGET, tmp_path / f"out-{installed}", log_to=folder)
        written[installed] = (folder / "events.txt").read_text().split() if folder.exists() else None
    assert written[False] is None
    assert {"train/loss:1", "train/loss:2", "train/grad_norm:1"} <= set(written[True])
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
