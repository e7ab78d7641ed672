"""Sweeps on executors give the table of a serial sweep, and survive the death of workers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

import vlm_core.sweeps.sweep
from vlm_core import ZeroHeads, sweep
from vlm_core.sweeps.executors import ProcessExecutor, RayExecutor, SerialExecutor, open_subject
from vlm_core.tests.tiny import make_items
from vlm_core.tests.worker_tasks import DiesAt, TinySubject, answer, die, die_once, fail

INTERVENTIONS = {"none": None, "zero": ZeroHeads([(1, 1)])}


@pytest.fixture
def expected(monkeypatch, subject):
    monkeypatch.setattr(vlm_core.sweeps.sweep, "_BLOCK_ITEMS", 2)
    return sweep(subject, make_items(8), INTERVENTIONS)


def assert_same(table, expected):
    pd.testing.assert_frame_equal(table, expected, check_exact=False, rtol=1e-4, atol=1e-4)
    assert table.attrs == expected.attrs


@pytest.mark.parametrize("executor", [SerialExecutor, functools.partial(ThreadPoolExecutor, 2)])
def test_in_process_executors_equal_no_executor(executor, expected, subject):
    seen = []
    with executor() as pool:
        table = sweep(subject, make_items(8), INTERVENTIONS, executor=pool, progress=lambda *done: seen.append(done))
    assert_same(table, expected)
    assert seen == [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_a_pool_of_processes_equals_no_executor(tmp_path, expected):
    with ProcessExecutor(1, threads=1) as pool:
        table = sweep(TinySubject(str(tmp_path / "log")), make_items(8), INTERVENTIONS, executor=pool, store=tmp_path / "store")
    assert_same(table, expected)
    assert len(list((tmp_path / "store").glob("*.parquet"))) == 4
    # One subject for four blocks.
    assert len((tmp_path / "log").read_text().split()) == 1


def test_the_death_of_a_worker_costs_no_task(tmp_path):
    with ProcessExecutor(1) as pool:
        futures = [pool.submit(answer, 0), pool.submit(die_once, str(tmp_path / "marker"), 1), pool.submit(answer, 2)]
        assert [future.result() for future in futures] == [0, 1, 2]
        with pytest.raises(ValueError, match="the task itself is wrong"):
            pool.submit(fail).result()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(answer, 0)


def test_a_task_that_ends_every_worker_is_given_up():
    with ProcessExecutor(1, retries=1) as pool, pytest.raises(RuntimeError, match="2 workers died over one task"):
        pool.submit(die).result()


def test_queued_tasks_can_be_cancelled():
    pool = ProcessExecutor(1)
    futures = [pool.submit(answer, number) for number in range(20)]
    pool.shutdown(cancel_futures=True)
    assert any(future.cancelled() for future in futures)
    assert all(future.cancelled() or future.result() == number for number, future in enumerate(futures))


def test_a_subject_in_memory_cannot_go_to_other_processes(subject):
    with ProcessExecutor(1) as pool, pytest.raises(ValueError, match="give sweep the checkpoint's path"):
        sweep(subject, make_items(2), INTERVENTIONS, executor=pool)


@pytest.mark.parametrize("kind", [ProcessExecutor, RayExecutor])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_workers": 0}, "max_workers must be 1 or more, got 0"),
        ({"max_workers": -1}, "max_workers must be 1 or more, got -1"),
        ({"max_workers": 1.5}, "max_workers must be an integer, got 1.5"),
        ({"max_workers": "2"}, "max_workers must be an integer, got '2'"),
        ({"retries": -1}, "retries must be 0 or more, got -1"),
    ],
)
def test_an_executor_has_workers(kind, arguments, words):
    with pytest.raises(ValueError, match=words):
        kind(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ProcessExecutor(threads=0), ValueError, "threads must be 1 or more, got 0"),
        (lambda: RayExecutor(cpus="a"), ValueError, "cpus must be a number, 0 or more, got 'a'"),
        (lambda: RayExecutor(gpus=-1), ValueError, "gpus must be a number, 0 or more, got -1"),
        (lambda: RayExecutor(init="auto"), TypeError, "init must be a dict of ray.init's arguments"),
    ],
)
def test_settings_of_an_executor(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_what_cannot_travel_to_a_worker_is_named_before_one_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(ProcessExecutor, "_hire", lambda self: pytest.fail("a worker was started"))
    source = TinySubject(str(tmp_path / "log"))
    with ProcessExecutor(1) as pool:
        with pytest.raises(ValueError, match=r"groups \(.*<lambda>\) cannot be sent to another process: name a function at the top level"):
            sweep(source, make_items(2), INTERVENTIONS, executor=pool, groups=lambda item, prompt: {})
        with pytest.raises(ValueError, match=r"the subject's source \(.*<lambda>\) cannot be sent to another process"):
            sweep(lambda: source(), make_items(2), INTERVENTIONS, executor=pool)


def test_a_worker_starts_without_torch():
    code = "import sys, vlm_core.sweeps.executors; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(vlm_core.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_subject_is_opened_once_per_process(tmp_path):
    first, again = (TinySubject(str(tmp_path / "log")) for _ in range(2))
    assert open_subject(first) is open_subject(again)
    assert open_subject(functools.partial(first)) is open_subject(functools.partial(again))


def test_a_ray_cluster_equals_no_executor_though_a_worker_dies(tmp_path, expected):
    ray = pytest.importorskip("ray")
    source, groups = TinySubject(str(tmp_path / "log")), DiesAt("item-3", str(tmp_path / "marker"))
    try:
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        with RayExecutor(2, init={"num_cpus": 2, **quiet}) as cluster:
            table = sweep(source, make_items(8), INTERVENTIONS, executor=cluster, store=tmp_path / "store", groups=groups)
            with pytest.raises(ValueError, match="the task itself is wrong"):
                cluster.submit(fail).result()
        left = RayExecutor(1)
        ray.shutdown()
        with pytest.raises(RuntimeError, match="Ray was shut down while tasks were left"):
            left.submit(answer, 0).result()
    finally:
        ray.shutdown()
    assert not ray.is_initialized()
    assert_same(table, expected)
    assert (tmp_path / "marker").exists()
    assert len(list((tmp_path / "store").glob("*.parquet"))) == 4
    # Two workers and one in place of the dead; each loads the subject once.
    loaded = (tmp_path / "log").read_text().split()
    assert len(loaded) == len(set(loaded)) == 3


def test_workers_keep_to_their_threads_where_the_main_module_has_imported_torch(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import torch\n"
        "from vlm_core import ProcessExecutor\n"
        "if __name__ == '__main__':\n"
        "    with ProcessExecutor(1, threads=3) as pool:\n"
        "        print(pool.submit(torch.get_num_threads).result())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vlm_core.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
