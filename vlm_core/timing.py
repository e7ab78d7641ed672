"""Seconds of work, measured side by side.

``seconds(work, device)``                     how long work takes, what a device still computes included
``paired(contestants, rounds, seed=...)``     every contestant once a round, in an order drawn anew, so that rounds can be compared
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from vlm_core.interventions.numeric import integer

__all__ = ["paired", "seconds"]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes, until ``device`` has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def paired(contestants: Mapping[str, Callable[[int], float]], rounds: int, seed: int = 0) -> pd.DataFrame:
    """Let every contestant work once a round, so that what slows the machine down for a while slows all of them.

    Parameters
    ----------
    contestants : mapping of name to function
        Called with the number of the round; gives what it took. Each is called once before the first round, since the first call of its
        kind makes what later ones find.
    rounds : int
    seed : int
        Of the order within rounds.

    Returns
    -------
    DataFrame
        ``round`` and a column a contestant.
    """
    integer(rounds, "rounds", least=1)
    rng = np.random.default_rng(seed)
    names = list(contestants)
    for work in contestants.values():
        work(0)
    table = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            table.append({"round": turn, **{str(name): contestants[name](turn) for name in rng.permutation(names)}})
    finally:
        if enabled:
            gc.enable()
    return pd.DataFrame(table)[["round", *names]]
