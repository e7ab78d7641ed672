"""Counts what models compute while a suite runs: which part asks for it, on which tokens, and what its amount follows.

``Counting(subject)``   a context manager; what it has counted is a list of `Work`
``Work``                operations of one kind
``driver_of(...)``      what the number of a sweep's rows follows

Every linear map that is called counts, as two operations a weight and token; going back through it twice more where its weights train, once
more where they do not. A forward hook on all modules is what counts: runs take longer, results do not change.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions import Row, parts
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps import recorded, sweep
from vlm_core.sweeps.features import prompts_of

__all__ = ["Counting", "Work", "driver_of"]

DRIVERS = ("fixed", "layers", "heads", "tokens")
_MOST = 0.75


@dataclass(frozen=True)
class Work:
    """Operations of one kind.

    Parameters
    ----------
    part : str
        Who asked: a hypothesis.
    model : {"subject", "other"}
        The subject under test, or a model whose size does not follow from it (a student).
    kind : {"layers", "image", "head"}
        Decoder layers; vision tower and what follows it; the unembedding.
    tokens : {"whole", "tail", "one"}
        Prompts with their image; what follows the image alone; single generated tokens.
    driver : {"fixed", "layers", "heads", "tokens"}
        What the number of rows follows.
    training : bool
    flops : float
    """

    part: str
    model: str
    kind: str
    tokens: str
    driver: str
    training: bool
    flops: float


def driver_of(table: Mapping[str, Row], anatomy: Anatomy, n_image: int) -> dict[str, str]:
    """What the number of rows of each intervention in a sweep's table follows, by label.

    Rows that touch one head each, of (nearly) every head, are as many as heads; rows at one layer each, of nearly every layer, as many as
    layers; rows that leave out one token each, of nearly every visual token, as many as those. All others are as many as the suite chose.
    """
    found = {}
    for label, row in table.items():
        own = list(parts(row))
        heads = {tuple(head) for one in own for head in getattr(one, "heads", ()) if not isinstance(head, int)}
        layers = {layer for one in own for layer in _layers(one)}
        tokens = {position for one in own if isinstance(getattr(one, "tokens", None), tuple) for position in one.tokens}
        kind = "heads" if len(heads) == 1 else "tokens" if len(tokens) == 1 else "layers" if len(layers) == 1 else "fixed"
        found[label] = kind, next(iter({"heads": heads, "tokens": tokens, "layers": layers}.get(kind, ())), None)
    covered = {kind: len({which for one, which in found.values() if one == kind}) for kind in DRIVERS}
    whole = {"heads": len(anatomy.heads), "tokens": n_image, "layers": anatomy.n_layers - 1}
    follows = {kind: covered[kind] > 1 and covered[kind] >= _MOST * most for kind, most in whole.items()}
    return {label: kind if follows.get(kind) else "fixed" for label, (kind, _) in found.items()}


def _layers(part: Any) -> tuple[int, ...]:
    if getattr(part, "layer", None) is not None:
        return (part.layer,)
    return tuple(getattr(part, "layers", ()) or ())


class Counting:
    """Counts in its context, in the thread that entered it.

    Parameters
    ----------
    is_subject : callable
        Whether a ``Subject`` is the one under test.

    Attributes
    ----------
    part : str
        Whose work is counted next.
    """

    def __init__(self, is_subject: Any) -> None:
        self.part = "other"
        self.uncounted = 0.0
        self._is_subject = is_subject
        self._known: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()
        self._counts: Counter = Counter()
        self._drivers: dict[str, float] = {"fixed": 1.0}
        self._tail = False
        self._thread = threading.get_ident()
        self._stack = ExitStack()

    @property
    def work(self) -> list[Work]:
        """What was counted so far."""
        return [Work(*key, flops) for key, flops in sorted(self._counts.items())]

    def __enter__(self) -> Counting:
        # Where they are looked up: what calls them is not to know.
        original = Subject.__init__

        @functools.wraps(original)
        def made(subject: Subject, *args, **kwargs) -> None:
            original(subject, *args, **kwargs)
            self.know(subject)

        self._replace(Subject, "__init__", made)
        self._replace(sweep, "_measure", self._driven(sweep._measure))
        self._replace(recorded, "forward_shared", self._on_tails(recorded.forward_shared))
        self._stack.callback(register_module_forward_hook(self._count).remove)
        return self

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def __exit__(self, *error) -> None:
        self._stack.close()

    def know(self, subject: Subject) -> None:
        """Say which map of a subject belongs where."""
        anatomy, model = subject.anatomy, "subject" if self._is_subject(subject) else "other"
        decoder = {id(one) for one in anatomy.language_model.modules()}
        for one in subject.model.modules():
            if hasattr(one, "weight"):
                kind = "head" if one is anatomy.head else "layers" if id(one) in decoder else "image"
                self._known[one] = model, kind

    def _driven(self, measure):
        @functools.wraps(measure)
        def wrapped(subject: Subject, block, prompts=None):
            n_image = max(int(prompt.image.sum()) for prompt in (prompts or prompts_of(subject, block.items)))
            drivers = driver_of(block.plan.table, subject.anatomy, n_image)
            rows = Counter(drivers[label] for _, label in block.rows)
            before, self._drivers = self._drivers, {driver: n / rows.total() for driver, n in rows.items()}
            try:
                return measure(subject, block, prompts)
            finally:
                self._drivers = before

        return wrapped

    def _on_tails(self, forward):
        @functools.wraps(forward)
        def wrapped(*args, **kwargs):
            with self._in_tails():
                return forward(*args, **kwargs)

        return wrapped

    @contextmanager
    def _in_tails(self):
        self._tail = True
        try:
            yield
        finally:
            self._tail = False

    def _count(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or threading.get_ident() != self._thread or not output.numel():
            return
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1 if output.ndim > 3 else 0]
        n = output.numel() // channels
        training = torch.is_grad_enabled() and output.requires_grad
        flops = 2.0 * n * module.weight.numel() * ((3 if module.weight.requires_grad else 2) if training else 1)
        if module not in self._known:
            self.uncounted += flops
            return
        model, kind = self._known[module]
        tokens = "tail" if self._tail else "one" if output.ndim == 3 and output.shape[1] == 1 else "whole"
        for driver, share in self._drivers.items():
            self._counts[self.part, model, kind, tokens, driver, training] += share * flops
