"""Numbers and truth values of declarations: what they say they are, or refused in one sentence.

``integer(...)``         an int or a NumPy integer as an int
``integers(...)``        one or several of them as a tuple, in their order
``real(...)``            a finite number as a float
``boolean(...)``         a bool or a NumPy bool as a bool
``shown(...)``           a number as short as it can be without rounding
``require_finite(...)``  refuse a tensor with NaN or infinity
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real

import numpy as np
import torch

__all__ = ["boolean", "integer", "integers", "real", "require_finite", "shown"]


def _is_truth(value) -> bool:
    return isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)


def integer(value, name: str, least: int | None = None) -> int:
    """A whole number as an ``int``.

    Parameters
    ----------
    name : str
        What the error calls it.
    least : int, optional
        The smallest that will do.

    Raises
    ------
    ValueError
        For anything else: a bool, a float (whole or not), a string; or a number below ``least``.
    """
    try:
        if _is_truth(value):
            raise TypeError
        found = operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an integer, got {value!r} ({type(value).__name__}): pass a whole number as int") from None
    if least is not None and found < least:
        raise ValueError(f"{name} must be {least} or more, got {found}")
    return found


def integers(values: int | Iterable[int], name: str, one: str) -> tuple[int, ...]:
    """One whole number or several as a tuple, in the order given; each is called ``one`` where it is refused."""
    if hasattr(values, "__index__") and not getattr(values, "ndim", 0):
        return (integer(values, one),)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be one integer or several, got {values!r}: pass a tuple of ints")
    return tuple(integer(value, one) for value in values)


def real(value, name: str) -> float:
    """A finite number as a ``float``.

    Raises
    ------
    ValueError
        For NaN, infinity, a bool, or what is no number.
    """
    scalar = isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0 and not _is_truth(value)
    if _is_truth(value) or not (scalar or isinstance(value, Real)):
        raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__}): pass an int or a float")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {float(value)}: look for what made it so where it was computed")
    return float(value)


def boolean(value, name: str) -> bool:
    """A truth value as a ``bool``.

    Raises
    ------
    ValueError
        For anything else, however true: a number, a string, None.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r} ({type(value).__name__}): pass a bool")
    return bool(value)


def shown(number: float) -> str:
    """A number as short as it can be without rounding: two different numbers never look alike."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def require_finite(tensor: torch.Tensor, name: str, shape: tuple[str, ...] | None = None) -> None:
    """Refuse what is no tensor, has other axes than ``shape`` names, or holds NaN or infinity."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}: pass torch.as_tensor(...) of it")
    if shape is not None and tensor.ndim != len(shape):
        raise ValueError(f"{name} must be [{', '.join(shape)}], got a tensor of shape {tuple(tensor.shape)}: bring it to that form")
    if not bool(torch.isfinite(tensor).all()):
        n = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {n} of {tensor.numel()} numbers: recompute it in a wider dtype")
