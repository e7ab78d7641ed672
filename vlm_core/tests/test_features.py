"""An image passes the vision tower once, whatever prompt, place in a list or block of a sweep it turns up in."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import Barrier

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vlm_core.sweeps.sweep
from vlm_core import Subject, ZeroHeads, sweep
from vlm_core.subjects.embed import capture, encode_items
from vlm_core.sweeps.features import KnownFeatures, Prompt, encode_distinct, prompts_of, recalling, vision_tower
from vlm_core.tests.family_models import BUILDERS, TINY
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items, tiny_subject

AFTER = ((12, 13, 14), (15, 16, 17, 18))


@cache
def subject_of(name: str) -> Subject:
    return Subject(BUILDERS[name]()[0], name=name)


@contextmanager
def seen_by(subject):
    """How many pixels the vision tower's patch embedding is given, call by call."""
    first = next(module for module in vision_tower(subject).modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    pixels = []
    handle = first.register_forward_hook(lambda module, args, output: pixels.append(args[0].numel()))
    try:
        yield pixels
    finally:
        handle.remove()


def captured(subject, inputs):
    with torch.inference_mode():
        return capture(subject, inputs)


def image_tensors(encoded):
    cross = [] if encoded.cross is None else [encoded.cross.states, encoded.cross.mask, encoded.cross.rows]
    return [encoded.embeds, *encoded.deepstack, *cross]


@pytest.fixture
def shared_items():
    items = make_items(5)
    # Items 0, 2 and 4 ask about one image (as equal copies), 1 and 3 about their own.
    return [{**item, "image": items[0]["image"].copy()} if number % 2 == 0 else item for number, item in enumerate(items)]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_known_image_does_not_run_and_gives_the_same_bits(name):
    subject, inputs, known = subject_of(name), TINY[name].prompts(), KnownFeatures(2**30)
    (expected,) = captured(subject, inputs)
    with seen_by(subject) as pixels, recalling(subject, known):
        (first,) = captured(subject, inputs)
        once = sum(pixels)
        (second,) = captured(subject, inputs)
    assert once > 0 and sum(pixels) == once
    for found in (first, second):
        assert all(torch.equal(one, other) for one, other in zip(image_tensors(found), image_tensors(expected), strict=True))
        assert (found.positions is None) == (expected.positions is None)
        assert found.positions is None or torch.equal(found.positions, expected.positions)
    # The pixels tell images apart: another image runs.
    with seen_by(subject) as pixels, recalling(subject, known):
        (other,) = captured(subject, TINY[name].prompts(start=7))
    assert sum(pixels) == once
    assert any(not torch.equal(one, another) for one, another in zip(image_tensors(other), image_tensors(expected), strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_list_of_images_runs_those_that_are_new(name):
    subject, known = subject_of(name), KnownFeatures(2**30)
    counts = (2, 2) if subject.anatomy.family.max_images is None else (1, 1)
    # Two prompts of two images (or of one): the first is known, of the others each runs once though the batch comes twice.
    both = TINY[name].prompts(counts, AFTER, start=1)
    expected = captured(subject, both)
    with seen_by(subject) as pixels, recalling(subject, known):
        captured(subject, TINY[name].prompts(start=1))
        one = sum(pixels)
        seen = captured(subject, both)
        assert sum(pixels) == sum(counts) * one
        again = captured(subject, both)
        # As the third image of a prompt, or the first of another batch.
        captured(subject, TINY[name].prompts((1,), AFTER[:1], start=sum(counts)))
        assert sum(pixels) == sum(counts) * one
    for found in (seen, again):
        for ours, theirs in zip(found, expected, strict=True):
            for tensor, other in zip(image_tensors(ours), image_tensors(theirs), strict=True):
                torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "mllama", "instructblip"])
def test_through_a_processor_one_image_under_many_questions_runs_once(name):
    processor, model = next(make for key, make in PROCESSORS.items() if key.startswith(name))()
    subject = Subject(model, processor, name=name)
    pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)) for seed in range(2)]
    several = subject.anatomy.family.max_images is None
    items = [
        {"id": f"{number}", "image": [pictures[1], pictures[0]] if several and number == 2 else pictures[0].copy(), "prompt": prompt}
        for number, prompt in enumerate(["what color is it ?", "what is the shape of the big circle ?", "what color ?"])
    ]
    expected = [encode_items(subject, [item])[0] for item in items]
    with seen_by(subject) as pixels:
        encode_distinct(subject, items[:1])
        one = sum(pixels)
        found = encode_distinct(subject, items, batch=1)
    assert sum(pixels) == one * (3 if several else 2)
    for ours, theirs in zip(found, expected, strict=True):
        for tensor, other in zip(image_tensors(ours), image_tensors(theirs), strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5)


