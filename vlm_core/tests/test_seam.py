"""The seam changes nothing by itself, and exactly what it says otherwise. One test per trap of transformers."""

from __future__ import annotations

import contextvars
import copy
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vlm_core import (
    AttentionMass,
    Batch,
    DropTokens,
    FullAttention,
    GaussianNoise,
    HeadMeans,
    HiddenStates,
    ImageAttention,
    ImageKVMeans,
    KnockOut,
    MeanHeads,
    Patch,
    ReplaceImageKV,
    Steer,
    Subject,
    Vector,
    ZeroHeads,
    observe,
    sweep,
)
from vlm_core.errors import SubjectError
from vlm_core.observation.sinks import SinkMass, Sinks
from vlm_core.seam.attending import AttentionEdits
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import ATTENTION_NAMES, active, current_run, original_attention
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows
from vlm_core.tests.family_models import BUILDERS, IMAGE_TOKEN
from vlm_core.tests.tiny import make_items, tiny_llava, tiny_subject

NO_OPS = {
    "none": None,
    "empty tuple": (),
    "no heads": ZeroHeads(()),
    "keep all": DropTokens(1, 1.0),
    "no layers": KnockOut("text", "image", ()),
}


def logits(subject, batch):
    with torch.inference_mode():
        return subject.model(**batch.inputs).logits


def text_logits(subject, batch):
    return logits(subject, batch)[~batch.image & batch.valid]


