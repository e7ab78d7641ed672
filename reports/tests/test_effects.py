"""Effects per item keep every bit beside the run, and are paired with those of another run."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from reports import effects, record

from .suites import REFUTED, SUPPORTED

pytest_plugins = ["pytester"]

AWKWARD = [0.1 + 0.2, 1 / 3, -0.0, 5e-324, float(np.nextafter(1.0, 0.0))]


def kept(folder, rows):
    """Store rows in a folder the way a run does, through JSON; what stands in the record."""
    arrays = {}
    stored = json.loads(json.dumps(effects.store(rows, arrays)))
    (folder / record.ARRAYS).mkdir(parents=True, exist_ok=True)
    for digest, content in arrays.items():
        (folder / record.ARRAYS / f"{digest}.npy").write_bytes(base64.b64decode(base64.b64encode(content)))
    return stored


@pytest.mark.parametrize("seeds", [None, [0, 0, 1, 1, 1]])
@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)])
def test_rows_come_back_bit_by_bit(tmp_path, seeds, bounds):
    stored = kept(tmp_path / "run", effects.pack(np.array(AWKWARD), ["é", "a", "a", "b", "b"], seeds, bounds))
    effects.copy(stored, tmp_path / "run", tmp_path / "elsewhere")
    again = effects.load(tmp_path / "elsewhere", stored)
    assert [one.hex() for one in again["effect"].tolist()] == [one.hex() for one in AWKWARD]
    assert again["clusters"].tolist() == ["é", "a", "a", "b", "b"]
    assert (None if again["seeds"] is None else again["seeds"].tolist()) == (None if seeds is None else list("00111"))
    assert again["bounds"] == (None if bounds is None else [-1.0, 1.0])


def test_any_changed_bit_or_name_is_another_content():
    base = dict(effect=[0.5, 0.25], clusters=["a", "b"], seeds=[0, 0], bounds=(-1, 1))
    changes = [
        {},
        {"effect": [0.5, np.nextafter(0.25, 1)]},
        {"effect": [0.25, 0.5]},
        {"clusters": ["a", "c"]},
        {"seeds": [0, 1]},
        {"seeds": None},
        {"bounds": None},
    ]
    stored = [effects.store(effects.pack(**{**base, **change}), {}) for change in changes]
    assert len({record.dumps(one) for one in stored}) == len(changes)


@pytest.mark.parametrize("effect", [None, [], [float("nan")], [1.0, 2.0], [[1.0]], ["x"], object()])
def test_what_is_no_effect_per_item_has_no_rows(effect):
    assert effects.pack(effect, ["a"]) is None and effects.store(None, {}) is None


def test_rows_are_paired_by_cluster_and_seed():
    first = effects.pack([1.0, 2.0, 3.0, 4.0, 5.0], ["a", "a", "b", "c", "d"])
    second = effects.pack([30.0, 10.0, 20.0, 40.0, 41.0], ["b", "a", "a", "c", "c"])
    found = effects.matched(first, second)
    assert dict(zip(found["first"], found["second"], strict=True)) == {1.0: 10.0, 2.0: 20.0, 3.0: 30.0}
    assert sorted(found["clusters"]) == ["a", "a", "b"] and found["seeds"] is None and found["only"] == 4
    crossed = [effects.pack(values, ["a", "a"], seeds) for values, seeds in (([1.0, 2.0], [0, 1]), ([20.0, 10.0], [1, 0]))]
    assert effects.matched(*crossed)["second"].tolist() == [10.0, 20.0]


def test_a_run_keeps_the_effects_of_each_verdict_beside_it(suite):
    suite.write(SUPPORTED, REFUTED)
    suite.run()
    folder = suite.folders[0]
    _, records = suite.read(folder)
    for entry, share in zip(records, (0.5, 0.0), strict=True):
        rows = effects.load(folder, entry["effects"])
        assert rows["effect"].tolist() == [float(item < share * 100) for item in range(100)]
        assert rows["clusters"].tolist() == [str(item) for item in range(100)] and rows["bounds"] == [-1.0, 1.0]
