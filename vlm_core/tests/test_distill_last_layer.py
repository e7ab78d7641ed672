"""A loss that reads some tokens is the same, with its gradients, where the last layer runs for these alone."""

from __future__ import annotations

import contextlib
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlm_core import DropTokens, MergeTokens, Subject, distill, keep_tokens
from vlm_core.distill import Lora, last_layer
from vlm_core.seam import seam
from vlm_core.tests.distill_students import preferences, save_student
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
    # The mathematics of attention, whose products are counted.
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
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


def spared_by_formula(subject, rows, tokens):
    """Feed-forward, output projection, and products of queries with keys and of weights with values; three times, with their gradients."""
    anatomy = subject.anatomy
    modules = anatomy.mlps[-1], anatomy.output_projection(anatomy.n_layers - 1)
    linear = sum(weight.numel() for module in modules for weight in module.parameters())
    return 3 * rows * (tokens - READ) * (2 * linear + 4 * anatomy.n_heads * anatomy.head_dim * tokens)


def test_loss_and_gradients_are_those_of_whole_passes(subject, inputs):
    rows, tokens = inputs["input_ids"].shape
    assert spared(subject, inputs) == spared_by_formula(subject, rows, tokens)


def test_prompts_of_one_length_have_no_mask(subject):
    (item,) = make_items(1)
    inputs = subject.encode_items([item, {**item, "id": "again"}]).inputs
    assert spared(subject, inputs) == spared_by_formula(subject, *inputs["input_ids"].shape)


def test_rows_may_read_as_many_tokens_as_they_like(subject, inputs):
    """As many as the row that reads most are asked; the others' stay zero."""
    read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    read[0, -2:], read[1, -9:-2:3] = True, True
    hidden = []
    for context in (contextlib.nullcontext(), last_layer.read_alone(subject, read)):
        with context, torch.no_grad():
            hidden.append(subject.anatomy.base(**inputs, use_cache=False).last_hidden_state)
    torch.testing.assert_close(hidden[1][read], hidden[0][read])
    assert not torch.isclose(hidden[1][~read], hidden[0][~read]).all(), "what is not read is not computed"


def attended(subject, read, query, mask, key=None, **rest):
    """How many queries the attention that was there is asked for."""
    asked = []

    def original(module, query, key, value, mask, **rest):
        asked.append(query.shape[2])
        return query.transpose(1, 2), None

    attention = subject.anatomy.attentions[-1]
    key = query if key is None else key
    last_layer._Read(read, attention).attend(original, attention, query, key, key, mask, **rest)
    (count,) = asked
    return count


def test_where_half_of_the_tokens_are_read_all_of_them_attend(subject):
    query, mask = torch.zeros(2, 2, 8, 4), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    for most, asked in ((8, 8), (4, 8), (3, 3), (0, 8)):
        read = torch.zeros(2, 8, dtype=torch.bool)
        read[1, :most] = True
        assert attended(subject, read, query, mask) == asked


def test_an_attention_that_goes_by_more_than_a_querys_row_is_whole(subject):
    """Random numbers, or a bias, of every query and key; no mask where nothing is masked."""
    read = torch.zeros(2, 8, dtype=torch.bool)
    read[:, -1] = True
    query, mask = torch.zeros(2, 2, 8, 4), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    assert attended(subject, read, query, mask, dropout=0.0) == attended(subject, read, query, None) == attended(subject, read, query, mask[:, :, :1]) == 1
    assert attended(subject, read, query, mask, dropout=0.1) == 8
    assert attended(subject, read, query, mask, position_bias=torch.zeros(1, 2, 8, 8)) == 8
    assert attended(subject, read, query, None, is_causal=False) == 8
    assert attended(subject, read, query, None, key=torch.zeros(2, 2, 9, 4)) == 8, "of no mask, which keys are whose is not told"
    subject.anatomy.attentions[-1].is_causal = False
    assert attended(subject, read, query, None) == 8 and attended(subject, read, query, mask) == 1


