"""Freed memory stays in the process; what is free is what the process may take."""

import gc
import subprocess
import sys
import weakref

import psutil
import pytest
import torch

from vlm_core import memory
from vlm_core.memory import free_memory
from vlm_core.sweeps.budget import free_bytes

# One process imports everything once; those whose memory is looked at are its children.
CODE = """
import os, platform, resource, torch
from vlm_core.memory import keep_freed_memory
torch.set_num_threads(1)
BLOCK = 9 * 2**20  # numbers, 36 MiB: more than glibc ever keeps of its own accord
for keep in (True, False):
    if os.fork():
        os.wait()
        continue
    if keep:
        assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    for _ in range(100):  # until every place an aligned block can start at has been visited
        torch.empty(BLOCK).fill_(1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(BLOCK).fill_(1.0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_blocks_are_not_faulted_in_again():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < given_back / 4, done.stderr


MIB = 2**20
HOST = 64 * 1024 * MIB


def tree(root, files):
    """A machine's files under ``root``: numbers are MiB."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content * MIB}\n" if isinstance(content, int) else content)
    return root


def stat(name, size):
    return f"anon 5\n{name} {size * MIB}\nactive_file 7\n"


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
OWN = {V2 + "a/b/memory.max": 500, V2 + "a/b/memory.current": 400, V2 + "a/b/memory.stat": stat("inactive_file", 50)}
ABOVE = {V2 + "a/memory.max": 450, V2 + "a/memory.current": 420, V2 + "a/memory.stat": stat("inactive_file", 0)}
LIMITED = {V1 + "memory.limit_in_bytes": 300, V1 + "memory.usage_in_bytes": 100, V1 + "memory.stat": stat("total_inactive_file", 20)}
MACHINES = {
    "no control groups": ({}, HOST // MIB),
    "version 2": ({"proc/self/cgroup": "0::/a/b\n", **OWN}, 150),
    "version 2, no limit": ({"proc/self/cgroup": "0::/a/b\n", **OWN, V2 + "a/b/memory.max": "max\n"}, HOST // MIB),
    "version 2, a group above is narrower": ({"proc/self/cgroup": "0::/a/b\n", **OWN, **ABOVE}, 30),
    "version 2, used up": ({"proc/self/cgroup": "0::/a/b\n", **OWN, V2 + "a/b/memory.current": 600}, 0),
    "version 2, in a container": (
        {"proc/self/cgroup": "0::/\n", V2 + "memory.max": 200, V2 + "memory.current": 150, V2 + "memory.stat": stat("inactive_file", 0)}, 50
    ),
    "version 1": ({"proc/self/cgroup": "7:cpu,cpuacct:/x\n4:memory:/\n", **LIMITED}, 220),
    "version 1, in a container": ({"proc/self/cgroup": "4:memory:/docker/0123\n0::/docker/0123\n", **LIMITED}, 220),
    "version 1, no limit": ({"proc/self/cgroup": "4:memory:/\n", **LIMITED, V1 + "memory.limit_in_bytes": "9223372036854771712\n"}, HOST // MIB),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch, machine):
    files, expected = MACHINES[machine]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": HOST}))
    assert free_memory(tree(tmp_path, files)) == expected * MIB


def test_a_container_cannot_take_more_than_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * MIB}))
    assert free_memory(tree(tmp_path, MACHINES["version 2"][0])) == 100 * MIB


def test_a_cpu_budget_is_of_what_the_process_may_take(monkeypatch):
    monkeypatch.setattr(memory, "_left_to_groups", lambda root: [7 * MIB])
    assert free_bytes(torch.device("cpu")) == 7 * MIB


class Knot:
    """Garbage that only a search finds."""

    def __init__(self):
        self.itself = self


@pytest.mark.parametrize("enabled", [True, False])
def test_what_begins_to_be_in_there_is_never_searched(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with memory.lasting():
            assert not gc.isenabled()
            lasting = weakref.ref(Knot())
        passing = weakref.ref(Knot())
        assert gc.isenabled() is enabled
        gc.collect()
        assert lasting() is not None and passing() is None
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()


def test_searches_go_on_after_an_error():
    with pytest.raises(KeyError), memory.lasting():
        raise KeyError
    assert gc.isenabled()
    gc.unfreeze()