@pytest.fixture(scope="module")
def batch(subject):
    return subject.encode_items(make_items(4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("no_op", NO_OPS)
def test_a_no_op_is_bit_identical_to_the_model_without_seam(attention, no_op):
    model, processor = tiny_llava(attention=attention)
    subject = Subject(model, processor)
    batch = subject.encode_items(make_items(4))
    with subject.intervene(NO_OPS[no_op], batch):
        seen = logits(subject, batch)
    subject.seam.remove()
    assert model.config.text_config._attn_implementation == attention
    assert torch.equal(seen, logits(subject, batch))


def test_a_no_op_observed_is_bit_identical(subject, batch):
    plain = logits(subject, batch)
    with subject.intervene(None, batch, observers=[ImageAttention(), HiddenStates()]) as run:
        assert torch.equal(logits(subject, batch), plain)
    assert len(run.records[0]) == subject.anatomy.n_layers


def o_proj_oracle(subject, batch, layer, head, vector):
    size = subject.anatomy.head_dim

    def overwrite(module, args):
        hidden = args[0].clone()
        hidden[..., head * size : (head + 1) * size] = vector
        return (hidden,)

    handle = subject.anatomy.output_projection(layer).register_forward_pre_hook(overwrite)
    try:
        return logits(subject, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
@pytest.mark.parametrize("head", [(0, 0), (1, 3), (2, 2)])
def test_zeroing_a_head_equals_an_output_projection_hook(request, fixture, head):
    subject = request.getfixturevalue(fixture)
    batch = subject.encode_items(make_items(4))
    with subject.intervene(ZeroHeads([head]), batch):
        seen = logits(subject, batch)
    assert torch.equal(seen, o_proj_oracle(subject, batch, *head, 0.0))
    assert not torch.equal(seen, logits(subject, batch))


def test_mean_heads_equals_an_output_projection_hook(subject, batch):
    values = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    with subject.intervene(MeanHeads([(1, 2)], HeadMeans(values)), batch):
        seen = logits(subject, batch)
    assert torch.equal(seen, o_proj_oracle(subject, batch, 1, 2, values[1, 2]))


def replaced_keys_and_values(monkeypatch, subject, batch, layer, head, means):
    """Oracle without the seam: overwrite image keys after rotary embedding and image values after v_proj."""
    import transformers.models.llama.modeling_llama as modelling

    rotate, calls, size = modelling.apply_rotary_pos_emb, [], subject.anatomy.head_dim

    def rotate_and_replace(query, key, cos, sin, *args, **kwargs):
        query, key = rotate(query, key, cos, sin, *args, **kwargs)
        if len(calls) == layer:
            key = key.clone()
            key[:, head] = torch.where(batch.image[:, :, None], means.keys[layer, head], key[:, head])
        calls.append(layer)
        return query, key

    def replace_values(module, args, output):
        output = output.clone()
        columns = slice(head * size, (head + 1) * size)
        output[..., columns] = torch.where(batch.image[:, :, None], means.values[layer, head], output[..., columns])
        return output

    monkeypatch.setattr(modelling, "apply_rotary_pos_emb", rotate_and_replace)
    handle = subject.anatomy.attentions[layer].v_proj.register_forward_hook(replace_values)
    # Padding on the left is not counted: replaced keys are rotated already and would shift against the others.
    positions = (batch.valid.long().cumsum(1) - 1).clamp(min=0)
    try:
        return logits(subject, replace(batch, inputs={**batch.inputs, "position_ids": positions}))
    finally:
        handle.remove()
        monkeypatch.undo()


def test_replacing_image_keys_and_values_equals_overwriting_them_by_hand(monkeypatch, subject, batch, means):
    with subject.intervene(ReplaceImageKV([(1, 2)], means), batch):
        seen = logits(subject, batch)
    expected = replaced_keys_and_values(monkeypatch, subject, batch, 1, 2, means)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert (seen - logits(subject, batch)).abs().max() > 1e-3


def test_replacing_under_grouped_queries_touches_one_query_head_only():
    grouped, processor = tiny_llava(kv_heads=2, seed=1)
    full, _ = tiny_llava(kv_heads=4, seed=1)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "language_model" in name:
            state[name] = state[name].view(2, 1, 8, -1).expand(2, 2, 8, -1).reshape(32, -1)
    full.load_state_dict(state)
    grouped, full = Subject(grouped, processor), Subject(full, processor)
    batch = grouped.encode_items(make_items(4))
    generator = torch.Generator().manual_seed(0)
    means = ImageKVMeans(torch.randn(3, 4, 8, generator=generator), torch.randn(3, 4, 8, generator=generator))
    for heads in ([(1, 1)], [(0, 2), (2, 3)]):
        with grouped.intervene(ReplaceImageKV(heads, means), batch):
            seen = logits(grouped, batch)
        with full.intervene(ReplaceImageKV(heads, means), batch):
            expected = logits(full, batch)
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
        assert (seen - logits(grouped, batch)).abs().max() > 1e-3


def masked_layers_oracle(subject, batch, allowed_in):
    """Oracle without the seam: hand every decoder layer its own boolean mask ``[batch, 1, query, key]``."""

    def give_mask(layer):
        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": allowed_in(layer)}

        return hook

    handles = [
        module.register_forward_pre_hook(give_mask(layer), with_kwargs=True)
        for layer, module in enumerate(subject.anatomy.layers)
    ]
    try:
        return text_logits(subject, batch)
    finally:
        for handle in handles:
            handle.remove()


def causal(batch):
    n = batch.valid.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & batch.valid[:, None, None, :]


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
def test_knocking_out_edges_equals_an_explicit_mask(request, fixture):
    """Trap 2: sdpa may pass no mask at all, and an eager mask is additive."""
    subject = request.getfixturevalue(fixture)
    batch = subject.encode_items(make_items(6)[1:3])
    assert bool(batch.valid.all()), "without padding, sdpa_mask gives None"
    oracle = request.getfixturevalue("gqa_subject" if fixture == "gqa_subject" else "subject")
    cut = (~batch.image)[:, None, :, None] & batch.image[:, None, None, :]
    expected = masked_layers_oracle(
        oracle, batch, lambda layer: causal(batch) & ~cut if layer in (1, 2) else causal(batch)
    )
    with subject.intervene(KnockOut("text", "image", (1, 2)), batch):
        seen = logits(subject, batch)[~batch.image & batch.valid]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_padding_survives_a_knock_out(subject):
    items = make_items(6)
    both = subject.encode_items(items)
    assert not bool(both.valid.all())
    with subject.intervene(KnockOut("last", "image", (0, 1, 2)), both):
        together = logits(subject, both)[:, -1]
    for row, item in enumerate(items):
        one = subject.encode_items([item])
        with subject.intervene(KnockOut("last", "image", (0, 1, 2)), one):
            torch.testing.assert_close(together[row], logits(subject, one)[0, -1], rtol=1e-4, atol=1e-4)


def test_an_unmasked_name_leaks_and_ours_do_not(subject, batch):
    """Trap 1: an attention name without a mask function silently gets no causal mask under eager attention."""
    for name in ATTENTION_NAMES.values():
        assert name in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    model, processor = tiny_llava(attention="eager")
    AttentionInterface.register("test_unmasked", _eager_by_module)
    leaking = Subject(model, processor)
    leaking.seam.remove()
    model.set_attn_implementation({"text_config": "test_unmasked"})
    changed = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 7
    with torch.inference_mode():
        leak = (model(**batch.inputs).logits - model(**changed).logits)[:, :-1].abs().max()
        sound = (subject.model(**batch.inputs).logits - subject.model(**changed).logits)[:, :-1].abs().max()
    assert leak > 0.1
    assert sound < 1e-5
    AttentionMaskInterface._global_mapping.pop("test_unmasked", None)
    AttentionInterface._global_mapping.pop("test_unmasked")


def _eager_by_module(module, *args, **kwargs):
    return original_attention(module, "eager")(module, *args, **kwargs)


def test_names_avoid_substring_dispatch():
    """Trap 3."""
    for name in ATTENTION_NAMES.values():
        assert not any(part in name for part in ("sdpa", "flash", "flex_attention", "paged"))


@pytest.mark.parametrize("fixture", ["subject", "eager_subject"])
def test_attention_read_at_the_seam_equals_eager_output_attentions(request, fixture):
    """Trap 4: under sdpa, ``output_attentions`` gives nothing; the seam reads the same numbers there."""
    model, processor = tiny_llava(attention="eager")
    plain = Subject(model, processor)
    plain.seam.remove()
    items = make_items(6)
    seen = observe(request.getfixturevalue(fixture), items, ImageAttention("last"))
    for row, item in enumerate(items):
        batch = plain.encode_items([item])
        with torch.inference_mode():
            attentions = model(**batch.inputs, output_attentions=True).attentions
        expected = torch.stack([layer[0, :, -1][:, batch.image[0]] for layer in attentions])
        torch.testing.assert_close(torch.from_numpy(seen[row]), expected, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_before_the_final_norm_and_after_edits(subject):
    """Traps 5 and 6: transformers' last hidden state is normed, ours is not, and its hooks may run before an edit."""
    items = make_items(2)
    batch = subject.encode_items(items[:1])
    seen = torch.from_numpy(observe(subject, items[:1], HiddenStates(positions="last")))[0]
    with torch.inference_mode():
        outputs = subject.model(**batch.inputs, output_hidden_states=True)
    own = torch.stack([state[0, -1] for state in outputs.hidden_states])
    torch.testing.assert_close(seen[:-1], own[:-1], rtol=1e-4, atol=1e-5)
    assert (seen[-1] - own[-1]).abs().max() > 1e-3
    with torch.inference_mode():
        torch.testing.assert_close(subject.anatomy.norm(seen[-1]), own[-1], rtol=1e-4, atol=1e-5)
    edited = torch.from_numpy(observe(subject, items[:1], HiddenStates(), ZeroHeads([(1, 0)])))[0]
    torch.testing.assert_close(edited[:2], seen[:2], rtol=1e-4, atol=1e-5)
    assert (edited[2] - seen[2]).abs().max() > 1e-3


def test_transformers_own_hooks_are_left_alone(subject, batch):
    """Trap 5: what ``hidden_states`` shows around an edit hangs on the order of hooks; what the seam shows and does does not."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    heard = []
    handle = subject.anatomy.layers[1].register_forward_hook(lambda *_: heard.append(1))
    try:
        with torch.inference_mode():
            plain = subject.model(**batch.inputs, output_hidden_states=True)
            with subject.intervene(Steer(1, direction), batch, observers=[HiddenStates(positions="last")]) as run:
                edited = subject.model(**batch.inputs, output_hidden_states=True)
                assert torch.equal(edited.logits, subject.model(**batch.inputs).logits)
        before = plain.hidden_states[1][:, -1]
        torch.testing.assert_close(run.record(0, 1), before + direction, rtol=1e-4, atol=1e-4)
        kept = edited.hidden_states[1][:, -1]
        assert any(torch.allclose(kept, state, atol=1e-4) for state in (before, before + direction))
        assert torch.equal(subject.model(**batch.inputs, output_hidden_states=True).hidden_states[2], plain.hidden_states[2])
        assert len(heard) == 4
    finally:
        handle.remove()


def test_giving_the_model_back_takes_away_no_hooks_but_the_seams_own(batch):
    """Trap 5: LLaVA's own vision path reads through hooks, and a user's belong to the user."""
    model, processor = tiny_llava()
    heard = []
    for module in (model.model.language_model.layers[1], model.model.language_model.layers[1].mlp):
        module.register_forward_hook(lambda *_: heard.append(1))
        module.register_forward_pre_hook(lambda *_: heard.append(1))
    before = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    subject = Subject(model, processor)
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] != before
    subject.seam.remove()
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == before
    logits(subject, batch)
    assert len(heard) == 4


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_image_tokens_see_each_other_both_ways_where_the_model_says_so(name):
    """Trap 7: only the model's own mask is right, in the row engine too."""
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    with torch.inference_mode():
        (sequence,) = capture(subject, inputs)
        first = int(sequence.image.int().argmax())
        changed = capture(subject, inputs)[0]
        changed.embeds[first + 1] += 1.0
        for plan in (None, ZeroHeads([(1, 0)]), KnockOut("question", "bos", (1,))):
            hidden, _ = forward_rows(
                subject, [sequence, changed], np.arange(2), [plan] * 2, [0, 0], (np.arange(2), np.full(2, first))
            )
            assert (hidden[0] - hidden[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_towers_that_call_the_interface_once_per_image_chunk_are_left_alone(monkeypatch, name):
    """Trap 8: a Qwen-VL tower attends image chunk by image chunk, through the same interface."""
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    image = inputs["input_ids"] == IMAGE_TOKEN
    both = {key: torch.cat([value] * 2) for key, value in inputs.items()}
    batch = Batch(both, torch.cat([image] * 2), torch.ones_like(torch.cat([image] * 2)))
    visited = []
    attend = AttentionEdits.attend
    monkeypatch.setattr(
        AttentionEdits, "attend", lambda self, layer, *args, **kwargs: visited.append(layer) or attend(self, layer, *args, **kwargs)
    )
    grids = {"image_grid_thw": both["image_grid_thw"]}
    with torch.inference_mode():
        plain = model.get_image_features(both["pixel_values"], **grids).pooler_output
        with subject.intervene(ZeroHeads(subject.heads), batch):
            seen = model.get_image_features(both["pixel_values"], **grids).pooler_output
            assert not visited
            model(**both)
    assert visited == list(range(subject.anatomy.n_layers))
    assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))


def test_the_vision_tower_is_left_alone(subject, batch):
    """Trap 8: a vision tower calls the same interface; only the language model's attentions are in a run."""
    assert subject.model.config.vision_config._attn_implementation == "sdpa"
    with torch.inference_mode():
        plain = subject.model.get_image_features(batch.inputs["pixel_values"]).pooler_output
        with subject.intervene(ZeroHeads(subject.heads), batch):
            seen = subject.model.get_image_features(batch.inputs["pixel_values"]).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))


def test_another_subject_inside_a_run_is_left_alone(subject, gqa_subject, batch):
    expected = logits(gqa_subject, batch)
    with subject.intervene(ZeroHeads(subject.heads), batch):
        assert torch.equal(logits(gqa_subject, batch), expected)


def test_a_run_ends_with_its_context_even_after_an_error(subject, batch):
    plain = logits(subject, batch)
    hooks = [len(module._forward_pre_hooks) for module in subject.model.modules()]
    with pytest.raises(RuntimeError, match="broken"), subject.intervene(ZeroHeads([(0, 0)]), batch):
        raise RuntimeError("broken")
    assert current_run() is None
    assert torch.equal(logits(subject, batch), plain)
    assert hooks == [len(module._forward_pre_hooks) for module in subject.model.modules()]


def test_a_run_is_let_go_of_at_once(subject, batch):
    """Nothing of it waits for the garbage collector: a run holds activations, and passes come by the thousand."""
    gc.disable()
    try:
        for plan, observers in ((ZeroHeads([(0, 0)]), ()), (None, [AttentionMass()]), (DropTokens(1, 0.5), [AttentionMass()])):
            with subject.intervene(plan, batch, observers=observers) as run:
                logits(subject, batch)
            gone = weakref.ref(run)
            del run
            assert gone() is None
    finally:
        gc.enable()


def test_attention_and_mlp_are_hooked_from_the_first_run_that_hears_them(batch):
    """Ahead of hooks that are there already: whoever looks sees what the seam left."""
    model, processor = tiny_llava()
    mlp = model.model.language_model.layers[1].mlp
    early, late = [], []
    mlp.register_forward_hook(lambda module, args, output: early.append(output))
    subject = Subject(model, processor)
    mlp.register_forward_hook(lambda module, args, output: late.append(output))

    def hooks():
        return sum(len(module._forward_hooks) for module in (*subject.anatomy.attentions, *subject.anatomy.mlps))

    for plan in (None, ZeroHeads([(0, 0)]), Steer(1, Vector(torch.ones(32)))):
        with subject.intervene(plan, batch, observers=[AttentionMass()]):
            logits(subject, batch)
    assert hooks() == 2
    noise = Patch("mlp", (1,), GaussianNoise(1.0, 0))
    for _ in range(2):
        with subject.intervene(noise, batch) as run:
            logits(subject, batch)
        assert hooks() == 2 + 2 * subject.anatomy.n_layers
    logits(subject, batch)
    for seen in (early, late):
        assert torch.equal(seen[3], seen[4]) and (seen[3] - seen[5]).abs().mean() > 0.1
    subject.seam.remove()
    with pytest.raises(SubjectError, match="seam of this model was removed"), active(run):
        pass
    assert hooks() == 2


def test_layers_are_hooked_only_for_runs_that_hear_them(batch):
    """A run that does nothing, or looks at attention alone, leaves no hook on a layer; one that is still going on keeps its own."""
    model, processor = tiny_llava()
    first = model.model.language_model.layers[0]
    subject = Subject(model, processor)
    seen = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in (*subject.anatomy.layers, subject.anatomy.norm)) - 1

    every = subject.anatomy.n_layers + 1
    assert hooks() == 0
    plain = logits(subject, batch)
    with subject.intervene(Steer(0, Vector(torch.ones(32))), batch):
        assert hooks() == every
        with subject.intervene(None, batch):
            assert hooks() == every and torch.equal(logits(subject, batch), plain)
        logits(subject, batch)
    assert (seen[2] - seen[1]).abs().mean() > 0.1  # ahead of a hook that was there before
    for observers, expected in ([], 0), ([AttentionMass()], 0), ([HiddenStates()], every), ([SinkMass(sinks=Sinks((0,), 0.0))], every):
        with subject.intervene(None, batch, observers=observers):
            assert hooks() == expected and torch.equal(logits(subject, batch), plain)


@pytest.mark.parametrize("plan", [None, ZeroHeads([(0, 0)])])
def test_another_batch_than_the_runs_is_refused(subject, batch, plan):
    shorter = {name: value[:, :-1] if name != "pixel_values" else value for name, value in batch.inputs.items()}
    with subject.intervene(plan, batch), pytest.raises(ValueError, match="pass the batch that the model is called with"):
        subject.model(**shorter)


def test_two_plans_in_two_threads(subject, batch):
    plans = {"zero": ZeroHeads([(0, 1)]), "drop": DropTokens(1, 0.25), "none": None}
    expected = {}
    for name, plan in plans.items():
        with subject.intervene(plan, batch):
            expected[name] = logits(subject, batch)
    seen, together = {}, threading.Barrier(len(plans))

    def work(name):
        with subject.intervene(plans[name], batch):
            together.wait(10)
            seen[name] = [logits(subject, batch) for _ in range(5)]
            together.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in plans:
        assert all(torch.equal(one, expected[name]) for one in seen[name])


def test_a_different_intervention_per_row(subject, batch, means):
    rows = [ZeroHeads([(0, 1)]), None, ReplaceImageKV([(1, 0), (2, 2)], means), (ZeroHeads([(2, 0)]),)]
    with subject.intervene(rows, batch):
        together = logits(subject, batch)
    for row, intervention in enumerate(rows):
        with subject.intervene(intervention, batch):
            alone = logits(subject, batch)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-5, atol=1e-5)


