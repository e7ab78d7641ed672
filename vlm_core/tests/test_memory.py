"""Freed memory stays in the process."""

import subprocess
import sys

import pytest

CODE = """
import platform, resource, sys, torch
from vlm_core.memory import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
for _ in range(100):  # until every place an aligned block can start at has been visited
    torch.empty(2**24).fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(2**24).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_blocks_are_not_faulted_in_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True).stdout)
        for keep in (True, False)
    )
    assert kept < given_back / 4
