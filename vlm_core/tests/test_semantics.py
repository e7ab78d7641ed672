"""Head usage by meaning or by looks: what is planted wins, and silhouettes are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import silhouette_score

from vlm_core import compare_labels
from vlm_core.heads import semantics
from vlm_core.heads.semantics import appearance, flat_map, usage


def test_usage_is_a_direction():
    rows = np.random.default_rng(0).normal(size=(5, 2, 3))
    found = usage(rows * np.arange(1, 6)[:, None, None])
    np.testing.assert_allclose(found, usage(rows))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    with pytest.raises(ValueError, match="1 items have no attribution"):
        usage(np.concatenate([rows, np.zeros((1, 2, 3))]))


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
    vectors = usage(rng.normal(size=(30, 6)))
    codes = rng.integers(0, 4, 30)
    distances = np.clip(1 - vectors @ vectors.T, 0, None)
    np.fill_diagonal(distances, 0)
    (found,) = semantics._silhouettes(distances, codes, np.ones((1, 30)))
    assert found == pytest.approx(silhouette_score(distances, codes, metric="precomputed"))
    # a weight of 0 is an item left out; a weight of k, k items, none the other's neighbour
    weights = rng.integers(0, 3, 30).astype(float)
    copies = np.repeat(np.arange(30), weights.astype(int))
    values = []
    for item in copies:
        mean = {}
        for group in set(codes[copies]):
            others = [other for other in copies if codes[other] == group and other != item]
            mean[group] = np.mean([distances[item, other] for other in others]) if others else None
        own, rest = mean.pop(codes[item]), [one for one in mean.values() if one is not None]
        values.append(0.0 if own is None else (min(rest) - own) / max(own, min(rest)))
    assert semantics._silhouettes(distances, codes, weights[None])[0] == pytest.approx(np.mean(values))


def planted(by, n=72, seed=0):
    """Items that use the heads of their group in ``by``; semantic groups and looks are independent."""
    rng = np.random.default_rng(seed)
    labels = {"semantic": np.arange(n) % 4, "look": rng.permutation(n) % 4}
    centres = rng.normal(size=(4, 12))
    noise = 0.5 * rng.normal(size=(n, 12))
    return usage((centres[labels[by]] if by else 0) + noise), labels["semantic"], {"look": labels["look"]}, np.arange(n) // 2


def test_what_is_planted_wins():
    found = compare_labels(*planted("semantic"), permutations=199)
    assert found.gain.value > 0.2 and found.gain.bounds(0.01)[0] > 0 and found.p_value == 1 / 200
    assert found.gain.value == pytest.approx(found.agreement["semantic"] - found.agreement["look"])
    looks = compare_labels(*planted("look"), permutations=199)
    assert looks.gain.bounds(0.01)[1] < 0 and looks.p_value > 0.05 and looks.strongest == "look"


def test_nothing_planted_nothing_found():
    p_values = [compare_labels(*planted(None, seed=seed), permutations=99).p_value for seed in range(5)]
    assert max(p_values) > 0.2
    lowers = [compare_labels(*planted(None, seed=seed), permutations=9).gain.bounds(0.05)[0] for seed in range(5)]
    assert sum(lower > 0 for lower in lowers) <= 1


def test_labels_that_do_not_fit_are_refused():
    vectors, semantic, looks, clusters = planted(None)
    with pytest.raises(ValueError, match="same label 'look'"):
        compare_labels(vectors, semantic, {"look": np.zeros(72)}, clusters)
    with pytest.raises(ValueError, match="72 items and 71 labels 'semantic'"):
        compare_labels(vectors, semantic[1:], looks, clusters)


def test_the_flat_map_keeps_groups_together_and_repeats():
    vectors, semantic, _, _ = planted("semantic")
    places = flat_map(vectors)
    assert places.shape == (72, 2) and np.array_equal(places, flat_map(vectors))
    assert silhouette_score(places, semantic) > 0.3
    with pytest.raises(ValueError, match="at least five"):
        flat_map(vectors[:3])