def test_eager_attention_gives_its_maps_whole(inputs):
    model, processor = tiny_llava(layers=3)
    model.set_attn_implementation({"text_config": "eager"})
    subject = Subject(model, processor)
    with torch.no_grad():
        plain = subject.model(**inputs, use_cache=False, output_attentions=True).attentions[-1]
        read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        read[:, -1] = True
        with last_layer.read_alone(subject, read):
            found = subject.model(**inputs, use_cache=False, output_attentions=True).attentions[-1]
    assert torch.equal(found, plain)


@pytest.mark.parametrize("modules", [("q_proj", "k_proj", "v_proj"), ("q_proj", "o_proj")])
def test_it_is_so_beside_adapters(subject, inputs, modules):
    whole = spared(subject, inputs)
    Lora((1, 2), rank=4, modules=modules).on(subject)
    # What is frozen has no gradients of its weights; adapters of the output projection are spared with it.
    assert whole / 2 < spared(subject, inputs) < whole


def test_hooks_are_gone_afterwards(subject):
    module = subject.anatomy.mlps[-1]
    before = len(module._forward_hooks), len(module._forward_pre_hooks)
    with pytest.raises(KeyError), last_layer.read_alone(subject, torch.ones(1, 1, dtype=torch.bool)):
        raise KeyError
    assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == before and seam._ATTENDING.get() == ()


def test_under_a_recipe_it_is_of_the_tokens_that_are_left(subject, inputs):
    whole = spared(subject, inputs)
    for layer in (0, 1):
        with keep_tokens(subject, DropTokens(layer, 0.5, "stride")):
            assert 0 < spared(subject, inputs) < whole
    with keep_tokens(subject, MergeTokens(2, 0.5)):
        assert 0 < spared(subject, inputs) < whole


def test_under_a_recipe_as_much_is_spared_as_there_is_left(subject):
    (item,) = make_items(1)
    inputs = subject.encode_items([item, {**item, "id": "again"}]).inputs
    image = int((inputs["input_ids"][0] == subject.anatomy.image_token_id).sum())
    rows, tokens = inputs["input_ids"].shape
    with keep_tokens(subject, DropTokens(1, 0.5, "stride")):
        assert spared(subject, inputs) == spared_by_formula(subject, rows, tokens - image + round(0.5 * image))


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (3, 40), (2, 30)])
def test_a_sequence_of_another_length_is_computed_whole(subject, inputs, shape, recipe):
    assert inputs["input_ids"].shape == (3, 30)
    read = torch.zeros(shape, dtype=torch.bool)
    with torch.no_grad(), keep_tokens(subject, DropTokens(1, 0.5, "stride")) if recipe else contextlib.nullcontext():
        whole = subject.model(**inputs, use_cache=False).logits
        with last_layer.read_alone(subject, read):
            assert torch.equal(subject.model(**inputs, use_cache=False).logits, whole)


def test_tokens_are_those_that_a_run_has_left(subject):
    """What a row is filled up with stands for a token and is none; rows that branch off are elements of another number and order."""
    tokens = SimpleNamespace(source=None, index=None, valid=None)
    tokens.on = lambda device: tokens
    read = torch.tensor([[True, False, True, False], [False, True, True, False]])
    run = SimpleNamespace(anatomy=subject.anatomy, tokens=tokens, shape=(2, 4), plain=True, hears_layers=False, attention_layer=lambda module: 2)
    reads = last_layer._Read(read, subject.anatomy.attentions[-1])
    with seam.active(run):
        assert reads.among((2, 4)) is read
        tokens.index, tokens.valid = torch.tensor([[0, 0, 2], [0, 1, 3]]), torch.tensor([[False, True, True], [True, True, True]])
        assert reads.among((2, 3)).tolist() == [[False, True, True], [False, True, False]]
        tokens.source = torch.tensor([1, 0])
        assert reads.among((2, 3)) is None


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


