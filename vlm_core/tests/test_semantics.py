"""Head usage by meaning or by looks: what is planted wins, and silhouettes are scikit-learn's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.metrics import silhouette_samples, silhouette_score

from vlm_core import compare_labels
from vlm_core.errors import NotMeasurable
from vlm_core.heads import semantics
from vlm_core.heads.semantics import appearance, appearance_within, flat_map, usage


def test_usage_is_a_direction():
    rows = np.random.default_rng(0).normal(size=(5, 2, 3))
    found, every = usage(rows * np.arange(1, 6)[:, None, None])
    np.testing.assert_allclose(found, usage(rows)[0])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    assert every.tolist() == [0, 1, 2, 3, 4]
    rows[2] = 0
    some, left = usage(rows)
    assert left.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(some, found[left])
    with pytest.raises(NotMeasurable, match="none of 1 items has an attribution other than zeros"):
        usage(rows[2:3])


def test_looks_are_read_from_pixels():
    rng = np.random.default_rng(0)
    images = []
    for index in range(24):
        level, rough, hue = 60 + 60 * (index % 3), (index // 3) % 2, (index // 6) % 2
        pixels = np.full((16, 16, 3), level, dtype=float) + (40 * rng.choice([-1, 1], (16, 16, 1)) if rough else 0)
        pixels[..., 2 if hue else 0] *= 0.2
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    for n, name, truth in ((2, "texture", [(i // 3) % 2 for i in range(24)]),):
        found = appearance(images, n)[name]
        assert found.tolist() == truth
    bright = appearance(images, 3)["brightness"]
    assert sorted(np.bincount(bright)) == [8, 8, 8]
    luminance = [(np.asarray(one, float) @ (0.299, 0.587, 0.114)).mean() for one in images]
    assert max(np.array(luminance)[bright == 0]) <= min(np.array(luminance)[bright == 2])
    assert set(appearance(images, 4)) == {"brightness", "texture", "colours"}
    with pytest.raises(ValueError, match="24 images cannot be put into 25 groups"):
        appearance(images, 25)


def test_looks_of_a_stratum_are_those_of_its_own_images():
    shades = [(10 * k, 10 * k, 10 * k) for k in range(12)]
    images, within = [Image.new("RGB", (8, 8), shade) for shade in shades], np.array(["dark"] * 6 + ["light"] * 6)
    answers = ["a", "b", "c"] * 2 + ["a", "b"] * 3
    order = np.random.default_rng(0).permutation(12)
    found = appearance_within([images[k] for k in order], np.array(answers)[order], within[order])["brightness"]
    again = np.empty(12, dtype=int)
    again[order] = found
    for rows, groups in ((slice(0, 6), 3), (slice(6, 12), 2)):
        alone = appearance(images[rows], groups)["brightness"]
        np.testing.assert_array_equal(again[rows][:, None] == again[rows], alone[:, None] == alone)
    assert not set(again[:6]) & set(again[6:])


def test_colour_groups_follow_colours():
    images = [Image.new("RGB", (8, 8), colour) for colour in [(200, 30, 30), (30, 30, 200)] * 5]
    found = appearance(images, 2)["colours"]
    assert len(set(found[::2])) == len(set(found[1::2])) == 1 and found[0] != found[1]


def test_silhouettes_are_scikit_learns_and_weights_are_copies():
    rng = np.random.default_rng(0)
    vectors, _ = usage(rng.normal(size=(30, 6)))
    codes = rng.integers(0, 4, 30)
    distances = np.clip(1 - vectors @ vectors.T, 0, None)
    np.fill_diagonal(distances, 0)
    (found,) = semantics._silhouettes(distances, codes, np.ones((1, 30)))
    assert found == pytest.approx(silhouette_samples(distances, codes, metric="precomputed"))
    # a weight of 0 is an item left out; a weight of k, k items, none the other's neighbour
    weights = rng.integers(0, 3, 30).astype(float)
    copies = np.repeat(np.arange(30), weights.astype(int))
    (found,) = semantics._silhouettes(distances, codes, weights[None])
    for item in copies:
        mean = {}
        for group in set(codes[copies]):
            others = [other for other in copies if codes[other] == group and other != item]
            mean[group] = np.mean([distances[item, other] for other in others]) if others else None
        own, rest = mean.pop(codes[item]), [one for one in mean.values() if one is not None]
        assert found[item] == pytest.approx(0.0 if own is None else (min(rest) - own) / max(own, min(rest)))


def planted(by, seed=0, scenes=40, questions=(1, 2, 3, 4), strength=0.6):
    """Scenes with looks, asked some of four questions; items use the heads of their question, of their scene's look or of both."""
    rng = np.random.default_rng([seed, 3])
    centres = strength * np.random.default_rng(1).normal(size=(4, 12))
    looks = {name: rng.permutation(scenes) % 4 for name in ("look", "other look", "third look")}
    rows, semantic, clusters = [], [], []
    for scene in range(scenes):
        for question in rng.choice(4, rng.choice(questions), replace=False):
            nothing = np.zeros(12)
            asked, seen = centres[question], centres[looks["look"][scene]]
            rows.append(np.concatenate([asked if "semantic" in by else nothing, seen if "look" in by else nothing]))
            semantic.append(question)
            clusters.append(scene)
    rows = np.array(rows) + rng.normal(size=(len(rows), 24))
    return usage(rows)[0], semantic, {name: one[clusters] for name, one in looks.items()}, clusters


