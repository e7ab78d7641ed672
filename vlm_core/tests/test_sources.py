"""Checkpoints and items that a configuration names: found, read when asked for, known by content."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vlm_core import sources
from vlm_core.sources import Items, checkpoint_digest, items_of, items_on_asking, located
from vlm_core.tests.distill_students import save_student
from vlm_core.tests.tiny import make_items

MAKE = "vlm_core.tests.tiny:make_items"


def test_a_checkpoint_of_the_hub_is_one_commit_without_what_is_never_read(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(sources, "inspect_checkpoint", lambda path, revision: SimpleNamespace(commit="c0ffee"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda path, **how: asked.update(how, path=path) or str(tmp_path))
    assert located("org/name", "main") == str(tmp_path)
    assert asked["path"] == "org/name" and asked["revision"] == "c0ffee" and {"*.bin", "*.py"} <= set(asked["ignore_patterns"])
    assert located(str(tmp_path)) == str(tmp_path)


def test_a_checkpoint_is_known_by_weights_and_settings(tmp_path):
    first, again, other = (str(save_student(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert checkpoint_digest(first) == checkpoint_digest(again) != checkpoint_digest(other)
    file = tmp_path / "b" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.1}))
    assert checkpoint_digest(again) != checkpoint_digest(first)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt"])
def test_a_checkpoint_is_known_by_its_tokenizer(tmp_path, name):
    folder = save_student(tmp_path / "a")
    before = checkpoint_digest(str(folder))
    (folder / "notes.txt").write_text("of no consequence")
    assert checkpoint_digest(str(folder)) == before
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    assert checkpoint_digest(str(folder)) != before


def test_items_are_read_when_they_are_asked_for(monkeypatch):
    made, read = make_items(6), []

    class Given:
        def __len__(self):
            return len(made)

        def __getitem__(self, index):
            read.append(index)
            return made[index]

    monkeypatch.setattr(Items, "called", lambda self: Given)
    items = items_on_asking(Items(factory=MAKE, limit=4), "data")
    assert len(items) == 4 and not read
    assert items[2]["id"] == "item-2" and read == [2]
    assert items[-1] is made[3] and [item["id"] for item in items] == [f"item-{n}" for n in range(4)]
    with pytest.raises(IndexError, match="there are 4 items, and none is number 4"):
        items[4]
    monkeypatch.undo()
    assert [item["id"] for item in items_of(Items(factory=MAKE, arguments={"n": 3}), "data")] == [item["id"] for item in make_items(3)]