def test_a_batch_of_another_shape_is_refused(subject, batch):
    other = subject.encode_items(make_items(2))
    with subject.intervene(None, batch), pytest.raises(ValueError, match="was made for"):
        logits(subject, other)


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (ZeroHeads([(9, 0)]), "outside this model's 3 layers x 4 heads"),
        (DropTokens(3, 0.5), "outside this model's 3 layers"),
        (KnockOut("text", "image", (3,)), "outside this model's 3 layers"),
        ((DropTokens(1, 0.5), DropTokens(1, 0.2)), "at most once per layer"),
    ],
)
def test_what_the_model_does_not_have_is_refused(subject, batch, intervention, message):
    with pytest.raises(ValueError, match=message), subject.intervene(intervention, batch):
        pass


def test_a_subject_can_be_forgotten():
    subject = tiny_subject()
    model = weakref.ref(subject.model)
    del subject
    gc.collect()
    assert model() is None


def test_a_seam_that_is_gone_is_said_and_put_back(batch):
    """Silence would look like heads that do nothing."""
    model, processor = tiny_llava()
    subject = Subject(model, processor)
    plain, plan = logits(subject, batch), ZeroHeads(subject.heads)
    with subject.intervene(plan, batch):
        expected = logits(subject, batch)
    model.set_attn_implementation("eager")
    with pytest.raises(SubjectError, match="attention 'eager' was set on this model"), subject.intervene(plan, batch):
        pass
    again = Subject(model, processor)
    assert again.seam is not subject.seam and again.seam.original == "eager"
    with again.intervene(plan, batch):
        torch.testing.assert_close(logits(again, batch), expected)
    subject.seam.remove()  # of a seam that is gone already: nothing more
    with again.intervene(plan, batch):
        torch.testing.assert_close(logits(again, batch), expected)
    again.seam.remove()
    torch.testing.assert_close(logits(again, batch)[:, -1], plain[:, -1])
    with pytest.raises(SubjectError, match="seam of this model was removed"), again.intervene(plan, batch):
        pass


