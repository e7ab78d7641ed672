"""Where model families differ, as data.

``family``       what a family declares, and what it refuses; ``anatomy``: a family resolved on one model
``layout``       image token <-> place on the image; ``tiling``: the ways to cut an image that it stands on
``processing``   processors, where transformers wants torchvision for them
``adapters``     which modules a LoRA of the language model names
"""