def test_what_is_planted_wins():
    found = compare_labels(*planted(["semantic"]), permutations=199)
    assert found.gain.value > 0.05 and found.gain.bounds(0.01)[0] > 0 and found.p_value == 1 / 200
    assert found.gain.value == pytest.approx(found.agreement["semantic"] - found.agreement[found.strongest])
    assert found.gain.n_clusters == 40 and max(found.by_look.values()) == found.p_value
    looks = compare_labels(*planted(["look"]), permutations=199)
    assert looks.gain.bounds(0.01)[1] < 0 and looks.p_value > 0.05 and looks.strongest == "look"


def test_better_than_the_strongest_look_is_better_than_each():
    vectors, semantic, looks, clusters = planted(["semantic", "look"])
    whole = compare_labels(vectors, semantic, looks, clusters)
    alone = {name: compare_labels(vectors, semantic, {name: labels}, clusters) for name, labels in looks.items()}
    assert whole.strongest == "look" and whole.by_look == {name: one.p_value for name, one in alone.items()}
    assert whole.gain.bounds(0.05) == pytest.approx(
        (min(one.gain.bounds(0.05)[0] for one in alone.values()), min(one.gain.bounds(0.05 / 3)[1] for one in alone.values()))
    )
    assert min(whole.by_look.values()) < 0.01 < whole.p_value  # the looks that nothing follows lose, and decide nothing


def test_p_is_that_of_signs_exchanged_scene_by_scene():
    vectors, semantic, looks, clusters = planted(["semantic"], scenes=10)
    clusters = np.array(clusters)

    def gain(keep):
        distances = np.clip(1 - vectors[keep] @ vectors[keep].T, 0, None)
        np.fill_diagonal(distances, 0)
        by = [silhouette_score(distances, np.asarray(labels)[keep], metric="precomputed") for labels in (semantic, looks["look"])]
        return by[0] - by[1]

    contributed = [10 * gain(clusters > -1) - 9 * gain(clusters != scene) for scene in range(10)]
    flipped = [np.dot(signs, contributed) for signs in itertools.product((1, -1), repeat=10)]
    exact = np.mean(np.array(flipped) >= np.sum(contributed) - 1e-9)
    assert compare_labels(vectors, semantic, {"look": looks["look"]}, clusters).p_value == pytest.approx(exact)


@pytest.mark.parametrize("questions", [(1,), (1, 2, 3, 4)])
@pytest.mark.parametrize("by", [("semantic", "look"), ()], ids=["both alike", "nothing"])
def test_semantic_labels_that_are_no_better_are_rarely_called_so(by, questions):
    runs = 120
    found = [compare_labels(*planted(by, seed, questions=questions), permutations=199) for seed in range(runs)]
    for alpha in (0.05, 0.01):
        called = sum(one.gain.bounds(alpha)[0] > 0 for one in found), sum(one.p_value <= alpha for one in found)
        for hits in called:  # each alone, though a claim needs both
            assert stats.binomtest(hits, runs, alpha, alternative="greater").pvalue > 1e-3, (alpha, hits)
    lower = np.quantile([one.gain.value for one in found], 0.02)
    assert lower < 0 and np.mean([one.gain.value for one in found]) < 0.01  # the null is what it is said to be


