"""Means over a set: exact however the set is cut, and stable far from zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import HeadOutputs, KeyValues, Moments, head_means, image_kv_means, key_value_moments, observe
from vlm_core.observation import means
from vlm_core.seam.views import AttentionView, Tokens
from vlm_core.tests.tiny import make_items


def moments_of(values: np.ndarray) -> Moments:
    values = torch.from_numpy(values)[:, None]
    return Moments.of(torch.ones(len(values)), values, torch.zeros_like(values))


def test_moments_far_from_zero_keep_their_digits():
    values = np.random.default_rng(0).normal(1e8, 1.0, 20_000)
    total = None
    for part in np.array_split(values, 77):
        total = moments_of(part) if total is None else total.joined(moments_of(part))
    assert float(total.count) == 20_000
    np.testing.assert_allclose(total.mean, values.mean(), rtol=1e-15)
    np.testing.assert_allclose(total.std, values.std(), rtol=1e-9)
    # The textbook formula loses them: the data are hard enough to tell the two apart.
    assert abs(np.sqrt(max((values**2).mean() - values.mean() ** 2, 0.0)) - values.std()) > 0.1


@pytest.mark.parametrize("fixture", ["subject", "gqa_subject"])
@pytest.mark.parametrize("tokens", ["image", "question"])
def test_moments_are_those_of_all_tokens_of_all_items(request, fixture, tokens):
    subject, items = request.getfixturevalue(fixture), make_items(7)
    seen: list[list[np.ndarray]] = [[], [], []]

    class Keep:
        def attention(self, view):
            for members, key, value in zip(view.tokens.group(tokens), view.key, view.value, strict=True):
                seen[view.layer].append(torch.stack([key[:, members], value[:, members]]).double().numpy())

    observe_all(subject, items, Keep())
    small, large = (key_value_moments(subject, items, tokens, batch_rows) for batch_rows in (2, 32))
    for layer in range(3):
        values = np.concatenate(seen[layer], axis=2)
        np.testing.assert_allclose(large.mean[layer], values.mean(2), atol=1e-6)
        np.testing.assert_allclose(large.std[layer], values.std(2), atol=1e-6)
        assert (large.count[layer] == values.shape[2]).all()
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-5, atol=1e-5)


def observe_all(subject, items, observer):
    batch = subject.encode_items(items, padding_side="right")
    with torch.inference_mode(), subject.intervene(None, batch, observers=[observer]):
        subject.model(**batch.inputs, use_cache=False)


def test_keys_far_from_zero_keep_their_spread():
    key = 1e4 + torch.randn(1, 2, 4000, 3, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(1, 4000, dtype=torch.bool)
    tokens = Tokens(everywhere, everywhere, torch.zeros(1, dtype=torch.long))
    seen = Moments(**KeyValues.joined(KeyValues().attention(AttentionView(0, key, key, key, key, None, 1.0, None, tokens))))
    np.testing.assert_allclose(seen.mean[0], key[0].double().mean(1), rtol=1e-14)
    np.testing.assert_allclose(seen.std[0], key[0].double().std(1, correction=0), rtol=1e-10)


def test_an_item_keeps_its_own_moments(subject):
    items = make_items(3)
    seen = observe(subject, items, KeyValues())
    assert seen["mean"].shape == (3, 3, 2, 4, 8) and seen["mean"].dtype == np.float64
    assert (seen["count"] == 17).all()
    np.testing.assert_allclose(seen["mean"].mean(0), key_value_moments(subject, items).mean, rtol=1e-6, atol=1e-9)


def test_means_of_parts_are_those_of_all_items(subject):
    items = make_items(7)
    parts = [key_value_moments(subject, some) for some in (items[::2], items[1::2])]
    whole, joined = image_kv_means(subject, items), means.image_kv_means_of(subject, parts)
    torch.testing.assert_close(joined.keys, whole.keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.values, whole.values, rtol=1e-5, atol=1e-6)
    assert joined.count == whole.count
    with pytest.raises(ValueError, match="at least one part"):
        means.image_kv_means_of(subject, [])


def test_means_need_items(subject):
    for ask in (image_kv_means, key_value_moments):
        with pytest.raises(ValueError, match="at least one item"):
            ask(subject, [])


def test_head_means_do_not_hold_every_item(subject, monkeypatch):
    sizes, observed = [], means.observed
    monkeypatch.setattr(means, "observed", lambda *a: (sizes.append(len(some.items)) or some for some in observed(*a)))
    items = make_items(9)
    found = head_means(subject, items, batch_rows=4)
    assert sizes == [4, 4, 1] and found.count == 9
    np.testing.assert_allclose(found.values, observe(subject, items, HeadOutputs("mean")).mean(0), rtol=1e-5, atol=1e-6)
