"""What the vision tower attends to, per image token: against its own attention maps, and against changed pixels."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from PIL import Image
from transformers import AttentionInterface

from vlm_core import NotMeasurable, Subject, ZeroHeads
from vlm_core.families.layout import image_layouts
from vlm_core.families.tiling import Patches
from vlm_core.interventions.policy import KEYED
from vlm_core.seam.tower import TOWER_NAMES, patch_places, tower_layers
from vlm_core.subjects.visual import visuals
from vlm_core.tests.family_processors import PROCESSORS, VARIANTS
from vlm_core.tests.layout_oracle import PLACED, PROMPT, QUERIES, SIZES, changes_follow, layouts_of, picture, subject_of
from vlm_core.tests.tiny import make_items, tiny_subject

PACKED = [name for name in PLACED if name != "mllama"]
"""Families whose image tokens are pooled patches in the sequence."""
LED = ("llava", "vipllava", "llava_next", "internvl")
"""Those around a tower with a class token."""


@lru_cache(maxsize=None)
def mixing(name: str) -> Subject:
    processor, model = {**PROCESSORS, **VARIANTS}[name]()
    return Subject(model, processor, name=name)


def two_prompts(subject: Subject):
    """A prompt with an image, and one with two where the family takes them."""
    first, second = Image.fromarray(picture((40, 70))), Image.fromarray(picture((64, 33), seed=1))
    return subject.encode([[first, second], [second]], [PROMPT] * 2)


def towers(subject: Subject, batch) -> list:
    return [one.tower for one in visuals(subject, batch.inputs, batch.sizes, {"tower"})]


def maps_of(subject: Subject, batch, monkeypatch) -> dict:
    """Every attention map ``[view, head, query, key]`` and keys ``[view, key, size]`` of each layer of the tower, with eager attention."""
    found: dict = {}
    kind = type(subject.model.config.vision_config)
    modelling = {sys.modules[type(one).__module__] for one in subject.model.modules() if isinstance(getattr(one, "config", None), kind)}
    for one in modelling:
        if not hasattr(one, "eager_attention_forward"):
            continue

        def keep(module, query, key, *args, own=one.eager_attention_forward, **kwargs):
            output, weights = own(module, query, key, *args, **kwargs)
            if isinstance(module.config, kind):
                found.setdefault(module, []).append((weights.detach(), key.detach().transpose(1, 2).flatten(2)))
            return output, weights

        monkeypatch.setattr(one, "eager_attention_forward", keep)
    subject.model.set_attn_implementation({"vision_config": "eager"})
    try:
        with torch.inference_mode():
            subject.model(**batch.inputs)
    finally:
        subject.model.set_attn_implementation({"vision_config": "sdpa"})
        monkeypatch.undo()
    return found


def packed(subject: Subject, patches: Patches) -> list[tuple[int, int]]:
    """Row and column of each patch of a view in the order in which the tower gets them, counted out."""
    rows, columns = patches.view
    order = subject.anatomy.family.patch_order
    if order == "raster":
        return [(row, column) for row in range(rows) for column in range(columns)]
    config = subject.model.config.vision_config
    merge = config.spatial_merge_size
    side = config.window_size // config.patch_size // merge if order == "windows" else max(rows, columns)
    found = []
    for top in range(0, rows // merge, side):
        for left in range(0, columns // merge, side):
            for down in range(top, min(top + side, rows // merge)):
                for across in range(left, min(left + side, columns // merge)):
                    found += [(down * merge + y, across * merge + x) for y in range(merge) for x in range(merge)]
    return found


@pytest.mark.parametrize("name", [name for name in PACKED if name != "llava_onevision_shrunk"])
def test_tokens_receive_what_the_maps_say_and_have_the_keys_of_their_patches(name, monkeypatch):
    """Patch by patch, from maps that the model itself computes with eager attention."""
    subject = mixing(name)
    if subject.anatomy.family.max_images == 1:
        image = Image.fromarray(picture((40, 70)))
        batch = subject.encode([[image], [image]], [PROMPT] * 2)
    else:
        batch = two_prompts(subject)
    found = towers(subject, batch)
    maps = maps_of(subject, batch, monkeypatch)
    layouts = image_layouts(subject.anatomy.family, subject.model.config, subject.processor, batch.inputs, batch.sizes)
    assert len(maps) == len(found[0]) == len(found[1]) == 2
    led = name in LED or name == "llava_stretched" or name == "llava_padded"
    for number, calls in enumerate(maps.values()):
        # One row a patch: what it receives of all queries that count, whatever the calls were cut into.
        received, keys = [], []
        for weights, key in calls:
            mean = weights.mean(1)
            for view in range(len(mean)):
                received += (mean[view, 0, 1:] if led else mean[view].sum(0)).tolist()
                keys += list(key[view, led:])
        at = 0
        for layout, layers in zip(layouts, found, strict=True):
            expected = torch.zeros(len(layout))
            summed, counts = torch.zeros(len(layout), layers[number].keys.shape[1]), torch.zeros(len(layout))
            for grid, patches in enumerate(layout.patches):
                place = {
                    (int(layout.row[token]), int(layout.column[token])): token for token in (layout.grid == grid).nonzero()[0]
                }
                for view in range(patches.views[0] * patches.views[1]):
                    top, left = view // patches.views[1] * patches.view[0], view % patches.views[1] * patches.view[1]
                    for row, column in packed(subject, patches):
                        y = (top + row - patches.first[0]) // int(patches.step[0])
                        x = (left + column - patches.first[1]) // int(patches.step[1])
                        if (y, x) in place:
                            token = place[y, x]
                            expected[token] += received[at] / (1 if led else patches.view[0] * patches.view[1])
                            summed[token] += keys[at]
                            counts[token] += 1
                        at += 1
            assert bool((counts[layout.grid >= 0] > 0).all()) and not bool(counts[layout.grid < 0].any())
            torch.testing.assert_close(layers[number].received, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layers[number].keys, summed / counts.clamp(min=1)[:, None], rtol=1e-4, atol=1e-5)
        assert at == len(received)


def test_what_is_received_is_the_class_token_s_row_of_the_maps_that_the_tower_returns():
    subject = tiny_subject(vision_layers=4)
    batch = subject.encode_items(make_items(3))
    found = towers(subject, batch)
    tower = subject.model.model.vision_tower
    subject.model.set_attn_implementation({"vision_config": "eager"})
    with torch.inference_mode():
        maps = tower(batch.inputs["pixel_values"], output_attentions=True).attentions
    for row, layers in enumerate(found):
        assert len(layers) == len(maps) == 4
        assert [one.keys is not None for one in layers] == [False] * (4 - KEYED) + [True] * KEYED
        for one, weights in zip(layers, maps, strict=True):
            torch.testing.assert_close(one.received[1:], weights[row, :, 0, 1:].mean(0), rtol=1e-4, atol=1e-6)
            assert float(one.received[0]) == 0  # the class token has no place
        assert not bool(layers[-1].keys[0].any()) and bool(layers[-1].keys[1:].any(1).all())


@pytest.mark.parametrize("name", PACKED)
def test_exactly_the_tokens_over_changed_pixels_have_other_keys(name, monkeypatch):
    """Where the tower's attention adds nothing, a patch's key follows from its own pixels."""
    subject = subject_of(name)
    hit = missed = 0
    for size in SIZES:
        pixels = picture(size)
        (layout,) = layouts_of(subject, [Image.fromarray(pixels)])

        def keys_of(subject, inputs, size=size):
            found = visuals(subject, inputs, [[size]] * len(inputs["input_ids"]), {"tower"})
            return [one.tower[-1].keys for one in found]

        monkeypatch.setattr("vlm_core.tests.layout_oracle.features_of", keys_of)
        counts = changes_follow(
            name, subject, pixels, layout, 0, lambda images: subject.encode(images, [PROMPT] * len(images)).inputs
        )
        hit, missed = hit + counts[0], missed + counts[1]
    assert hit > 30 and missed > 60


def test_queries_that_are_looked_at_in_blocks_add_up(monkeypatch):
    """As few scores at once as two queries need, with the masks of several images."""
    for name in ("mistral3", "paligemma", "qwen2_vl"):
        subject = mixing(name)
        batch = subject.encode([Image.fromarray(picture((40, 70))), Image.fromarray(picture((64, 33), seed=1))], [PROMPT] * 2)
        whole = towers(subject, batch)
        monkeypatch.setattr("vlm_core.seam.tower._SCORES", 200)
        for one, two in zip(whole, towers(subject, batch), strict=True):
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a.received, b.received, rtol=1e-5, atol=1e-7)
        monkeypatch.undo()


def test_places_of_merged_and_windowed_patches_by_hand():
    # Four rows of six patches in blocks of two by two: the first block is patches 0, 1, 6 and 7.
    patches = Patches((4, 6), step=(2, 2))
    blocks = patch_places("blocks", patches, None).reshape(4, 6)
    assert blocks.tolist() == [
        [0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11], [12, 13, 16, 17, 20, 21], [14, 15, 18, 19, 22, 23]
    ]  # fmt: skip

    class Windowed:
        window_size, patch_size = 32, 8

    # Windows of two by two blocks: the third column of blocks comes after the first window.
    windows = patch_places("windows", patches, Windowed).reshape(4, 6)
    assert windows.tolist() == [
        [0, 1, 4, 5, 16, 17], [2, 3, 6, 7, 18, 19], [8, 9, 12, 13, 20, 21], [10, 11, 14, 15, 22, 23]
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in QUERIES if name in PROCESSORS][:2] + ["mllama"])
def test_tokens_that_are_no_patches_are_refused(name):
    subject = mixing(name)
    batch = subject.encode([Image.fromarray(picture((40, 70)))], [PROMPT])
    with pytest.raises(NotMeasurable, match="cannot be told by image token .* choose a policy that does not read it"):
        towers(subject, batch)


def names(subject) -> set:
    kind = type(subject.model.config.vision_config)
    return {one.config._attn_implementation for one in subject.model.modules() if isinstance(getattr(one, "config", None), kind)}


def test_a_tower_whose_attention_is_not_seen_is_refused_and_left_as_it_was():
    subject = tiny_subject()
    batch = subject.encode_items(make_items(1))
    config = subject.model.model.vision_tower.config
    config._attn_implementation_internal = "flex_attention"
    with pytest.raises(NotMeasurable, match="uses attention 'flex_attention', .* 'sdpa' or 'eager'"):
        towers(subject, batch)
    assert config._attn_implementation == "flex_attention"


def test_the_model_is_as_before_after_a_look_at_its_tower(monkeypatch):
    subject = tiny_subject()
    batch = subject.encode_items(make_items(2))
    with torch.inference_mode():
        plain = subject.model(**batch.inputs).logits
        before = names(subject)
        found = towers(subject, batch)
        assert names(subject) == before == {"sdpa"}
        assert torch.equal(subject.model(**batch.inputs).logits, plain)
    broken = AttentionInterface._global_mapping[TOWER_NAMES["sdpa"]]

    def fails(*args, **kwargs):
        assert names(subject) == {TOWER_NAMES["sdpa"]}
        raise FloatingPointError("half-way")

    monkeypatch.setitem(AttentionInterface._global_mapping, TOWER_NAMES["sdpa"], fails)
    with pytest.raises(FloatingPointError, match="half-way"):
        towers(subject, batch)
    assert names(subject) == before
    monkeypatch.setitem(AttentionInterface._global_mapping, TOWER_NAMES["sdpa"], broken)
    again = towers(subject, batch)
    assert all(torch.equal(a.received, b.received) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True))


def test_an_active_run_and_other_threads_change_nothing():
    subject = tiny_subject()
    batches = [subject.encode_items(make_items(2, seed=seed)) for seed in range(4)]
    expected = [towers(subject, batch) for batch in batches]
    with subject.intervene(ZeroHeads([(0, 0), (1, 1)]), batches[0]):
        inside = towers(subject, batches[0])
    with torch.inference_mode():
        plain = [subject.model(**batch.inputs).logits for batch in batches]

    def work(number):
        with torch.inference_mode():
            return towers(subject, batches[number % 4]), subject.model(**batches[number % 4].inputs).logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(16)))
    for number, (one, logits) in enumerate([(inside, plain[0]), *found]):
        at = max(number - 1, 0) % 4
        assert torch.equal(logits, plain[at])
        for layers, own in zip(one, expected[at], strict=True):
            assert all(torch.equal(a.received, b.received) and torch.equal(a.keys, b.keys) for a, b in zip(layers, own, strict=True))


def test_a_tower_that_is_not_what_is_thought_is_refused(monkeypatch):
    """More tokens than a class token and the patches, or an attention of its own."""
    subject = tiny_subject()
    batch = subject.encode_items(make_items(2))
    layouts = image_layouts(subject.anatomy.family, subject.model.config, subject.processor, batch.inputs, batch.sizes)
    fewer = [replace(layout, patches=(replace(layout.patches[0], view=(3, 4)),)) for layout in layouts]
    with pytest.raises(NotMeasurable, match="attends over 34 tokens for images of 24 patches, so that it is not known which is which"):
        tower_layers(subject.model, subject.anatomy, batch.inputs, fewer)
    monkeypatch.setitem(AttentionInterface._global_mapping, TOWER_NAMES["sdpa"], AttentionInterface._global_mapping["sdpa"])
    with pytest.raises(NotMeasurable, match="does not dispatch its attention through transformers' AttentionInterface"):
        towers(subject, batch)