def test_hooks_that_others_clear_are_put_back_and_stay_ahead(batch):
    subject = Subject(*tiny_llava())
    push, seen = Steer(0, Vector(torch.full((32,), 5.0))), []
    with subject.intervene(push, batch):
        expected = logits(subject, batch)
    for module in subject.model.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    with subject.intervene(push, batch):
        assert torch.equal(logits(subject, batch), expected)
    subject.anatomy.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].mean().item()), prepend=True)
    for before in (push, None, push):
        with subject.intervene(before, batch):
            logits(subject, batch)
    assert seen[0] == seen[2] and seen[0] - seen[1] > 4.0


def test_hooks_may_go_while_another_forward_pass_is_under_way(batch):
    """torch lists a module's hooks first and asks later how each is called."""
    subject = Subject(*tiny_llava())
    plain = logits(subject, batch)
    with subject.intervene(Steer(0, Vector(torch.ones(32))), batch):
        logits(subject, batch)

    def elsewhere():
        with subject.intervene(None, batch):
            pass

    def interrupt(module, args):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    subject.anatomy.layers[1].register_forward_pre_hook(interrupt, prepend=True)
    assert torch.equal(logits(subject, batch), plain)


def test_runs_on_two_models_are_active_side_by_side(batch):
    one, other = Subject(*tiny_llava()), Subject(*tiny_llava(seed=1))
    push = Steer(0, Vector(torch.full((32,), 5.0)))
    expected = []
    for subject in (one, other):
        with subject.intervene(push, batch):
            expected.append(logits(subject, batch))
    with one.intervene(push, batch) as outer, other.intervene(push, batch) as inner:
        assert current_run() is inner
        assert torch.equal(logits(one, batch), expected[0]) and torch.equal(logits(other, batch), expected[1])
        with one.intervene(None, batch):
            assert not torch.equal(logits(one, batch), expected[0]) and torch.equal(logits(other, batch), expected[1])
    assert outer.program is not inner.program and current_run() is None


