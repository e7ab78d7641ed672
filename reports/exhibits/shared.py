"""What several exhibits say alike: a mean with its interval, how many heads see the image."""

from __future__ import annotations

import numpy as np

from vlm_core.stats import interval


def mean_with_interval(values, clusters, seeds=None) -> dict:
    """``{value, lower, upper}``: accuracy over items (and seeds) and its 95 % interval over clusters (crossed with seeds).

    What an interval of few clusters claims beyond 0 and 1 is left out: no accuracy lies there.
    """
    found = interval(np.asarray(values, dtype=float), np.asarray(clusters), seeds=seeds, bounds=(0.0, 1.0))
    return {"value": found.estimate, "lower": max(0.0, found.lower), "upper": min(1.0, found.upper)}


def heads_seeing(values) -> str:
    """For the caption of a head map: how many heads see the image, where not all do. ``values``: NaN or None for those that do not."""
    values = np.asarray(values, dtype=float)
    seeing = int(np.isfinite(values).sum())
    return f" {seeing} of {values.size} heads see the image." if seeing < values.size else ""
