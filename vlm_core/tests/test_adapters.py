"""Trap 10: adapters on some layers of the language model must leave the vision tower alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vlm_core import Batch, Subject
from vlm_core.families.adapters import lora_targets
from vlm_core.tests.family_models import BUILDERS, IMAGE_TOKEN
from vlm_core.tests.tiny import tiny_llava


def adapted(model, **options):
    """Modules that PEFT adapts."""
    wrapped = get_peft_model(model, LoraConfig(r=2, **options))
    names = [name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name]
    return sorted({name.removeprefix("base_model.model.") for name in names})


def test_names_and_layers_also_match_the_vision_tower():
    """What the regular expression is for: without it, the tower is adapted too."""
    model, _ = tiny_llava()
    assert any("vision" in name for name in adapted(model, target_modules=["q_proj"], layers_to_transform=[1]))


@pytest.mark.parametrize("layers", [(1,), (2, 0)])
def test_one_expression_names_layers_of_the_language_model_only(layers):
    model, processor = tiny_llava()
    targets = lora_targets(Subject(model, processor).anatomy, layers, ("q_proj", "v_proj"))
    expected = sorted(
        f"model.language_model.layers.{layer}.self_attn.{module}" for layer in layers for module in ("q_proj", "v_proj")
    )
    assert adapted(model, target_modules=targets) == expected


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "gemma3", "mllama"])
def test_it_names_the_attention_of_every_family(name):
    model, inputs = BUILDERS[name]()
    subject = Subject(model, name=name)
    found = adapted(model, target_modules=lora_targets(subject.anatomy, (1, 3), ("q_proj",)))
    modules = {id(module): name for name, module in model.named_modules()}
    assert {name.rsplit(".", 2)[0] for name in found} == {modules[id(subject.anatomy.layers[layer])] for layer in (1, 3)}
    image = inputs["input_ids"] == IMAGE_TOKEN
    batch = Batch(inputs, image, torch.ones_like(image))
    with torch.inference_mode(), subject.intervene(None, batch):
        assert torch.isfinite(model(**inputs).logits).all()


def test_what_the_model_does_not_have_is_refused():
    model, processor = tiny_llava()
    anatomy = Subject(model, processor).anatomy
    with pytest.raises(ValueError, match="layer 3 lies outside this model's 3 layers"):
        lora_targets(anatomy, (3,))
    with pytest.raises(ValueError, match="has no module 'w_proj'"):
        lora_targets(anatomy, (0,), ("w_proj",))
