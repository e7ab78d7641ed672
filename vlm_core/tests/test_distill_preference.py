"""Preference training: its loss is the papers', its numbers those of TRL, what it shares and computes once changes nothing."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
import torch
import trl
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import add_fused_lm_head

from vlm_core import evaluate, load_vlm
from vlm_core.distill import Budget, TrainingDiverged, preference, swapped_images
from vlm_core.distill.answers import SharedPrompts, shared, whole_sequences
from vlm_core.distill.preference import preference_loss
from vlm_core.tests.distill_students import TEMPLATE, preferences, save_student, weights
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items

MODULE = sys.modules["vlm_core.distill.preference"]
BUDGET = Budget(steps=3, batch_size=4, learning_rate=1e-3)
SHARED = ("llava", "vipllava", "llava_next", "llava_onevision", "mistral3", "internvl", "idefics2", "idefics3", "smolvlm", "gemma3")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny checkpoint on disk."""
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def data():
    """Ten pairs."""
    return preferences(10)


def plain_score(model, processor, image, prompt, answer):
    """Summed log-probability of an answer's words and end, token by token, without padding."""
    ids = processor(images=[image], text=f"USER : <image> {prompt} ASSISTANT :", return_tensors="pt", add_special_tokens=False)
    said = processor.tokenizer(f"{answer} </s>", add_special_tokens=False)["input_ids"]
    total, sequence = 0.0, ids["input_ids"]
    for token in said:
        with torch.no_grad():
            logits = model(input_ids=sequence, pixel_values=ids["pixel_values"]).logits[0, -1]
        total += float(logits[token] - torch.logsumexp(logits, 0))
        sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)
    return total


def texts(row):
    return tuple(row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_term", "anchor_term", "answer_term"), [(0.0, 0.0, 0.0), (0.7, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.6), (1.0, 1.0, 1.0)]
)
def test_the_loss_is_that_of_the_papers(image_term, anchor_term, answer_term):
    generator = torch.Generator().manual_seed(0)
    scores, reference = (-10 * torch.rand(3, 5, generator=generator) for _ in range(2))
    lengths = torch.tensor([1, 2, 3, 5, 8])
    beta, terms = 0.3, []
    for w, l, o, rw, rl, ro, n in torch.cat([scores, reference, lengths[None]]).T.tolist():
        log_sigmoid = [
            -math.log1p(math.exp(-beta * x)) for x in ((w - rw) - (l - rl), (w - rw) - (o - ro), w - rw)
        ]
        terms.append(-log_sigmoid[0] - image_term * log_sigmoid[1] - anchor_term * log_sigmoid[2] - answer_term * w / n)
    loss, margins = preference_loss(scores, reference, beta, image_term, anchor_term, answer_term, lengths)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert margins.tolist() == pytest.approx((beta * (scores - reference)[0] - beta * (scores - reference)[1]).tolist(), rel=1e-5)


