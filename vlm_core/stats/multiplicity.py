"""Many claims at once.

``holm``
    family-wise adjusted p-values; false-discovery control of exploratory lists is
    ``scipy.stats.false_discovery_control``
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given.

    Rejecting where the adjusted value is below α keeps the chance of any false rejection in the family below α
    under every dependence between the tests.

    Parameters
    ----------
    p_values : [claim]
        One p-value per member of the family.

    Returns
    -------
    numpy.ndarray : [claim]

    References
    ----------
    Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6:65-70.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1:
        raise ValueError(f"holm needs a one-dimensional list of p-values, not shape {p.shape}")
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("holm needs p-values between 0 and 1: a missing one is no member of the family")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
