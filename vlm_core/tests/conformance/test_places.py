"""Where image tokens lie: in the sequence, and on the image. Here the families' real processors make the prompts."""

from __future__ import annotations

import transformers

from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.family_models import TINY
from vlm_core.tests.layout_oracle import QUERIES, boxes_hold, no_place, spans_hold

PROCESSOR_OF = {name: {"blip2_opt": "blip-2", "instructblip_opt": "instructblip"}.get(name, name) for name in TINY}
"""Names in ``family_processors``."""

SINCE = (5, 23)
"""The transformers that the package asks for: processors of earlier ones cut images by other rules."""


def earlier(name: str) -> str | None:
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= SINCE:
        return None
    return "places are read off processors as they are from transformers {}.{} on, which the package asks for".format(*SINCE)


@conforms("spans", unavailable=earlier)
def test_spans(name):
    spans_hold(PROCESSOR_OF[name])


@conforms("boxes", unavailable=earlier)
def test_boxes(name):
    """On an image tower whose tokens see only their own pixels."""
    if PROCESSOR_OF[name] in QUERIES:
        return f"no: {no_place(PROCESSOR_OF[name])}"
    boxes_hold(PROCESSOR_OF[name])
