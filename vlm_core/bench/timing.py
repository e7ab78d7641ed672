"""Paired, interleaved timing: in every round each contestant works once, on the same prompt, in an order drawn anew.

``interleave(contestants, rounds)``       seconds per unit of work, one figure a round
``in_pairs(contestant, against, ...)``    two of them side by side, until the median of their ratios is known well enough
``compare(numerator, denominator)``       the rounds' ratios: median with spread
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np
import torch
from scipy.stats import binom

__all__ = ["CLOCKS", "Ratio", "compare", "in_pairs", "interleave"]

CLOCKS = {"wall": perf_counter, "cpu": process_time}
BLOCK = 10  # rounds between two looks at how well a median is known


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, their quartiles, and how far the ends of the median's 95 % interval are from it at most."""

    median: float
    low: float
    high: float
    within: float


def interleave(
    contestants: Mapping[str, Callable[[int], int]],
    rounds: int,
    clock: str = "wall",
    device: torch.device | str = "cpu",
    seed: int = 0,
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
    seed : int
        Of their order.

    Returns
    -------
    dict of name to list of seconds per unit, ``[round]``
    """
    names, now = list(contestants), CLOCKS[clock]
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(seed)
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


def in_pairs(
    contestant: Callable[[int], int],
    against: Callable[[int], int],
    rounds: int,
    within: float,
    clock: str = "wall",
    device: torch.device | str = "cpu",
    before: Callable[[range], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Time two contestants next to each other until the median of their ratios is known to ``within``.

    How many rounds that takes depends on how unsteady the machine is, not on who is faster. Looking again and again makes the 95 % of
    the interval nominal: in simulations 91 to 98 %.

    Parameters
    ----------
    rounds : int
        No more than these.
    within : float
        Half the width of the median's 95 % interval that is precise enough.
    before : callable, optional
        Told the numbers of the next rounds before they are timed.

    Returns
    -------
    seconds of the contestant, seconds of the other: lists, ``[round]``
    """
    ours: list[float] = []
    theirs: list[float] = []
    while len(ours) < rounds and not (ours and compare(ours, theirs).within <= within):
        done = len(ours)
        numbers = range(done, min(done + BLOCK, rounds))
        if before is not None:
            before(numbers)
        block = interleave(
            {"ours": lambda number, done=done: contestant(done + number), "theirs": lambda number, done=done: against(done + number)},
            len(numbers),
            clock,
            device,
            seed=done,
        )
        ours += block["ours"]
        theirs += block["theirs"]
    return ours, theirs


def compare(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Ratios round by round: what a slow moment of the machine does to one, it does to the other.

    The median's interval is that of the sign test (two order statistics, no assumption on the ratios' distribution); fewer than six rounds
    have none, and are within infinity.
    """
    ratios = np.sort(np.asarray(numerator) / np.asarray(denominator))
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    rank = int(binom.ppf(0.025, len(ratios), 0.5))
    within = max(median - ratios[rank - 1], ratios[-rank] - median) if rank else np.inf
    return Ratio(float(median), float(low), float(high), float(within))
