"""Object identification from COCO, with masks: which objects, their pixels, and what measurements make of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="masks of COCO are read with pycocotools: pip install -e '.[benchmarks]'")

from probes.benchmarks import BENCHMARKS, load, others_mask, target_mask
from probes.benchmarks.coco import SELECTIONS, annotation_mask
from vlm_core.items import SCORED, require_items
from vlm_core.scoring import score_answer

NAMES = {1: "dog", 2: "cat", 3: "bus", 4: "cup", 5: "kite"}
SIZE = (64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CLAIMS_CACHE", str(tmp_path / "cache"))


def square(left: int, top: int, across: int, down: int) -> list[float]:
    return [left, top, left + across, top, left + across, top + down, left, top + down]


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, column by column, zeros first: by their definition."""
    counts, last = [0], 0
    for value in mask.T.ravel().astype(int):
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return counts


def blob(seed: int, height: int = 13, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < 0.4


def test_run_lengths_are_the_pixels_they_count():
    for seed in range(5):
        mask = blob(seed)
        assert np.array_equal(annotation_mask({"counts": run_lengths(mask), "size": list(mask.shape)}, *mask.shape), mask)


def test_compressed_run_lengths_are_read_too():
    # Decoded by hand from COCO's definition (six bits a letter, from "0" on, five of them of the number, low ones first, from the fourth
    # run on differences to the run two before): "52203" is the runs 5, 2, 2, 2 + 0, 2 + 3: a column of 16.
    mask = annotation_mask({"counts": "52203", "size": [16, 1]}, 16, 1)
    assert np.flatnonzero(mask[:, 0]).tolist() == [5, 6, 9, 10]


def test_polygons_are_filled():
    mask = annotation_mask([square(2, 3, 4, 5), square(10, 1, 2, 2)], 12, 14)
    expected = np.zeros((12, 14), dtype=bool)
    expected[3:8, 2:6] = expected[1:3, 10:12] = True
    assert np.array_equal(mask, expected)
    # A slanted one against the pixels whose centres lie in it: only those of the border may differ.
    from matplotlib.path import Path
    from scipy.ndimage import binary_dilation, binary_erosion

    corners = [5.0, 5.0, 90.0, 20.0, 70.0, 85.0, 15.0, 60.0]
    rows, columns = np.mgrid[:100, :100] + 0.5
    centres = Path(np.reshape(corners, (-1, 2))).contains_points(np.c_[columns.ravel(), rows.ravel()]).reshape(100, 100)
    found, around = annotation_mask([corners], 100, 100), np.ones((3, 3))
    assert not (binary_erosion(centres, around) & ~found).any()
    assert not (found & ~binary_dilation(centres, around)).any()


def test_a_segmentation_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="a segmentation is of 9 x 13 pixels, its picture of 9 x 12"):
        annotation_mask({"counts": run_lengths(blob(0)), "size": [13, 9]}, 12, 9)
    with pytest.raises(ValueError, match="a segmentation cannot be read"):
        annotation_mask({"counts": 3, "size": [13, 9]}, 13, 9)


def annotation(number: int, image: int, category: int, box: tuple[int, int, int, int], **fields) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": [square(*box)],
        "area": float(box[2] * box[3]),
        "bbox": [float(one) for one in box],
        "iscrowd": 0,
        **fields,
    }


