"""Answers that name where: the words, the cells, and who says them."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core.distill import box_cell, by_asking, by_box, by_mask, grounded_answers, mask_cell
from vlm_core.tests.tiny import make_items


def test_an_answer_is_followed_by_its_place_and_stays_plain_where_that_is_unknown():
    items = make_items(3)
    places = {"item-0": "row two column three", "item-1": None, "item-2": " "}
    where = lambda item: places[item["id"]]  # noqa: E731
    assert grounded_answers(items, ["red", "big {where}", "blue"], where) == ["red at row two column three", "big {where}", "blue"]
    assert grounded_answers(items[:1], ["{where}"], where) == ["{where} at row two column three"]
    assert grounded_answers(items[:1], ["red"], where, "{answer} , there : {where} .") == ["red , there : row two column three ."]


@pytest.mark.parametrize("template", ["at {where}: {answer}", "{answer}", "{answer} {where} {where}", "{answer} {answer} {where}"])
def test_a_template_begins_with_the_answer(template):
    with pytest.raises(ValueError, match="must begin with {answer} and hold {where} once"):
        grounded_answers(make_items(1), ["red"], lambda item: "here", template)


def test_a_place_that_is_no_text_is_one_sentence():
    with pytest.raises(ValueError, match="where gives 3 .* for item 'item-0'"):
        grounded_answers(make_items(1), ["red"], lambda item: 3)


@pytest.mark.parametrize("size", [(12, 12), (13, 29), (3, 4)])
def test_a_masks_cell_is_that_with_most_of_its_pixels(size):
    height, width = size
    rows, columns = 3, 4
    generator = np.random.default_rng(0)
    for _ in range(30):
        mask = generator.random(size) < generator.random()
        # By brute force: every pixel is cut into 12 x 12 parts, so that no cell's edge runs through a part.
        fine = np.kron(mask, np.ones((12, 12)))
        area = fine.reshape(rows, 4 * height, columns, 3 * width).sum(axis=(1, 3))
        said = mask_cell(mask, rows, columns)
        if not mask.any():
            assert said is None
            continue
        row, column = divmod(int(area.argmax()), columns)
        assert said == f"row {('one', 'two', 'three')[row]} column {('one', 'two', 'three', 'four')[column]}"


def test_a_box_is_where_its_centre_is():
    assert box_cell((0, 0, 10, 10), (40, 20), 2, 4) == "row one column one"
    assert box_cell((30, 10, 40, 20), (40, 20), 2, 4) == "row two column four"
    assert box_cell((40, 20, 40, 20), (40, 20), 2, 4) == "row two column four"
    assert box_cell((0, 0, 2, 2), (2, 26), 26, 1, "{row}|{column}") == "two|one"
    assert box_cell((0, 24, 2, 26), (2, 26), 26, 1, "{row}|{column}") == "26|one"
    for box, words in (((0, 0, 10), "a box is"), ((5, 0, 0, 5), "a box is"), ((100, 0, 120, 10), "lies outside a picture")):
        with pytest.raises(ValueError, match=words):
            box_cell(box, (40, 20), 2, 4)


def test_masks_and_boxes_of_items_say_where():
    items = [{**item, "boxes": boxes} for item, boxes in zip(make_items(4), ([[8, 0, 16, 8]], [0, 8, 8, 16], [], None), strict=True)]
    where = by_box("boxes", 2, 2)
    assert [where(item) for item in items] == ["row one column two", "row two column one", None, None]
    mask = np.zeros((16, 16), dtype=bool)
    mask[12, 3] = True
    where = by_mask(lambda item: mask if item["id"] == "item-0" else None, 4, 4)
    assert [where(item) for item in items[:2]] == ["row four column one", None]


@pytest.mark.parametrize(("rows", "columns"), [(0, 2), (2, -1), (True, 2), (2.0, 2)])
def test_a_grid_has_cells(rows, columns):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        mask_cell(np.ones((4, 4)), rows, columns)
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        box_cell((0, 0, 1, 1), (4, 4), rows, columns)


def test_a_mask_has_two_axes():
    with pytest.raises(ValueError, match="a mask is one array"):
        mask_cell(np.ones((4, 4, 3)), 2, 2)


def test_the_teacher_says_where_when_asked_and_is_asked_once():
    items, calls = make_items(3), []

    class Guide:
        def answers(self, asked):
            calls.append([(one["id"], one["prompt"], one["image"]) for one in asked])
            return ["top left", " . "][: len(asked)]

    question = lambda item: None if item["id"] == "item-1" else f"where ? {item['prompt']}"  # noqa: E731
    where = by_asking(Guide(), items, question)
    assert [where(item) for item in items] == ["top left", None, None]
    assert calls == [[(item["id"], f"where ? {item['prompt']}", item["image"]) for item in (items[0], items[2])]]
    with pytest.raises(ValueError, match="was not asked where about item 'item-3'"):
        where(make_items(4)[3])
    assert by_asking(Guide(), items[:1], "where is it ?")(items[0]) == "top left"
    assert calls[1][0][1] == "where is it ?"
    for items, words in ((3, "items must be a sequence"), ([items[0], items[0]], "two items have the id 'item-0'")):
        with pytest.raises(ValueError, match=words):
            by_asking(Guide(), items, "where ?")
