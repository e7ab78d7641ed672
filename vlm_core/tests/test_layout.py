"""Every image token lies where the layout says: real processors, and towers whose tokens see only their own pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_core import Subject, SubjectError
from vlm_core.families.family import FAMILIES
from vlm_core.families.layout import Layout, coverage, heatmap, image_layouts, object_tokens
from vlm_core.families.tiling import CUTS
from vlm_core.subjects.embed import capture
from vlm_core.tests.conformance.test_places import PROCESSOR_OF
from vlm_core.tests.family_processors import PROCESSORS, SIDE, VARIANTS
from vlm_core.tests.layout_oracle import (
    PLACED,
    PROMPT,
    boxes_hold,
    changes_follow,
    layouts_of,
    picture,
    spans_hold,
    subject_of,
)

SETTINGS = [name for name in VARIANTS if name not in PROCESSOR_OF.values()]
"""Further settings of families; each family's own are in the conformance suite."""

@pytest.mark.parametrize("name", SETTINGS)
def test_exactly_the_tokens_over_changed_pixels_change(name):
    boxes_hold(name)


def test_the_oracle_sees_nothing_where_attention_mixes_tokens():
    processor, model = PROCESSORS["llava"]()
    subject, pixels = Subject(model, processor), picture((32, 32))
    (layout,) = layouts_of(subject, [Image.fromarray(pixels)])
    with pytest.raises(AssertionError, match="changed"):
        changes_follow("llava", subject, pixels, layout, 0, lambda images: subject.encode(images, [PROMPT] * len(images)).inputs)


@pytest.mark.parametrize("name", PLACED)
def test_several_images_in_one_prompt_and_prompts_of_one_batch(name):
    subject = subject_of(name)
    first, second = Image.fromarray(picture((40, 70))), Image.fromarray(picture((64, 33), seed=1))
    inputs = subject.encode([[first, second], second], [PROMPT] * 2).inputs
    both, alone = layouts_of(subject, [[first, second], second], inputs)
    assert both.sizes == ((40, 70), (64, 33)) and alone.sizes == ((64, 33),)
    for image, size in enumerate(both.sizes):
        (own,) = layouts_of(subject, [Image.new("RGB", size[::-1])])
        np.testing.assert_array_equal(both.corners[both.image == image], own.corners)
        np.testing.assert_array_equal(both.kind[both.image == image], own.kind)
    np.testing.assert_array_equal(both.corners[both.image == 1], alone.corners[alone.image == 0])
    assert len(both.spans) == 2 and both.spans[0][-1][1] <= both.spans[1][0][0]

    def encode(images):
        return subject.encode([[first, image] for image in images], [PROMPT] * len(images)).inputs

    hit, missed = changes_follow(name, subject, np.asarray(second), both, 1, encode)
    assert hit and missed


def test_images_of_a_nested_prompt_are_padded_to_squares():
    """LLaVA-OneVision tiles an image only where it is the prompt's one image."""
    subject, name = subject_of("llava_onevision"), "llava_onevision"
    first, second = Image.fromarray(picture((40, 70))), Image.fromarray(picture((64, 33), seed=1))

    def encode(images):
        texts = [f"<image> <image> {PROMPT}"] * len(images)
        return subject.processor(
            images=[[first, image] for image in images], text=texts, return_tensors="pt", padding=True
        )

    (layout,) = layouts_of(subject, [[first, second]], encode([second]))
    assert list(layout.kind[layout.image == 1][-1:]) == ["newline"] and (layout.kind == "padding").sum() == 4
    hit, missed = changes_follow(name, subject, np.asarray(second), layout, 1, encode)
    assert hit and missed


