"""Attention drawn on the image is the attention on the tokens that show each pixel, however a family cuts images."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image

from vlm_core import FullAttention, Subject, attention_heatmap, observe
from vlm_core.tests.family_processors import PROCESSORS

HEADS = ((0, 1), (1, 0))


@cache
def subject_of(name: str) -> Subject:
    processor, model = PROCESSORS[name]()
    return Subject(model, processor, name=name)


def item_of(seed: int = 0, height: int = 47, width: int = 80) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"id": f"item-{seed}", "image": Image.fromarray(pixels), "prompt": "what is in the image ?"}


def attention_on_keys(subject, item, head):
    """``[key]`` of the last query, and where the layout's tokens are among the keys."""
    full = observe(subject, [item], FullAttention())[0][head]
    last = np.flatnonzero(~np.isnan(full).all(1))[-1]
    return full[last]


# One grid, one grid under M-RoPE, tiles stitched to one grid, tiles beside a thumbnail (three ways), pooled tokens.
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "internvl", "idefics3", "aya_vision", "gemma3", "mistral3"])
def test_heat_is_the_attention_on_the_finest_tokens_over_a_pixel(name):
    subject, item = subject_of(name), item_of()
    height, width = item["image"].height, item["image"].width
    layout = subject.layout(item["image"], item["prompt"])
    drawn = attention_heatmap(subject, item, HEADS, (height, width))
    values = sum(attention_on_keys(subject, item, head) for head in HEADS)[layout.positions]
    checked = set()
    for row, column in np.ndindex(height, width):
        box = np.array([column / width, row / height, (column + 1) / width, (row + 1) / height])
        meets = (layout.boxes[:, :2] < box[2:] - 1e-9).all(1) & (layout.boxes[:, 2:] > box[:2] + 1e-9).all(1)
        fine = meets & (layout.kind != "thumbnail")
        tokens = fine if fine.any() else meets
        whole = (layout.boxes[tokens, :2] <= box[:2] + 1e-9).all(1) & (layout.boxes[tokens, 2:] >= box[2:] - 1e-9).all(1)
        if not tokens.any():
            assert np.isnan(drawn[row, column])
        elif whole.all():
            assert drawn[row, column] == pytest.approx(values[tokens].mean(), rel=1e-4)
            checked.update(np.flatnonzero(tokens).tolist())
    assert len(checked) > 3 and np.ptp(values[list(checked)]) > 0


def test_heads_without_image_keys_add_nothing_and_those_across_are_read():
    subject, item = subject_of("mllama"), item_of()
    maps = {layer: attention_heatmap(subject, item, [(layer, 0)], (47, 80)) for layer in range(subject.anatomy.n_layers)}
    seeing = [layer for layer, drawn in maps.items() if np.nansum(drawn) > 0]
    assert 0 < len(seeing) < len(maps)
    both = attention_heatmap(subject, item, [(layer, 0) for layer in maps], (47, 80))
    np.testing.assert_allclose(both, sum(maps.values()), rtol=1e-5)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="learned queries .* none has a place"):
        attention_heatmap(subject_of("blip-2"), item_of(), HEADS, (8, 8))
    with pytest.raises(ValueError, match="there is no head L0.H99"):
        attention_heatmap(subject_of("llava"), item_of(), [(0, 99)], (8, 8))