def test_a_context_left_elsewhere_does_not_leave_its_hooks(batch):
    subject = Subject(*tiny_llava())
    context = active(Run(subject.anatomy, _program(subject, Steer(0, Vector(torch.ones(32))), batch), batch.image, batch.valid))
    contextvars.copy_context().run(context.__enter__)
    with pytest.raises(ValueError, match="different Context"):
        context.__exit__(None, None, None)
    with subject.intervene(None, batch):
        assert not subject.anatomy.layers[0]._forward_pre_hooks


def _program(subject, plan, batch):
    return Program.compile([plan] * len(batch), subject.anatomy.n_layers, subject.anatomy.n_heads)


def test_what_a_batch_keeps_serves_gradients_and_follows_changes_in_place(batch):
    subject = Subject(*tiny_llava())
    batch = replace(batch, image=batch.image.clone())
    observer = AttentionMass("text", groups=("image",))

    def mass():
        with torch.inference_mode(), subject.intervene(None, batch, observers=[observer]) as run:
            subject.model(**batch.inputs)
        return run.record(0, 1)

    before = mass()
    with subject.intervene(Steer(1, Vector(torch.ones(32)), positions="last"), batch):
        subject.model(**batch.inputs).logits.sum().backward()
    where = batch.image[0].nonzero()[0]
    batch.image[0, where] = False
    assert (mass()[0] < before[0]).all()
    assert torch.equal(mass(), mass())


