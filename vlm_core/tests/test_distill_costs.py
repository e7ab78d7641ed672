"""Costs of a student: what runs spent as their logs say, sizes by hand, times in pairs, shares of the teacher's."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vlm_core.distill.costs as costs
from vlm_core import DropTokens
from vlm_core.distill.costs import model_costs, quality_per_flop, speed_pairs, training_costs
from vlm_core.reduction.costs import saved_flops
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture(scope="module")
def models():
    teacher, student = tiny_subject(layers=6, hidden=64, image_size=48), tiny_subject(layers=2, image_size=48)
    return {"teacher": (teacher, None), "student": (student, None), "shorter": (student, DropTokens(0, 0.0))}


def test_spending_adds_up(tmp_path):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        log = {"kind": "sft", "budget": {"steps": 5, "batch_size": 2}, "images": 10, "tokens": 300, "supervised_tokens": 20,
               "flops": (number + 1) * 10**15, "seconds": 1.5}  # fmt: skip
        (tmp_path / name / "training.json").write_text(json.dumps(log))
    spent = training_costs({name: tmp_path / name for name in ("a", "b")})
    assert spent.iloc[1].to_dict() == {
        "stage": "b", "kind": "sft", "steps": 5, "images": 10, "tokens": 300, "supervised_tokens": 20, "flops": 2 * 10**15,
        "seconds": 1.5, "flops_so_far": 3 * 10**15,
    }  # fmt: skip
    bought = quality_per_flop(spent, {"a": 0.6, "b": 0.65}, before=0.5)
    np.testing.assert_allclose(bought["gain"], [10, 15])
    np.testing.assert_allclose(bought["gain_per_petaflop"], [10, 5])


def test_sizes_are_those_of_the_models(models):
    items = make_items(4, size=48)
    table = model_costs(models, items, batch=2, rounds=0)
    assert table.columns.tolist() == ["model", "quantity", "unit", "value", "of_reference", "lower", "upper"]
    values = table.pivot(index="model", columns="quantity", values="value")
    shares = table.pivot(index="model", columns="quantity", values="of_reference")
    for name, (subject, _) in models.items():
        assert values.loc[name, "parameters"] == sum(weight.numel() for weight in subject.model.parameters())
        assert values.loc[name, "weights"] == 4 * values.loc[name, "parameters"]
    assert (shares.loc["teacher"] == 1).all() and (shares.loc["student"] < 1).all()
    less = saved_flops(models["student"][0], items, models["shorter"][1])
    saved = 1 - values.loc["shorter", "prefill operations"] / values.loc["student", "prefill operations"]
    assert less.min() <= saved <= less.max()
    assert values.loc["shorter", "cache"] < values.loc["student", "cache"]
    assert values.loc["student", "peak memory"] > 4 * 32 * 144, "the embeddings of one image's tokens at least"
    assert table[["lower", "upper"]].isna().all(axis=None) and "first token" not in set(table["quantity"])


def test_times_come_in_rounds_and_the_smaller_model_is_faster(models):
    pair = {name: models[name] for name in ("teacher", "student")}
    speed = speed_pairs(pair, make_items(4, size=48), batch=2, rounds=4, tokens=4)
    assert speed.groupby("round")["model"].apply(sorted).tolist() == [["student", "teacher"]] * 4
    table = model_costs(pair, make_items(4, size=48), batch=2, rounds=5, tokens=4)
    times = table[table["unit"] == "s"].set_index(["model", "quantity"])
    assert (times["value"] > 0).all()
    assert (times["lower"] <= times["of_reference"]).all() and (times["of_reference"] <= times["upper"]).all()
    assert times.loc[("student", "first token"), "of_reference"] < 1, "a third of the layers of half the width"


def test_what_a_further_token_takes_by_hand(models, monkeypatch):
    """A model that takes a second to begin and half a second a token, another twice that."""
    taken = {id(models["teacher"][0]): 2.0, id(models["student"][0]): 1.0}
    monkeypatch.setattr(costs, "generation_seconds", lambda subject, prepared, row, n: taken[id(subject)] * (1 + 0.5 * (n - 1)))
    pair = {name: models[name] for name in ("teacher", "student")}
    speed = speed_pairs(pair, make_items(2, size=48), batch=2, rounds=2, tokens=4).set_index("model")
    assert (speed.loc["student", "first_token"] == 1.0).all() and (speed.loc["student", "further_token"] == 0.5).all()
    assert (speed.loc["teacher", "first_token"] == 2.0).all() and (speed.loc["teacher", "further_token"] == 1.0).all()


def test_without_further_tokens_only_the_first_is_waited_for(models, monkeypatch):
    asked = []
    monkeypatch.setattr(costs, "generation_seconds", lambda subject, prepared, row, n: asked.append(n) or 1.0)
    speed = speed_pairs({"teacher": models["teacher"]}, make_items(2, size=48), batch=2, rounds=2, tokens=0)
    assert set(asked) == {1} and (speed["first_token"] == 1.0).all() and speed["further_token"].isna().all()
    for function, tokens, least in ((speed_pairs, -1, 0), (model_costs, 0, 1)):
        with pytest.raises(ValueError, match=f"tokens must be .*{least}"):
            function({"teacher": models["teacher"]}, make_items(2, size=48), tokens=tokens)


def test_without_a_reference_there_are_no_shares(models):
    alone = model_costs({"student": models["student"]}, make_items(2, size=48), reference=None, batch=2, rounds=1, tokens=1)
    assert alone["of_reference"].isna().all() and len(alone) == 7
    with pytest.raises(ValueError, match="the reference 'teacher' is none of the models student"):
        model_costs({"student": models["student"]}, make_items(2, size=48))
