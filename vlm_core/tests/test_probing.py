"""Probes: planted information is read, none where there is none, and nothing of a held-out row is seen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from vlm_core import groundedness, held_out
from vlm_core.evaluation import evaluate
from vlm_core.heads import probing
from vlm_core.heads.probing import Groundedness, tell_categories, tell_grounded
from vlm_core.heads.taxonomy import NO_EFFECT
from vlm_core.stats import Claim, Superiority, decide
from vlm_core.tests.tiny import make_items


def rows(n=60, signal=2.0, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, 8)) + signal * rng.normal(size=(classes, 8))[labels], labels, np.arange(n) // 6


def test_planted_classes_are_told_apart_and_the_control_is_at_chance():
    told = held_out(*rows())
    assert told.accuracy > 0.9 and told.p_value == 1 / 201
    assert told.control_accuracy.mean() == pytest.approx(1 / 3, abs=0.05)
    assert told.gain.mean() == pytest.approx(told.accuracy - told.control_accuracy.mean())


def test_without_signal_there_is_no_gain():
    gains = [held_out(*rows(signal=0.0, seed=seed), shuffles=50).gain.mean() for seed in range(8)]
    assert np.mean(gains) == pytest.approx(0, abs=0.06)


def test_common_classes_do_not_pay():
    features, _, folds = rows(n=120, signal=0.0)
    rare = np.where(np.arange(120) % 6 == 0, "rare", "common")
    told = held_out(features, rare, folds, shuffles=50)
    assert told.accuracy == pytest.approx(0.5, abs=0.15) and told.control_accuracy.mean() == pytest.approx(0.5, abs=0.05)
    assert told.weights.mean() == pytest.approx(1.0) and told.weights[0] == pytest.approx(3.0)
    signal = features + 4 * (rare == "rare")[:, None] * np.eye(8)[0]
    assert held_out(signal, rare, folds, shuffles=5).accuracy > 0.9


def test_a_held_out_row_teaches_nothing():
    features, labels, folds = rows()
    same = held_out(features, labels, folds, asked=[3], shuffles=3)
    assert np.isnan(same.correct[folds != 3]).all() and np.isfinite(same.correct[folds == 3]).all()
    first = np.flatnonzero(folds == 3)[0]
    changed, others = features.copy(), labels.copy()
    changed[first], others[first] = 1000, (labels[first] + 1) % 3
    again = held_out(changed, others, folds, asked=[3], shuffles=3)
    assert (again.correct[folds == 3][1:] == same.correct[folds == 3][1:]).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_without_penalty_the_probe_is_linear_discriminant_analysis(classes, monkeypatch):
    monkeypatch.setattr(probing, "_PENALTIES", np.array([1e-12]))
    features, labels, _ = rows(n=160, signal=0.7, classes=classes)
    labels[:100] = np.where(np.arange(100) % 5, labels[:100], 0)  # one class is commoner
    train, test = probing._standardised(features[:100], features[100:])
    found = probing._predicted(train, labels[None, :100], test, classes)
    expected = LinearDiscriminantAnalysis(priors=np.full(classes, 1 / classes)).fit(train, labels[:100]).predict(test)
    assert (found[0] == expected).all()


def test_leaving_one_out_is_fitting_without_it():
    features, labels, _ = rows(n=30)
    train, _ = probing._standardised(features, features[:1])
    target = (labels[:, None] == np.arange(3)) - np.bincount(labels) / 30
    left, values, _ = np.linalg.svd(train, full_matrices=False)
    found = probing._left_out_loss(left, values, target[None], (left.T @ target)[None], [0.3, 20.0])
    for penalty, (loss,) in zip([0.3, 20.0], found, strict=True):
        kept = ~np.eye(30, dtype=bool)
        errors = [target[out] - Ridge(penalty).fit(train[kept[out]], target[kept[out]]).predict(train[[out]])[0] for out in range(30)]
        assert loss == pytest.approx(np.square(errors).mean())


def test_labels_are_shuffled_within_groups():
    codes, groups = np.array([0, 1] * 20), np.repeat(np.arange(20), 2)
    rng, flipped = np.random.default_rng(0), 0
    for _ in range(50):
        found = probing._shuffled(codes, groups, rng)
        assert (np.sort(found.reshape(20, 2), axis=1) == [0, 1]).all()
        flipped += (found.reshape(20, 2)[:, 0] == 1).sum()
    assert flipped / 1000 == pytest.approx(0.5, abs=0.06)


def test_what_cannot_be_probed_is_refused():
    features, labels, folds = rows()
    with pytest.raises(ValueError, match="two classes"):
        held_out(features, np.zeros(60), folds)
    with pytest.raises(ValueError, match="every row"):
        held_out(features, labels, np.zeros(60))
    with pytest.raises(ValueError, match="class '2' is in fold '1' alone"):
        held_out(features, np.where(np.arange(60) < 30, np.arange(60) % 2, 2), np.arange(60) // 30, asked=[1])
    with pytest.raises(ValueError, match="label and fold"):
        held_out(features, labels[1:], folds)


def test_missing_features_stand_at_the_mean():
    features, labels, folds = rows()
    holes = features.copy()
    holes[::7, 2] = np.nan
    holes[:, 5] = np.nan
    assert held_out(holes, labels, folds, shuffles=5).accuracy > 0.85


def layered(seed, by, layers=32, heads=8):
    """Categories ``[layer, head]`` and features that tell them: of each head its own (``head``), or both follow the layer.

    By ``layer`` a layer's heads all have its category, by ``depth`` neighbouring layers have the same one, by ``mix`` one head in five has
    another than its layer, which nothing shows.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(3, size=(layers, heads if by == "head" else 1)) + np.zeros((layers, heads), dtype=int)
    if by == "depth":
        kinds = np.arange(layers)[:, None] * 3 // layers + np.zeros((layers, heads), dtype=int)
    seen = np.eye(3)[kinds] + 0.3 * rng.normal(size=(layers, heads, 3))
    if by == "mix":
        kinds = np.where(rng.random((layers, heads)) < 0.2, rng.integers(3, size=(layers, heads)), kinds)
    place = np.arange(layers)[:, None, None] / layers + 0.1 * rng.normal(size=(layers, heads, 1))
    return np.concatenate([seen, place], axis=2).reshape(-1, 4), np.array(["grounding", "routing", NO_EFFECT])[kinds]