@pytest.mark.parametrize("name", SETTINGS)
def test_positions_are_those_of_the_image_tokens(name):
    spans_hold(name)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_rotary_positions_count_the_rows_and_columns_of_the_layout(name):
    subject = subject_of(name)
    first, second = Image.fromarray(picture((40, 70))), Image.fromarray(picture((64, 33), seed=1))
    inputs = subject.encode([[first, second]], [PROMPT]).inputs
    (layout,) = layouts_of(subject, [[first, second]], inputs)
    positions = capture(subject, inputs)[0].positions[-2:, layout.positions].numpy()
    for image in (0, 1):
        here = layout.image == image
        down, across = positions[:, here] - positions[:, here].min(1, keepdims=True)
        np.testing.assert_array_equal(down, layout.row[here])
        np.testing.assert_array_equal(across, layout.column[here])


def boxes_in_pixels(layout: Layout) -> np.ndarray:
    height, width = layout.sizes[0]
    return np.round(layout.boxes * [width, height, width, height], 6)


def test_a_centre_crop_by_hand():
    # 64 x 96 is halved to 32 x 48, of which the middle 32 columns are kept: 64 x 64 of the original from column 16 on.
    (layout,) = layouts_of(subject_of("llava"), [Image.new("RGB", (96, 64))])
    assert layout.shape == (4, 4)
    boxes = boxes_in_pixels(layout)
    np.testing.assert_array_equal(boxes[0], [16, 0, 32, 16])
    np.testing.assert_array_equal(boxes[6], [48, 16, 64, 32])
    np.testing.assert_array_equal(boxes[-1], [64, 48, 80, 64])


def test_a_padded_square_by_hand():
    # 32 x 64 becomes the middle of 64 x 64: the first and last of four rows of patches are only padding.
    (layout,) = layouts_of(subject_of("llava_padded"), [Image.new("RGB", (64, 32))])
    assert list(layout.kind) == ["cls"] + ["padding"] * 4 + ["patch"] * 8 + ["padding"] * 4
    boxes = boxes_in_pixels(layout)
    np.testing.assert_array_equal(boxes[5], [0, 0, 16, 16])
    np.testing.assert_array_equal(boxes[12], [48, 16, 64, 32])
    assert np.isnan(boxes[[0, 1, 4, 13, 16]]).all() and layout.shape is None


def test_stitched_tiles_by_hand():
    # 48 x 64 goes into 64 x 64 with 8 rows of padding above and below: 8 x 8 patches less one row at either end.
    (layout,) = layouts_of(subject_of("llava_next"), [Image.new("RGB", (64, 48))])
    assert list(layout.kind[:16]) == ["thumbnail"] * 16 and (layout.kind == "newline").sum() == 6
    np.testing.assert_array_equal(boxes_in_pixels(layout)[5], [16, 12, 32, 24])
    tiles = layout.kind == "tile"
    np.testing.assert_array_equal(boxes_in_pixels(layout)[tiles][:9][[0, 7, 8]], [[0, 0, 8, 8], [56, 0, 64, 8], [0, 8, 8, 16]])
    tile = layout.tile[tiles].reshape(6, 8)
    np.testing.assert_array_equal(tile[:3], [[0, 0, 0, 0, 1, 1, 1, 1]] * 3)
    np.testing.assert_array_equal(tile[3:], [[2, 2, 2, 2, 3, 3, 3, 3]] * 3)
    assert list(layout.kind[16:26]) == ["tile"] * 8 + ["newline", "tile"]


def test_tiles_and_thumbnail_by_hand():
    # Two to one: two tiles of 2 x 2 tokens, then the whole.
    (layout,) = layouts_of(subject_of("internvl"), [Image.new("RGB", (64, 32))])
    assert list(layout.kind) == ["tile"] * 8 + ["thumbnail"] * 4 and list(layout.tile) == [0] * 4 + [1] * 4 + [-1] * 4
    boxes = boxes_in_pixels(layout)
    np.testing.assert_array_equal(boxes[[1, 6, 9]], [[16, 0, 32, 16], [32, 16, 48, 32], [32, 0, 64, 16]])


