"""Checkpoints of every family load from disk with the processor they were saved with, whether or not torchvision is there."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from vlm_core import Subject, load_vlm
from vlm_core.families.processing import images_only, load_processor, processor_class
from vlm_core.tests.family_processors import PROCESSORS, VARIANTS, save

PROMPT = "what is in the image ?"


@pytest.mark.parametrize("name", [*PROCESSORS, "llava_pixtral"])
def test_a_saved_family_loads_and_encodes_the_same(name, tmp_path):
    processor, model = {**PROCESSORS, **VARIANTS}[name]()
    loaded = load_vlm(save(tmp_path, name), check=False)
    assert type(loaded.processor).__name__ == type(processor).__name__
    assert loaded.model.config.model_type == model.config.model_type
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8))
    seen = loaded.encode([image], [PROMPT]).inputs
    loaded.processor = processor
    expected = loaded.encode([image], [PROMPT]).inputs
    assert set(seen) == set(expected)
    for field in expected:
        assert torch.equal(seen[field], expected[field]), field


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there: nothing to do without")
@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3", "smolvlm"])
def test_transformers_alone_refuses_them_without_torchvision(name, tmp_path):
    save(tmp_path, name)
    with pytest.raises((OSError, ImportError)):
        tf.AutoProcessor.from_pretrained(tmp_path)
    assert load_processor(tmp_path).image_processor.backend == "pil"


def test_only_the_video_processor_is_left_out():
    assert images_only(tf.LlavaProcessor) is tf.LlavaProcessor
    smaller = images_only(tf.Qwen2VLProcessor)
    assert issubclass(smaller, tf.Qwen2VLProcessor) and smaller.__name__ == "Qwen2VLProcessor"
    assert smaller.get_attributes() == ["image_processor", "tokenizer"]
    assert "video_processor" in tf.Qwen2VLProcessor.get_attributes()
    assert processor_class("NoSuchProcessor") is None


def test_nothing_of_transformers_stays_changed():
    module = __import__("transformers.models.smolvlm.processing_smolvlm", fromlist=["num2words"])
    before = module.num2words
    PROCESSORS["smolvlm"]()
    PROCESSORS["qwen2_vl"]()
    assert module.num2words is before
    assert not hasattr(__import__("transformers.models.qwen2_vl.processing_qwen2_vl", fromlist=["_"]), "num2words")


@pytest.mark.parametrize("answers", [None, ["red", "green"]])
def test_paligemma_is_given_the_placeholders_that_it_would_guess(monkeypatch, answers):
    """Without them its processor warns at every call; the inputs are the same."""
    import transformers.models.paligemma.processing_paligemma as processing

    warned = []
    monkeypatch.setattr(processing.logger, "warning", warned.append)
    processor, model = PROCESSORS["paligemma"]()
    subject = Subject(model, processor)
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 32, 3), dtype=np.uint8)
    one, two, three = map(Image.fromarray, noise)
    pictures, prompts = [[one, two], [three]], ["what color is in the image ?", "what is the color ?"]
    batch = subject.encode(pictures, prompts, answers)
    assert not warned
    guessed = processor(
        images=pictures, text=prompts, return_tensors="pt", padding=True, padding_side="left",
        **({} if answers is None else {"suffix": answers}),
    )
    assert len(warned) == 1
    assert torch.equal(batch.inputs["input_ids"], guessed["input_ids"])
    assert torch.equal(batch.inputs["token_type_ids"], guessed["token_type_ids"])
