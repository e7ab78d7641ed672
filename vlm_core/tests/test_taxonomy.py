"""Categories of heads: planted paths are found by name, none where there is none; clusters only where features cluster."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from vlm_core import KnockOut, ReplaceImageKV, categorise, cluster_heads, head_features, path_effects, sweep
from vlm_core.heads.features import HeadFeatures
from vlm_core.heads.taxonomy import CATEGORIES, NO_EFFECT, PathEffects, category_agreement, same_categories
from vlm_core.tables import wide
from vlm_core.tests.tiny import make_items

NAMES = tuple(CATEGORIES)


def planted(noise: float = 0.005, n: int = 30, seed: int = 0) -> PathEffects:
    """Three layers of four heads: head 1.2 grounds, 0.0 summarises, 2.3 follows, 1.0 routes, the others do nothing."""
    rng = np.random.default_rng(seed)
    drops = {name: rng.normal(0, noise, (n, 3, 4)) for name in NAMES}
    for name, cell in zip(NAMES, ((1, 2), (0, 0), (2, 3), (1, 0)), strict=True):
        drops[name][:, *cell] += 0.1
    clusters = tuple(f"s{i // 2}" for i in range(n))
    return PathEffects(drops, dict.fromkeys(NAMES, clusters))


def test_heads_get_the_category_of_their_costliest_path():
    found = categorise(planted())
    expected = np.full((3, 4), NO_EFFECT, dtype=object)
    expected[1, 2], expected[0, 0], expected[2, 3], expected[1, 0] = NAMES
    assert (found.category == expected).all()
    assert found.confidence[1, 2] == found.confidence[0, 0] == 1.0
    assert found.counts() == {**dict.fromkeys(NAMES, 1), NO_EFFECT: 8}


def test_confidence_is_the_share_of_resamples_that_agree():
    effects = planted(noise=0.0)
    # scenes 0-7 of 15 cost 0.1 through one path, the others 0.1 through another: a coin toss
    drop = np.repeat(np.arange(15) < 8, 2)
    effects.drops[NAMES[0]][:, 2, 0], effects.drops[NAMES[2]][:, 2, 0] = 0.1 * drop, 0.1 * ~drop
    found = categorise(effects, draws=2000)
    assert found.category[2, 0] == NAMES[0]
    share = (np.random.default_rng(3).binomial(15, 8 / 15, 200_000) >= 8).mean()
    assert found.confidence[2, 0] == pytest.approx(share, abs=0.04)
    assert found.confidence[0, 1] == 1.0


def test_a_scene_asked_more_often_makes_nothing_surer():
    effects = planted(noise=0.3)
    often = PathEffects(
        {name: np.repeat(drops, 5, axis=0) for name, drops in effects.drops.items()},
        {name: tuple(np.repeat(scenes, 5)) for name, scenes in effects.clusters.items()},
    )
    once, more = categorise(effects), categorise(often)
    assert (once.category == more.category).all() and 0 < once.confidence.min() < 0.9
    np.testing.assert_array_equal(once.confidence, more.confidence)
    for name in NAMES:
        assert once.as_dict()["1.2"]["drops"][name] == pytest.approx(more.as_dict()["1.2"]["drops"][name])


def test_a_small_effect_is_none():
    effects = planted(noise=0.0)
    assert categorise(effects, least=0.2).counts()[NO_EFFECT] == 12
    with pytest.raises(ValueError, match="share of the margin"):
        categorise(effects, least=0.0)


def test_the_evidence_of_a_head_is_its_numbers():
    found = categorise(planted(noise=0.0)).as_dict()
    assert list(found)[:2] == ["0.0", "0.1"] and json.loads(json.dumps(found)) == found
    grounding = found["1.2"]
    assert (grounding["category"], grounding["confidence"]) == (NAMES[0], 1.0)
    assert grounding["drops"][NAMES[0]]["drop"] == pytest.approx(0.1)
    assert "margin falls by 10.0 %" in grounding["evidence"] and CATEGORIES[NAMES[0]] in grounding["evidence"]
    assert "costs less than 1.0 % of the margin" in found["0.1"]["evidence"]


def test_halves_of_the_scenes_agree_on_what_is_planted_and_by_chance_on_noise():
    same = category_agreement(planted())
    assert same.share == 1.0 and same.by_chance == pytest.approx((8 / 12) ** 2 + 4 / 12**2)
    flat = planted(0.0).drops  # what is planted, without noise
    noise = [
        category_agreement(PathEffects({name: drops - flat[name] for name, drops in planted(0.5, seed=seed).drops.items()}, planted().clusters))
        for seed in range(12)
    ]
    assert np.mean([one.share for one in noise]) == pytest.approx(np.mean([one.by_chance for one in noise]), abs=0.08)
    assert np.isnan(category_agreement(PathEffects(planted().drops, dict.fromkeys(NAMES, ("s",) * 30))).share)
    # items of one scene are on one side: whole scenes that disagree cannot agree by their items
    effects = planted(0.0, n=4)  # two scenes of two items
    effects.drops[NAMES[0]][2:, 2, 0] = effects.drops[NAMES[2]][:2, 2, 0] = 0.1
    assert category_agreement(effects).share == pytest.approx(11 / 12)


def test_two_measurements_agree_as_far_as_they_give_heads_one_category():
    effects, other = planted(0.0), planted(0.0, n=4)
    assert same_categories(effects, other).share == 1.0
    other.drops[NAMES[3]][:, 0, 0] = 0.2  # the head that summarises routes, and two of the idle ones do
    other.drops[NAMES[3]][:, 0, 1:3] = 0.2
    same = same_categories(effects, other)
    assert same.share == pytest.approx(9 / 12)
    assert same.by_chance == pytest.approx((8 * 6 + 1 * 1 + 1 * 0 + 1 * 1 + 1 * 4) / 144)
    assert same_categories(effects, other, least=0.15).share == pytest.approx(9 / 12)  # what is none in both is the same
    with pytest.raises(ValueError, match="cannot be compared with those of"):
        same_categories(effects, PathEffects({name: drops[:, :2] for name, drops in other.drops.items()}, other.clusters))


def test_effects_of_some_items_are_their_rows():
    effects = planted()
    rows = {name: [3 * k, 7] for k, name in enumerate(NAMES)}
    some = effects.of(rows)
    for name in NAMES:
        np.testing.assert_array_equal(some.drops[name], effects.drops[name][rows[name]])
        assert some.clusters[name] == tuple(effects.clusters[name][row] for row in rows[name])


def test_features_agree_with_those_of_the_same_items_alone():
    rng = np.random.default_rng(0)
    truth, other = rng.normal(size=(2, 3, 4, 2))
    per_item = np.stack([truth] * 4 + [other] * 4)
    items = tuple("abcdefgh")
    features = HeadFeatures(per_item, ("one", "two"), items, items, ("t",) * 8)
    few = HeadFeatures(per_item[[1, 2]] * 2 + 1, ("one", "two"), ("b", "c"), ("b", "c"), ("t",) * 2)  # ranks are the same
    assert features.agreement_with(few) == pytest.approx({"one": 1.0, "two": 1.0})
    crossed = HeadFeatures(per_item[[1, 2]], ("one", "two"), ("e", "f"), ("e", "f"), ("t",) * 2)
    expected = {name: stats.spearmanr(truth[..., k].ravel(), other[..., k].ravel()).statistic for k, name in enumerate(("one", "two"))}
    assert features.agreement_with(crossed) == pytest.approx(expected) and max(map(abs, expected.values())) < 0.9
    with pytest.raises(ValueError, match="the item 'b' is none of the 2 that these features are of"):
        crossed.agreement_with(few)
    with pytest.raises(ValueError, match="of other heads, or other features"):
        features.agreement_with(HeadFeatures(per_item[[1]], ("one", "three"), ("b",), ("b",), ("t",)))


def test_features_agree_between_halves_where_heads_differ():
    rng = np.random.default_rng(0)
    truth = np.stack([np.arange(12.0), np.zeros(12), np.full(12, np.nan), np.zeros(12)], axis=1).reshape(3, 4, 4)
    per_item = truth + np.stack([1e-3 * rng.normal(size=(40, 3, 4)), rng.normal(size=(40, 3, 4)), *np.zeros((2, 40, 3, 4))], axis=3)
    scenes = tuple(f"s{i // 2}" for i in range(40))
    found = HeadFeatures(per_item, ("own", "noise", "none", "same"), tuple(map(str, range(40))), scenes, ("t",) * 40).agreement()
    assert found["own"] == pytest.approx(1.0) and abs(found["noise"]) < 0.5
    assert np.isnan(found["none"]) and np.isnan(found["same"])


def test_path_effects_are_what_the_cuts_cost(subject, means):
    items = make_items(4)
    found = path_effects(subject, items, means)
    full = wide(sweep(subject, items, {"full": None}, metrics=("margin",)), "margin")["full"].to_numpy()
    head = (1, 2)
    cuts = {
        "cross-modal grounding": ReplaceImageKV([head], means, queries="text"),
        "vision summarisation": KnockOut("image", "image", (1,), (2,)),
        "instruction following": KnockOut("question", "question", (1,), (2,)),
    }
    for name, cut in cuts.items():
        one = wide(sweep(subject, items, {"cut": cut}, metrics=("margin",)), "margin")["cut"].to_numpy()
        np.testing.assert_allclose(found.drops[name][:, 1, 2], (full - one) / np.abs(full).mean(), rtol=1e-3, atol=1e-5)
        assert np.abs(found.drops[name]).max() > 1e-4
    assert np.abs(found.drops["routing"]).max() > 1e-4
    assert set(found.clusters["routing"]) == {"scene-0", "scene-1"}
    seen = head_features(subject, items)
    assert "on the image" in categorise(found).as_dict(seen)["1.2"]["evidence"]


def test_known_effects_are_taken_and_not_measured_again(subject, means):
    items, asked = make_items(4), []

    def measure(items, interventions, **options):
        asked.extend(interventions)
        return sweep(subject, items, interventions, **options)

    known = np.arange(24.0).reshape(2, 3, 4)
    found = path_effects(subject, items, means, known={"cross-modal grounding": (known, ["a", "b"])}, measure=measure)
    assert len(asked) == 1 + 3 * 12 and not any(label.startswith("cross-modal") for label in asked)
    ratio = found.drops["cross-modal grounding"].ravel()[1:] / known.ravel()[1:]
    np.testing.assert_allclose(ratio, ratio[0])
    assert found.clusters["cross-modal grounding"] == ("a", "b")
    assert list(found.drops) == list(NAMES)
    again = path_effects(subject, items, means, margin=2 * found.margin)
    for name in NAMES[1:]:
        np.testing.assert_allclose(again.drops[name], found.drops[name] / 2, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="no category 'grounding'"):
        path_effects(subject, items, means, known={"grounding": (known, ["a", "b"])})
    with pytest.raises(ValueError, match="one map an item"):
        path_effects(subject, items, means, known={"routing": (known[:, :2], ["a", "b"])})


def test_planted_clusters_are_found_and_beat_permuted_features():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 12)
    features = rng.normal(size=(36, 6)) + 6 * rng.normal(size=(3, 6))[group]
    found = cluster_heads(features)
    assert found.k == 3 and found.p_value == 1 / 20
    assert all(len(set(found.labels[group == one])) == 1 for one in range(3))
    assert found.silhouette == max(found.by_k.values()) > found.permuted.max() + 0.2


def test_no_clusters_where_features_do_not_cluster():
    p_values = [cluster_heads(np.random.default_rng(seed).normal(size=(40, 8)), ks=(2, 3, 4)).p_value for seed in range(4)]
    assert max(p_values) > 0.2
    with pytest.raises(ValueError, match="four heads or more"):
        cluster_heads(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="between 2 and 4"):
        cluster_heads(np.random.default_rng(0).normal(size=(5, 2)), ks=(5, 6))