def test_cross_attention_keys_by_hand():
    # 32 x 48 fits two tiles side by side and leaves the last 16 columns, two of eight patches, empty; two tiles fill up.
    (layout,) = layouts_of(subject_of("mllama"), [Image.new("RGB", (48, 32))])
    assert layout.where == "cross_attention" and len(layout) == 4 * 17
    assert list(np.flatnonzero(layout.kind == "cls")) == [0, 17]
    boxes = boxes_in_pixels(layout)
    np.testing.assert_array_equal(boxes[[1, 18, 23]], [[0, 0, 8, 8], [32, 0, 40, 8], [40, 8, 48, 16]])
    assert (layout.kind[18:34] == "padding").sum() == 8 and (layout.kind[34:] == "padding").all()


def test_rows_of_pixtral_end_outside_the_image_tokens():
    (layout,) = layouts_of(subject_of("mistral3"), [Image.new("RGB", (64, 32))])
    start = layout.positions[0]
    assert layout.shape == (2, 4) and layout.spans == (((start, start + 4), (start + 5, start + 9)),)


def test_the_crops_of_pan_and_scan_by_hand():
    (layout,) = layouts_of(subject_of("gemma3_pan_and_scan"), [Image.new("RGB", (90, 30))])
    assert list(layout.kind) == ["thumbnail"] * 4 + ["tile"] * 12
    np.testing.assert_array_equal(boxes_in_pixels(layout)[[1, 4, 15]], [[45, 0, 90, 15], [0, 0, 15, 15], [75, 15, 90, 30]])


def test_pan_and_scan_asked_for_in_the_call():
    subject = subject_of("gemma3")
    image, options = Image.new("RGB", (90, 30)), {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    inputs = subject.processor(images=[[image]], text=["<start_of_image> what"], return_tensors="pt", images_kwargs=options)
    arguments = (subject.anatomy.family, subject.model.config, subject.processor, inputs, [[(30, 90)]])
    assert len(image_layouts(*arguments, options=options)[0]) == 16
    with pytest.raises(SubjectError, match="make 4 image tokens .* the prompt holds 16: give the sizes .* options"):
        image_layouts(*arguments)


# -- what stands on the boxes -------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(8, 200), st.integers(8, 200)).filter(lambda size: max(size) <= 12 * min(size))
# A margin may be cut off, or patches may leave the end of a view without a token.
CROPPED = {"llava", "vipllava", "llava_next", "llava_onevision", "llava_onevision_shrunk", "llava_onevision_uneven"}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACED), sizes, st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_properties(name, size, point):
    (layout,) = layouts_of(subject_of(name), [Image.new("RGB", size[::-1])])
    boxes, placed = layout.boxes, layout.placed()
    assert placed.any() and (boxes[placed] >= 0).all() and (boxes[placed] <= 1).all()
    assert (boxes[placed, :2] < boxes[placed, 2:]).all()
    assert set(layout.kind[placed]) <= {"patch", "tile", "thumbnail"}
    # Tiles partition the image, and a thumbnail shows all of it.
    held = layout.kind[layout.at(*point)]
    assert (held == "thumbnail").sum() in ((0, 1) if name == "llava_onevision_uneven" else ("thumbnail" in layout.kind,))
    assert (held != "thumbnail").sum() in ((0, 1) if name in CROPPED else (1,))
    np.testing.assert_allclose(coverage(layout, np.ones(size, bool)), placed, atol=1e-9)
    assert not coverage(layout, np.zeros(size, bool)).any()
    drawn = heatmap(layout, np.full(len(layout), 2.5), size)
    np.testing.assert_allclose(drawn[~np.isnan(drawn)], 2.5)
    assert not np.isnan(drawn).all() and (name in CROPPED or not np.isnan(drawn).any())


