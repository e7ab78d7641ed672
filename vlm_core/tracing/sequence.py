"""The depth at which text and image arrive where the answer is read.

``arrivals(subject, items)``   what it costs to cut a source's edges from a layer on, item by item
``Arrivals``                   mean depths of arrival, and their difference
``ROUTES``                     the edges

What cutting edges from layer ``l`` on still costs is what has not arrived before ``l``: of what cutting them in all layers costs, it falls
from 1 to 0 over the layers like a survival function, and the area under it is the mean depth at which the information arrives. [ours]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_core.interventions import KnockOut, Row
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import token_places
from vlm_core.tracing.shares import pooled_shares

__all__ = ["ROUTES", "Arrivals", "arrivals"]

ROUTES = {
    "text": (("role", "last"), "asked"),
    "image": (("question",), "image"),
    "image, direct": (("role", "last"), "image"),
}
"""Name: groups that are cut off, and what from.

``text``: the role tokens and the last one from the question. ``image``: all text after it from the image: what the image tells cannot reach
the last token before it leaves the image's own, so this depth is the least that its arrival can have. ``image, direct``: the role tokens
and the last one alone from the image.
"""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """What cutting a source off from a layer on costs, in nats of the margin.

    Attributes
    ----------
    items, clusters, tasks : tuple of str
    n_layers : int
    lost : dict of str to ndarray ``[item, layer]``
        By route, cut from each layer on.
    lost_before : dict of str to ndarray ``[item, layer]``
        Cut up to each layer instead, that layer included.
    """

    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]
    n_layers: int
    lost: dict[str, np.ndarray]
    lost_before: dict[str, np.ndarray]

    def curve(self, route: str, weights: np.ndarray | None = None) -> np.ndarray:
        """Share that has not arrived before each layer, ``[draw, layer]``; 1 at the first."""
        weights = np.ones((1, len(set(self.clusters)))) if weights is None else weights
        return pooled_shares(self.lost[route], self.lost[route][:, 0], self.clusters)(weights)

    def depth(self, route: str) -> Callable[[np.ndarray], np.ndarray]:
        """Mean depth of arrival as a share of all layers, ``[draw, cluster] -> [draw]``: 0 in the first layer, 1 after the last."""
        return lambda weights: self.curve(route, weights)[:, 1:].sum(1) / self.n_layers

    def depth_before(self, route: str) -> Callable[[np.ndarray], np.ndarray]:
        """The same from cuts up to a layer: what they cost of the whole is what only arrives up to there."""
        whole = self.lost_before[route]
        shares = pooled_shares(whole, whole[:, -1], self.clusters)
        return lambda weights: (1 - shares(weights)[:, :-1]).sum(1) / self.n_layers

    def lag(self, of: str = "image", behind: str = "text", before: bool = False) -> Callable[[np.ndarray], np.ndarray]:
        """How much deeper one route's information arrives than another's, ``[draw, cluster] -> [draw]``."""
        depth = self.depth_before if before else self.depth
        later, earlier = depth(of), depth(behind)
        return lambda weights: later(weights) - earlier(weights)


def arrivals(
    subject: Subject,
    items: Sequence,
    *,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Arrivals:
    """Cut text and image off from where the answer is read, from every layer on and up to every layer.

    Parameters
    ----------
    items : sequence of items
        Their prompts end with tokens of the chat template (``vlm_core.tracing.places.template_lengths``); where they do not, the last token
        alone is cut off.
    store, progress
        See ``vlm_core.sweep``.

    Returns
    -------
    Arrivals

    Notes
    -----
    Cross-attention layers hold no text and the other layers of such a family no image: each route is cut in the layers that have it.

    References
    ----------
    The observation is Kim et al. 2025, arXiv:2509.17588; the measure is ours.
    """
    n_layers = subject.anatomy.n_layers
    rows: dict[str, Row] = {"nothing cut": None}
    for route in ROUTES:
        for layer in range(n_layers):
            rows[f"{route} from {layer}"] = _cut(subject, route, range(layer, n_layers))
            if layer < n_layers - 1:
                rows[f"{route} up to {layer}"] = _cut(subject, route, range(layer + 1))
    table = sweep(subject, items, rows, metrics=("margin",), groups=token_places(subject, items), store=store, progress=progress)
    found = wide(table, "margin")
    lost = {name: (found["nothing cut"] - found[name]).to_numpy() for name in rows if name != "nothing cut"}

    for route in ROUTES:
        lost[f"{route} up to {n_layers - 1}"] = lost[f"{route} from 0"]

    def stacked(what: str) -> dict[str, np.ndarray]:
        return {route: np.stack([lost[f"{route} {what} {layer}"] for layer in range(n_layers)], axis=1) for route in ROUTES}

    about = (tuple(found.index), tuple(found["cluster"]), tuple(found["task"]))
    return Arrivals(*about, n_layers, stacked("from"), stacked("up to"))


def _cut(subject: Subject, route: str, layers: range) -> tuple[KnockOut, ...] | None:
    (queries, keys), anatomy = ROUTES[route], subject.anatomy
    there = [layer for layer in layers if (layer in anatomy.image_layers if keys == "image" else layer not in anatomy.cross_layers)]
    return tuple(KnockOut(group, keys, tuple(there)) for group in queries) if there else None
