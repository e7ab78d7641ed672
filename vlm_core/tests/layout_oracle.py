"""Where image tokens lie, found out by changing pixels: towers whose tokens see only their own, on real processors.

``subject_of(name)``       a tiny model and its processor, vision attention silenced
``changes_follow(...)``    perturb blocks of an image, and compare the tokens that change with the boxes of its layout
``boxes_hold(name)``       the same for images of all sizes
``spans_hold(name)``       compare the places of image tokens in the sequence with the processor's own
``no_place(name)``         learned queries have none: who asks for one is told
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import Subject
from vlm_core.families.layout import KINDS, Layout, coverage, heatmap, image_layouts, object_tokens
from vlm_core.tests.family_processors import PATCH, PROCESSORS, VARIANTS

PROMPT = "what is in the image ?"
QUERIES = ("idefics2", "blip-2", "instructblip", "blip2_llama", "instructblip_llama")
PLACED = [name for name in (*PROCESSORS, *VARIANTS) if name not in QUERIES]
# (height, width): the model's own size, wide, tall, tiny, no multiple of anything, much larger than the model's.
SIZES = [(32, 32), (30, 91), (88, 27), (9, 11), (53, 47), (150, 210)]
# How far a resized pixel looks, in pixels of the coarser of the two images: the filter's support, summed over resizings.
REACH = {"idefics3": 9, "smolvlm": 9, "idefics3_whole": 6, "gemma3": 1, "gemma3_pan_and_scan": 1, "mllama": 1}
# Merged or pooled patches per token and side.
MERGED = {"mistral3", "aya_vision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "idefics3", "idefics3_whole",
          "smolvlm", "gemma3", "gemma3_pan_and_scan"}  # fmt: skip


@lru_cache(maxsize=None)
def subject_of(name: str) -> Subject:
    """A subject whose vision attention adds nothing, so that each image feature follows from its own pixels alone."""
    processor, model = {**PROCESSORS, **VARIANTS}[name]()
    subject = Subject(model, processor, name=name)
    silent = 0
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        projects = last in ("out_proj", "o_proj", "proj", "projection_layer") and isinstance(module, torch.nn.Linear)
        if projects and ("attn" in parent or "attention" in parent) and "language_model" not in path:
            silent += 1
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    assert name in QUERIES or silent >= 2, path
    return subject


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(96, 160, (*size, 3)).astype(np.uint8)


def with_block(pixels: np.ndarray, block: tuple[int, int, int, int]) -> np.ndarray:
    changed, (y0, x0, y1, x1) = pixels.copy(), block
    changed[y0:y1, x0:x1] += 128
    return changed


def layouts_of(subject: Subject, images: list, inputs=None) -> list[Layout]:
    inputs = subject.encode(images, [PROMPT] * len(images)).inputs if inputs is None else inputs
    sizes = [[(image.height, image.width) for image in (shown if isinstance(shown, list) else [shown])] for shown in images]
    return image_layouts(subject.anatomy.family, subject.model.config, subject.processor, inputs, sizes)


class _Seen(Exception):
    pass


def features_of(subject: Subject, inputs: dict) -> list[torch.Tensor]:
    """What the language model receives for each prompt's image tokens ``[image token, hidden]``."""
    received = {}

    def keep(module, args, kwargs):
        received.update(kwargs)
        raise _Seen

    handle = subject.anatomy.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            subject.model(**inputs)
    except _Seen:
        pass
    finally:
        handle.remove()
    if subject.anatomy.family.image_in_sequence:
        image = inputs["input_ids"] == subject.anatomy.image_token_id
        return [embeds[here] for embeds, here in zip(received["inputs_embeds"], image, strict=True)]
    states = received["cross_attention_states"]
    return list(states.reshape(len(inputs["input_ids"]), -1, states.shape[-1]))


