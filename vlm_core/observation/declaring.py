"""What declarations of observers share: plain values that hash, and numbers that are integers.

``freeze``, ``freeze_groups``, ``freeze_numbers``   lists from a file as tuples, one group's name as a group, layers as ints
``require_names``                                   refuse what is no token group's name
``require_layers``, ``require_groups``              refuse a layer that the model, a token group that the batch does not have
``require_images``, ``require_positions``           refuse a prompt without image tokens, or without a numbered token
``OnImage``                                         what observers of attention on image tokens refuse
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlm_core.interventions.numeric import integers
from vlm_core.seam.views import GROUPS, Tokens

__all__ = [
    "OnImage",
    "freeze",
    "freeze_groups",
    "freeze_numbers",
    "require_groups",
    "require_images",
    "require_layers",
    "require_names",
    "require_positions",
]


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


def require_names(observer: Any, *names: str) -> None:
    """Refuse a field that should name a token group and does not."""
    for name in names:
        value = getattr(observer, name)
        if not isinstance(value, str):
            raise ValueError(f"{name} of {type(observer).__name__} must be a token group's name, got {value!r} ({type(value).__name__})")


def require_groups(observer: Any, tokens: Tokens, *groups: str) -> None:
    """Refuse a token group that the batch does not know, and the queries of image tokens where a prompt has none."""
    for group in groups:
        if group not in GROUPS and group not in tokens.named:
            raise ValueError(f"{type(observer).__name__}: there is no token group '{group}', this batch knows {', '.join(tokens.known)}")
    if getattr(observer, "queries", None) == "image":
        require_images(observer, tokens)


class OnImage:
    """An observer of the attention of its ``queries`` on image tokens."""

    def require_there(self, anatomy: Any, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have, and a prompt without image tokens."""
        if tokens is not None:
            require_groups(self, tokens, self.queries)
            require_images(self, tokens)


def require_images(observer: Any, tokens: Tokens) -> None:
    """Refuse a batch with a prompt that has no image tokens."""
    without = (~tokens.group("image").any(1)).nonzero()[:, 0].tolist()
    if without:
        raise ValueError(
            f"{type(observer).__name__} is about image tokens and prompt {without[0]} of the batch has none: leave that prompt out, or "
            f"observe what text has too (AttentionMass, HiddenStates(positions='text'))"
        )


def require_positions(observer: Any, tokens: Tokens) -> None:
    """Refuse ``positions`` that a prompt of the batch does not have: a group, or numbers of tokens."""
    positions = observer.positions
    if isinstance(positions, str):
        group = positions.removesuffix(" tokens")
        require_groups(observer, tokens, group)
        if group == "image":
            require_images(observer, tokens)
        return
    for prompt, n in enumerate(tokens.valid.sum(1).tolist()):
        outside = [position for position in positions if not -n <= position < n]
        if outside:
            raise ValueError(
                f"{type(observer).__name__} names position {outside[0]}, prompt {prompt} of the batch has {n} tokens: positions lie outside "
                f"a sequence unless they are {-n} to {n - 1}"
            )


def require_layers(observer: Any, anatomy: Any) -> None:
    """Refuse a layer that the model does not have; layer ``n_layers`` is what enters the final norm."""
    n_layers = anatomy.n_layers
    outside = [layer for layer in observer.layers or () if not 0 <= layer <= n_layers]
    if outside:
        raise ValueError(
            f"{type(observer).__name__} names layer {outside[0]}: this model has {n_layers} layers, counted from 0, "
            f"and {n_layers} is what enters the final norm"
        )