SHAPES = {"heads of their own": {}, "shared keys and values": {"kv_heads": 2}, "one key and value head": {"kv_heads": 1}}


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_length_read_what_they_like_with_the_same_gradients(shape, window):
    """By the kernels that training uses; padded on the left; one row reads nothing."""
    model, processor = tiny_llava(layers=3, **SHAPES[shape])
    subject = Subject(model.double(), processor)
    items = [{**item, "prompt": item["prompt"] + " is it red" * number} for number, item in enumerate(make_items(3))]
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in subject.encode_items(items, padding_side="left").inputs.items()}
    assert not inputs["attention_mask"].bool().all()
    read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    read[0, -1], read[1, [-9, -4, -2]] = True, True
    attention, found = subject.anatomy.attentions[-1], []

    def windowed(original, module, query, key, value, mask, **rest):
        near = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1 - window)
        return original(module, query, key, value, mask & near, **rest)

    for alone in (False, True):
        with contextlib.ExitStack() as stack:
            if alone:
                stack.enter_context(last_layer.read_alone(subject, read))
            if window is not None:  # where the family's own mask has one
                stack.enter_context(seam.attending(attention, windowed))
            model.zero_grad()
            model(**inputs, use_cache=False).logits[read].pow(2).sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_has_the_same_loss_and_gradients(family):
    model, inputs = BUILDERS[family]()
    assert spared(Subject(model, name=family), inputs) >= 0


@pytest.fixture
def asked(monkeypatch):
    """``asked(kind)``: layers of the model and masks of what training of this kind reads, as it goes on; the last layer runs for as many tokens."""

    def of(kind):
        module, read, whole = importlib.import_module(f"vlm_core.distill.{kind}"), [], last_layer.read_alone

        @contextlib.contextmanager
        def counted(subject, mask):
            read.append((subject.anatomy.n_layers, mask))
            ran = []
            with whole(subject, mask):
                modules = subject.anatomy.mlps[-1], subject.anatomy.output_projection(subject.anatomy.n_layers - 1)
                handles = [module.register_forward_pre_hook(lambda _, args: ran.append(args[0].flatten(0, -2).shape[0])) for module in modules]
                yield
            for handle in handles:
                handle.remove()
            assert ran[:2] == [int(mask.sum())] * 2

        monkeypatch.setattr(module, "read_alone", counted)
        return read

    return of


def test_supervised_training_computes_it_where_the_loss_reads(tmp_path, asked):
    read, items = asked("sft"), make_items(6)
    data = distill.instruction_set(items, [item["answer"] for item in items])
    distill.sft(save_student(tmp_path / "student"), data, distill.Budget(2, 2), tmp_path / "out")
    supervised = json.loads((tmp_path / "out" / "training.json").read_text())["supervised_tokens"]
    assert sum(int(mask.sum()) for _, mask in read) == supervised > 0
    assert not any(mask[:, -1].any() for _, mask in read), "the last token has none after it to be supervised"


def test_preferences_compute_it_where_answers_begin(tmp_path, asked):
    read, data = asked("preference"), preferences(6)
    distill.preference(save_student(tmp_path / "student"), data, distill.Budget(2, 3), tmp_path / "out", image_term=1.0)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["shared_prompts"]
    assert len(read) == 5, "a batch to see whether prompts can be shared, against one that is whole; two of the reference, two of training"
    for _, mask in read:  # three rows, with their own picture and another
        assert len(mask) == 6 and mask[:, -1].all() and not mask[:, :-1].any()


def test_preferences_under_a_recipe_compute_it_where_answers_are_read(tmp_path, asked):
    read, data = asked("preference"), preferences(6)
    distill.preference(save_student(tmp_path / "student"), data, distill.Budget(2, 3), tmp_path / "out", recipe=DropTokens(1, 0.5, "stride"))
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert not found["shared_prompts"] and sum(int(mask.sum()) for _, mask in read[-2:]) == found["supervised_tokens"] > 0


def test_on_policy_both_models_compute_it_where_the_student_spoke(tmp_path, asked):
    read, data = asked("on_policy"), distill.prompt_set(make_items(6))
    student, teacher = save_student(tmp_path / "student"), save_student(tmp_path / "teacher", seed=7, layers=3)
    distill.on_policy(student, teacher, data, distill.Budget(2, 3), tmp_path / "out", max_new_tokens=4)
    supervised = json.loads((tmp_path / "out" / "training.json").read_text())["supervised_tokens"]
    for layers in (2, 3):
        assert sum(int(mask.sum()) for of, mask in read if of == layers) == supervised > 0