def grid_layout(rows, columns, size=(4, 4), tiles=1, thumbnail=False) -> Layout:
    """Grids side by side, each ``rows`` x ``columns``, and one token over all of the image."""
    row, column = (index.reshape(-1) for index in np.indices((rows, columns)))
    boxes = [
        np.stack([tile + column / columns, row / rows * tiles, tile + (column + 1) / columns, (row + 1) / rows * tiles], 1)
        for tile in range(tiles)
    ]
    count = rows * columns * tiles
    whole = [[0.0, 0.0, 1.0, 1.0]] * thumbnail
    extra = [0] * thumbnail
    return Layout(
        positions=np.arange(count + thumbnail),
        image=np.zeros(count + thumbnail, int),
        kind=np.array(["tile"] * count + ["thumbnail"] * thumbnail),
        tile=np.r_[np.repeat(np.arange(tiles), rows * columns), np.full(int(thumbnail), -1)],
        grid=np.r_[np.repeat(np.arange(tiles), rows * columns), np.full(int(thumbnail), tiles)].astype(int),
        row=np.r_[np.tile(row, tiles), extra].astype(int),
        column=np.r_[np.tile(column, tiles), extra].astype(int),
        corners=np.concatenate([np.concatenate(boxes) / tiles, np.reshape(whole, (-1, 4))]),
        sizes=(size,),
    )


def test_coverage_is_an_exact_share():
    layout = grid_layout(2, 2)
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[2:, 1:3] = True
    np.testing.assert_allclose(coverage(layout, mask), [0.25, 0, 0.5, 0.5])
    # Three columns of boxes over four of pixels.
    shares = coverage(grid_layout(1, 3), np.array([[True, False, False, False]]))
    np.testing.assert_allclose(shares, [0.75, 0, 0])
    np.testing.assert_allclose(coverage(layout, np.kron(mask, np.ones((3, 5)))), [0.25, 0, 0.5, 0.5])


def test_object_tokens_take_a_threshold_and_rings_of_neighbours():
    layout = grid_layout(6, 6, size=(12, 12))
    mask = np.zeros((12, 12), bool)
    mask[4:6, 4:6] = mask[0, 0] = True
    assert list(np.flatnonzero(object_tokens(layout, mask))) == [0, 14]
    assert list(np.flatnonzero(object_tokens(layout, mask, 0.25))) == [14]
    ring = object_tokens(layout, mask, 0.5, rings=1).reshape(6, 6)
    wide = object_tokens(layout, mask, 0.5, rings=2).reshape(6, 6)
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    np.testing.assert_array_equal(ring, expected)
    expected[0:5, 0:5] = True
    np.testing.assert_array_equal(wide, expected)


def test_rings_stay_on_their_tile():
    layout = grid_layout(3, 3, size=(12, 24), tiles=2, thumbnail=True)
    mask = np.zeros((12, 24), bool)
    mask[5, 11] = True
    chosen = object_tokens(layout, mask, rings=1)
    # The last column of the middle row of the left tile and what lies around it; the thumbnail's one token.
    assert list(np.flatnonzero(chosen)) == [1, 2, 4, 5, 7, 8, 18]


def test_fine_tiles_are_drawn_before_the_thumbnail_and_overlaps_are_averaged():
    layout = grid_layout(2, 2, thumbnail=True)
    np.testing.assert_allclose(heatmap(layout, [1, 2, 3, 4, 9], (2, 2)), [[1, 2], [3, 4]])
    np.testing.assert_allclose(heatmap(layout, [1, 2, 3, 4, 9], (1, 1)), [[2.5]])
    layout.corners[3] = np.nan
    np.testing.assert_allclose(heatmap(layout, [1, 2, 3, 4, 9], (2, 2)), [[1, 2], [3, 9]])
    layout.kind[4] = "tile"
    np.testing.assert_allclose(heatmap(layout, [1, 2, 3, 4, 9], (2, 2)), [[5, 5.5], [6, 9]])
    np.testing.assert_allclose(heatmap(grid_layout(1, 2), [0, 1], (1, 3)), [[0, 0.5, 1]])


