"""Token groups that callers name: one rule, whoever takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import AttentionMass, KnockOut, RecordingConfig, capture_activations, observe, record, sweep
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.groups import grouped, with_groups
from vlm_core.tests.tiny import make_items

MASS = AttentionMass(groups=("image", "object"))


def record_in(tmp_path):
    def run(subject, item, groups):
        record(subject, [item], RecordingConfig({"mass": MASS}), tmp_path / "recording", groups=groups)

    return run


def under_intervene(subject, item, groups):
    batch = subject.encode_items([item])
    named = groups(item, encode_items(subject, [item])[0])
    with subject.intervene(None, batch, observers=[MASS], groups={name: torch.as_tensor(one)[None] for name, one in named.items()}):
        pass


TAKERS = {
    "observe": lambda subject, item, groups: observe(subject, [item], MASS, groups=groups),
    "sweep": lambda subject, item, groups: sweep(subject, [item], [KnockOut("last", "object", (0,))], groups=groups),
    "capture": lambda subject, item, groups: capture_activations(
        subject, item, layers=0, groups=groups(item, encode_items(subject, [item])[0])
    ),
    "intervene": under_intervene,
}


@pytest.mark.parametrize("taker", [*TAKERS, "record"])
@pytest.mark.parametrize(
    ("name", "mask", "sentence"),
    [
        ("object", lambda n: np.ones(n, dtype=bool), None),
        ("object", lambda n: np.arange(n), "token group 'object' .*is torch.int64 of shape .* give one boolean per token"),
        ("object", lambda n: np.full(n, 0.5), "token group 'object' .*is torch.float64 of shape .* give one boolean per token"),
        ("object", lambda n: np.ones(3, dtype=bool), "token group 'object' .*is torch.bool of shape .*3.* give one boolean per token"),
        ("image", lambda n: np.ones(n, dtype=bool), "token group 'image' is one that every prompt has: give yours another name"),
    ],
)
def test_a_group_is_one_boolean_per_token_under_a_new_name(subject, tmp_path, taker, name, mask, sentence):
    run = record_in(tmp_path) if taker == "record" else TAKERS[taker]
    (item,) = make_items(1)

    def groups(item, encoded):
        return {name: mask(len(encoded))}

    if sentence is None:
        run(subject, item, groups)
    else:
        with pytest.raises(ValueError, match=sentence):
            run(subject, item, groups)


def test_groups_join_those_that_a_prompt_has_and_none_changes_nothing(subject):
    items = make_items(3)
    plain = encode_items(subject, items)
    first = grouped(plain, items, lambda item, encoded: {"object": encoded.image} if item is items[1] else None)
    assert [list(one.groups) for one in first] == [[], ["object"], []]
    both = with_groups(first[1], {"background": ~first[1].image.numpy()})
    assert torch.equal(both.groups["object"], plain[1].image) and torch.equal(both.groups["background"], ~plain[1].image)
    assert not plain[1].groups and list(first[1].groups) == ["object"]
    assert grouped(plain, items, None) == plain
    with pytest.raises(ValueError, match="token groups of item 'item-0' are a list: give a mapping"):
        grouped(plain, items, lambda item, encoded: [encoded.image])