def test_encodings_are_those_of_each_item_alone(subject, shared_items):
    with seen_by(subject) as pixels:
        encode_items(subject, shared_items[:1])
        one = sum(pixels)
        encoded = encode_distinct(subject, shared_items)
    assert sum(pixels) == 4 * one
    for ours, item in zip(encoded, shared_items, strict=True):
        (alone,) = encode_items(subject, [item])
        assert torch.equal(ours.ids, alone.ids)
        assert torch.equal(ours.image, alone.image)
        torch.testing.assert_close(ours.embeds, alone.embeds, rtol=1e-5, atol=1e-6)
    assert (encoded[0].embeds[encoded[0].image] - encoded[1].embeds[encoded[1].image]).abs().max() > 0.1


@pytest.mark.parametrize("threads", [0, 2])
def test_a_sweep_encodes_every_image_once_over_all_its_blocks(subject, shared_items, monkeypatch, threads):
    with seen_by(subject) as pixels:
        encode_items(subject, shared_items[:1])
        one = sum(pixels)
        monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 1)
        asked = [None, ZeroHeads([(1, 1)])]
        if threads:
            with ThreadPoolExecutor(threads) as pool:
                table = sweep(subject, shared_items, asked, metrics=("logprob",), executor=pool)
        else:
            table = sweep(subject, shared_items, asked, metrics=("logprob",))
    assert sum(pixels) == 4 * one
    assert not vlm_core.sweeps.sweep._KNOWN
    singly = [sweep(subject, [item], asked, metrics=("logprob",)) for item in shared_items]
    expected = [value for one in singly for value in one["value"]]
    assert table["value"].tolist() == pytest.approx(expected, abs=1e-4)


def test_what_is_kept_stays_within_its_bytes_and_the_latest_used_stay(subject):
    items = make_items(4)
    one = KnownFeatures(2**30)
    encode_distinct(subject, items[:1], one)
    known = KnownFeatures(2 * one.bytes)
    for number in (0, 1, 0, 2):
        encode_distinct(subject, [items[number]], known)
    assert len(known) == 2 and known.bytes == 2 * one.bytes
    with seen_by(subject) as pixels:
        encode_distinct(subject, [items[0], items[2]], known)
        assert not pixels
        encode_distinct(subject, [items[1]], known)
        assert pixels
    small = KnownFeatures(one.bytes - 1)
    assert torch.equal(encode_distinct(subject, items[:1], small)[0].embeds, encode_items(subject, items[:1])[0].embeds)
    assert len(small) == small.bytes == 0


def test_the_tower_is_itself_again_afterwards_and_in_other_threads(subject):
    tower, known = vision_tower(subject), KnownFeatures(2**30)
    pixels = subject.encode_items(make_items(1)).inputs["pixel_values"]
    with pytest.raises(ZeroDivisionError), recalling(subject, known):
        tower(pixels)
        assert len(known) == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(tower, pixels + 1).result()
        assert len(known) == 1
        raise ZeroDivisionError
    assert "forward" not in vars(tower)
    tower.forward = original = tower.forward
    try:
        with recalling(subject, known):
            pass
        assert vars(tower)["forward"] is original
    finally:
        del tower.forward


