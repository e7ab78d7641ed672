"""Families are data: what is declared, how another is added, and what is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf

from vlm_core import FAMILIES, Batch, DropTokens, KnockOut, ReplaceImageKV, Subject, SubjectError, ZeroHeads, selfcheck
from vlm_core.families.family import CAPABILITIES, LLAVA, declare, find_family
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows
from vlm_core.sweeps.engine import choose_path
from vlm_core.tests.conformance.models import Grab, batch_of, logits_of, logits_under, some_means, subject_of
from vlm_core.tests.family_models import BUILDERS, FAMILY_OF, IMAGE_TOKEN, SIGLIP, TEXT, TINY, WITHOUT_HEAD_DIM


def test_every_declared_family_is_tested():
    assert set(FAMILIES) == set(FAMILY_OF.values())
    assert all(subject_of(name).anatomy.family.key == key for name, key in FAMILY_OF.items())


def undeclared():
    """A family that nobody declared: built like LLaVA."""
    config = tf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "cohere2", **TEXT, "logit_scale": 0.25, "sliding_window": 64},
        image_token_id=IMAGE_TOKEN,
        downsample_factor=2,
        alignment_intermediate_size=32,
    )
    tiny = replace(TINY["aya_vision"], cls=tf.Cohere2VisionForConditionalGeneration, config=lambda: config)
    inputs = tiny.prompts()
    return tiny.model(), Batch(inputs, inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool())


def test_another_family_is_one_dataclass_away(monkeypatch):
    """As the docstring of ``vlm_core.families.family`` says."""
    model, batch = undeclared()
    with pytest.raises(SubjectError, match="model_type 'cohere2_vision', which is not declared in vlm_core/families/family.py"):
        Subject(model, name="x")
    monkeypatch.delitem(FAMILIES, "cohere2_vision", raising=False)
    monkeypatch.setitem(FAMILIES, "cohere2_vision", None)
    declare(replace(LLAVA, model_type="cohere2_vision"))
    subject = Subject(model, name="x")
    selfcheck(subject, batch)
    zeroed = logits_under(subject, ZeroHeads([(1, 2)]), batch)
    assert not torch.allclose(zeroed, logits_of(model, batch))


def test_a_family_that_does_not_fit_says_where_it_stops(monkeypatch):
    model, _ = undeclared()
    monkeypatch.setitem(FAMILIES, "cohere2_vision", replace(LLAVA, language_model="model.text_model"))
    with pytest.raises(SubjectError, match=r"no module 'model.text_model' .* stops before 'text_model'"):
        Subject(model, name="x")


def test_mllama_says_per_layer_where_its_image_keys_are():
    anatomy = subject_of("mllama").anatomy
    assert anatomy.layer_types == ("full_attention", "cross_attention", "full_attention", "cross_attention")
    assert anatomy.image_layers == (1, 3) and anatomy.cross_layers == {1, 3}
    assert not anatomy.family.image_in_sequence
    llava = subject_of("llava").anatomy
    assert llava.image_layers == (0, 1, 2, 3) and not llava.cross_layers and llava.family.image_in_sequence


@pytest.mark.parametrize(
    "plan",
    [
        lambda anatomy: ReplaceImageKV([(0, 0)], some_means(anatomy)),
        lambda anatomy: KnockOut("text", "image", (0, 1)),
        lambda anatomy: (ZeroHeads([(1, 1)]), ReplaceImageKV([(1, 0), (2, 0)], some_means(anatomy))),
    ],
)
def test_image_keys_are_looked_for_only_where_they_are(plan):
    subject, batch = subject_of("mllama"), batch_of("mllama")
    before = logits_of(subject.model, batch)
    with pytest.raises(ValueError, match=r"holds no image keys in layer [02]: .* cross-attention layers 1, 3"):
        logits_under(subject, plan(subject.anatomy), batch)
    assert torch.equal(logits_of(subject.model, batch), before)


def test_sliding_windows_are_seen_where_the_config_lists_no_layers():
    assert set(subject_of("idefics2").anatomy.layer_types) == {"sliding_attention"}
    assert set(subject_of("mistral3").anatomy.layer_types) == {"full_attention"}


@pytest.mark.parametrize("name", TINY)
def test_capabilities_are_those_not_refused(name):
    subject = subject_of(name)
    refusals = subject.anatomy.family.refusals
    assert subject.capabilities == set(CAPABILITIES) - set(refusals)
    for capability in CAPABILITIES:
        if capability in refusals:
            with pytest.raises(ValueError, match=f"lacks '{capability}': {refusals[capability][:40]}"):
                subject.anatomy.require(capability)
        else:
            subject.anatomy.require(capability)
    with pytest.raises(ValueError, match="unknown capability 'fly': it must be one of heads, image_kv"):
        subject.anatomy.require("fly")


def test_what_a_family_lacks():
    lacking = {name: set(subject_of(name).anatomy.family.refusals) for name in TINY}
    lacking = {name: refused for name, refused in lacking.items() if refused}
    assert lacking == {
        "mllama": {"drop", "merge", "replace_tokens", "resume", "shared_prefix"},
        "paligemma": {"shared_prefix"},
        "paligemma2": {"shared_prefix"},
    }


# -- refused models -----------------------------------------------------------------------------------------------------


def test_a_hybrid_is_refused_by_its_layer():
    config = tf.LlavaConfig(
        vision_config=SIGLIP,
        text_config={
            "model_type": "qwen3_next", **TEXT, "layer_types": ["full_attention", "linear_attention"] * 2,
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = tf.LlavaForConditionalGeneration._from_config(config)
    with pytest.raises(SubjectError, match="is a hybrid: its layer 1 is 'linear_attention', which has no attention heads"):
        Subject(model, name="x")
    assert model.config.text_config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("name", ["blip2_opt", "instructblip_opt"])
def test_an_encoder_decoder_is_refused(name):
    config = TINY[name].config()
    text = {"model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    config = type(config)(
        vision_config=config.vision_config.to_dict(), qformer_config=config.qformer_config.to_dict(), text_config=text,
        num_query_tokens=6, image_token_index=IMAGE_TOKEN,
    )
    model = TINY[name].cls._from_config(config)
    with pytest.raises(SubjectError, match="wraps the encoder-decoder language model 't5'.*only decoder-only"):
        Subject(model, name="x")


def test_another_wrapped_language_model_is_named():
    config = TINY["blip2_opt"].config()
    config = tf.Blip2Config(
        vision_config=config.vision_config.to_dict(), qformer_config=config.qformer_config.to_dict(),
        text_config={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64},
        num_query_tokens=6, image_token_index=IMAGE_TOKEN,
    )
    with pytest.raises(SubjectError, match="is a blip-2 around the language model 'gpt2', .* declared .* llama, opt"):
        Subject(tf.Blip2ForConditionalGeneration._from_config(config), name="x")
    # Before the weights are there the config may not say what is wrapped.
    assert find_family("blip-2").model_type == "blip-2"


def test_an_unknown_family_is_named():
    model, _ = BUILDERS["llava"]()
    model.config.model_type = "newvlm"
    with pytest.raises(SubjectError, match=r"model_type 'newvlm', which is not declared in vlm_core/families/family.py"):
        Subject(model, name="x")


def test_an_attention_that_cannot_be_delegated_to_is_refused():
    model, _ = BUILDERS["llava"]()
    model.config.text_config._attn_implementation_internal = "flex_attention"
    with pytest.raises(SubjectError, match="uses attention 'flex_attention'"):
        Subject(model, name="x")


def test_a_language_model_without_attention_interface_is_refused(monkeypatch):
    model, _ = BUILDERS["llava"]()
    monkeypatch.setattr(type(model.model.language_model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(SubjectError, match="no attention-interface support"):
        Subject(model, name="x")


def test_a_model_without_image_token_is_refused():
    model, _ = BUILDERS["llava"]()
    model.config.image_token_id = None
    with pytest.raises(SubjectError, match="has no image token in its config"):
        Subject(model, name="x")


def test_deepstack_layers_refuse_drops():
    subject, batch = subject_of("qwen3_vl"), batch_of("qwen3_vl")
    with torch.inference_mode():
        sequences = capture(subject, batch.inputs)
    with pytest.raises(ValueError, match="drop .*tokens from layer 1 on"):
        forward_rows(subject, sequences, np.array([0]), [DropTokens(0, 0.5)], [0])


@pytest.mark.parametrize("name", TINY)
def test_sizes_are_those_that_the_seam_sees(name):
    subject, grab = subject_of(name), Grab()
    logits_under(subject, None, batch_of(name), [grab])
    anatomy = subject.anatomy
    for view in grab.views.values():
        assert (anatomy.n_heads, anatomy.head_dim) == (view.query.shape[1], view.query.shape[3])
        assert anatomy.n_kv_heads == view.key.shape[1] and anatomy.kv_groups * view.key.shape[1] == view.query.shape[1]
        assert view.hidden.shape[2] == anatomy.hidden_size
    assert sorted(grab.views) == list(range(anatomy.n_layers))


def test_wrapped_decoders_have_no_other_head_size():
    """OPT has no ``head_dim`` of its own and scales its queries before the seam sees them."""
    anatomy = subject_of("blip2_opt").anatomy
    assert anatomy.head_dim == WITHOUT_HEAD_DIM["hidden_size"] // WITHOUT_HEAD_DIM["num_attention_heads"]
    assert anatomy.n_kv_heads == anatomy.n_heads


def test_families_that_cannot_take_a_fast_path_say_so_and_take_the_slow_one():
    for name, reason in (("mllama", "cross-attention layers"), ("paligemma", "attends to itself both ways")):
        subject, batch = subject_of(name), batch_of(name)
        with torch.inference_mode():
            (sequence,) = capture(subject, batch.inputs)
        path, why = choose_path(subject.anatomy, sequence, KnockOut("question", "image", subject.anatomy.image_layers[-1:]))
        assert path != "shared prefix" and reason in why


def test_a_family_that_does_not_fit_leaves_the_model_as_it_was():
    model = TINY["llava"].model()
    before = {name: len(module._forward_pre_hooks) + len(module._forward_hooks) for name, module in model.named_modules()}
    named = model.config.get_text_config()._attn_implementation
    declare(replace(LLAVA, mlp="feed_forward"))
    try:
        with pytest.raises(SubjectError, match="has no module 'feed_forward'"):
            Subject(model)
    finally:
        declare(LLAVA)
    after = {name: len(module._forward_pre_hooks) + len(module._forward_hooks) for name, module in model.named_modules()}
    assert after == before and model.config.get_text_config()._attn_implementation == named
