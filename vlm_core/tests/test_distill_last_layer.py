"""A loss that reads some tokens is the same, with its gradients, where the last layer's feed-forward runs on these alone."""

from __future__ import annotations

import contextlib
import importlib
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_core import DropTokens, Subject, distill, keep_tokens
from vlm_core.distill import Lora, last_layer
from vlm_core.tests.distill_students import save_student
from vlm_core.tests.family_models import BUILDERS
from vlm_core.tests.tiny import make_items, tiny_llava

READ = 3


@pytest.fixture
def subject():
    model, processor = tiny_llava(layers=3)
    return Subject(model, processor)


def passed(subject, inputs, alone):
    """Loss of the last three tokens of every prompt, its gradients by name, and operations."""
    ids = inputs["input_ids"]
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[:, -READ - 1 : -1] = True
    subject.model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        with last_layer.read_alone(subject, read) if alone else contextlib.nullcontext():
            logits = subject.model(**inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, -READ - 1 : -1].flatten(0, 1), ids[:, -READ:].flatten())
        loss.backward()
    grads = {name: weight.grad.clone() for name, weight in subject.model.named_parameters() if weight.grad is not None}
    return loss.detach(), grads, counter.get_total_flops()


def spared(subject, inputs):
    """Operations that are spared, where loss and gradients agree."""
    subject.model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    (whole, slow, most), (alone, fast, fewer) = (passed(subject, inputs, alone) for alone in (False, True))
    torch.testing.assert_close(alone, whole)
    assert fast.keys() == slow.keys()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-7, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    return most - fewer


@pytest.fixture
def inputs(subject):
    return subject.encode_items(make_items(3), padding_side="left").inputs


def test_loss_and_gradients_are_those_of_whole_passes(subject, inputs):
    linear = sum(weight.numel() for weight in subject.anatomy.mlps[-1].parameters())
    assert spared(subject, inputs) == 3 * 2 * linear * (inputs["input_ids"].numel() - 3 * READ)


def test_it_is_so_beside_adapters(subject, inputs):
    Lora((1, 2), rank=4).on(subject)
    assert spared(subject, inputs) > 0


def test_hooks_are_gone_afterwards(subject):
    module = subject.anatomy.mlps[-1]
    before = len(module._forward_hooks), len(module._forward_pre_hooks)
    with pytest.raises(KeyError), last_layer.read_alone(subject, torch.ones(1, 1, dtype=torch.bool)):
        raise KeyError
    assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == before


def test_a_sequence_of_another_length_is_computed_whole(subject, inputs):
    with keep_tokens(subject, DropTokens(1, 0.5, "stride")):
        assert spared(subject, inputs) == 0


@pytest.mark.parametrize("inside", [nn.LayerNorm(8), nn.ModuleList([nn.Linear(8, 8)]), nn.Identity()])
def test_what_may_mix_tokens_is_computed_whole(subject, inside, monkeypatch):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = inside

        def forward(self, hidden):
            assert hidden.shape[:-1] == (2, 3)
            return hidden

    monkeypatch.setattr(type(subject.anatomy), "mlps", property(lambda self: (mixed,)))
    mixed = Mixed()
    with last_layer.read_alone(subject, torch.zeros(2, 3, dtype=torch.bool)):
        mixed(torch.ones(2, 3, 8))


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_has_the_same_loss_and_gradients(family):
    model, inputs = BUILDERS[family]()
    assert spared(Subject(model, name=family), inputs) >= 0


def test_supervised_training_computes_it_where_the_loss_reads(tmp_path, monkeypatch):
    module, read = importlib.import_module("vlm_core.distill.sft"), []
    whole = last_layer.read_alone
    monkeypatch.setattr(module, "read_alone", lambda subject, mask: read.append(mask) or whole(subject, mask))
    items = make_items(6)
    data = distill.instruction_set(items, [item["answer"] for item in items])
    distill.sft(save_student(tmp_path / "student"), data, distill.Budget(2, 2), tmp_path / "out")
    supervised = json.loads((tmp_path / "out" / "training.json").read_text())["supervised_tokens"]
    assert sum(int(mask.sum()) for mask in read) == supervised > 0
    assert not any(mask[:, -1].any() for mask in read), "the last token has none after it to be supervised"
