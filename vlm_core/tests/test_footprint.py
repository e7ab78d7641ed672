"""What a picture takes before a model is loaded, against what its vision tower and language model then get."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from vlm_core.subjects.checkpoint import Checkpoint
from vlm_core.subjects.footprint import Footprint
from vlm_core.subjects.weightless import Weightless, patches_of
from vlm_core.tests.family_processors import PROCESSORS, VARIANTS
from vlm_core.tests.layout_oracle import PROMPT, features_of, picture, subject_of

# (height, width): the model's own, wide, large.
SIZES = [(32, 32), (30, 91), (150, 210)]
ONE_SIZE = {"llava", "llava_padded", "llava_stretched", "vipllava", "paligemma", "paligemma2", "idefics3_whole", "gemma3", "idefics2",
            "mllama", "blip-2", "instructblip", "blip2_llama", "instructblip_llama"}  # fmt: skip
"""Whose number of image tokens is one for every picture; Idefics2 splits each, and Mllama fills up with tiles."""


def footprint_of(subject, size) -> Footprint:
    checkpoint = Checkpoint(subject.name, "nowhere", None, None, subject.model.config.to_dict(), (), 1)
    return Footprint.of(checkpoint, torch.float32, processor=subject.processor, picture=size[::-1])


@pytest.mark.parametrize("name", [*PROCESSORS, *VARIANTS])
def test_image_tokens_are_as_many_as_the_language_model_receives(name):
    subject, counts = subject_of(name), []
    for size in SIZES:
        batch = subject.encode([Image.fromarray(picture(size))], [PROMPT])
        found, short = footprint_of(subject, size), subject.encode([Image.fromarray(picture(size))], ["?"])
        (received,) = features_of(subject, batch.inputs)
        assert (found.n_image, found.n_tokens, found.picture) == (len(received), int(short.valid.sum()) + 64, size[::-1])
        counts.append(found.n_image)
    assert (len(set(counts)) == 1) == (name in ONE_SIZE), counts


@pytest.mark.parametrize("name", PROCESSORS)
def test_patches_are_those_that_the_tower_embeds(name):
    subject, size = subject_of(name), (30, 91)
    inputs = Weightless(subject.processor, subject.model.config).encode([Image.fromarray(picture(size))], [PROMPT]).inputs
    seen = []
    hooks = [
        one.register_forward_hook(lambda module, args, output: seen.append(output.numel() // module.out_channels))
        for one in subject.model.modules()
        if isinstance(one, nn.Conv2d | nn.Conv3d)
    ]
    with torch.inference_mode():
        subject.model(**inputs)
    for hook in hooks:
        hook.remove()
    assert patches_of(inputs, subject.model.config)[1] == seen[0]


def test_tiles_take_memory_in_the_tower():
    """16 patches of each of 6 tiles and the whole, where that is more than the decoder takes, and their pixels."""
    subject = subject_of("internvl")
    vision = subject.model.config.vision_config
    own, vision.hidden_size = vision.hidden_size, 4096
    found = footprint_of(subject, (64, 96))
    vision.hidden_size = own
    assert found.n_image == 7 * 4 and found.prompt == 4 * 7 * (3 * 32 * 32 + 16 * (12 * 4096 + 4 * 32))


def test_a_picture_behind_cross_attention_takes_keys_in_those_layers_alone():
    subject = subject_of("mllama")
    found, text = footprint_of(subject, (32, 48)), subject.model.config.text_config
    # Four tiles, two of them filled up, of 16 patches and a CLS.
    kept = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    layer = found.n_tokens * (12 * text.hidden_size + 4 * text.intermediate_size)
    behind = 68 * (2 * kept + text.hidden_size)
    assert found.n_image == 68 and text.cross_attention_layers == [1, 3] and text.num_hidden_layers == 4
    assert found.prompt == 4 * (found.n_tokens * 2 * kept + behind + layer + text.vocab_size + 4 * 3 * 32 * 32)
