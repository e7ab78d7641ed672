"""A word's track is its rank in the lens of the tokens that show the object; stages of entropy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import HiddenStates, observe
from vlm_core.families.layout import object_tokens
from vlm_core.tracing.lens_tracks import entropy_stages, lens_tracks

SIDE = 16


def own(item) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[:8, :4] = True
    return mask


def others(item) -> np.ndarray:
    """Overlaps with ``own`` in one patch, which is the object's."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[4:8, :12] = True
    return mask


def test_tracks_are_read_by_the_final_norm_and_the_unembedding(subject, items):
    found = lens_tracks(subject, items, own, others, batch_rows=5)
    states = observe(subject, items, HiddenStates(positions="image tokens"))
    anatomy = subject.anatomy
    assert found.items == tuple(item["id"] for item in items) and found.vocabulary == anatomy.vocab_size
    for number, item in enumerate(items):
        layout = subject.layout(item["image"], item["prompt"])
        word = subject.continuation(item["answer"])[0]
        mine = object_tokens(layout, own(item))
        theirs = object_tokens(layout, others(item)) & ~mine
        assert mine.sum() == 2 and theirs.sum() == 2
        for layer in range(anatomy.n_layers + 1):
            with torch.inference_mode():
                logits = anatomy.head(anatomy.norm(torch.from_numpy(states[number, layer]))).double()
            rank = (logits > logits[:, word : word + 1]).sum(1).numpy() + 1
            probabilities = logits.softmax(1).numpy()
            entropy = -(probabilities * np.log(probabilities)).sum(1)
            assert found.log_rank["own"][number, layer] == pytest.approx(np.log(rank[mine]).mean(), abs=1e-6)
            assert found.log_rank["others"][number, layer] == pytest.approx(np.log(rank[theirs]).mean(), abs=1e-6)
            assert found.entropy[number, layer] == pytest.approx(entropy[mine].mean(), abs=1e-4)
    np.testing.assert_allclose(found.lead(), found.log_rank["others"] - found.log_rank["own"])
    assert np.ptp(found.lead()) > 0


def test_items_that_do_not_show_both_are_left_out(subject, items):
    nothing = np.zeros((SIDE, SIDE), dtype=bool)
    masks = {item["id"]: nothing if item["id"] in ("item-0", "item-7") else others(item) for item in items}
    found = lens_tracks(subject, items, own, masks)
    assert found.items == tuple(item["id"] for item in items if item["id"] not in ("item-0", "item-7"))
    assert len(found.entropy) == len(found.lead()) == len(found.clusters) == 10
    with pytest.raises(ValueError, match="no item shows both"):
        lens_tracks(subject, items, own, own)


def test_stages_are_the_first_third_the_last_third_and_the_end():
    entropy = np.array([[6.0, 4.0, 3.0, 3.0, 2.0, 1.0, 2.5], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 4.0]])
    fall, rise = entropy_stages(entropy)
    np.testing.assert_allclose(fall, [3.5, 0.0])
    np.testing.assert_allclose(rise, [1.0, -1.0])
    with pytest.raises(ValueError, match="three layers"):
        entropy_stages(np.ones((2, 3)))