def test_features_that_a_model_changes_in_place_stay_what_they_were(subject):
    tower, known = vision_tower(subject), KnownFeatures(2**30)
    pixels = subject.encode_items(make_items(1)).inputs["pixel_values"]
    with torch.inference_mode(), recalling(subject, known):
        expected = tower(pixels).last_hidden_state.clone()
        tower(pixels).last_hidden_state.zero_()
        assert torch.equal(tower(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("odd", ["input", "output", "nested"])
def test_a_tower_that_cannot_be_cut_runs_as_it_is(subject, odd, monkeypatch):
    tower, known, calls = vision_tower(subject), KnownFeatures(2**30), []
    pixels = subject.encode_items(make_items(2)).inputs["pixel_values"]
    given = {"input": {"extra": torch.zeros(3)}, "output": {}, "nested": {"extra": [torch.zeros(2)]}}[odd]
    plain = tower.forward

    def forward(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        output = plain(pixel_values)
        return (output.last_hidden_state, output.last_hidden_state.sum()) if odd == "output" else output

    monkeypatch.setattr(tower, "forward", forward)
    with torch.inference_mode(), recalling(subject, known):
        for _ in range(2):
            tower(pixels, **given)
    assert calls == [2, 2] and not len(known)


def test_prompts_are_the_tokens_of_the_encodings_and_run_nothing(subject):
    items = make_items(4)
    with seen_by(subject) as pixels:
        prompts = prompts_of(subject, items, batch=3)
    assert not pixels
    for prompt, encoded in zip(prompts, encode_items(subject, items), strict=True):
        for tokens in (prompt, Prompt.of(encoded)):
            assert len(tokens) == tokens.n_prompt == len(encoded)
            assert torch.equal(tokens.ids, encoded.ids) and torch.equal(tokens.image, encoded.image)


@pytest.mark.parametrize("n_subjects", [1, 2])
def test_two_sweeps_in_threads_leave_each_other_their_features(shared_items, monkeypatch, n_subjects):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 1)
    subjects = [tiny_subject(seed=seed) for seed in range(n_subjects)]
    turns, held = Barrier(2, timeout=60), []

    def take_turns(done, total):
        held.append(len(vlm_core.sweeps.sweep._KNOWN))
        turns.wait()

    with ExitStack() as watched, ThreadPoolExecutor(2) as threads:
        pixels = [watched.enter_context(seen_by(subject)) for subject in subjects]
        runs = [threads.submit(sweep, subjects[number % n_subjects], shared_items, [None], progress=take_turns) for number in range(2)]
        tables = [run.result() for run in runs]
    one = shared_items[0]["image"].size[0] ** 2 * 3
    # Three images: each passes the tower of its subject once, however the two sweeps take turns.
    assert [sum(seen) for seen in pixels] == [3 * one] * n_subjects
    assert max(held) == n_subjects and not vlm_core.sweeps.sweep._KNOWN
    for number, table in enumerate(tables):
        pd.testing.assert_frame_equal(table, sweep(subjects[number % n_subjects], shared_items, [None]))


def test_a_worker_takes_no_features_of_other_weights_and_one_store_a_subject(subject):
    of, known = vlm_core.sweeps.sweep._known, vlm_core.sweeps.sweep._KNOWN
    subject = tiny_subject()
    first = of(subject, "a")
    assert of(subject, "a") is first and of(subject, "b") is first and len(known) == 1
    with torch.no_grad():
        next(subject.model.parameters()).mul_(1.5)
    changed = of(subject, "c")
    assert changed is not first and of(subject, "c") is changed and len(known) == 1
    vlm_core.sweeps.sweep._let_go("c")
    assert not known


def test_features_go_with_their_subject():
    known = vlm_core.sweeps.sweep._KNOWN
    vlm_core.sweeps.sweep._known(tiny_subject(), "a")
    gc.collect()
    assert not known
