"""On how many pixels a subject's pictures are best drawn: its processor says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm_core import Subject
from vlm_core.subjects import resolution
from vlm_core.subjects.resolution import own_resolution
from vlm_core.tests.family_processors import PROCESSORS, VARIANTS

# Resized to one size; tiles of one size, also where they are padded; several crops; pictures that keep their size within bounds.
SIDES = {
    "llava": 32, "llava_onevision_uneven": 38, "llava_next": 32, "internvl": 32, "idefics3": 32, "gemma3_pan_and_scan": 32, "mllama": 32,
    "paligemma": 32, "blip-2": 32, "mistral3": 64, "llava_pixtral": 64, "qwen2_vl": 96, "glm4v": 96,
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_pictures_of_that_size_are_neither_enlarged_nor_made_smaller(name, monkeypatch):
    subject = Subject(*reversed({**PROCESSORS, **VARIANTS}[name]()))
    monkeypatch.setattr(resolution, "LEAST", 1)
    assert own_resolution(subject) == SIDES[name]
    monkeypatch.undo()
    assert own_resolution(subject) == max(64, SIDES[name])


def test_a_subject_that_keeps_sizes_gets_as_many_tokens_as_show_a_scene():
    subject = Subject(*reversed(PROCESSORS["qwen2_vl"]()))
    subject.processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 2048 * 2048}
    side = own_resolution(subject)
    picture = Image.fromarray(np.zeros((side, side, 3), np.uint8))
    assert side == 256 and len(subject.layout(picture)) == 256  # 16 pixels a token


def test_of_one_family_the_processors_size_decides():
    subject = Subject(*reversed(PROCESSORS["llava"]()))
    for side in (128, 336):
        subject.processor.image_processor.size = {"shortest_edge": side}
        subject.processor.image_processor.crop_size = {"height": side, "width": side}
        assert own_resolution(subject) == side
