"""Peak memory by the allocator's own account.

``peak_bytes(work, device)``   most that tensors allocated while ``work`` runs hold at once

Resident memory is no measure of a few megabytes: the C library keeps freed blocks. PyTorch's CPU allocator reports every block that it
gives out and takes back to a profiler; the running total of a trace is exact and the same on every run. Of a GPU PyTorch keeps the account.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest total of the blocks allocated on ``device`` since the start of ``work``.

    Parameters
    ----------
    work : callable
    device : torch.device or str

    Raises
    ------
    RuntimeError
        Where this build of PyTorch reports no allocation.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    del kept
    if not events:
        raise RuntimeError("PyTorch's profiler reported no allocation: this build cannot account for memory")
    start = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - start
