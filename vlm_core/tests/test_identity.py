"""Digests of what a stored measurement depends on: equal for the same, different for whatever changes the numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from vlm_core import Subject, sweep
from vlm_core.identity import code_digest, image_digest, item_digest, library_digest
from vlm_core.tests.tiny import make_items, tiny_llava, tiny_subject
from vlm_core.tests.warm import run


def noise(width=8, height=32, mode="RGB"):
    return Image.frombytes(mode, (width, height), np.random.default_rng(0).bytes(width * height * len(mode)))


def test_size_mode_palette_and_order_tell_images_apart():
    plain, turned = noise(8, 32), noise(32, 8)
    assert plain.tobytes() == turned.tobytes() and image_digest(plain) != image_digest(turned)
    assert image_digest(noise(mode="RGBA")) != image_digest(noise(mode="CMYK"))
    first = plain.quantize(8)
    second = first.copy()
    second.putpalette(first.getpalette()[::-1])
    assert first.tobytes() == second.tobytes() and image_digest(first) != image_digest(second)
    assert image_digest([plain, turned]) != image_digest([turned, plain])
    assert image_digest(plain) == image_digest(plain.copy())


def test_items_differ_by_text_and_image():
    (item,) = make_items(1)
    assert item_digest(item) == item_digest(dict(item))
    for change in ({"prompt": "what ?"}, {"answer": "blue"}, {"image": noise()}, {"image": [item["image"]] * 2}):
        assert item_digest({**item, **change}) != item_digest(item)


def threshold(value):
    return lambda item: item > value


def test_callables_differ_by_code_and_by_what_they_close_over():
    assert code_digest(None) is None
    assert code_digest(threshold(1)) == code_digest(threshold(1)) != code_digest(threshold(4))
    assert code_digest(lambda item: item > 1) != code_digest(lambda item: item >= 1)
    assert code_digest(lambda item, k=1: item) != code_digest(lambda item, k=2: item)
    with pytest.raises(ValueError, match="cannot be told from others like it"):
        code_digest(threshold(sys.stdout))


def test_a_fingerprint_follows_weights_and_settings():
    subject, same = tiny_subject(), tiny_subject()
    before = subject.fingerprint
    subject.encode_items(make_items(2))
    assert before == subject.fingerprint == same.fingerprint
    with torch.no_grad():
        same.anatomy.embedding.weight[5, 5] += 1.0
    assert same.fingerprint[0] != before[0]
    subject.anatomy.embedding.weight.data.mul_(1.5)
    assert subject.fingerprint[0] != before[0] and subject.fingerprint[3] == before[3]
    subject.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    changed = subject.fingerprint[3]
    assert changed != before[3]
    subject.processor.chat_template = subject.processor.chat_template.replace("USER", "ASSISTANT")
    assert subject.fingerprint[3] not in (changed, before[3])
    assert tiny_subject(attention="eager").fingerprint[3] != before[3]


def test_a_fingerprint_is_the_same_in_another_process():
    code = "from vlm_core.tests.tiny import tiny_subject; print(tiny_subject().fingerprint)"
    seen = run(["-c", code]).stdout.strip()
    assert seen == str(tiny_subject().fingerprint)


CODES = """
from vlm_core.identity import code_digest

def groups(item, prompt, names=frozenset({"red", "green", "blue"}), *, kept={"a": {"x", "y", "z"}}):
    return {} if item in {"one", "two", "three"} or (item, {"k"}) in (("u", frozenset({"v", "w"})),) else names

def made(words):
    return lambda item, prompt: item in words

class Chooser:
    def __init__(self, words):
        self.words = words
    def __call__(self, item, prompt):
        return item in self.words

words = ["red", "green", "blue", "yellow", ("dark", "light")]
print(code_digest(groups), code_digest(made(set(words))), code_digest(made({"k": [frozenset(words)]})), code_digest(Chooser(set(words))))
"""


def test_code_is_digested_alike_whatever_order_sets_have():
    def digests(seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        return subprocess.run([sys.executable, "-c", CODES], capture_output=True, text=True, check=True, env=environment).stdout.split()

    first, *others = (digests(seed) for seed in (0, 1, 2))
    assert len(set(first)) == 4 and others == [first, first]


def test_sets_in_code_are_told_apart():
    def made(words):
        return lambda item, prompt: item in words

    given = [set("ab"), set("ac"), frozenset("ab"), ["a", "b"], {"a": {"b"}}, {"b": {"a"}}, {frozenset("ab")}]
    assert len({code_digest(made(words)) for words in given}) == len(given)
    assert code_digest(lambda item: item in {"a", "b"}) != code_digest(lambda item: item in {"a", "c"})
    assert code_digest(made(set("abcdef"))) == code_digest(made(set("fedcba")))


def test_a_store_gives_back_nothing_stale(tmp_path):
    model, processor = tiny_llava()
    subject = Subject(model, processor)
    shapes = [{**item, "image": image} for item, image in zip(make_items(2), (noise(8, 32), noise(32, 8)), strict=True)]
    shapes[1] = {**shapes[0], "image": shapes[1]["image"]}
    palettes = [noise().quantize(8) for _ in range(2)]
    palettes[1].putpalette(palettes[0].getpalette()[::-1])
    for item in (*shapes, *({**shapes[0], "image": image} for image in palettes)):
        stored = sweep(subject, [item], [None], store=tmp_path)
        pd.testing.assert_frame_equal(stored, sweep(subject, [item], [None]))
    together = sweep(subject, [{**shapes[0], "image": image, "id": str(n)} for n, image in enumerate(palettes)], [None], metrics=["logit"])
    assert together["value"].nunique() == 2
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    pd.testing.assert_frame_equal(sweep(subject, shapes[:1], [None], store=tmp_path), sweep(subject, shapes[:1], [None]))


def test_items_of_several_images_are_stored(tmp_path):
    subject, (item,) = tiny_subject(), make_items(1)
    several = {**item, "image": [item["image"], noise(16, 16)]}
    first = sweep(subject, [several], [None], store=tmp_path)
    pd.testing.assert_frame_equal(sweep(subject, [several], [None], store=tmp_path), first)
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_the_library_is_its_code_but_for_what_measures_nothing(tmp_path):
    files = {"a.py": "x = 1", "rooms/b.py": "y = 2", "tests/test_a.py": "assert x", "rooms/tests/test_b.py": "", "stats/mean.py": ""}

    def digest(changed):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in {**files, **changed}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return library_digest(folder)

    same = [digest({}), digest({"tests/test_a.py": "assert not x"}), digest({"rooms/tests/test_c.py": "new"}), digest({"stats/mean.py": "new"})]
    others = [digest({"a.py": "x = 2"}), digest({"rooms/b.py": "y = 1"}), digest({"c.py": ""})]
    assert len(set(same)) == 1 and len(set(same + others)) == 4
    assert library_digest() == library_digest()
