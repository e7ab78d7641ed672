"""Tasks for workers in other processes. Torch is imported only where a subject is made, so that a worker starts quickly."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


def answer(number: int) -> int:
    """Give back a number."""
    return number


def die() -> None:
    """End this process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(marker: str, number: int) -> int:
    """End the process that runs this first; give back a number in the next."""
    if not os.path.exists(marker):
        Path(marker).touch()
        die()
    return number


def fail() -> None:
    """Raise what a wrong task raises."""
    raise ValueError("the task itself is wrong")


@dataclass(frozen=True)
class TinySubject:
    """Makes a subject, and writes down that it did."""

    log: str

    def __call__(self):
        from vlm_core.tests.tiny import tiny_subject

        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return tiny_subject()


@dataclass(frozen=True)
class DiesAt:
    """Token groups of no name; the first process that asks for those of ``item`` ends in the middle of its block."""

    item: str
    marker: str

    def __call__(self, item, encoded):
        if item["id"] == self.item:
            die_once(self.marker, 0)
        return {"none": encoded.image & False}


def stay(folder, seconds):
    """Leave word of this process, and work on for some time."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)
