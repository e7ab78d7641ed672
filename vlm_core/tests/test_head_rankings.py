"""Rivals of attribution are what they say, and planted heads show which of them can be trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import FullAttention, ReplaceImageKV, ZeroHeads, image_kv_means, observe, sweep
from vlm_core.heads.ranking import top_heads
from vlm_core.heads.rankings import SingleHeads, attention_mass, gradient_gates, random_scores, without_each_head
from vlm_core.tests.planted import planted_subject, with_answers_the_image_raises
from vlm_core.tests.tiny import make_items

PLANTED = [(0, 1), (2, 3)]


@pytest.fixture(scope="module")
def planted():
    """A subject, items and the removal of the image from heads."""
    subject, items = planted_subject(PLANTED), make_items(6)
    means = image_kv_means(subject, items)
    items = with_answers_the_image_raises(subject, items, PLANTED, means)
    return subject, items, lambda heads: ReplaceImageKV(tuple(heads), means, queries="text")


def test_attention_mass_is_the_full_maps_sum_over_image_keys_averaged_over_text(planted):
    subject, items, _ = planted
    found = attention_mass(subject, items[:2])
    assert found.shape == (2, 3, 4)
    for number, item in enumerate(items[:2]):
        maps = observe(subject, [item], FullAttention())[0]
        image = subject.encode_items([item]).image[0].numpy()
        np.testing.assert_allclose(found[number], maps[:, :, ~image][..., image].sum(-1).mean(-1), atol=1e-5)
        np.testing.assert_allclose(attention_mass(subject, [item], "last")[0], maps[:, :, -1][..., image].sum(-1), atol=1e-5)


@pytest.mark.parametrize("multi_token", [False, True])
def test_gradient_gates_are_the_slope_of_the_margin_as_heads_fade(multi_token):
    """Finite differences of the margin that sweeps score, for answers of one token and of two that begin alike."""
    subject = planted_subject(PLANTED)
    items = make_items(2)
    if multi_token:
        items = [{**item, "answer": "dark red", "candidates": ["dark red", "dark blue", "green"]} for item in items]
    found = gradient_gates(subject, items)
    assert found.shape == (2, 3, 4)

    def margin(number, layer, head, gate):
        size = subject.anatomy.head_dim

        def fade(module, args):
            heads = args[0].clone()
            heads[..., head * size : (head + 1) * size] *= gate
            return (heads,)

        batch = subject.encode_items([items[number]])
        scores = {}
        for candidate in items[number]["candidates"]:
            tokens = subject.continuation(candidate)
            inputs = dict(batch.inputs)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            handle = subject.anatomy.output_projection(layer).register_forward_pre_hook(fade)
            try:
                with torch.inference_mode():
                    chances = subject.model(**inputs).logits[0, -len(tokens) :].log_softmax(-1)
            finally:
                handle.remove()
            scores[candidate] = sum(float(row[token]) for row, token in zip(chances, tokens, strict=True))
        answer = scores.pop(items[number]["answer"])
        return answer - max(scores.values())

    (scored,) = sweep(subject, items[:1], [None], metrics=("margin",))["value"]
    assert margin(0, 0, 1, 1.0) == pytest.approx(scored, abs=1e-4)
    logits = gradient_gates(subject, items, "logit")
    for number, layer, head in ((0, 0, 1), (1, 2, 3), (1, 1, 0)):
        slope = (margin(number, layer, head, 1.02) - margin(number, layer, head, 0.98)) / 0.04
        assert found[number, layer, head] == pytest.approx(slope, abs=2e-3)
    assert np.abs(found - logits).max() > 0.05  # another question than the answer's own logit


def test_single_heads_are_one_sweep_each_and_name_the_planted_ones(planted):
    subject, items, remove = planted
    found = without_each_head(subject, items, remove)
    assert found.without.shape == (6, 3, 4) and found.metric == "margin"
    assert (found.items, found.clusters) == (tuple(i["id"] for i in items), tuple(i["scene_id"] for i in items))
    one = sweep(subject, items, [None, remove([(2, 3)]), remove(subject.heads)], metrics=("margin",))["value"].to_numpy().reshape(6, 3)
    np.testing.assert_allclose(found.untouched, one[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.without[:, 2, 3], one[:, 1], atol=1e-5)
    np.testing.assert_allclose(found.without_any, one[:, 2], atol=1e-5)
    np.testing.assert_allclose(found.cost[:, 2, 3], one[:, 0] - one[:, 1], atol=1e-5)
    assert set(top_heads(found.cost.mean(0), 2)) == set(PLANTED)
    others = [found.cost[:, layer, head] for layer, head in subject.heads if (layer, head) not in PLANTED]
    np.testing.assert_allclose(others, 0, atol=1e-4)


def test_what_is_removed_is_the_callers(planted):
    subject, items, _ = planted
    zeroed = without_each_head(subject, items[:2], ZeroHeads, metric="logit")
    one = sweep(subject, items[:2], [ZeroHeads([(1, 2)])], metrics=("logit",))["value"]
    np.testing.assert_allclose(zeroed.without[:, 1, 2], one, atol=1e-5)


def test_shares_of_unchanged_heads_by_hand():
    without = np.array([[[10.0, 9.6, 9.5, 14.0]], [[-1.96, -2.04, -2.2, -2.0]]])  # 5 % of 10 is 0.5, of -2 is 0.1
    measured = SingleHeads(np.array([10.0, -2.0]), np.array([9.5, -2.05]), without, ("a", "b"), ("s", "t"), "logit")
    assert measured.unchanged(0.05).tolist() == [2 / 4, 3 / 4]  # a change of 5 % is not less than 5 %
    assert measured.all_change(0.05).tolist() == [True, False]
    assert measured.cost[0, 0].tolist() == pytest.approx([0.0, 0.4, 0.5, -4.0])


def test_random_scores_are_new_orders_by_seed(planted):
    subject, *_ = planted
    found = random_scores(subject, 3, seed=4)
    assert found.shape == (3, 3, 4) and len(np.unique(found)) == 36
    assert np.array_equal(found, random_scores(subject, 3, seed=4)) and not np.array_equal(found, random_scores(subject, 3, seed=5))


def test_no_items_are_refused(planted):
    subject, _, remove = planted
    with pytest.raises(ValueError, match="needs at least one item"):
        without_each_head(subject, [], remove)
