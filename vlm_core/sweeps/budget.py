"""How much runs at once: rows per batch from a memory budget, halved when memory runs out.

``Budget``             tokens in flight, and how many rows that is
``in_batches(...)``    run rows batch by batch; a batch that does not fit runs as two halves
``free_bytes(...)``    memory that a device has left
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlm_core.errors import SubjectError
from vlm_core.memory import free_memory
from vlm_core.subjects.subject import Subject

__all__ = ["NOTHING_FITS", "Budget", "free_bytes", "in_batches", "out_of_memory"]

# On a CPU a batch is fastest while a layer's activations stay in the caches, yet has enough tokens for a matrix product to pay.
_CACHE_BYTES = 12 * 2**20
_FEWEST_TOKENS, _MOST_TOKENS = 192, 2**16
_SHARE_IN_FLIGHT, _SHARE_STORED = 0.25, 0.25

NOTHING_FITS = "a single row does not fit into the device's memory: use a smaller dtype, shorter prompts, or device_map='auto'"


@dataclass(frozen=True)
class Budget:
    """What a batch may take.

    Parameters
    ----------
    tokens : int
        Tokens in flight with which a batch is fastest.
    most : int
        Tokens in flight that memory allows.
    stored : int
        Bytes of recorded trunks held at a time.
    rows : int, optional
        Rows per batch whatever their length, where the caller has said so.
    """

    tokens: int
    most: int
    stored: int
    rows: int | None = None

    @classmethod
    def of(cls, subject: Subject, rows: int | None = None, cached: bool = False) -> Budget:
        """The budget of a subject where it is: a CPU's caches and memory, or what a GPU has left.

        Parameters
        ----------
        rows : int, optional
            Rows per batch whatever their length.
        cached : bool
            Whether keys and values of every layer are kept with each token, as ``generate`` does.
        """
        anatomy, text = subject.anatomy, subject.model.config.get_text_config()
        weight = anatomy.embedding.weight
        inner = getattr(text, "intermediate_size", None) or 4 * anatomy.hidden_size
        per_token = (12 * anatomy.hidden_size + 4 * inner) * weight.element_size()
        if cached:
            per_token += 2 * anatomy.n_layers * anatomy.n_kv_heads * anatomy.head_dim * weight.element_size()
        on_gpu = subject.device.type == "cuda"
        free = free_bytes(subject.device)
        most = max(_FEWEST_TOKENS, int(free * _SHARE_IN_FLIGHT / per_token))
        tokens = min(_MOST_TOKENS, most) if on_gpu else max(_FEWEST_TOKENS, _CACHE_BYTES // per_token)
        return cls(tokens, most, int(free * _SHARE_STORED), rows)

    def batch(self, n_tokens: int) -> int:
        """Rows of ``n_tokens`` tokens per batch."""
        return self.rows if self.rows is not None else max(1, self.tokens // max(1, n_tokens))

    def whole(self, n_tokens: int, usual: int) -> int:
        """Rows per batch of whole prompts: ``usual``, where memory allows it (they share a trunk, so more is less work)."""
        return self.rows if self.rows is not None else max(1, min(usual, self.most // max(1, n_tokens)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free where ``device`` computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    # The CPU's allocator has no error type of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_batches(rows: Sequence, size: int, run: Callable[[Sequence], None]) -> int:
    """Call ``run`` on batches of at most ``size`` rows, halving the size whenever memory runs out.

    Returns
    -------
    int
        The size that was found to fit.

    Raises
    ------
    SubjectError
        Where a single row does not fit.
    """
    start = 0
    while start < len(rows):
        try:
            run(rows[start : start + size])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            taken = min(size, len(rows) - start)
            if taken == 1:
                raise SubjectError(NOTHING_FITS) from error
            size = taken // 2
        else:
            start += size
            continue
        # Outside the handler: the error's traceback holds the tensors of the failed batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return size