def test_prompts_laid_out_alike_share_what_is_worked_out_from_where_tokens_are(batch):
    again = replace(batch, inputs=dict(batch.inputs), image=batch.image.clone(), valid=batch.valid.clone())
    assert again.tokens is batch.tokens
    other = replace(batch, image=batch.image.roll(1, 1))
    assert other.tokens is not batch.tokens
    assert torch.equal(other.tokens.image, other.image & other.valid)
    # What is shared is nobody's own tensor.
    known = batch.tokens.valid.clone()
    again.valid[:] = False
    assert torch.equal(batch.tokens.valid, known)
    assert not again.tokens.valid.any()


def test_records_are_those_of_the_last_pass_and_asked_for_too_early_are_refused(batch):
    subject = Subject(*tiny_llava())
    with subject.intervene(None, batch, observers=[AttentionMass()]) as run:
        with pytest.raises(ValueError, match="observer 0 of this run kept nothing at layer 0"):
            run.record(0, 0)
        logits(subject, batch)
        run.record(0, 0)

        def fail(module, args, output):
            raise RuntimeError("broken")

        handle = subject.anatomy.layers[0].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            logits(subject, batch)
        handle.remove()
        run.record(0, 0)
        with pytest.raises(ValueError, match="kept nothing at layer 1"):
            run.record(0, 1)


