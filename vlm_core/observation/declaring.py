"""What declarations of observers share: plain values that hash, and numbers that are integers.

``freeze``, ``freeze_groups``, ``freeze_numbers``   lists from a file as tuples, one group's name as a group, layers as ints
``require_layers``                                  refuse a layer that the model does not have
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlm_core.interventions.numeric import integers

__all__ = ["freeze", "freeze_groups", "freeze_numbers", "require_layers"]


def freeze(observer: Any, *names: str) -> None:
    # Lists (from a file) become tuples, so that declarations stay hashable.
    for name in names:
        value = getattr(observer, name)
        if isinstance(value, list | range):
            object.__setattr__(observer, name, tuple(value))


def freeze_groups(observer: Any, name: str) -> None:
    # A bare name is one group, not its letters.
    value = getattr(observer, name)
    groups = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not groups or not all(isinstance(one, str) for one in groups):
        raise ValueError(f"{name} of {type(observer).__name__} must be token groups by name, at least one, got {value!r}")
    object.__setattr__(observer, name, groups)


def freeze_numbers(observer: Any, *names: str) -> None:
    """Layers, heads or positions as tuples of ints; None and group names as they are."""
    for name in names:
        value = getattr(observer, name)
        if value is not None and not isinstance(value, str):
            what = f"{name} of {type(observer).__name__}"
            numbers = integers(value, what, f"each of {what}")
            if not numbers:
                raise ValueError(f"{what} must be at least one integer, got none: leave {name} out for the usual ones")
            object.__setattr__(observer, name, numbers)
        elif value is None and name == "positions":
            raise ValueError(f"positions of {type(observer).__name__} must be a token group or integers, got None")
        elif isinstance(value, str) and name != "positions":
            raise ValueError(f"{name} of {type(observer).__name__} must be integers, got {value!r}: pass a tuple of ints")


def require_layers(observer: Any, subject: Any) -> None:
    """Refuse a layer that the model does not have; layer ``n_layers`` is what enters the final norm."""
    n_layers = subject.anatomy.n_layers
    outside = [layer for layer in observer.layers or () if not 0 <= layer <= n_layers]
    if outside:
        raise ValueError(
            f"{type(observer).__name__} saw nothing of layer {outside[0]}: this model has {n_layers} layers, counted from 0, "
            f"and {n_layers} is what enters the final norm"
        )
