"""Public benchmarks as items, one declaration each; what they are, licences and what is verified: ``README.md`` beside this module.

``load(name, n=..., seed=...)``   items of one, or of data of your own
``BENCHMARKS``                    every declaration by its name
``target_mask``, ``others_mask``  masks of COCO's objects, as measurements take them
"""

from .coco import others_mask, target_mask
from .declaration import Benchmark
from .loading import load
from .registry import BENCHMARKS

__all__ = ["BENCHMARKS", "Benchmark", "load", "others_mask", "target_mask"]
