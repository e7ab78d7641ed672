"""Shards are whole or absent, computed once whoever asks, and survive the death of whoever computes them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pandas as pd
import pytest

from vlm_core.sweeps.shards import ShardStore
from vlm_core.tests.warm import Warm

WORKER = """
import sys, time
import pandas as pd
from vlm_core.sweeps.shards import ShardStore

folder, log, pause, n_shards = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

def task(number):
    def compute():
        with open(log, "a") as file:
            file.write(f"start {number}\\n")
        time.sleep(pause)
        with open(log, "a") as file:
            file.write(f"end {number}\\n")
        return pd.DataFrame({"value": [number]})
    return compute

values = [int(table["value"][0]) for _, table in ShardStore(folder).compute((f"shard-{n}", task(n)) for n in range(n_shards))]
print(sorted(values))
"""


def start(folder, log, pause=0.0, n_shards=6):
    return Warm(["-c", WORKER, folder, log, pause, n_shards])


def said(worker):
    """What it printed, once it has ended as it should."""
    assert worker.wait(timeout=60) == 0, worker.said()
    return worker.said()[0].strip()


def wait_for(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(log, word):
    return [line for line in log.read_text().splitlines() if line.startswith(word)] if log.exists() else []


def test_two_processes_share_the_work(tmp_path):
    log = tmp_path / "log"
    workers = [start(tmp_path / "store", log, 0.15) for _ in range(2)]
    assert [said(worker) for worker in workers] == ["[0, 1, 2, 3, 4, 5]"] * 2
    assert sorted(lines(log, "end")) == [f"end {n}" for n in range(6)]


def test_three_processes_that_race_for_many_shards_compute_none_twice(tmp_path):
    log = tmp_path / "log"
    workers = [start(tmp_path / "store", log, 0.0, 60) for _ in range(3)]
    assert [said(worker) for worker in workers] == [str(list(range(60)))] * 3
    assert sorted(lines(log, "start")) == sorted(f"start {n}" for n in range(60))
    assert not list((tmp_path / "store" / "locks").iterdir())


def test_who_waits_for_a_process_that_is_killed_goes_on_at_once(tmp_path):
    log, other_log, store = tmp_path / "log", tmp_path / "other", tmp_path / "store"
    victim = start(store, log, 600.0, 1)
    wait_for(lambda: lines(log, "start"))
    other = start(store, other_log, 0.0, 3)
    # The other has done everything else and waits for the first shard.
    wait_for(lambda: len(lines(other_log, "end")) == 2)
    time.sleep(0.2)
    assert other.poll() is None and len(lines(other_log, "start")) == 2
    victim.kill()
    assert said(other) == "[0, 1, 2]"
    assert lines(other_log, "end") == ["end 1", "end 2", "end 0"]
    assert not list((store / "locks").iterdir())


def test_a_lock_goes_with_its_shard_in_place_and_stays_where_a_task_failed(tmp_path):
    store, locks = ShardStore(tmp_path), tmp_path / "locks"

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.once("a", fails)
    assert [lock.name for lock in locks.iterdir()] == ["a.lock"]
    store.once("a", lambda: pd.DataFrame({"value": [1]}))
    assert not list(locks.iterdir())
    # Killed between its shard and its lock; another has not come to its shard.
    for name in ("a", "b"):
        (locks / f"{name}.lock").touch()
    ShardStore(tmp_path)
    assert [lock.name for lock in locks.iterdir()] == ["b.lock"]


def test_a_killed_process_loses_nothing_and_its_claim_is_taken_over(tmp_path):
    log = tmp_path / "log"
    victim = start(tmp_path / "store", log, 0.3)
    wait_for(lambda: len(lines(log, "start")) == 3)
    other = start(tmp_path / "store", log, 0.0)
    victim.kill()
    assert said(other) == "[0, 1, 2, 3, 4, 5]"
    # What was finished is not computed again; the one that was under way is, once.
    finished = lines(log, "end")
    assert sorted(finished) == sorted(set(finished))
    assert len(finished) == 6
    assert len(lines(log, "start")) == 7


def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch):
    store = ShardStore(tmp_path)

    def torn(self, file, **options):
        file.write(b"half a table")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pd.DataFrame, "to_parquet", torn)
        with pytest.raises(KeyboardInterrupt):
            store.once("a", lambda: pd.DataFrame({"value": [1]}))
    assert store.read("a") is None
    assert len(list(tmp_path.glob("*.partial"))) == 1
    assert store.once("a", lambda: pd.DataFrame({"value": [2]}))["value"].tolist() == [2]
    assert store.read("a")["value"].tolist() == [2]
    assert not list(tmp_path.glob("*.partial"))


def test_threads_share_the_work_too(tmp_path):
    computed = []

    def task():
        computed.append(1)
        time.sleep(0.05)
        return pd.DataFrame({"value": [1]})

    def work():
        assert [name for name, _ in ShardStore(tmp_path).compute([("a", task), ("b", task)])]

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 2


def test_what_a_table_carries_beside_its_columns_is_kept(tmp_path):
    store, table = ShardStore(tmp_path), pd.DataFrame({"value": [1.5]})
    table.attrs = {"paths": {"whole": 1}}
    store.write("a", table)
    assert store.read("a").attrs == {"paths": {"whole": 1}}


def test_a_shard_that_was_finished_between_the_look_and_the_claim_is_read(tmp_path, monkeypatch):
    store, claim = ShardStore(tmp_path), ShardStore.claim

    @contextmanager
    def finished_meanwhile(self, name):
        store.write(name, pd.DataFrame({"value": [1]}))
        with claim(self, name) as mine:
            yield mine

    monkeypatch.setattr(ShardStore, "claim", finished_meanwhile)
    assert store.once("a", lambda: pd.DataFrame({"value": [2]}))["value"].tolist() == [1]


@pytest.mark.parametrize("content", [b"", b"PAR1garbage", None])
def test_a_damaged_shard_is_computed_anew(tmp_path, content):
    store, table = ShardStore(tmp_path), pd.DataFrame({"value": [1.0, 2.0]})
    store.write("a", table)
    path = store.path("a")
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.warns(UserWarning, match=r"a\.parquet is damaged .*computed anew.*a\.damaged"):
        ((_, found),) = store.compute([("a", lambda: table)])
    pd.testing.assert_frame_equal(found, table)
    pd.testing.assert_frame_equal(store.read("a"), table)
    assert (tmp_path / "a.damaged").is_file()
