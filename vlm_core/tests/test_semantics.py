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
from vlm_core.heads.semantics import appearance, flat_map, usage


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


def test_labels_that_do_not_fit_are_refused():
    vectors, semantic, looks, clusters = planted(())
    with pytest.raises(ValueError, match="same label 'look'"):
        compare_labels(vectors, semantic, {"look": np.zeros(len(semantic))}, clusters)
    with pytest.raises(ValueError, match="items and [0-9]+ labels 'semantic'"):
        compare_labels(vectors, semantic[1:], looks, clusters)


def test_the_flat_map_keeps_groups_together_and_repeats():
    vectors, semantic, _, _ = planted(["semantic"], strength=3.0)
    places = flat_map(vectors)
    assert places.shape == (len(vectors), 2) and np.array_equal(places, flat_map(vectors))
    assert silhouette_score(places, semantic) > 0.3
    with pytest.raises(ValueError, match="at least five"):
        flat_map(vectors[:3])
