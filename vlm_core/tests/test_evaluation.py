"""Answering items, sighted and blind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vlm_core import DropTokens, SubjectError, accuracy_table, evaluate, sweep
from vlm_core.evaluation import _mean_image, _partners
from vlm_core.items import plain
from vlm_core.sweeps.budget import Budget
from vlm_core.tests.tiny import make_items


def test_candidates_mode_is_the_plain_sweep(subject, items):
    results = evaluate(subject, items)
    table = sweep(subject, items, {"none": None}, metrics=("correct", "margin"))
    values = table.pivot(index="item", columns="metric", values="value").loc[results["item"]]
    assert results["correct"].tolist() == (values["correct"] == 1).tolist()
    assert results["score"].to_numpy() == pytest.approx(values["margin"].to_numpy())
    assert (results["correct"] == (results["output"] == results["answer"])).all()
    assert results["image"].tolist() == results["cluster"].tolist()


def test_blind_shows_other_images(subject, items):
    sighted = evaluate(subject, items)
    swapped = evaluate(subject, items, blind="swap")
    mean = evaluate(subject, items, blind="mean")
    assert (swapped["image"] != swapped["cluster"]).all()
    assert set(mean["image"]) == {"mean"}
    assert not np.allclose(sighted["score"], swapped["score"])
    assert not np.allclose(swapped["score"], mean["score"])
    assert swapped["answer"].tolist() == sighted["answer"].tolist()


def test_the_swapped_image_is_of_the_same_task_and_another_scene(items):
    for item, partner in zip(items, _partners(items), strict=True):
        assert partner["task"] == item["task"]
        assert partner["scene_id"] != item["scene_id"]
    with pytest.raises(ValueError, match="at least two scenes"):
        _partners(items[:2])


def test_the_mean_image_is_the_mean(items):
    images = [item["image"] for item in items]
    expected = np.mean([np.asarray(image, dtype=float) for image in images], axis=0)
    assert np.abs(np.asarray(_mean_image(images), dtype=float) - expected).max() <= 0.5


def test_greedy_mode_writes_what_generate_writes(subject, tmp_path):
    items = make_items(5)
    results = evaluate(subject, items, mode="greedy", max_new_tokens=4, out=tmp_path / "run" / "outputs.jsonl")
    for row, item in enumerate(items):
        batch = subject.encode_items([item])
        with torch.inference_mode():
            tokens = subject.model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        text = subject.tokenizer.decode(tokens[0, batch.image.shape[1] :], skip_special_tokens=True).strip()
        assert results["output"][row] == text
    lines = [json.loads(line) for line in (tmp_path / "run" / "outputs.jsonl").read_text().splitlines()]
    assert [line["output"] for line in lines] == results["output"].tolist()
    assert set(lines[0]) == set(results.columns)


def test_a_plan_is_in_force(subject, items):
    plain, dropped = evaluate(subject, items), evaluate(subject, items, plan=DropTokens(0, 0.0))
    assert not np.allclose(plain["score"], dropped["score"])
    options = {"mode": "greedy", "max_new_tokens": 6}
    plain, dropped = evaluate(subject, items, **options), evaluate(subject, items, plan=DropTokens(0, 0.0), **options)
    assert plain["output"].tolist() != dropped["output"].tolist()


def test_answers_are_compared_as_words():
    assert plain(" The  Red, one. ") == "the red one"


def test_unknown_modes_are_refused(subject, items):
    with pytest.raises(ValueError, match="mode must be"):
        evaluate(subject, items, mode="loud")
    with pytest.raises(ValueError, match="blind must be"):
        evaluate(subject, items, blind="fold")


def test_a_model_that_overflows_is_not_wrong_but_refused(subject, items):
    weight = subject.anatomy.head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(SubjectError, match=r"not finite for item 'item-0' \(\d+ of \d+ items\)"):
            evaluate(subject, items)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_accuracy_table_gives_an_interval_per_task(subject, items):
    table = accuracy_table(evaluate(subject, items))
    assert table["task"].tolist() == ["color", "shape"]
    assert table["n"].tolist() == [6, 6]
    assert ((table["lower"] <= table["accuracy"]) & (table["accuracy"] <= table["upper"])).all()


def test_logits_on_request_are_every_candidates_log_probability(subject, items):
    results = evaluate(subject, items, logits=True)
    assert "logits" not in evaluate(subject, items[:2])
    for item, row in zip(items, results.itertuples(), strict=True):
        assert list(row.logits) == list(item["candidates"])
        assert max(row.logits, key=row.logits.get) == row.output
        wrong = [value for name, value in row.logits.items() if name != item["answer"]]
        assert row.logits[item["answer"]] - max(wrong) == pytest.approx(row.score)
        batch = subject.encode([item["image"]], [item["prompt"]], [item["answer"]])  # against the plain model
        with torch.inference_mode():
            logits = subject.model(**batch.inputs).logits[0].log_softmax(-1)
        at = (batch.labels[0] != -100).nonzero()[:, 0]
        tokens = subject.continuation(item["answer"])
        plain = sum(logits[at[0] - 1 + k, token].item() for k, token in enumerate(tokens))
        assert row.logits[item["answer"]] == pytest.approx(plain, abs=1e-4)
    with pytest.raises(ValueError, match="ask for them in mode 'candidates'"):
        evaluate(subject, items, logits=True, mode="greedy")


@pytest.mark.parametrize("blind", [None, "mean", "swap"])
def test_greedy_answers_need_no_candidates(blind, subject, items):
    open_ended = [{name: value for name, value in item.items() if name != "candidates"} for item in items]
    expected = evaluate(subject, items, mode="greedy", blind=blind)
    assert evaluate(subject, open_ended, mode="greedy", blind=blind).equals(expected)
    with pytest.raises(ValueError, match="has no field 'candidates'"):
        evaluate(subject, open_ended, blind=blind)


def test_a_batch_that_is_generated_from_leaves_room_for_keys_and_values(subject, monkeypatch):
    monkeypatch.setattr("vlm_core.sweeps.budget.free_bytes", lambda device: 2**24)
    plain_most, cached_most = (Budget.of(subject, cached=cached).most for cached in (False, True))
    batch = subject.encode_items(make_items(2))
    with torch.inference_mode():
        cache = subject.model(**batch.inputs, use_cache=True).past_key_values
    each = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / batch.inputs["input_ids"].numel()
    share = 2**22  # a quarter
    assert share / cached_most - share / plain_most == pytest.approx(each, rel=0.02)
