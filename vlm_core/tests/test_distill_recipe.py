"""Training under a recipe: every pass of the student lets go of the tokens, and the numbers are those of the shorter sequences."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import trl

from vlm_core import DropTokens, MergeTokens, Recipe, keep_tokens, load_vlm
from vlm_core.distill import Budget, Lora, instruction_set, on_policy, preference, prompt_set, sft
from vlm_core.distill.training import Student
from vlm_core.reduction import FastV, VisionZip
from vlm_core.tests.distill_students import preferences, save_student
from vlm_core.tests.test_distill_on_policy import plain_divergence
from vlm_core.tests.tiny import make_items

BUDGET = Budget(steps=2, batch_size=3, learning_rate=1e-3)
ROW = DropTokens(1, 0.3, FastV())
RECIPE = Recipe(ROW, n_layers=3, policy="fastv", keep=0.3)
N_IMAGE = 17
GONE = N_IMAGE - ROW.count(N_IMAGE)
KINDS = ("sft", "preference", "on_policy")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint on disk."""
    return save_student(tmp_path_factory.mktemp("student"), layers=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another one."""
    return save_student(tmp_path_factory.mktemp("teacher"), seed=7)


def train(kind, student, teacher, out, **options):
    items = make_items(12)
    if kind == "sft":
        return sft(student, instruction_set(items, [item["answer"] for item in items]), BUDGET, out, **options)
    if kind == "preference":
        return preference(student, preferences(7), BUDGET, out, image_term=0.5, **options)
    return on_policy(student, teacher, prompt_set(items), BUDGET, out, **options)


@pytest.fixture
def watched(monkeypatch):
    """Lengths of sequences in the first and the last layer of the student in training, pass by pass, and whether there are gradients."""
    passes = []

    class Watched(Student):
        def __init__(self, run):
            super().__init__(run)
            first, *_, last = self.subject.anatomy.layers

            def length(args, kwargs):
                return (args[0] if args else kwargs["hidden_states"]).shape[1]

            def begins(module, args, kwargs):
                passes.append([length(args, kwargs), None, torch.is_grad_enabled()])

            def ends(module, args, kwargs):
                passes[-1][1] = length(args, kwargs)

            first.register_forward_pre_hook(begins, with_kwargs=True)
            last.register_forward_pre_hook(ends, with_kwargs=True)

    for kind in KINDS:
        monkeypatch.setattr(sys.modules[f"vlm_core.distill.{kind}"], "Student", Watched)
    return passes


@pytest.mark.parametrize("lora", [None, Lora((0, 2))], ids=["all weights", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_of_the_student_lets_go_of_the_tokens(kind, lora, student, teacher, tmp_path, watched):
    out = train(kind, student, teacher, tmp_path / "out", recipe=RECIPE, lora=lora)
    prompts = [one for one in watched if one[0] > N_IMAGE]
    with_gradients = [one for one in prompts if one[2]]
    assert len(with_gradients) == BUDGET.steps * (2 if kind == "preference" else 1)
    assert (len(prompts) > len(with_gradients)) == (kind != "sft")  # the reference, or generation
    assert all(GONE <= first - last <= GONE + 2 for first, last, _ in prompts)  # a column or two may hold padding only
    assert all(first == last == 1 for first, last, _ in watched if first <= N_IMAGE)
    whole = train(kind, student, teacher, tmp_path / "whole", lora=lora)
    less, more = (json.loads((folder / "training.json").read_text()) for folder in (out, whole))
    assert less["recipe"] == [ROW.describe()] and more["recipe"] is None
    assert 0.5 * more["flops"] < less["flops"] < 0.9 * more["flops"]
    assert less["images"] == more["images"]
    # Nothing is gained on the reference in these two steps, but for the last bits.
    assert (less["losses"] == pytest.approx(more["losses"], rel=1e-5)) == (kind == "preference")
    if kind != "on_policy":  # there the student says something else
        assert less["tokens"] == more["tokens"]


@pytest.mark.parametrize("row", [ROW, DropTokens(0, 0.5, "stride"), MergeTokens(1, 0.4)], ids=str)
def test_the_loss_of_fine_tuning_is_that_of_the_model_under_the_recipe(row, student, teacher, tmp_path, monkeypatch):
    seen, own = [], load_vlm(student, check=False)

    class Recording(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            plain = dict(inputs)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if not seen:
                with torch.no_grad():
                    whole = own.model(**plain).loss
                    with keep_tokens(own, row):
                        seen.append((float(loss.detach()), float(own.model(**plain).loss), float(whole)))
            return loss

    monkeypatch.setattr(trl, "SFTTrainer", Recording)
    train("sft", student, teacher, tmp_path / "out", recipe=row)
    ((found, expected, whole),) = seen
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - whole) > 1e-3


def test_the_divergence_is_that_of_the_student_under_the_recipe_and_the_whole_teacher(student, teacher, tmp_path, monkeypatch):
    seen, teaching = [], load_vlm(teacher, check=False).model

    class Answering(torch.nn.Module):
        """The student on a sequence whose end is an answer."""

        def __init__(self, model):
            super().__init__()
            self.model, self.prompt = model, None

        def forward(self, input_ids, pixel_values):
            labels = input_ids.clone()
            labels[:, : self.prompt] = -100
            return self.model(input_ids=input_ids, pixel_values=pixel_values, labels=labels)

    class Recording(trl.DistillationTrainer):
        def _compute_loss(self, model, inputs, total):
            found = super()._compute_loss(model, inputs, total)
            rows = []
            for row in range(len(inputs["prompt_ids"])):
                answering = Answering(model)
                answering.prompt = int(inputs["prompt_mask"][row].sum())
                names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "pixel_values")
                one = {name: inputs[name][row : row + 1] for name in names}
                rows.append((plain_divergence(answering, teaching, one, 1.0, 1.0), int(inputs["completion_mask"][row].sum())))
            mean = sum(value * n for value, n in rows) / sum(n for _, n in rows)
            seen.append((float(found[0].detach()), mean))
            return found

    monkeypatch.setattr(trl, "DistillationTrainer", Recording)
    train("on_policy", student, teacher, tmp_path / "out", recipe=RECIPE, max_new_tokens=4)
    assert len(seen) == BUDGET.steps
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_reference_is_the_student_under_the_recipe(student, teacher, tmp_path, monkeypatch):
    module = sys.modules["vlm_core.distill.preference"]
    seen, loss = [], module.preference_loss

    def recording(scores, reference, *terms):
        seen.append(reference)
        return loss(scores, reference, *terms)

    monkeypatch.setattr(module, "preference_loss", recording)
    train("preference", student, teacher, tmp_path / "out", recipe=RECIPE)
    subject = load_vlm(student, check=False)
    expected = []
    for row in preferences(7):
        prompt, chosen = (row[name][0]["content"] for name in ("prompt", "chosen"))
        encoded = subject.processor(images=row["images"], text=f"USER : <image> {prompt} ASSISTANT : {chosen} </s>", return_tensors="pt")
        n = len(subject.tokenizer(f"{chosen} </s>")["input_ids"])
        labels = encoded["input_ids"].clone()
        labels[:, :-n] = -100
        with keep_tokens(subject, RECIPE), torch.no_grad():
            expected.append(-n * float(subject.model(**encoded, labels=labels).loss))
    for reference in seen:
        for found in reference[0].tolist():
            assert any(found == pytest.approx(one, abs=1e-3) for one in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_reads_the_tower_trains(kind, student, teacher, tmp_path, watched):
    train(kind, student, teacher, tmp_path / "out", recipe=DropTokens(1, 0.3, VisionZip()))
    assert all(first > last for first, last, _ in watched if first > N_IMAGE)


def test_a_recipe_that_does_not_fit_is_refused_before_training(student, teacher, tmp_path):
    with pytest.raises(ValueError, match="outside this model's 3 layers"):
        train("sft", student, teacher, tmp_path / "out", recipe=DropTokens(9, 0.5))
    assert not (tmp_path / "out").exists()
