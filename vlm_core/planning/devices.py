"""How fast known devices are: peak of dense matrix products as their vendors state it, and memory.

``DEVICES``        by name
``UTILISATION``    the share of the peak that is assumed
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "UTILISATION", "Device"]

UTILISATION = 0.3
"""Assumed, not measured: what inference in batches of short prompts reaches on a GPU whose matrix products are large enough."""


@dataclass(frozen=True)
class Device:
    """Peak operations a second (dense, 16-bit) and memory in GiB."""

    name: str
    peak: float
    memory: int


DEVICES = {
    one.name: one
    for one in (
        Device("T4", 65e12, 15),
        Device("L4", 121e12, 22),
        Device("V100-32GB", 125e12, 32),
        Device("A100-40GB", 312e12, 40),
        Device("A100-80GB", 312e12, 80),
        Device("H100-80GB", 989e12, 80),
        Device("H200", 989e12, 141),
    )
}
