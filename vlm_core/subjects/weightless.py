"""What a subject makes of pictures and prompts before its weights are there: its processor is asked, on a model that is not.

``Weightless``                  encodes like a ``Subject``
``patches_of(inputs, config)``  what its vision tower would get
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from vlm_core.families.anatomy import image_token_of
from vlm_core.families.family import find_family
from vlm_core.subjects.batch import Batch, encode
from vlm_core.subjects.wording import Wording

__all__ = ["Weightless", "patches_of"]


class Weightless:
    """A subject's processor, encoding prompts as ``Subject.encode`` does.

    Parameters
    ----------
    processor : its processor
    config : its model's config
    name : str
        For errors.

    Raises
    ------
    SubjectError
        If its family is not declared, or its config names no image token.
    """

    def __init__(self, processor: Any, config: Any, name: str = "subject") -> None:
        family = find_family(config.model_type, name, config.get_text_config().model_type)
        self.name, self.config, self.processor, self.tokenizer = name, config, processor, processor.tokenizer
        self.wording, self.device = Wording(processor, family, name), torch.device("cpu")
        self.anatomy = SimpleNamespace(
            family=family, image_token_id=image_token_of(config, family, name), embedding=SimpleNamespace(weight=torch.empty(0))
        )

    def encode(self, images: Sequence, prompts: Sequence[str], padding_side: str = "right") -> Batch:
        """As ``Subject.encode``, in float32 on the host."""
        return encode(self, images, prompts, None, padding_side)


def patches_of(inputs: Mapping[str, torch.Tensor], config: Any) -> tuple[int, int]:
    """Views that a vision tower gets, and patches that it cuts them into together; one view where pictures become rows of patches.

    Parameters
    ----------
    inputs : mapping
        Of a model, with ``pixel_values``: ``[..., channel, height, width]`` or ``[patch, value]``.
    config : the model's config
    """
    pixels, patch = inputs["pixel_values"], config.vision_config.patch_size
    if pixels.ndim < 4:
        return 1, pixels.shape[0]
    views = pixels.shape[:-3].numel()
    down, across = patch if isinstance(patch, list | tuple) else (patch, patch)
    return views, views * (pixels.shape[-2] // down) * (pixels.shape[-1] // across)
