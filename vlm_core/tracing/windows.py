"""Attention edges cut in windows of layers: which way, and how deep, the answer's information goes.

``depth_windows(n_layers)``          the published windows of 32 layers, scaled to a depth
``knock_out_windows(subject, ...)``   what cutting every edge in every window costs, item by item
``EDGES``                            the edges
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_core.interventions import KnockOut
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import Masks, token_places

__all__ = ["EDGES", "PUBLISHED", "WindowLosses", "depth_windows", "knock_out_windows"]

PUBLISHED = {"early": (1, 10), "early to middle": (5, 14), "middle": (11, 20), "middle to late": (15, 24), "late": (21, 31)}
"""Windows of 32 layers, counted from 0, first and last layer (Neo et al. 2025)."""

EDGES = {
    "object → last": ("last", "object"),
    "background → last": ("last", "background"),
    "image → last": ("last", "image"),
    "image → question": ("asking", "image"),
    "question → last": ("last", "asking"),
}
"""Name: queries, keys. ``question`` is all text between the image and the last token, the chat template's included."""


@dataclass(frozen=True, eq=False)
class WindowLosses:
    """What cutting edges costs.

    Attributes
    ----------
    items, clusters, tasks : tuple of str
    edges : tuple of str
    windows : dict of str to tuple of int
        Layers of each window.
    n_layers : int
        Of the model.
    full : dict of str to ndarray ``[item]``
        By metric (``correct``, ``margin``): nothing cut.
    cut : dict of str to ndarray ``[item, edge, window]``
    blind : dict of str to ndarray ``[item]``
        All edges from the image to later text cut in all layers: what is left without sight.
    """

    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]
    edges: tuple[str, ...]
    windows: dict[str, tuple[int, ...]]
    n_layers: int
    full: dict[str, np.ndarray]
    cut: dict[str, np.ndarray]
    blind: dict[str, np.ndarray]

    def loss(self, metric: str = "correct") -> np.ndarray:
        """What is lost, ``[item, edge, window]``: shares right, or nats of the margin."""
        return self.full[metric][:, None, None] - self.cut[metric]

    def worst(self, metric: str = "correct", by: str = "margin") -> tuple[str, str]:
        """The edge and window that cost most on average; of several alike, the one that costs most of ``by``."""
        first, second = (self.loss(name).mean(0) for name in (metric, by))
        edge, window = max(np.ndindex(first.shape), key=lambda cell: (round(first[cell], 12), second[cell]))
        return self.edges[edge], list(self.windows)[window]

    def at(self, edge: str, window: str, metric: str = "correct") -> np.ndarray:
        """What one cell costs, ``[item]``."""
        return self.loss(metric)[:, self.edges.index(edge), list(self.windows).index(window)]

    def runner_up(self, edge: str, window: str, metric: str = "correct", by: str = "margin") -> str:
        """The other window in which an edge costs most on average; of several alike, the one that costs most of ``by``.

        Raises
        ------
        ValueError
            Where there is no other window.
        """
        others = [name for name in self.windows if name != window]
        if not others:
            raise ValueError(f"{self.n_layers} layers have one window only ({window}): there is no other to compare it with")
        return max(others, key=lambda name: (round(self.at(edge, name, metric).mean(), 12), self.at(edge, name, by).mean()))


def depth_windows(n_layers: int, published: Mapping[str, tuple[int, int]] = PUBLISHED, of: int = 32) -> dict[str, tuple[int, ...]]:
    """Windows of ``of`` layers at the same depth of ``n_layers``; each holds at least one layer, and those that coincide are left out.

    Raises
    ------
    ValueError
        For a window outside the ``of`` layers, or a model without layers.
    """
    if n_layers < 1:
        raise ValueError(f"windows need a model of at least one layer, not {n_layers}")
    found: dict[str, tuple[int, ...]] = {}
    for name, (first, last) in published.items():
        if not 0 <= first <= last < of:
            raise ValueError(f"window '{name}' is layers {first} to {last}, outside {of} layers counted from 0")
        start = min(round(first * n_layers / of), n_layers - 1)
        layers = tuple(range(start, max(start + 1, round((last + 1) * n_layers / of))))
        if layers not in found.values():
            found[name] = layers
    return found


def knock_out_windows(
    subject: Subject,
    items: Sequence,
    masks: Masks,
    *,
    windows: Mapping[str, Sequence[int]] | None = None,
    edges: Mapping[str, tuple[str, str]] = EDGES,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> WindowLosses:
    """Cut every edge in every window of layers.

    Parameters
    ----------
    masks : callable or mapping
        The object in each item's image.
    windows : mapping of str to layers, optional
        Default: ``depth_windows`` of the model.
    edges : mapping of str to (queries, keys)
        Token groups of every prompt or of ``vlm_core.tracing.places.PLACES``.
    store, progress
        See ``vlm_core.sweep``.

    Returns
    -------
    WindowLosses

    References
    ----------
    Neo et al., ICLR 2025, arXiv:2410.07149 (windows, object → last, image → last through the question); Zhang et al., CVPR 2025,
    arXiv:2411.18620 (cross-modal flow: image → question, question → last, image → last). Scaling windows to the depth is ours.
    """
    windows = depth_windows(subject.anatomy.n_layers) if windows is None else {name: tuple(layers) for name, layers in windows.items()}
    cells = {f"{edge}, {window}": KnockOut(*edges[edge], layers) for edge in edges for window, layers in windows.items()}
    rows = {"nothing cut": None, **cells, "blind": KnockOut("question", "image", range(subject.anatomy.n_layers))}
    metrics = ("correct", "margin")
    table = sweep(subject, items, rows, metrics=metrics, groups=token_places(subject, items, masks), store=store, progress=progress)
    tables = {metric: wide(table, metric) for metric in metrics}
    shape = (-1, len(edges), len(windows))
    about = tables["correct"]
    return WindowLosses(
        tuple(about.index),
        tuple(about["cluster"]),
        tuple(about["task"]),
        tuple(edges),
        dict(windows),
        subject.anatomy.n_layers,
        {metric: found["nothing cut"].to_numpy() for metric, found in tables.items()},
        {metric: found[list(cells)].to_numpy().reshape(shape) for metric, found in tables.items()},
        {metric: found["blind"].to_numpy() for metric, found in tables.items()},
    )