def shown(by, seed=0, tasks=3, items=24, strength=0.8):
    """Tasks whose items, each of another scene, use the heads of their task, and of their answer, their look or both."""
    rng = np.random.default_rng([seed, 5])
    centres = strength * np.random.default_rng(2).normal(size=(2, tasks, 4, 12))
    of_task = 2 * np.random.default_rng(3).normal(size=(tasks, 24))
    rows, task, answers, clusters, looks = [], [], [], [], {"look": [], "other look": []}
    for one in range(tasks):
        answer, look, other = (rng.permutation(items) % 4 for _ in range(3))
        rows += [
            of_task[one] + np.concatenate([centres[0, one, a] * ("answer" in by), centres[1, one, b] * ("look" in by)])
            for a, b in zip(answer, look, strict=True)
        ]
        task += [f"t{one}"] * items
        answers += [f"{'abcd'[k]}" for k in answer]
        looks["look"] += look.tolist()
        looks["other look"] += other.tolist()
        clusters += [f"s{k}" for k in rng.permutation(2 * items)[:items]]
    rows = np.array(rows) + rng.normal(size=(len(rows), 24))
    return {"vectors": usage(rows)[0], "semantic": answers, "looks": looks, "clusters": clusters, "within": task}


def test_within_strata_silhouettes_are_those_of_each_stratum_alone():
    made = shown(["answer"])
    found, task = compare_labels(**made, permutations=99), np.array(made["within"])
    for name, labels in {"semantic": made["semantic"], **made["looks"]}.items():
        alone = [
            silhouette_samples(np.clip(1 - vectors @ vectors.T, 0, None) * (1 - np.eye(len(vectors))), np.array(labels)[task == one], metric="precomputed")
            for one in np.unique(task)
            for vectors in [made["vectors"][task == one]]
        ]
        assert found.agreement[name] == pytest.approx(np.concatenate(alone).mean())
    assert found.shuffled.shape == (99,) and found.p_value == max(found.p_shuffled, *found.by_look.values())
    whole = compare_labels(**{**made, "within": None}, permutations=99)  # the task, which every item uses most, is in the way
    assert whole.agreement["semantic"] < found.agreement["semantic"] - 0.05 and whole.p_shuffled is None and not whole.shuffled.size


def test_what_is_shown_wins_within_tasks_and_what_tasks_have_in_common_does_not_count():
    found = compare_labels(**shown(["answer"]), permutations=199)
    assert found.gain.value > 0.05 and found.gain.bounds(0.01)[0] > 0 and found.p_value == 1 / 200 == found.p_shuffled
    looks = compare_labels(**shown(["look"]), permutations=199)
    assert looks.gain.bounds(0.01)[1] < 0 and looks.p_value > 0.05 and looks.strongest == "look"
    both = compare_labels(**shown(["answer", "look"]), permutations=199)
    assert both.p_shuffled < 0.01 < both.p_value  # answers matter, and no more than looks do
    made = shown([])
    made["semantic"] = made["within"]  # the task itself: nothing within a task
    with pytest.raises(ValueError, match="all items of 't0' have the same label 'semantic'"):
        compare_labels(**made)


def test_answers_that_heads_do_not_follow_are_rarely_said_to_matter():
    runs = 200
    found = [compare_labels(**shown([], seed), permutations=99, seed=seed) for seed in range(runs)]
    assert all(one.p_value == max(one.p_shuffled, *one.by_look.values()) for one in found)
    for name in ("p_shuffled", "look"):
        p_values = np.array([one.p_shuffled if name == "p_shuffled" else one.by_look[name] for one in found])
        steps = np.random.default_rng(0).uniform(-0.005, 0.005, runs)  # p-values are whole numbers of hundredths
        assert stats.kstest(p_values - 0.005 + steps, "uniform").pvalue > 1e-3, name
    for alpha in (0.05, 0.2):
        for hits in (sum(one.p_value <= alpha for one in found), sum(one.gain.bounds(alpha)[0] > 0 for one in found)):
            assert stats.binomtest(hits, runs, alpha, alternative="greater").pvalue > 1e-3, (alpha, hits)


def test_labels_that_do_not_fit_are_refused():
    vectors, semantic, looks, clusters = planted(())
    with pytest.raises(ValueError, match="same label 'look'"):
        compare_labels(vectors, semantic, {"look": np.zeros(len(semantic))}, clusters)
    with pytest.raises(ValueError, match="items and [0-9]+ labels 'semantic'"):
        compare_labels(vectors, semantic[1:], looks, clusters)
    with pytest.raises(ValueError, match="items and [0-9]+ strata"):
        compare_labels(vectors, semantic, looks, clusters, within=semantic[1:])
    with pytest.raises(ValueError, match="two items of 'all' are of one scene"):
        compare_labels(vectors, semantic, looks, clusters, within=["all"] * len(semantic))


def test_the_flat_map_keeps_groups_together_and_repeats():
    vectors, semantic, _, _ = planted(["semantic"], strength=3.0)
    places = flat_map(vectors)
    assert places.shape == (len(vectors), 2) and np.array_equal(places, flat_map(vectors))
    assert silhouette_score(places, semantic) > 0.3
    with pytest.raises(ValueError, match="at least five"):
        flat_map(vectors[:3])
