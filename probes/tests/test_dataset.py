"""Probe sets: balance, blind floor, disjoint splits, masks of targets, a card that is up to date."""

from collections import Counter

import datasets
import numpy as np
import pytest

import probes
from probes import card
from probes.baselines import baselines
from probes.dataset import BALANCE

N = 48


@pytest.fixture(scope="module")
def sets():
    return {split: probes.build(split, n_per_task=N) for split in ("train", "discovery", "confirmation")}


def test_a_probe_set_is_a_dataset_with_image_features(sets):
    data = sets["confirmation"]
    assert isinstance(data.features["image"], datasets.Image) and data[0]["image"].size == (64, 64)
    assert Counter(data["task"]) == {task: N for task in probes.TASKS}
    assert len(set(data["id"])) == len(data)
    assert len(set(data["scene_id"])) < len(data) / 3, "tasks share scenes, which are the clusters"


@pytest.mark.parametrize("n", [48, 50])
def test_answers_are_balanced_even_where_the_number_does_not_divide(n):
    data = probes.build("discovery", n_per_task=n, seed=5)
    for task in probes.TASKS:
        if probes.TASKS[task].answers is None:
            continue
        counts = Counter(a for t, a in zip(data["task"], data["answer"]) if t == task)
        assert set(counts) == set(probes.TASKS[task].answers)
        assert max(counts.values()) <= max(BALANCE * min(counts.values()), min(counts.values()) + 1)


def test_nothing_can_be_answered_well_without_looking(sets):
    table = baselines(sets["train"], sets["confirmation"]).set_index("task")
    for task, row in table.drop(index="caption").iterrows():
        guessable = 0.5 if task in ("relation", "binding") else row.chance
        assert row.blind < guessable + 0.2, f"{task} is answered blind at {row.blind:.2f}"
        assert row.majority <= row.chance + 0.15 and row.balance <= BALANCE + 0.1


def test_blind_baseline_finds_a_leak(sets):
    leaky = sets["train"].map(lambda r: {"prompt": r["prompt"] + " " + r["answer"]})
    assert baselines(leaky, leaky).set_index("task").loc["color", "blind"] == 1.0


def test_splits_share_no_picture_and_a_shared_one_is_found(sets):
    probes.assert_disjoint(sets.values())
    with pytest.raises(ValueError, match="share"):
        probes.assert_disjoint([sets["train"], sets["train"].select([0])])
    assert len({probes.content_hash(s) for s in sets.values()}) == 3


def test_another_seed_gives_other_scenes_and_the_same_seed_the_same(sets):
    again = probes.build("confirmation", n_per_task=N)
    assert probes.content_hash(again) == probes.content_hash(sets["confirmation"])
    assert again[7]["image"].tobytes() == sets["confirmation"][7]["image"].tobytes()
    probes.assert_disjoint([again, probes.build("confirmation", n_per_task=N, seed=1)])


def test_target_masks_lie_in_the_targets_boxes(sets):
    for row in sets["discovery"].select(range(0, len(sets["discovery"]), 7)):
        mask = probes.target_mask(row)
        inside = np.zeros_like(mask)
        for left, top, right, bottom in row["boxes"]:
            inside[top:bottom, left:right] = True
        assert mask.any()
        if row["target"]:
            assert not (mask & ~inside).any()


def test_the_debug_set_has_100_items_over_all_tasks():
    debug = probes.debug_set()
    assert len(debug) == 100 and set(debug["task"]) == set(probes.TASKS)


def test_bad_requests_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="task 'colour' is unknown: expected one of color"):
        probes.build("train", tasks=["colour"])
    with pytest.raises(ValueError, match="n_per_task is 0"):
        probes.build("train", n_per_task=0)


def test_the_card_is_what_the_generator_builds(tmp_path):
    assert card.write(tmp_path / "CARD.md") == card.PATH.read_text(), "run `python -m probes.card` after changing a probe"


def test_a_set_on_more_pixels_asks_the_same_of_the_same_scenes():
    small, large = (probes.build("debug", n_per_task=2, size=size) for size in (64, 160))
    assert probes.content_hash(small) == probes.content_hash(large)
    for one, other in zip(small, large, strict=True):
        assert {name: one[name] for name in ("id", "scene_id", "prompt", "answer", "candidates", "objects")} == {
            name: other[name] for name in ("id", "scene_id", "prompt", "answer", "candidates", "objects")
        }
        assert other["image"].size == other["partner_image"].size == (160, 160)
        mask = probes.target_mask(other)
        assert mask.shape == (160, 160) and mask.mean() == pytest.approx(probes.target_mask(one).mean(), rel=0.3)
        for left, top, right, bottom in other["boxes"]:
            assert mask[top:bottom, left:right].any(axis=1).all() and max(right, bottom) <= 160
