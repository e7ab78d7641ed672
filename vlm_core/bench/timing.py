"""Paired, interleaved timing: in every round each contestant works once, on the same prompt, in an order drawn anew.

``interleave(contestants, rounds)``   seconds per unit of work, one figure a round
``compare(numerator, denominator)``   the rounds' ratios: median with spread
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np
import torch

__all__ = ["CLOCKS", "Ratio", "compare", "interleave"]

CLOCKS = {"wall": perf_counter, "cpu": process_time}


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float


def interleave(
    contestants: Mapping[str, Callable[[int], int]], rounds: int, clock: str = "wall", device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time every contestant in every round.

    What runs before leaves the processor's caches to what runs after, so that no contestant always follows the same one.

    Parameters
    ----------
    contestants : mapping of name to function
        Called with the number of the round; gives back how many units of work it did.
    clock : {"wall", "cpu"}
        ``cpu`` counts the processor time of this process: with one thread it leaves out what other programs take.
    device : torch.device or str
        Where they work: a GPU is waited for before the clock is read.

    Returns
    -------
    dict of name to list of seconds per unit, ``[round]``
    """
    names, now = list(contestants), CLOCKS[clock]
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    # What is there now stays: the collector looks at what the contestants leave behind, between rounds.
    gc.freeze()
    try:
        for number in range(rounds):
            for name in order.permutation(names):
                wait()
                start = now()
                units = contestants[name](number)
                wait()
                seconds[name].append((now() - start) / units)
            gc.collect()
    finally:
        gc.unfreeze()
    return seconds


def compare(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratios round by round: what a slow moment of the machine does to one, it does to the other."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))
