"""Objects out of sight: every condition against the tokens written out, donors, and what gains are made of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_core import KnockOut, ReplaceTokens, mean_token, sweep
from vlm_core.tables import wide
from vlm_core.tests.tracing_items import make_pairs, square
from vlm_core.tracing.background import CONDITIONS, Background, without_object
from vlm_core.tracing.places import token_places


@pytest.fixture(scope="module")
def items():
    made = make_pairs(12)
    return [{**item, "answer": answer} for item, answer in zip(made, ["red", "green", "blue", "yellow"] * 3, strict=True)]


@pytest.fixture(scope="module")
def mean(subject, items):
    return mean_token(subject, items)


@pytest.fixture(scope="module")
def found(subject, items, mean):
    return without_object(subject, items, square, mean, seed=1)


def test_every_condition_is_that_of_its_tokens(subject, items, mean, found):
    assert list(found.correct.columns) == ["cluster", "task", *CONDITIONS] and list(found.correct.index) == [item["id"] for item in items]
    by_id = {item["id"]: item for item in items}
    places, ringed = (token_places(subject, items, square, rings=rings) for rings in (0, 1))
    every = range(subject.anatomy.n_layers)
    for item in items:
        named, around = places(item), ringed(item)["object"]
        at = {"object": named["object"], "background": named["background"], "around": around}
        at = {name: tuple(np.flatnonzero(members).tolist()) for name, members in at.items()}
        rows = {
            "full": None,
            "own background": KnockOut("question", at["object"], every),
            "own background, ring": KnockOut("question", at["around"], every),
            "own background, input": ReplaceTokens(mean, at["object"]),
            "own object": KnockOut("question", at["background"], every),
            "nothing": KnockOut("question", "image", every),
        }
        own = wide(sweep(subject, [item], rows)).iloc[0]
        lent = {**item, "id": "lent", "image": by_id[found.donors[item["id"]]]["image"]}
        others = {name.replace("own", "other"): row for name, row in rows.items() if "background" in name}
        other = wide(sweep(subject, [lent], others)).iloc[0]
        for name in set(CONDITIONS) - {"as many others"}:
            expected = other[name] if name.startswith("other") else own[name]
            assert found.correct.loc[item["id"], name] == expected, (item["id"], name)
    assert found.correct[list(CONDITIONS)].to_numpy().std() > 0


def test_donors_are_of_other_scenes_and_the_same_task(items, found):
    by_id = {item["id"]: item for item in items}
    for name, donor in found.donors.items():
        assert by_id[name]["scene_id"] != by_id[donor]["scene_id"] and by_id[name]["task"] == by_id[donor]["task"]
    assert len(set(found.donors.values())) > 3


def test_the_seed_draws(subject, items, mean, found):
    again, other = (without_object(subject, items, square, mean, seed=seed) for seed in (1, 2))
    pd.testing.assert_frame_equal(again.correct, found.correct)
    assert again.donors == found.donors != other.donors


def test_as_many_others_are_background_tokens(subject, items, mean, monkeypatch):
    seen = []

    def watched(subject, items, rows, groups, **options):
        seen.extend(groups(item) for item in items)
        return sweep(subject, items, rows, groups=groups, **options)

    monkeypatch.setattr("vlm_core.tracing.background.sweep", watched)
    without_object(subject, items, square, mean)
    assert len(seen) == 2 * len(items)
    for groups in seen:
        assert groups["others"].sum() == groups["object"].sum() and not (groups["others"] & ~groups["background"]).any()


def test_an_item_without_object_or_donor_is_left_out(subject, items, mean):
    def nothing(item):
        return square(item) & (item["id"] != "pair-2")

    lonely = [*items[:5], {**items[5], "task": "other"}]
    left = without_object(subject, lonely, nothing, mean)
    assert list(left.correct.index) == ["pair-0", "pair-1", "pair-3", "pair-4"] and set(left.donors) == set(left.correct.index)
    with pytest.raises(ValueError, match="no item has an object in its image and another scene's image"):
        without_object(subject, items[:1], square, mean)
    with pytest.raises(ValueError, match="no item has an object"):
        without_object(subject, items, lambda item: square(item) & False, mean)


def test_gains_are_differences_of_conditions():
    correct = pd.DataFrame({"cluster": ["a", "b"], "task": ["t", "t"], **{name: [0.0, 0.0] for name in CONDITIONS}}, index=["x", "y"])
    correct["own background"], correct["other background, ring"], correct["own background, input"] = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    correct["as many others"] = [1.0, 1.0]
    found = Background(correct, {})
    np.testing.assert_array_equal(found.gain(), [1, 0])
    np.testing.assert_array_equal(found.gain("ring"), [0, -1])
    np.testing.assert_array_equal(found.gain("input"), [1, 1])
    np.testing.assert_array_equal(found.object_worth(), [0, 1])
    correct["nothing"] = [0.0, 1.0]
    np.testing.assert_array_equal(found.beyond_nothing(), [1, -1])
    np.testing.assert_array_equal(found.clusters, ["a", "b"])
    with pytest.raises(ValueError, match="no variant 'rings'"):
        found.gain("rings")


def test_what_the_tokens_beside_an_object_tell_is_found(subject, items, mean, monkeypatch):
    """A planted subject: the answer is right exactly where a token beside the object shows the item's own picture."""
    own = {item["id"]: np.asarray(item["image"]) for item in items}

    def planted(subject, items, rows, assignments, groups, **options):
        table = []
        for number, name in assignments:
            item, row = items[number], rows[name]
            hidden = None if row is None else getattr(row, "keys", getattr(row, "tokens", None))
            mine = np.array_equal(np.asarray(item["image"]), own[item["id"].removesuffix("/lent")])
            told = mine and hidden not in ("background", "image")
            table.append((item["id"], item["scene_id"], item["task"], name, "correct", float(told)))
        return pd.DataFrame(table, columns=["item", "cluster", "task", "intervention", "metric", "value"])

    monkeypatch.setattr("vlm_core.tracing.background.sweep", planted)
    found = without_object(subject, items, square, mean)
    for variant in ("", "ring", "input"):
        np.testing.assert_array_equal(found.gain(variant), 1.0)
    assert not found.object_worth().any()
    assert torch.is_tensor(mean.values)
