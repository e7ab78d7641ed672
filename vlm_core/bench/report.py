"""What the benchmark says: one row a comparison.

``Row``           a figure, its bar and whether it is met
``Report``        all rows with the machine, the versions and the settings
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Report", "Row", "machine"]

VERSIONS = ("torch", "transformers", "nnsight", "transformer-lens", "pyvene", "numpy")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Parameters
    ----------
    work, subject : str
        What was done, on which subject.
    by, against : str
        Whose time or memory it is, and whose it is compared with.
    figure : float or None
        Median over rounds; None where nothing was measured, and ``note`` says why.
    unit : str
        ``"x faster"``, ``"x the time"``, ``"of the memory"`` or ``"of the FLOP/s"``.
    low, high : float or None
        Spread over rounds.
    bar : float or None
        None where no bar was set for this comparison.
    at_least : bool
        Whether the bar is a least or a most.
    own, other : float or None
        Medians of the two sides, in ``measured_in``.
    difference : float or None
        Largest difference of the two results.
    note : str
        What else is to be known.
    """

    work: str
    subject: str
    by: str
    against: str
    figure: float | None = None
    unit: str = "x faster"
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    at_least: bool = True
    own: float | None = None
    other: float | None = None
    measured_in: str = "ms"
    difference: float | None = None
    rounds: int = 0
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar. What could not be measured is not met."""
        if self.bar is None:
            return None
        if self.figure is None:
            return False
        return self.figure >= self.bar if self.at_least else self.figure <= self.bar

    def as_json(self) -> dict:
        """The fields and ``met``, builtins only."""
        return {**asdict(self), "met": self.met}


def machine(threads: int, device: torch.device | str = "cpu") -> dict:
    """Processor, cores, threads, load and versions, and the GPU if one is measured on; builtins only."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0] if named else model
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "gpu": _gpu(torch.device(device)),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _gpu(device: torch.device) -> dict | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "gib": round(found.total_memory / 2**30), "cuda": torch.version.cuda}


@dataclass
class Report:
    """Rows of one run.

    Attributes
    ----------
    settings : dict
        Subjects, works, rounds, clock, seed, device and dtype.
    """

    machine: dict
    settings: dict
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(
            {
                "machine": self.machine,
                "settings": self.settings,
                "seconds": round(self.seconds, 1),
                "rows": [row.as_json() for row in self.rows],
            },
            indent=1,
        )
