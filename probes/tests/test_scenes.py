"""Scenes and their pixels: determinism, masks that match what is drawn, patches that match masks."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import probes
from probes.render import detail_mask
from probes.scene import CELL_SIZE, COLORS

SEEDS = st.integers(0, 2**31)


def scene_of(seed):
    return probes.sample_scene(np.random.default_rng(seed))


def nearest_color(rgb):
    return min(COLORS, key=lambda c: np.abs(np.asarray(COLORS[c]) - rgb).sum())


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_pixels_inside_a_mask_have_the_objects_color(seed):
    scene = scene_of(seed)
    image = np.asarray(probes.render(scene)).astype(float)
    for obj in scene.objects:
        mask = probes.object_mask(obj)
        assert mask.sum() > 15
        assert nearest_color(np.median(image[mask], axis=0)) == obj.color
        core = mask & (np.abs(image - np.asarray(obj.tint)).max(axis=2) < 2)
        assert core.sum() > 0.3 * mask.sum(), "what is not its own paint is its smoothed edge: most of a small star"


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_masks_stay_in_their_cell_and_never_overlap(seed):
    scene = scene_of(seed)
    masks = [probes.object_mask(o) for o in scene.objects] + [detail_mask(scene.detail)]
    assert np.max(np.sum(masks, axis=0)) == 1
    for obj in scene.objects:
        left, top, right, bottom = probes.object_box(obj)
        assert left >= obj.column * CELL_SIZE - 1 and right <= (obj.column + 1) * CELL_SIZE + 1
        assert top >= obj.row * CELL_SIZE - 1 and bottom <= (obj.row + 1) * CELL_SIZE + 1


def test_the_same_seed_draws_the_same_bytes_in_another_process():
    code = "import numpy as np, probes, hashlib; s = next(probes.scene_stream('confirmation', 3))[1]; print(s.content_hash, hashlib.sha256(probes.render(s).tobytes()).hexdigest())"
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}).stdout
    assert here == again and len(here.split()) == 2


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_patch_mask_equals_its_definition(rows, columns):
    mask = probes.object_mask(scene_of(rows * 10 + columns).objects[0])
    patches = probes.patch_mask(mask, (rows, columns), coverage=0.25)
    for r in range(rows):
        for c in range(columns):
            inside = [mask[y, x] for y in range(64) for x in range(64) if y * rows // 64 == r and x * columns // 64 == c]
            assert patches[r, c] == (np.mean(inside) > 0.25)


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="split 'test' is unknown: expected one of train, discovery, confirmation, debug"):
        next(probes.scene_stream("test"))


@pytest.mark.parametrize("size", [64, 96, 200, 448])
def test_a_scene_on_more_pixels_is_the_same_scene(size):
    """Masks, boxes and colours lie at the same places, finer drawn."""
    for seed in range(6):
        scene = scene_of(seed)
        image, small = np.asarray(probes.render(scene, size)).astype(float), np.asarray(probes.render(scene)).astype(float)
        assert image.shape == (size, size, 3)
        for thing, mask_of in (*((obj, probes.object_mask) for obj in scene.objects), (scene.detail, detail_mask)):
            mask, coarse = mask_of(thing, size), mask_of(thing)
            assert mask.mean() == pytest.approx(coarse.mean(), rel=0.25, abs=4 / 64**2), "as much of the picture"
            centre = np.argwhere(mask).mean(0) / size
            np.testing.assert_allclose(centre, (np.argwhere(coarse).mean(0)) / 64, atol=0.02)
            assert np.abs(np.median(image[mask], axis=0) - np.asarray(thing.tint)).max() < 25
        for obj in scene.objects:
            np.testing.assert_allclose(np.asarray(probes.object_box(obj, size)) / size, np.asarray(probes.object_box(obj)) / 64, atol=1.5 / 64)
        if scene.background in ("plain", "gradient"):
            corner = lambda pixels: pixels[: len(pixels) // 16, : len(pixels) // 16].mean()  # noqa: E731
            assert corner(image) == pytest.approx(corner(small), abs=3)


def test_fewer_pixels_than_the_smallest_things_need_are_refused():
    with pytest.raises(ValueError, match="scenes are drawn on 64 pixels a side at least, not 32"):
        probes.render(scene_of(0), 32)
