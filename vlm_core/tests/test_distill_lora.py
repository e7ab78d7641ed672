"""Adapters change the layers that are named, as many numbers wherever they are, and are part of the student that is saved."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vlm_core import evaluate, load_vlm
from vlm_core.distill import Budget, Lora, instruction_set, on_policy, preference, prompt_set, sft
from vlm_core.distill.training import Student
from vlm_core.families.adapters import lora_targets
from vlm_core.tests.distill_students import preferences, save_student, weights
from vlm_core.tests.tiny import make_items

BUDGET = Budget(steps=2, batch_size=3, learning_rate=1e-2)
LAYERS = 4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint on disk."""
    return save_student(tmp_path_factory.mktemp("student"), layers=LAYERS)


def train(kind, student, out, teacher=None, **options):
    items = make_items(12)
    if kind == "sft":
        return sft(student, instruction_set(items, [item["answer"] for item in items]), BUDGET, out, **options)
    if kind == "preference":
        return preference(student, preferences(8), BUDGET, out, **options)
    return on_policy(student, teacher, prompt_set(items), BUDGET, out, **options)


@pytest.mark.parametrize("kind", ["sft", "preference", "on_policy"])
def test_only_the_named_modules_of_the_named_layers_change(kind, student, tmp_path):
    lora = Lora((3, 1), rank=2, alpha=4, modules=("q_proj", "v_proj"))
    out = train(kind, student, tmp_path / "out", save_student(tmp_path / "teacher", seed=3), lora=lora)
    before, after = weights(student), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    names = {f"layers.{layer}.self_attn.{module}.weight" for layer in (1, 3) for module in ("q_proj", "v_proj")}
    assert {name.split("language_model.")[-1].removeprefix("model.") for name in changed} == names
    assert not any("vision" in name for name in changed)
    log = json.loads((out / "training.json").read_text())
    assert log["lora"] == {"layers": [1, 3], "rank": 2, "alpha": 4, "modules": ["q_proj", "v_proj"]}
    assert len(evaluate(load_vlm(out), make_items(4))) == 4


def test_the_saved_student_is_the_model_with_its_adapters(student, tmp_path, monkeypatch):
    items, seen = make_items(4), []

    def logits(model, subject):
        with torch.no_grad():
            return model(**subject.encode_items(items).inputs).logits

    class Recording(Student):
        def __init__(self, run):
            super().__init__(run)
            merge = self.trained.merge_and_unload

            def recorded():
                seen.append(logits(self.trained.eval(), self.subject))
                return merge()

            self.trained.merge_and_unload = recorded

    monkeypatch.setattr(sys.modules["vlm_core.distill.sft"], "Student", Recording)
    out = train("sft", student, tmp_path / "out", lora=Lora((0, 2)))
    saved, before = (logits(one.model, one) for one in (load_vlm(out, check=False), load_vlm(student, check=False)))
    torch.testing.assert_close(saved, seen[0], rtol=1e-4, atol=1e-4)
    assert (saved - before).abs().max() > 0.05


def test_equal_numbers_of_layers_train_equal_numbers_of_parameters(student, tmp_path):
    counts = set()
    for layers in ((0,), (2,), (3,)):
        log = json.loads((train("sft", student, tmp_path / str(layers), lora=Lora(layers)) / "training.json").read_text())
        counts.add(log["trained_parameters"])
    subject = load_vlm(student, check=False)
    adapted = get_peft_model(subject.model, LoraConfig(r=8, target_modules=lora_targets(subject.anatomy, (0,))))
    assert counts == {sum(p.numel() for p in adapted.parameters() if p.requires_grad)}
    both = json.loads((train("sft", student, tmp_path / "both", lora=Lora((0, 3))) / "training.json").read_text())
    assert both["trained_parameters"] == 2 * counts.pop()


def test_what_the_model_does_not_have_is_refused(student, tmp_path):
    with pytest.raises(ValueError, match="layer 9 lies outside this model's 4 layers"):
        train("sft", student, tmp_path / "out", lora=Lora((9,)))
    assert not (tmp_path / "out" / "training.json").exists()