def written(folder, annotations: list[dict], split: str = "val2017", file_name: str | None = None):
    """A folder as COCO is unpacked to."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    images = []
    for number in sorted({one["image_id"] for one in annotations}):
        name = f"{number:012d}.jpg"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / split / name)
        images.append({"id": number, "file_name": file_name or name, "height": SIZE[0], "width": SIZE[1]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": one, "name": name} for one, name in NAMES.items()]}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_an_item_shows_one_object_with_its_mask_and_asks_which_of_four_things_is_there(tmp_path):
    two = [annotation(1, 9, 1, (8, 4, 30, 20)), annotation(2, 9, 2, (40, 40, 10, 10))]
    items = load("coco-hear", source=written(tmp_path, two))
    require_items(items, SCORED)
    (item,) = items
    assert (item["id"], item["scene_id"], item["answer"], item["boxes"]) == ("9", "9", "dog", [[8, 4, 38, 24]])
    expected = np.zeros(SIZE, dtype=bool)
    expected[4:24, 8:38] = True
    assert np.array_equal(target_mask(item), expected)
    assert others_mask(item).sum() == 100 and not (others_mask(item) & expected).any()
    # What else is in the picture is no wrong answer.
    assert sorted(item["candidates"]) == ["bus", "cup", "dog", "kite"]
    assert all(name in item["prompt"] for name in item["candidates"]) and "cat" not in item["prompt"]
    assert score_answer("It is a dog.", item) == 1.0
    assert score_answer("It is a bus.", item) == 0.0
    orders = {tuple(load("coco-hear", source=tmp_path, seed=seed)[0]["candidates"]) for seed in range(6)}
    assert len(orders) > 1


CHOICES = [
    # one of two dogs is not the dog; a crowd is not one thing; a speck is not the main one
    ("coco-hear", [*(annotation(one, 1, 1, (32 * one - 32, 0, 30, 30)) for one in (1, 2)), annotation(3, 1, 2, (0, 40, 25, 20))], "cat"),
    ("coco-hear", [annotation(1, 1, 1, (0, 0, 30, 30), iscrowd=1), annotation(3, 1, 2, (0, 40, 25, 20))], "cat"),
    ("coco-hear", [annotation(1, 1, 1, (0, 0, 9, 9))], None),
    ("coco-hear", [annotation(1, 1, 1, (0, 0, 30, 30)), annotation(2, 1, 2, (30, 30, 31, 31))], "cat"),
    ("coco-hi", [annotation(1, 1, 1, (0, 0, 30, 30))], "dog"),
    # bounds are exclusive
    ("coco-neo", [annotation(1, 1, 1, (0, 0, 40, 25))], None),
    ("coco-neo", [annotation(1, 1, 1, (0, 0, 40, 26))], "dog"),
    ("coco-neo", [annotation(1, 1, 1, (0, 0, 40, 50))], None),
    ("coco-neo", [annotation(number, 1, number, (0, 0, 40, 26)) for number in (1, 2, 3)], "dog"),
    ("coco-neo", [annotation(number, 1, number, (0, 0, 40, 26)) for number in (1, 2, 3, 4)], None),
    ("coco-neo-lens", [annotation(1, 1, 1, (0, 0, 40, 26), area=25000.0)], "dog"),
    ("coco-neo-lens", [annotation(1, 1, 1, (0, 0, 40, 26))], None),
]


@pytest.mark.parametrize(("name", "annotations", "expected"), CHOICES)
def test_the_object_is_the_one_that_the_paper_would_choose(name, annotations, expected, tmp_path):
    folder = written(tmp_path, annotations, BENCHMARKS[name].split)
    if expected is None:
        with pytest.raises(ValueError, match=f"the benchmark '{name}' has no items"):
            load(name, source=folder)
    else:
        assert load(name, source=folder)["answer"][:] == [expected]


def test_the_published_sizes_are_what_is_loaded_unless_asked_otherwise(tmp_path, monkeypatch):
    assert {name: (selection.size, BENCHMARKS[name].n) for name, selection in SELECTIONS.items()} == {
        "coco-hear": (200, 200),
        "coco-hi": (None, None),
        "coco-neo": (4318, 4318),
        "coco-neo-lens": (170, 170),
    }
    folder = written(tmp_path, [annotation(number, number, 1, (0, 0, 30, 30)) for number in range(1, 6)])
    few = dataclasses.replace(BENCHMARKS["coco-hear"], n=3)
    monkeypatch.setattr("probes.benchmarks.loading.BENCHMARKS", {**BENCHMARKS, "coco-hear": few})
    assert len(load("coco-hear", source=folder)) == 3
    assert len(load("coco-hi", source=folder)) == 5
    assert load("coco-hear", n=2, source=folder)["id"][:] == load("coco-hear", source=folder)["id"][:2]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "https://images.cocodataset.org/1.jpg"])
def test_annotations_name_only_pictures_of_their_folder(name, tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "secret.jpg")
    folder = written(tmp_path / "coco", [annotation(1, 1, 1, (0, 0, 30, 30))], file_name=name)
    with pytest.raises(ValueError, match="^the image of item '1' .*data can only name files within"):
        load("coco-hear", source=folder)


def test_without_its_files_it_is_said_where_they_are(tmp_path):
    with pytest.raises(ValueError, match="'coco-hear' is not here: it is not on the Hub; fetch annotations_trainval2017.zip and"):
        load("coco-hear")
    with pytest.raises(ValueError, match="has no instances_val2017.json, nor in annotations/"):
        load("coco-hear", source=tmp_path)


def test_masks_are_what_measurements_take(tmp_path):
    from vlm_core.families.layout import Layout, object_tokens

    item = load("coco-hear", source=written(tmp_path, [annotation(1, 1, 1, (16, 0, 32, 16))]))[0]
    row, column = (one.ravel() for one in np.indices((4, 4)))
    layout = Layout(  # of 4 x 4 tokens
        positions=np.arange(16),
        image=np.zeros(16, int),
        kind=np.array(["tile"] * 16),
        tile=np.zeros(16, int),
        grid=np.zeros(16, int),
        row=row,
        column=column,
        corners=np.stack([column, row, column + 1, row + 1], 1) / 4,
        sizes=(target_mask(item).shape,),
    )
    assert np.flatnonzero(object_tokens(layout, target_mask(item))).tolist() == [1, 2]
    assert not object_tokens(layout, others_mask(item)).any()
