"""The row engine gives every row the numbers it would have alone, however much is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import DropTokens, HeadMeans, HiddenStates, KnockOut, MeanHeads, MergeTokens, ReplaceImageKV, ZeroHeads
from vlm_core.items import item_number
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.tests.tiny import make_items


def many_interventions(means):
    head_means = HeadMeans(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(3)))
    return [
        None,
        ZeroHeads([(2, 1)]),
        ZeroHeads([(0, 0), (1, 3)]),
        ReplaceImageKV([(1, 0), (1, 1)], means),
        ReplaceImageKV([(2, 3)], means),
        MeanHeads([(1, 2)], head_means),
        KnockOut("last", "image", (1, 2)),
        KnockOut("text", "image", (2,)),
        DropTokens(0, 0.0),
        DropTokens(1, 0.5),
        DropTokens(1, 0.2, "stride"),
        DropTokens(2, 0.3, "attention"),
        (DropTokens(1, 0.6), ZeroHeads([(2, 2)]), ReplaceImageKV([(0, 1)], means)),
        DropTokens(2, 1.0),
    ]


def alone(subject, item, intervention):
    batch = subject.encode_items([item])
    with subject.intervene(intervention, batch, items=[item_number(item)]), torch.inference_mode():
        return subject.model(**batch.inputs).logits[0, -1]


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject", "eager_subject"])
def test_mixed_rows_equal_each_row_alone(request, fixture, means):
    subject, items = request.getfixturevalue(fixture), make_items(4)
    encoded = encode_items(subject, items)
    assert len({len(sequence) for sequence in encoded}) == 2
    rows = [(index, intervention) for intervention in many_interventions(means) for index in range(4)]
    np.random.default_rng(0).shuffle(rows)
    trunk = np.array([index for index, _ in rows])
    wanted = (np.arange(len(rows)), np.array([len(encoded[index]) - 1 for index in trunk]))
    hidden, _ = forward_rows(
        subject, encoded, trunk, [row for _, row in rows], [item_number(item) for item in items], wanted
    )
    seen = read_logits(subject, hidden)
    expected = torch.stack([alone(subject, items[index], intervention) for index, intervention in rows])
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=2e-4)


def test_what_precedes_the_first_touched_layer_is_computed_once(subject, means):
    items = make_items(2)
    encoded = encode_items(subject, items)
    rows = [None, None, ZeroHeads([(2, 0)]), ZeroHeads([(1, 0)]), DropTokens(2, 0.0)]
    sizes = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[:2])))
        for layer in subject.anatomy.layers
    ]
    try:
        forward_rows(subject, encoded, np.repeat([0, 1], 5), rows * 2, [0, 1])
    finally:
        for handle in handles:
            handle.remove()
    n = len(encoded[0])
    # Two trunks; one branch each at layer 1; at layer 2 two more each, and both untouched rows stay one trunk.
    assert [size[0] for size in sizes] == [2, 4, 8]
    assert sizes[0][1] == max(n, len(encoded[1]))


def test_records_come_back_by_row(subject):
    items = make_items(2)
    encoded = encode_items(subject, items)
    rows = [None, ZeroHeads([(0, 0)]), ZeroHeads([(1, 0)]), None]
    _, run = forward_rows(
        subject, encoded, np.array([1, 0, 1, 0]), rows, [0, 1], observers=[HiddenStates(positions="last")]
    )
    plain = {index: alone_states(subject, items[index]) for index in (0, 1)}
    for layer in range(4):
        records = run.record(0, layer)
        torch.testing.assert_close(records[0], plain[1][layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(records[3], plain[0][layer], rtol=1e-4, atol=1e-4)
    assert (run.record(0, 2)[1] - plain[0][2]).abs().max() > 1e-3


def alone_states(subject, item):
    batch = subject.encode_items([item])
    with subject.intervene(None, batch, observers=[HiddenStates()]) as run, torch.inference_mode():
        subject.model(**batch.inputs)
    return [run.record(0, layer)[0] for layer in range(4)]


def test_appended_answer_tokens_equal_a_longer_prompt(subject):
    item = make_items(1)[0]
    (encoded,) = encode_items(subject, [item])
    tokens = subject.continuation("dark red")
    extended = encoded.extended(subject, tokens)
    hidden, _ = forward_rows(
        subject, [extended], np.array([0]), [None], [0], (np.zeros(3, int), len(encoded) - 1 + np.arange(3))
    )
    batch = subject.encode([item["image"]], [item["prompt"]], answers=["dark red"])
    with torch.inference_mode():
        expected = subject.model(**batch.inputs).logits[0, -3:]
    torch.testing.assert_close(read_logits(subject, hidden), expected, rtol=1e-4, atol=1e-4)
    assert batch.labels[0, -2:].tolist() == list(tokens)
    assert (batch.labels[0, :-2] == -100).all()


def test_means_of_another_model_are_refused(subject):
    encoded = encode_items(subject, make_items(1))
    other = HeadMeans(torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="do not fit this model"):
        forward_rows(subject, encoded, np.array([0]), [MeanHeads([(0, 0)], other)], [0])


def test_encoding_inside_a_run_is_refused(subject):
    batch = subject.encode_items(make_items(1))
    with subject.intervene(ZeroHeads([(0, 0)]), batch), pytest.raises(RuntimeError, match="encode first"):
        capture(subject, batch.inputs)


def test_rows_that_do_not_fit_are_refused_in_one_sentence(subject):
    items = make_items(2)
    encoded = encode_items(subject, items)
    n = [len(one) for one in encoded]
    right = {"sequences": encoded, "trunk": [0, 1, 1], "interventions": [None, ZeroHeads([(0, 0)]), None], "items": [7, 8]}
    wrong = [
        ({"sequences": []}, "there is nothing to run"),
        ({"sequences": items}, "sequences must be a list of prompts as encode_items"),
        ({"sequences": encoded[0]}, "sequences must be a list of prompts"),
        ({"trunk": [0, 1]}, "names the sequences of 2 rows for 3 interventions"),
        ({"trunk": [0, 1, 2]}, "trunk names sequence 2 of 2: they count from 0 to 1"),
        ({"trunk": [0, 1, -1]}, "trunk names sequence -1 of 2"),
        ({"trunk": [1, 1, 1]}, "sequence 0 of 2 belongs to no row"),
        ({"trunk": [0.0, 1.0, 1.0]}, "trunk must be whole numbers in one row, got float64"),
        ({"trunk": [[0, 1, 1]]}, r"trunk must be whole numbers in one row, got int64 of shape \(1, 3\)"),
        ({"interventions": None}, "interventions must be a list with one per row, got None"),
        ({"interventions": [None, [ZeroHeads([(0, 0)])], None]}, "a row must be None, an intervention"),
        ({"observers": HiddenStates()}, "observers must be a list, got HiddenStates"),
        ({"observers": [HiddenStates]}, "a run takes observers with .*, got the class HiddenStates"),
        ({"interventions": [None, "zero", None]}, "a row must be None, an intervention"),
        ({"items": [7]}, "items of 2 sequences, one each, got 1 of them"),
        ({"items": [7, 8, 9]}, "one each, got 3 of them"),
        ({"items": 7}, "one each, got 7"),
        ({"items": [7, 8.5]}, "an item's number must be an integer, got 8.5"),
        ({"wanted": np.arange(3)}, "wanted must be a pair of rows and positions"),
        ({"wanted": ([0, 1], [3])}, "2 rows and 1 positions are wanted"),
        ({"wanted": ([3], [0])}, "row 3 is wanted of 3 rows"),
        ({"wanted": ([1.5], [0])}, "the rows wanted must be whole numbers"),
        ({"wanted": ([0, 2], [0, n[1]])}, f"position {n[1]} of row 2 is wanted, its sequence has {n[1]} tokens: they count from 0"),
        ({"wanted": ([0], [-1])}, "position -1 of row 0 is wanted"),
    ]
    for change, match in wrong:
        with pytest.raises((ValueError, TypeError), match=match) as refused:
            forward_rows(subject, **{**right, **change})
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 250
    with pytest.raises(TypeError, match="the subject must be a Subject"):
        forward_rows(subject.model, **right)
    hidden, _ = forward_rows(subject, **right, wanted=([0, 1, 2], [n[0] - 1, n[1] - 1, n[1] - 1]))
    assert hidden.shape == (3, 32)
    image = int(encoded[1].image.nonzero()[0])
    for lost in (DropTokens(1, 0.0), MergeTokens(1, 0.01)):
        with pytest.raises(ValueError, match=f"row 1 dropped or merged the token at position {image} that is to be read"):
            forward_rows(subject, **{**right, "interventions": [None, lost, None]}, wanted=([0, 1], [n[0] - 1, image]))
