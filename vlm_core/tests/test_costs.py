"""Costs: the formula against PyTorch's own counter, lengths and caches against what really ran, times in pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vlm_core.reduction.costs
from vlm_core import DropTokens, MergeTokens
from vlm_core.reduction import FastV
from vlm_core.reduction.costs import (
    cache_bytes,
    decode_pairs,
    layer_lengths,
    peak_pairs,
    prefill_flops,
    prefill_pairs,
    prefill_rounds,
    saved_flops,
)
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.tiny import make_items, tiny_subject

ROWS = {
    "none": None,
    "drop": DropTokens(1, 0.5, "stride"),
    "drop at once": DropTokens(0, 0.25),
    "drop all": DropTokens(2, 0.0),
    "stages": (DropTokens(1, 0.5), DropTokens(2, 0.2)),
    "merge": MergeTokens(1, 0.3),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"intermediate": 100, "layers": 4}], ids=["tiny", "grouped", "deeper"])
def test_the_formula_is_what_the_counter_counts(row, options):
    subject = tiny_subject(**options)
    (encoded,) = encode_items(subject, make_items(1))
    anatomy, last = subject.anatomy, encoded.n_prompt - 1
    # On its own, so that the policy's arithmetic and the choice of tokens are no part of it.
    lengths = layer_lengths(row, len(encoded), N_IMAGE, anatomy.n_layers)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hidden, run = forward_rows(subject, [encoded], np.array([0]), [row], [0], (np.array([0]), np.array([last])))
        read_logits(subject, hidden)
    counted = counter.get_total_flops()
    extra = 0
    if isinstance(row, MergeTokens):  # similarity of tokens, round by round
        left = N_IMAGE
        while left > row.count(N_IMAGE):
            extra += 2 * -(-left // 2) * (left // 2) * anatomy.hidden_size
            left -= min(left - row.count(N_IMAGE), -(-left // 2))
    assert counted - extra == prefill_flops(anatomy, lengths)
    assert int(run.tokens.valid.sum()) == lengths[-1]


def test_the_formula_by_hand():
    subject = tiny_subject(layers=2)
    # d = 32: q, k, v, o of 32 x 32, gated MLP 3 x 32 x 64; attention 4 x 32 per query and key.
    weights = 4 * 32 * 32 + 3 * 32 * 64
    head = subject.anatomy.head.weight.shape[0] * 32
    expected = 2 * (10 + 4) * weights + 128 * (10**2 + 4**2) + 2 * head
    assert prefill_flops(subject.anatomy, (10, 4)) == expected


def test_lengths_by_hand():
    stages = (DropTokens(1, 0.5), DropTokens(3, 0.1))
    assert layer_lengths(stages, 30, 20, 5) == (30, 20, 20, 12, 12)
    assert layer_lengths((DropTokens(1, 0.1), DropTokens(3, 0.5)), 30, 20, 4) == (30, 12, 12, 12), "gone tokens do not come back"
    assert layer_lengths(None, 30, 20, 3) == (30, 30, 30)


def test_shares_saved_lie_between_those_of_nothing_and_everything(subject):
    items = make_items(3)
    none, half, all_of_it = (saved_flops(subject, items, row) for row in (None, DropTokens(1, 0.5), DropTokens(1, 0.0)))
    assert (none == 0).all() and (half > 0).all() and (all_of_it > half).all() and (all_of_it < 1).all()


def test_the_cache_holds_the_tokens_that_are_left(subject):
    items = make_items(2)
    row = DropTokens(1, 0.0)
    per_token = 2 * 4 * 8 * 4  # keys and values, heads, head_dim, bytes
    lengths = [layer_lengths(row, int(subject.encode_items([item]).valid.sum()), N_IMAGE, 3) for item in items]
    assert cache_bytes(subject, items, row).tolist() == [per_token * sum(one) for one in lengths]
    assert (cache_bytes(subject, items) > cache_bytes(subject, items, row)).all()


def test_times_come_in_pairs(subject):
    table = prefill_pairs(subject, make_items(6), DropTokens(1, 0.25, FastV()), batch=4, rounds=5)
    assert table["round"].tolist() == [0, 1, 2, 3, 4] and (table[["whole", "reduced"]] > 0).all(axis=None)
    np.testing.assert_allclose(table["saved"], 1 - table["reduced"] / table["whole"])
    slower = decode_pairs(subject, make_items(2), DropTokens(1, 0.25), batch=2, rounds=2, tokens=2)
    assert len(slower) == 2


def test_several_reductions_run_on_the_same_prompts_in_every_round(subject, monkeypatch):
    ran = []

    def watched(subject, encoded, numbers, prepared, row):
        ran.append((row, tuple(numbers)))

    monkeypatch.setattr(vlm_core.reduction.costs, "_prefill", watched)
    rows = {"whole": None, "half": DropTokens(1, 0.5), "few": DropTokens(1, 0.25, FastV())}
    table = prefill_rounds(subject, make_items(4), rows, batch=2, rounds=3)
    assert table.columns.tolist() == ["round", *rows] and len(table) == 3
    first, *rounds = [ran[start : start + 3] for start in range(0, len(ran), 3)]
    assert len(rounds) == 3 and len(first) == 3, "once before the first round, then once a round"
    for one in rounds:
        assert {row for row, _ in one} == set(rows.values()) and len({numbers for _, numbers in one}) == 1
    assert rounds[0][0][1] != rounds[1][0][1] and rounds[0][0][1] == rounds[2][0][1], "the next prompts each round, then again from the first"


def test_a_long_prompt_takes_less_time_with_few_tokens():
    """576 image tokens, all of them gone before the first layer: far more than any noise."""
    subject = tiny_subject(image_size=96, layers=4, hidden=64)
    items = make_items(2, size=96)
    table = prefill_pairs(subject, items, DropTokens(0, 0.0), batch=2, rounds=5)
    assert table["saved"].median() > 0.5
    whole, reduced = peak_pairs(subject, items, DropTokens(0, 0.0), batch=2)
    assert reduced < whole / 2


@pytest.mark.parametrize("name", ["batch", "rounds"])
def test_no_rounds_and_no_prompts_are_refused(subject, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        prefill_pairs(subject, make_items(2), DropTokens(1, 0.5), **{name: 0})
