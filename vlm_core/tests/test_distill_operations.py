"""Operations by formula are those that torch counts in passes of the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_core import DropTokens, Subject, keep_tokens
from vlm_core.distill import Lora
from vlm_core.distill.operations import Operations
from vlm_core.sweeps.features import vision_tower
from vlm_core.tests.tiny import make_items, tiny_llava

N_IMAGE = 17
TEXT = 12
READ = 3


def counted(subject, work):
    """Operations that torch counts in the language model and its head, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def subject():
    """A tiny student whose attention is made of plain products, tower frozen."""
    model, processor = tiny_llava(layers=4, attention="eager", kv_heads=4, intermediate=96)
    vision_tower(made := Subject(model, processor)).requires_grad_(False)
    return made


def embedded(subject):
    """A prompt as the language model receives it, and how it comes to require gradients."""
    items = make_items(1)
    batch = subject.encode_items(items)
    return batch.inputs["input_ids"], subject.anatomy.embedding(batch.inputs["input_ids"])


def forward_backward(subject, backward=True):
    """A pass over the language model and the unembedding of the last tokens; gradients of whatever trains."""
    anatomy = subject.anatomy
    ids, _ = embedded(subject)

    def work():
        with torch.set_grad_enabled(backward):
            hidden = anatomy.language_model(inputs_embeds=anatomy.embedding(ids), use_cache=False).last_hidden_state
            logits = anatomy.head(hidden[0, -READ:])
        if backward:
            logits.sum().backward()

    return ids, work


def by_formula(subject, ids, gradients=True, row=None):
    return Operations(subject, row).rows(ids, torch.ones_like(ids), torch.tensor([READ]), gradients)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_in_which_everything_trains(subject, gradients):
    ids, work = forward_backward(subject, gradients)
    assert by_formula(subject, ids, gradients) == pytest.approx(counted(subject, work), rel=1e-9)


def test_everything_training_takes_three_forward_passes(subject):
    ids, _ = embedded(subject)
    assert by_formula(subject, ids) == 3 * by_formula(subject, ids, gradients=False)


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2)])
@pytest.mark.parametrize("modules", [("q_proj", "k_proj", "v_proj"), ("v_proj", "o_proj")])
def test_a_pass_in_which_adapters_train(subject, layers, modules):
    Lora(layers, rank=4, modules=modules).on(subject)
    ids, work = forward_backward(subject)
    found, expected = by_formula(subject, ids), counted(subject, work)
    assert expected <= found < 1.05 * expected
    assert found < 3 * by_formula(subject, ids, gradients=False)


def test_a_pass_under_a_recipe(subject):
    row = DropTokens(1, 0.3, "stride")
    batch = subject.encode_items(make_items(1))
    ids = batch.inputs["input_ids"]
    with keep_tokens(subject, row), torch.no_grad(), FlopCounterMode(subject.model, display=False) as counter:
        subject.model(**batch.inputs, logits_to_keep=READ)
    counts = counter.get_flop_counts()
    names = {module: name for name, module in subject.model.named_modules()}
    modules = (*subject.anatomy.layers, subject.anatomy.head)
    found = sum(sum(counts[f"{type(subject.model).__name__}.{names[module]}"].values()) for module in modules)
    assert by_formula(subject, ids, gradients=False, row=row) == found
    assert by_formula(subject, ids, gradients=False, row=row) < by_formula(subject, ids, gradients=False)


def test_tokens_that_go_on_from_known_ones(subject):
    batch = subject.encode_items(make_items(1))
    n = batch.inputs["input_ids"].shape[1]
    anatomy = subject.anatomy
    with torch.no_grad():
        cache = anatomy.language_model(inputs_embeds=anatomy.embedding(batch.inputs["input_ids"]), use_cache=True).past_key_values

        def work():
            more = anatomy.language_model(inputs_embeds=torch.zeros(1, 4, anatomy.hidden_size), past_key_values=cache).last_hidden_state
            anatomy.head(more[0, -2:])

        assert Operations(subject).continuation(4, n, N_IMAGE, 2, False) == counted(subject, work)


def test_padding_does_not_count(subject):
    ids, _ = embedded(subject)
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    valid = torch.cat([torch.zeros_like(ids[:, :5]), torch.ones_like(ids)], dim=1)
    assert Operations(subject).rows(padded, valid, torch.tensor([READ])) == by_formula(subject, ids)