def test_the_language_model_may_be_called_by_place(batch):
    subject = Subject(*tiny_llava())
    ids = batch.inputs["input_ids"]
    with torch.inference_mode(), subject.intervene(None, batch):
        seen = subject.anatomy.language_model(ids).last_hidden_state
    with torch.inference_mode():
        assert torch.equal(seen, subject.anatomy.language_model(input_ids=ids).last_hidden_state)


def test_a_copied_subject_has_a_seam_of_its_own(batch):
    subject = Subject(*tiny_llava())
    clone, plan = copy.deepcopy(subject), ZeroHeads(subject.heads)
    with subject.intervene(plan, batch):
        expected = logits(subject, batch)
        assert not torch.equal(logits(clone, batch), expected)
    with clone.intervene(plan, batch):
        assert torch.equal(logits(clone, batch), expected)


@pytest.mark.parametrize("observers", [[AttentionMass()], [AttentionMass("text"), FullAttention()]])
def test_attention_is_seen_in_full_precision_under_autocast(batch, observers):
    subject = Subject(*tiny_llava())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), subject.intervene(None, batch, observers=observers) as run:
        subject.model(**batch.inputs)
    sums = run.record(0, 0)[..., :2].sum(-1)
    assert sums.dtype == torch.float32 and (sums - 1).abs().max() < 1e-5


