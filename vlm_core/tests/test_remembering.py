"""A prompt is encoded once while its subject remembers, and never from weights or pixels that are others."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from PIL import Image

from vlm_core import AttentionMass, ZeroHeads, evaluate, observe, sweep
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.remembering import KnownAlike, KnownPrompts, among_alike, prompt_key, remembering
from vlm_core.sweeps.features import Prompt, prompts_of, vision_tower
from vlm_core.tests.tiny import make_items, tiny_subject


@pytest.fixture
def counted(monkeypatch):
    """A subject, and how many prompts its processor was given, call by call."""
    subject, calls = tiny_subject(), []
    original = subject.encode

    def encode(images, prompts, *args, **kwargs):
        calls.append(len(prompts))
        return original(images, prompts, *args, **kwargs)

    monkeypatch.setattr(subject, "encode", encode)
    return subject, calls


def test_sweeps_and_observers_share_what_was_encoded(counted):
    subject, calls = counted
    items, rows = make_items(5), {"none": None, "zero": ZeroHeads([(0, 1)])}
    fresh, fresh_mass = sweep(subject, items, rows), observe(subject, items, AttentionMass("text", ("image",)))
    del calls[:]
    with remembering(subject) as known:
        for _ in range(2):
            remembered, mass = sweep(subject, items, rows), observe(subject, items, AttentionMass("text", ("image",)))
            pd.testing.assert_frame_equal(remembered, fresh)
            torch.testing.assert_close(torch.from_numpy(mass), torch.from_numpy(fresh_mass))
        assert sum(calls) == len(known) == len({prompt_key(item["image"], item["prompt"]) for item in items})
    encode_items(subject, items)
    assert sum(calls) == len(known) + len(items), "outside the context nothing is remembered"


def test_one_pixel_or_one_word_makes_another_prompt(counted):
    subject, calls = counted
    item = make_items(1)[0]
    painted: Image.Image = item["image"].copy()
    painted.putpixel((0, 0), tuple(255 - value for value in painted.getpixel((0, 0))))
    others = [item, {**item, "image": painted}, {**item, "prompt": item["prompt"] + " really"}, {**item, "image": item["image"].copy()}]
    with remembering(subject):
        found = encode_items(subject, others)
        assert sum(calls) == 3 and found[0] is found[3]
        again = encode_items(subject, others[1:])
    for one, fresh in zip(again, encode_items(subject, others[1:]), strict=True):
        torch.testing.assert_close(one.embeds, fresh.embeds)


def test_other_images_are_remembered_as_what_was_shown(counted):
    subject, _ = counted
    items = make_items(2)
    swapped = [items[1]["image"], items[0]["image"]]
    with remembering(subject):
        encode_items(subject, items)
        found = encode_items(subject, items, images=swapped)
    for one, fresh in zip(found, encode_items(subject, items, images=swapped), strict=True):
        torch.testing.assert_close(one.embeds, fresh.embeds)


def test_weights_that_change_end_the_memory():
    subject, items = tiny_subject(), make_items(3)
    with remembering(subject) as known:
        before = encode_items(subject, items)
        with torch.no_grad():
            subject.anatomy.embedding.weight.add_(1.0)
        after = encode_items(subject, items)
        assert len(known) == len({prompt_key(item["image"], item["prompt"]) for item in items})
    assert not torch.equal(before[0].embeds, after[0].embeds)
    torch.testing.assert_close(after[0].embeds, encode_items(subject, items)[0].embeds)


def test_prompts_are_known_without_the_processor(counted):
    subject, calls = counted
    items = make_items(4)
    fresh = prompts_of(subject, items)
    with remembering(subject):
        encode_items(subject, items)
        del calls[:]
        for one, plain in zip(prompts_of(subject, items), fresh, strict=True):
            assert isinstance(one, Prompt) and torch.equal(one.ids, plain.ids) and torch.equal(one.image, plain.image)
        assert not calls


def test_the_prompt_used_longest_ago_goes_first():
    subject, items = tiny_subject(), make_items(3)
    state, encoded = subject.weights_state(), encode_items(subject, items)
    measured = KnownPrompts(2**30)
    measured.find(state, [])
    measured.learn(state, ("a", ""), encoded[0])
    known = KnownPrompts(2 * measured.bytes)
    known.find(state, [])
    for name in "ab":
        known.learn(state, (name, ""), encoded[0])
    known.find(state, [("a", "")])
    known.learn(state, ("c", ""), encoded[0])
    assert known.bytes == 2 * measured.bytes
    assert [one is not None for one in known.find(state, [(name, "") for name in "abc"])] == [True, False, True]


def test_subjects_alike_share_what_processor_and_tower_made(monkeypatch):
    items, calls, seen = make_items(5), [], []
    one, other, apart = tiny_subject(), tiny_subject(), tiny_subject()
    with torch.no_grad():
        for parameter in other.anatomy.language_model.parameters():  # another decoder
            parameter.mul_(1.5)
        for parameter in vision_tower(apart).parameters():  # another tower
            parameter.mul_(1.5)
    apart.processor.image_processor.image_mean = [0.4, 0.4, 0.4]  # another processor
    for subject in (one, other, apart):
        original = subject.encode
        monkeypatch.setattr(subject, "encode", lambda *args, original=original, **kwargs: calls.append(len(args[1])) or original(*args, **kwargs))
        patches = next(module for module in vision_tower(subject).modules() if isinstance(module, torch.nn.Conv2d))
        patches.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    alone = [evaluate(subject, items) for subject in (one, other, apart)]
    assert not alone[0]["score"].equals(alone[1]["score"])
    counts = []
    with among_alike(KnownAlike()) as known:
        for subject, before in zip((one, other, apart), alone, strict=True):
            calls.clear(), seen.clear()
            pd.testing.assert_frame_equal(evaluate(subject, items), before)
            counts.append((sum(calls), sum(seen)))
        assert len(known.towers) == 2
    n_images = len({prompt_key(item["image"], "") for item in items})
    assert counts == [(len(items), n_images), (0, 0), (len(items), n_images)]
    calls.clear()
    evaluate(one, items)
    assert sum(calls) == len(items), "outside the context nothing is shared"