def blocks_of(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Small blocks in the corners, the middle and off the middle."""
    b = max(2, min(height, width) // 9)
    places = [(0, 0), (height - b, width - b), (0, width - b), (height - b, 0), ((height - b) // 2, (width - b) // 2)]
    places += [(int(0.3 * (height - b)), int(0.62 * (width - b))), (int(0.71 * (height - b)), int(0.21 * (width - b)))]
    return [(y, x, y + b, x + b) for y, x in places]


def expected(name: str, layout: Layout, block, image: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that must change under a block of pixels, and tokens that may (bool ``[image token]`` each)."""
    height, width = layout.sizes[image]
    here = layout.placed(image)
    cell = PATCH * (2 if name in MERGED else 1)
    must, may = here.copy(), here.copy()
    for axis, length, low, high in ((0, width, block[1], block[3]), (1, height, block[0], block[2])):
        start, stop = layout.boxes[:, axis] * length, layout.boxes[:, axis + 2] * length
        # Pixels of the original per pixel of the view; the widest token of its grid is one that no border clips.
        scale = np.zeros(len(layout))
        for grid in np.unique(layout.grid[here]):
            on_grid = here & (layout.grid == grid)
            scale[on_grid] = (stop - start)[on_grid].max() / cell
        reach = REACH.get(name, 2) * np.maximum(scale, 1)
        if name == "llava_onevision_shrunk":
            reach = reach + (stop - start)
        with np.errstate(invalid="ignore"):
            overlap = np.minimum(stop, high) - np.maximum(start, low)
            must &= overlap >= np.maximum(scale, 1)
            may &= overlap > -reach
    # Padding beside the image sees its edge through the filter.
    for token in np.flatnonzero((layout.kind == "padding") & (layout.row >= 0)):
        beside = (abs(layout.row - layout.row[token]) <= 1) & (abs(layout.column - layout.column[token]) <= 1)
        may[token] = (may & beside & here & (layout.grid == layout.grid[token])).any()
    return must, may


def changes_follow(name: str, subject: Subject, pixels: np.ndarray, layout: Layout, image: int, encode) -> tuple[int, int]:
    """Perturb blocks of one image and compare the tokens that change with the boxes; counts of decided tokens."""
    blocks = blocks_of(*pixels.shape[:2])
    inputs = encode([Image.fromarray(pixels), *(Image.fromarray(with_block(pixels, block)) for block in blocks)])
    plain, *changed = features_of(subject, inputs)
    assert len(plain) == len(layout)
    moved = [((features - plain).abs().amax(1) > 1e-5 * plain.abs().max()).numpy() for features in changed]
    hit = missed = 0
    for block, seen in zip(blocks, moved, strict=True):
        must, may = expected(name, layout, block, image)
        assert not (must & ~seen).any(), f"{layout.sizes[image]} {block}: unchanged {np.flatnonzero(must & ~seen)}"
        assert not (seen & ~may).any(), f"{layout.sizes[image]} {block}: changed {np.flatnonzero(seen & ~may)}"
        hit, missed = hit + int(must.sum()), missed + int((~may).sum())
    return hit, missed


def boxes_hold(name: str) -> None:
    """Exactly the tokens over changed pixels change, for one image of every size."""
    subject = subject_of(name)
    hit = missed = 0
    for size in SIZES:
        pixels = picture(size)
        (layout,) = layouts_of(subject, [Image.fromarray(pixels)])
        counts = changes_follow(
            name, subject, pixels, layout, 0, lambda images: subject.encode(images, [PROMPT] * len(images)).inputs
        )
        hit, missed = hit + counts[0], missed + counts[1]
    assert hit > 30 and missed > 60


def spans_hold(name: str) -> None:
    """Positions and spans are those of the image tokens that the processor wrote."""
    subject = subject_of(name)
    inputs = subject.encode([Image.fromarray(picture((50, 70)))], [PROMPT]).inputs
    (layout,) = layouts_of(subject, [Image.new("RGB", (70, 50))], inputs)
    assert set(layout.kind) <= set(KINDS)
    if layout.where == "cross_attention":
        assert len(layout) == len(features_of(subject, inputs)[0])
        return
    image = (inputs["input_ids"][0] == subject.anatomy.image_token_id).numpy()
    np.testing.assert_array_equal(layout.positions, np.flatnonzero(image))
    inside = np.zeros(len(image), bool)
    for start, stop in layout.spans[0]:
        inside[start:stop] = True
    np.testing.assert_array_equal(inside, image)
    np.testing.assert_array_equal(layout.in_sequence(np.ones(len(layout), bool), len(image)), image)
    assert list(np.flatnonzero(layout.in_sequence(np.arange(len(layout)) == 2, len(image)))) == [layout.positions[2]]


def no_place(name: str) -> str:
    """The reason why image tokens that are learned queries have no box, as everyone who asks is told."""
    subject = subject_of(name)
    (layout,) = layouts_of(subject, [Image.new("RGB", (64, 32))])
    assert len(layout) and set(layout.kind) == {"query"} and layout.shape is None and len(layout.spans[0])
    for ask in (
        lambda: layout.boxes,
        lambda: coverage(layout, np.ones((4, 4))),
        lambda: object_tokens(layout, np.ones((4, 4))),
        lambda: heatmap(layout, np.ones(len(layout)), (4, 4)),
    ):
        with pytest.raises(ValueError, match="its image tokens are learned queries .* none has a place") as refused:
            ask()
        assert layout.reason in str(refused.value)
    return layout.reason