@pytest.mark.parametrize("work", [lambda subject, items: sweep(subject, items, [None]), lambda subject, items: observe(subject, items, AttentionMass())])
def test_sweeps_and_observations_inside_a_run_are_refused(subject, batch, work):
    items = make_items(2)
    with subject.intervene(ZeroHeads([(0, 0)]), batch), pytest.raises(RuntimeError, match="inside an active run"):
        work(subject, items)
    work(subject, items)


def test_a_run_of_nothing_knows_what_any_run_knows(batch):
    subject = Subject(*tiny_llava())
    with subject.intervene(None, batch) as nothing:
        logits(subject, batch)
    assert "program" not in vars(nothing), "a plain pass worked out what nobody asked for"
    with pytest.raises(ValueError, match="observer 0 of this run kept nothing"):
        nothing.record(0, 0)
    run = Run(subject.anatomy, _program(subject, None, batch), batch.image, batch.valid)
    assert torch.equal(nothing.tokens.group("question"), run.tokens.group("question"))
    assert nothing.elements.tolist() == run.elements.tolist() and nothing.trunk.tolist() == run.trunk.tolist()
    assert nothing.records == {} and not hasattr(nothing, "nonsense")
    answered = subject.encode([make_items(1)[0]["image"]], ["what color ?"], ["red"])
    with subject.intervene(None, answered) as nothing:
        assert nothing.tokens.group("answer").sum() == 1


@pytest.mark.parametrize("observers", [(), [HiddenStates()]])
def test_a_run_on_another_batch_is_refused_whether_it_does_something_or_not(observers):
    subject = Subject(*tiny_llava())
    other, longer = (subject.encode_items([item]) for item in make_items(2))
    assert other.valid.shape != longer.valid.shape
    with torch.inference_mode(), subject.intervene(None, other, observers=observers):
        with pytest.raises(ValueError, match="the batch that entered the model is .* the run was made for"):
            subject.model(**longer.inputs)
        with pytest.raises(ValueError, match="entered the model as 2 sequences"):
            subject.model.generate(**other.inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        expected = subject.model.generate(**other.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(expected, subject.model.generate(**other.inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False))
