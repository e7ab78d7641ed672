"""What was measured of a head in one sentence, by fixed rules: no number that was not measured, no more than its interval allows.

``describe_head``   the sentence of an entry of a head report
``shown_side``      on which side of 0 an interval says that a number lies, if on one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_head", "shown_side"]

ROUNDING = 1e-4
"""Bounds nearer to 0 than this (nats, or shares) may come from the order of a summation."""


def describe_head(entry: Mapping[str, Any]) -> str:
    """One sentence of what was measured of a head.

    An effect whose interval includes 0, or that has none, is no measurable effect; attention on the object is compared with even attention
    and called more or less only where the interval of the difference says so.

    Parameters
    ----------
    entry : mapping
        Of ``HeadReport.heads``. Every number in the sentence is one of its numbers, rounded.
    """
    said = f"Head {entry['name']} ({entry['category']}, in {_text(entry['confidence'])} of resamples): with its view of the image removed, "
    effects = entry["effect"]
    if any(shown_side(one) for one in effects.values()):
        said += f"{_lost('the margin of the answer', effects['margin'])}, and {_lost('accuracy', effects['accuracy'])}"
    else:
        margin, accuracy = (_between(effects[name]) for name in ("margin", "accuracy"))
        said += f"there is no measurable effect, neither on the margin of the answer (lost {margin}) nor on accuracy (lost {accuracy})"
    features = entry["features"]
    image = features["answer_to_image"]["value"]
    if image is None:
        return f"{said}; the token that answers sees no image tokens through it."
    said += f"; the token that answers puts {_text(image)} of its attention through it on the image"
    share, even, gain = (features.get(name, {"value": None}) for name in ("object_share", "even_share", "object_gain"))
    if share["value"] is None:
        return f"{said}."
    than = {1: "more than", -1: "less than", 0: "not measurably other than"}[shown_side(gain)]
    put = f"{than} what evenly spread attention would put there ({_text(even['value'])})"
    return f"{said}, {_text(share['value'])} of that on the asked object, {put}."


def shown_side(measured: Mapping[str, float | None]) -> int:
    """1 or -1 where the whole interval lies on that side of 0, by more than rounding; else 0, and where there is no interval."""
    lower, upper = measured["lower"], measured["upper"]
    if lower is None or upper is None:
        return 0
    return int(lower > ROUNDING) - int(upper < -ROUNDING)


def _lost(what: str, measured: Mapping[str, float | None]) -> str:
    side = shown_side(measured)
    if side == 0:
        return f"there is no measurable effect on {what} (lost {_between(measured)})"
    # a gain is a loss below 0: said with its own sign, its bounds turned round
    gained = {"value": -measured["value"], "lower": -measured["upper"], "upper": -measured["lower"]}
    return f"{what} falls by {_between(measured)}" if side > 0 else f"{what} rises by {_between(gained)}"


def _between(measured: Mapping[str, float | None]) -> str:
    """``1.20 [0.90, 1.50]``"""
    value, lower, upper = (measured[name] for name in ("value", "lower", "upper"))
    if value is None:
        return "not measured"
    return f"{_text(value)}, no interval" if lower is None or upper is None else f"{_text(value)} [{_text(lower)}, {_text(upper)}]"


def _text(value: float) -> str:
    """Two decimals, three below 0.1; never ``-0.00``."""
    text = f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.3f}"
    return text if text.strip("-0.") else text.lstrip("-")
