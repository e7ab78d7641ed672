"""Every benchmark by its name."""

from __future__ import annotations

from types import MappingProxyType

from .choice import MMSTAR, POPE, SCIENCEQA, VSTAR, WHATSUP
from .coco import COCO_HEAR, COCO_HI, COCO_NEO, COCO_NEO_LENS
from .documents import CHARTQA, DOCVQA, OCRBENCH
from .questions import GQA, TEXTVQA, VQAV2

__all__ = ["BENCHMARKS"]

_ALL = (
    VQAV2, GQA, TEXTVQA, OCRBENCH, SCIENCEQA, MMSTAR, POPE, CHARTQA, DOCVQA, WHATSUP, VSTAR, COCO_HEAR, COCO_HI, COCO_NEO, COCO_NEO_LENS,
)  # fmt: skip
BENCHMARKS = MappingProxyType({one.name: one for one in _ALL})