TOLD = Claim("T.told", "s", "e", Superiority(0.2), "s", tier="exploratory", min_clusters=12)


@pytest.mark.parametrize("layers", [12, 32])
@pytest.mark.parametrize("by", ["layer", "depth", "mix", "head"])
def test_categories_that_follow_the_layer_alone_are_not_told_by_features(by, layers):
    for seed in range(3):
        features, category = layered(seed, by, layers)
        # a probe of heads dealt out over folds, against labels shuffled among all, is fooled
        assert held_out(features, category.ravel(), np.arange(8 * layers) % 5, shuffles=5).gain.mean() > 0.4
        told, heads, missing = tell_categories(features, category, shuffles=30, seed=seed)
        verdict = decide(TOLD, told.gain, clusters=heads // 8, bounds=None, p_value=told.p_value).verdict.value
        assert not missing and (verdict == "supported") == (by == "head"), (seed, verdict)
        if by == "head":
            assert told.accuracy > 0.8 and told.control_accuracy.mean() == pytest.approx(1 / 3, abs=0.15)
        elif by != "mix":
            assert told.p_value == 1.0  # every control probe does as well


def test_a_layer_left_out_teaches_nothing():
    features, category = layered(0, "head", layers=6)
    told, heads, _ = tell_categories(features, category, shuffles=2)
    assert heads.tolist() == list(range(48))
    changed = category.copy()
    changed[2] = changed[2, ::-1]  # the labels of layer 2 do not move what is said of its heads
    again, _, _ = tell_categories(features, changed, shuffles=2)
    named = {k: category.ravel()[k] if told.correct[k] else None for k in range(16, 24)}
    for k in range(16, 24):
        if named[k] is not None:
            assert again.correct[k] == (changed.ravel()[k] == named[k])


def test_two_categories_with_an_effect_are_needed():
    rng = np.random.default_rng(0)
    category = np.array([["a", "b", NO_EFFECT, NO_EFFECT]] * 6)
    category[:3, 3], category[0, 1] = "c", "c"  # four heads
    features = rng.normal(size=(24, 5)) + 3 * (category.ravel() == "a")[:, None]
    told, heads, missing = tell_categories(features, category, shuffles=5)
    assert told.classes == ("a", "b", "c", NO_EFFECT) and heads.size == 24 and missing == ""
    few = np.where(category == "c", NO_EFFECT, category)
    few[3, 3] = "c"  # one head
    told, heads, _ = tell_categories(features, few, shuffles=5)
    assert told.classes == ("a", "b", NO_EFFECT) and heads.tolist() == [k for k in range(24) if k != 15]
    one = np.where(np.isin(category, ["b", "c"]), NO_EFFECT, category)
    none, heads, missing = tell_categories(features, one)
    assert none.gain.size == heads.size == 0 and none.p_value is None and np.isnan(none.accuracy)
    assert missing.endswith(f"there are a (6), {NO_EFFECT} (18)")
    block = np.full((6, 4), NO_EFFECT, dtype=object)
    block[:, 0], block[1] = "a", "b"  # of b there are four, all in one layer
    assert "two with an effect" in tell_categories(features, block)[2]
    with pytest.raises(ValueError, match=r"expected \[layer, head\] of the 24 heads"):
        tell_categories(features, category.ravel())


def condition(n, shift, seed, scenes="x"):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 10))
    names = tuple(f"{scenes}{i}" for i in range(n))
    features = np.concatenate([base + shift * np.eye(10)[0] + 0.3 * rng.normal(size=(n, 10)), base + 0.3 * rng.normal(size=(n, 10))])
    return Groundedness(features, np.repeat([True, False], n), names * 2, names * 2, n)