def test_three_steps_are_those_of_trls_trainer_with_a_reference_model(student, data, tmp_path, monkeypatch):
    ours = preference(student, data, BUDGET, tmp_path / "ours", beta=0.5, seed=3)
    monkeypatch.setattr(MODULE, "_shares", lambda found: False)
    whole = preference(student, data, BUDGET, tmp_path / "whole", beta=0.5, seed=3)
    assert [json.loads((out / "training.json").read_text())["shared_prompts"] for out in (ours, whole)] == [True, False]
    model, reference = (AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32) for _ in range(2))
    model.model.vision_tower.requires_grad_(False)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=1,
        lr_scheduler_type="linear", adam_beta2=0.98, weight_decay=0.01, seed=3, bf16=False, gradient_checkpointing=False, use_cpu=True,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, max_length=None, beta=0.5, dataloader_drop_last=True,
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(student)
    trainer = trl.DPOTrainer(model, ref_model=reference, args=config, train_dataset=data, processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    theirs = {name: tensor for name, tensor in model.state_dict().items()}
    moved = max(float((theirs[name] - tensor).abs().max()) for name, tensor in load_vlm(student, check=False).model.state_dict().items())
    for out in (ours, whole):
        assert json.loads((out / "training.json").read_text())["losses"] == pytest.approx(losses, rel=1e-4)
        found = load_vlm(out, check=False).model.state_dict()
        apart = max(float((theirs[name] - tensor).abs().max()) for name, tensor in found.items())
        assert apart < 0.02 * moved  # Adam divides rounding by rounding where a gradient is next to nothing


# -- what is computed once --------------------------------------------------------------------------------------------


def test_what_the_student_said_before_and_of_another_picture_is_computed_once(student, data, tmp_path, monkeypatch):
    seen = []

    def recording(scores, reference, *terms):
        seen.append(reference)
        return preference_loss(scores, reference, *terms)

    monkeypatch.setattr(MODULE, "preference_loss", recording)
    preference(student, data, BUDGET, tmp_path / "out", image_term=1.0, seed=4)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(student)
    expected = []
    for row, other in zip(data, swapped_images(data, 4), strict=True):
        prompt, chosen, rejected = texts(row)
        assert row["images"][0].tobytes() != other["images"][0].tobytes()
        asked = ((row, chosen), (row, rejected), (other, chosen))
        expected.append([plain_score(model, processor, one["images"][0], prompt, answer) for one, answer in asked])
    assert len(seen) == BUDGET.steps
    for reference in seen:
        for found in reference.T.tolist():
            assert any(found == pytest.approx(one, abs=1e-3) for one in expected)


def test_the_answers_own_loss_is_divided_by_its_tokens(student, data, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(MODULE, "preference_loss", lambda *args: lengths.append(args[-1].tolist()) or preference_loss(*args))
    preference(student, data, BUDGET, tmp_path / "out", answer_term=1.0, seed=4)
    tokenizer = AutoProcessor.from_pretrained(student).tokenizer
    known = [len(tokenizer(f" {texts(row)[1]} </s>")["input_ids"]) for row in data]
    assert len(set(known)) > 1 and {length for step in lengths for length in step} <= set(known) and len({x for step in lengths for x in step}) > 1


@pytest.mark.parametrize("name", SHARED)
def test_answers_to_shared_prompts_score_as_whole_sequences_do(name):
    """Values, and gradients of every weight."""
    processor, model = PROCESSORS[name]()
    image = re.search(r"'image' %}(.*?){%", processor.chat_template).group(1)
    processor.chat_template = TEMPLATE.replace("<image> ", image)
    data, collator = preferences(6), DataCollatorForVisionPreference(processor)
    add_fused_lm_head(model)
    model.train()
    own, other = (dict(collator([some[row] for row in (0, 1, 5)])) for some in (data, swapped_images(data, 0)))
    weights = torch.linspace(-1, 2, 9)
    gradients = []
    for share in (False, True):
        model.zero_grad()
        if share:
            scores = shared(model, SharedPrompts.of([own, other], [2, 1], processor.tokenizer.pad_token_id))
        else:
            scores = torch.cat([whole_sequences(model, own), whole_sequences(model, other)[:3]])
        (weights * scores).sum().backward()
        gradients.append((scores.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (whole, expected), (scores, found) = gradients
    torch.testing.assert_close(scores, whole, rtol=1e-4, atol=1e-4)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_prompts_that_cannot_be_shared_are_not(student, data, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "shared", lambda model, prompts: 1.01 * shared(model, prompts))
    out = preference(student, data, BUDGET, tmp_path / "out")
    assert json.loads((out / "training.json").read_text())["shared_prompts"] is False


# -- what is left -----------------------------------------------------------------------------------------------------


def test_the_chosen_answer_gains_on_the_rejected_one_and_the_tower_stays(student, data, tmp_path):
    out = preference(student, data, Budget(20, 5, 2e-3), tmp_path / "out", seed=1)
    log = json.loads((out / "training.json").read_text())
    assert log["losses"][-1] < 0.8 * log["losses"][0]
    assert log["kind"] == "preference" and log["beta"] == 0.1 and log["image_term"] == 0.0 and log["images"] == 100
    before, after = weights(student), weights(out)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("vision_tower" in name), name
    assert len(evaluate(load_vlm(out), make_items(4))) == 4


def test_the_image_term_makes_the_own_picture_matter(student, data, tmp_path):
    def gap(folder):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        processor, gaps = AutoProcessor.from_pretrained(folder), []
        for row, other in zip(data, swapped_images(data, 2), strict=True):
            prompt, chosen, _ = texts(row)
            own, swapped = (plain_score(model, processor, one["images"][0], prompt, chosen) for one in (row, other))
            gaps.append(own - swapped)
        return sum(gaps) / len(gaps)

    budget = Budget(20, 5, 2e-3)
    without = preference(student, data, budget, tmp_path / "without", seed=2)
    with_term = preference(student, data, budget, tmp_path / "with", seed=2, image_term=1.0)
    assert gap(with_term) > gap(without) + 1


def test_diverged_training_leaves_nothing(student, data, tmp_path):
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        preference(student, data, Budget(4, 4, 1e40), tmp_path / "out")
    assert not (tmp_path / "out" / "training.json").exists()


def test_an_image_term_needs_a_second_picture(student, data, tmp_path):
    with pytest.raises(ValueError, match="no other to swap it with"):
        preference(student, data.select([0]), BUDGET, tmp_path / "out", image_term=1.0)
