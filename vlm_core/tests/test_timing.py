"""Work in pairs: everyone once a round, in orders that differ, the collector still."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from vlm_core.timing import paired, seconds


def test_everyone_works_once_a_round_after_a_call_that_does_not_count():
    called = []

    def work(name):
        return lambda turn: called.append((name, turn, gc.isenabled())) or len(called)

    table = paired({"a": work("a"), "b": work("b"), "c": work("c")}, rounds=30, seed=1)
    assert [one[:2] for one in called[:3]] == [("a", 0), ("b", 0), ("c", 0)] and called[0][2]
    rounds = [called[start : start + 3] for start in range(3, len(called), 3)]
    assert [sorted(one[:2] for one in some) for some in rounds] == [[(name, turn) for name in "abc"] for turn in range(30)]
    assert not any(one[2] for some in rounds for one in some) and gc.isenabled()
    assert len({tuple(one[0] for one in some) for some in rounds}) == 6, "every order comes up"
    assert table.columns.tolist() == ["round", "a", "b", "c"] and len(table) == 30
    at = {(name, turn): number for number, (name, turn, _) in enumerate(called[3:], start=4)}
    assert table["b"].tolist() == [at["b", turn] for turn in range(30)]
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        paired({"a": work("a")}, rounds=0)


def test_the_collector_works_again_after_an_error():
    calls = []

    def fails(turn):
        calls.append(turn)
        if len(calls) > 1:
            raise KeyError("broken")
        return 0.0

    with pytest.raises(KeyError):
        paired({"a": fails}, rounds=2)
    assert gc.isenabled()


def test_seconds_are_seconds():
    assert 0.05 <= seconds(lambda: time.sleep(0.05), torch.device("cpu")) < 5