def test_grounded_answers_are_told_from_others_on_unseen_items():
    assert tell_grounded(condition(60, 4.0, 0, "d"), condition(50, 4.0, 1, "c")).accuracy > 0.9
    none = tell_grounded(condition(60, 0.0, 0, "d"), condition(50, 0.0, 1, "c"))
    assert none.gain.mean() == pytest.approx(0, abs=0.15) and none.correct.shape == (100,)
    with pytest.raises(ValueError, match="share 50 scenes"):
        tell_grounded(condition(60, 4.0, 0), condition(50, 4.0, 1))
    assert tell_grounded(condition(0, 4.0, 0, "d"), condition(50, 4.0, 1, "c")).p_value is None


def test_groundedness_pairs_the_two_images_of_one_question(subject):
    items = make_items(60)
    items = [{**item, "answer": said} for item, said in zip(items, evaluate(subject, items)["output"], strict=True)]
    items[0]["answer"] = next(one for one in items[0]["candidates"] if one != items[0]["answer"])
    right = {item["id"] for item in items[1:]}
    found = groundedness(subject, items)
    n = len(found.items) // 2
    assert 0 < n and found.items[:n] == found.items[n:] and set(found.items) <= right and len(set(found.items)) == n
    assert found.grounded.tolist() == [True] * n + [False] * n and found.features.shape[0] == 2 * n and found.asked == 60
    image_mass = found.features.reshape(2, n, 3, 4, -1)[..., 0]
    assert np.abs(image_mass[0] - image_mass[1]).max() > 1e-4  # another image was shown


class Eyes:
    """A subject that is right where the image is bright enough for it and shows the answer, and whose one head tells how bright images are."""

    def __init__(self, monkeypatch, dimmest=140):
        self.dimmest, self.pictures = dimmest, []
        monkeypatch.setattr(probing, "evaluate", self.evaluate)
        monkeypatch.setattr(probing, "head_features", self.features)

    def evaluate(self, _, items):
        seen = [np.asarray(item["image"])[0, 0] for item in items]  # brightness, number shown
        right = [level >= self.dimmest and shown == int(item["answer"]) for item, (level, shown, _) in zip(items, seen, strict=True)]
        return pd.DataFrame({"item": [item["id"] for item in items], "correct": right})

    def features(self, _, items, sinks=None):
        self.pictures.append([item["image"].tobytes() for item in items])
        levels = np.array([np.asarray(item["image"])[0, 0, 0] for item in items], dtype=float)
        return SimpleNamespace(per_item=levels[:, None, None, None] + np.zeros((1, 1, 1, 1)))

    def items(self, split, seed, n=60):
        rng = np.random.default_rng(seed)
        rows = []
        for k in range(n):
            answer = int(rng.integers(4))
            image = Image.new("RGB", (2, 2), (int(rng.integers(80, 200)), answer, k))
            rows.append({"id": f"{split}{k}", "scene_id": f"{split}{k // 2}", "task": "ab"[k % 2], "image": image, "prompt": "which ?",
                         "answer": str(answer), "candidates": list("0123")})  # fmt: skip
        return rows


def test_both_conditions_hold_the_same_images_and_each_answer_is_lost(monkeypatch):
    eyes = Eyes(monkeypatch)
    items = eyes.items("d", 0)
    found = groundedness(None, items, sinks=object())
    every, swapped = eyes.pictures
    names = [item["id"] for item in items]
    own = [every[names.index(name)] for name in found.items[: len(found.items) // 2]]
    assert 15 < len(own) < 40 and sorted(own) == sorted(swapped)
    for task in "ab":  # and so does every task
        mine = [items[names.index(name)]["task"] == task for name in found.items[: len(own)]]
        assert sorted(p for p, one in zip(own, mine, strict=True) if one) == sorted(p for p, one in zip(swapped, mine, strict=True) if one)
    # the third byte names the item, the second the answer: another scene's, of another answer
    pairs = [(one[2], other[2], one[1] != other[1]) for one, other in zip(own, swapped, strict=True)]
    assert all(one // 2 != other // 2 and apart for one, other, apart in pairs)


def test_which_images_are_easy_does_not_tell_grounded_answers(monkeypatch):
    eyes = Eyes(monkeypatch)
    gains = []
    for seed in range(8):
        learnt, asked = (groundedness(None, eyes.items(split, 2 * seed + k), sinks=object()) for k, split in enumerate("dc"))
        told = tell_grounded(learnt, asked, shuffles=50, seed=seed)
        gains.append(told.gain.mean())
        assert decide(TOLD, told.gain, clusters=asked.clusters, bounds=None, p_value=told.p_value).verdict.value != "supported"
    assert np.mean(gains) == pytest.approx(0, abs=0.05)


def test_without_an_exchange_no_answer_is_called_grounded(monkeypatch):
    eyes = Eyes(monkeypatch, dimmest=0)
    items = eyes.items("d", 0, 8)
    for item in items:
        item["image"], item["answer"] = Image.new("RGB", (2, 2), (100, 1, 0)), "1"
    assert groundedness(None, items, sinks=object()).items == ()
    assert groundedness(None, [{**item, "answer": "2"} for item in items], sinks=object()).items == ()