def test_pixels_that_were_cropped_away_have_no_heat():
    (layout,) = layouts_of(subject_of("llava"), [Image.new("RGB", (96, 64))])
    drawn = heatmap(layout, np.arange(16), (64, 96))
    assert np.isnan(drawn[:, :16]).all() and np.isnan(drawn[:, 80:]).all() and drawn[0, 16] == 0 and drawn[63, 79] == 15


def test_masks_belong_to_one_image_of_the_prompt():
    (layout,) = layouts_of(subject_of("qwen2_vl"), [[Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))]])
    second = coverage(layout, np.ones((64, 32)), image=1)
    np.testing.assert_array_equal(second > 0, layout.image == 1)
    with pytest.raises(ValueError, match="the prompt has 2 image.s., counted from 0: there is no image 2"):
        coverage(layout, np.ones((4, 4)), image=2)


def test_a_subject_lays_out_its_own_prompts():
    subject = subject_of("internvl")
    layout = subject.layout([Image.new("RGB", (64, 32)), Image.new("RGB", (32, 32))], PROMPT)
    assert [len(runs) for runs in layout.spans] == [1, 1] and subject.layout(Image.new("RGB", (32, 32))).shape == (2, 2)
    assert subject.layout(Image.new("RGB", (64, 32))).shape is None


def test_every_declared_family_has_a_layout_that_is_tested():
    assert {family.layout for family in FAMILIES.values()} | {"native"} == set(CUTS)
    assert {family.model_type for family in FAMILIES.values()} == set(PROCESSORS)


def test_bad_input_is_one_sentence():
    subject = subject_of("llava")
    image = Image.new("RGB", (SIDE, SIDE))
    (layout,) = layouts_of(subject, [image])
    with pytest.raises(ValueError, match=r"one value per image token \(16\), but the values have shape \(3,\)"):
        heatmap(layout, [1, 2, 3], (4, 4))
    with pytest.raises(ValueError, match="at least 0 and below 1, but it is 1"):
        object_tokens(layout, np.ones((4, 4)), threshold=1)
    with pytest.raises(ValueError, match="0, 1 or 2, but 3"):
        object_tokens(layout, np.ones((4, 4)), rings=3)
    with pytest.raises(ValueError, match=r"one array \[height, width\], but this one has shape \(4,\)"):
        coverage(layout, np.ones(4))
    with pytest.raises(ValueError, match=r"16 image tokens .* do not fit \(3,\) choices in a sequence of 40"):
        layout.in_sequence(np.ones(3, bool), 40)
    with pytest.raises(ValueError, match="in a sequence of 5: .* whole length"):
        layout.in_sequence(np.ones(16, bool), 5)
    inputs = subject.encode([image], [PROMPT]).inputs
    family, config = subject.anatomy.family, subject.model.config
    with pytest.raises(ValueError, match="there are 1 prompts, but sizes of the images of 2"):
        image_layouts(family, config, subject.processor, inputs, [[(4, 4)], [(4, 4)]])
    with pytest.raises(SubjectError, match="make 32 image tokens .* the prompt holds 16"):
        image_layouts(family, config, subject.processor, inputs, [[(4, 4), (4, 4)]])
    with pytest.raises(SubjectError, match="cannot be placed without the processor"):
        image_layouts(family, config, None, inputs, [[(4, 4)]])
    with pytest.raises(SubjectError, match=r"declares the layout 'spiral', .* \(known: whole, native"):
        image_layouts(replace(family, layout="spiral"), config, subject.processor, inputs, [[(4, 4)]])


def test_a_layout_shows_itself_in_a_line():
    layout = grid_layout(2, 3, size=(20, 30), thumbnail=True)
    assert repr(layout) == "Layout(7 image tokens: 6 tile, 1 thumbnail; images of 30 x 20 pixels)"
