"""Settings that policies reading the vision tower have in common.

``share(...)``          a share above 0 and at most 1
``last_layers(...)``    a layer of the tower whose keys are kept
"""

from __future__ import annotations

from vlm_core.interventions.numeric import integer, real
from vlm_core.interventions.policy import KEYED

__all__ = ["last_layers", "share"]


def share(value, name: str) -> float:
    """A share above 0 and at most 1.

    Raises
    ------
    ValueError
    """
    found = real(value, name)
    if not 0 < found <= 1:
        raise ValueError(f"{name} must be a share above 0 and at most 1, got {found:g}")
    return found


def last_layers(value) -> int:
    """A layer of the vision tower counted from its end, one of those whose keys are kept.

    Raises
    ------
    ValueError
    """
    found = integer(value, "layer")
    if not -KEYED <= found < 0:
        known = ", ".join(map(str, range(-1, -KEYED - 1, -1)))
        raise ValueError(f"layer must be one of {known}, counted from the tower's end, got {found}: keys of others are not kept")
    return found
