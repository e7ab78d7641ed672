"""Processes that train one student together: what only the first of them does, and how the others learn of it.

``Processes.joined()``   the processes that a launcher (``accelerate launch``, ``torchrun``) started, or this one alone
``together.first(work)`` what ``work()`` gives in the first process, in all of them

Launchers tell a process how many there are by ``WORLD_SIZE``. Where no GPU is used they talk over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

__all__ = ["Processes"]

T = TypeVar("T")
WAITING = timedelta(days=30)
"""How long the others wait for the first: a large teacher answers for days."""


class Processes:
    """This process among those that work on the same thing.

    Attributes
    ----------
    index, count : int
    """

    def __init__(self, index: int = 0, count: int = 1, group: Any = None) -> None:
        self.index, self.count, self._group = index, count, group

    @classmethod
    def joined(cls) -> Processes:
        """The processes that a launcher started; this one alone where none did.

        Raises
        ------
        ValueError
            Where ``accelerate launch --cpu`` was asked for several and, without MPI, started one.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
                raise ValueError(
                    "accelerate launch --cpu starts a single process without MPI, whatever --num_processes says: start several with "
                    "'accelerate launch --multi_gpu --num_processes N -m vlm_core.distill ...', which needs no GPU, or with torchrun"
                )
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu())
        return cls(state.process_index, state.num_processes, torch.distributed.new_group(backend="gloo", timeout=WAITING))

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.index == 0

    def first(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives in the first process, in all of them, after it is done; an error of it is raised in all.

        Parameters
        ----------
        work : callable
            Its result (or exception) must be picklable.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:  # the others must not wait for what never comes
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def leave(self) -> None:
        """Part from the others, at the end."""
        if self.count > 1:
            torch.distributed.destroy_process_group()


def on_cpu() -> bool:
    """Whether training runs on the CPU: there is no GPU, or the launcher said so."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
