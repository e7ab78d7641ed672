"""A subject's size, prompt lengths and operations, from its configuration and processor alone: no weight is loaded.

``Sizes``             what the cost of a subject follows from
``sizes_of(path)``    reads it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.families.processing import load_processor
from vlm_core.reduction.costs import prefill_flops
from vlm_core.subjects.checkpoint import SAFE
from vlm_core.subjects.resolution import own_resolution
from vlm_core.subjects.weightless import Weightless

__all__ = ["Sizes", "sizes_of"]


@dataclass(frozen=True)
class Sizes:
    """What the cost of a subject follows from.

    Parameters
    ----------
    name, family : str
    parameters : int
        Tied weights once.
    layers, heads, kv_heads, head_dim, hidden, vocabulary : int
        Of the language model.
    layer_weights : float
        Weights of a decoder layer's linear maps, on average.
    widest : int
        The widest output of a decoder layer's linear maps.
    head_weights : int
        Of the unembedding.
    image_tokens, prompt_tokens, tail_tokens : float
        Of one prompt, on average: visual tokens, all tokens, tokens after the last visual one.
    prefill_flops : float
        Of the language model on one prompt (`vlm_core.reduction.costs.prefill_flops`).
    image_flops : int
        Of the vision tower and what follows it, on one image.
    image_size : (width, height)
        Of that image.
    """

    name: str
    family: str
    parameters: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    layer_weights: float
    widest: int
    head_weights: int
    image_tokens: float
    prompt_tokens: float
    tail_tokens: float
    prefill_flops: float
    image_flops: int
    image_size: tuple[int, int]

    @property
    def width(self) -> int:
        """Of all heads together."""
        return self.heads * self.head_dim

    def weight_bytes(self, element: int) -> int:
        """Bytes of the weights, ``element`` each."""
        return self.parameters * element

    def cache_bytes(self, element: int) -> int:
        """Bytes of the keys and values of one prompt."""
        return round(2 * self.layers * self.kv_heads * self.head_dim * self.prompt_tokens * element)

    def activation_bytes(self, element: int) -> int:
        """Bytes that one prompt holds at once in a layer: the residual stream twice, queries, keys, values and outputs, and two of the
        widest maps; and its logits, in four bytes each."""
        own = 2 * self.hidden + 2 * self.width + 2 * self.kv_heads * self.head_dim + 2 * self.widest
        return round(self.prompt_tokens * own * element + 4 * self.vocabulary)

    def as_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Sizes:
        """Read ``as_dict`` back, from JSON too."""
        return cls(**{**content, "image_size": tuple(content["image_size"])})


def sizes_of(path: str | Path, prompts: Sequence[str], image_size: tuple[int, int] | None = None, revision: str | None = None) -> Sizes:
    """Sizes of a checkpoint, prompts as its own processor lays them out.

    Parameters
    ----------
    path : directory or Hub id
    prompts : sequence of str
        What it will be asked.
    image_size : (width, height), optional
        Of the pictures it will be shown. Default: as many pixels as it looks at, on which the suite draws its scenes
        (`vlm_core.subjects.resolution`).

    Raises
    ------
    SubjectError
        One sentence: no configuration there, or not of a vision-language model whose parts are known.
    """
    name = Path(str(path).rstrip("/")).name
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, **SAFE)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **SAFE)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SubjectError(
            f"subject '{path}' has no configuration of a vision-language model: {' '.join(str(error).split())[:300]}"
        ) from error
    anatomy = Anatomy.of(model, name)
    processor = load_processor(path, revision)
    asked = Weightless(processor, config, name)
    if image_size is None:
        image_size = (own_resolution(asked),) * 2
    picture = Image.fromarray(np.zeros((image_size[1], image_size[0], 3), dtype=np.uint8))
    batches = [asked.encode([picture], [prompt]) for prompt in prompts]
    lengths = [int(batch.valid.sum()) for batch in batches]
    images = [int(batch.image.sum()) for batch in batches]
    tails = [length - 1 - int(batch.image[0].nonzero()[-1]) for batch, length in zip(batches, lengths, strict=True)]
    maps = [one for layer in anatomy.layers for one in layer.modules() if isinstance(one, nn.Linear)]
    return Sizes(
        name=name,
        family=anatomy.family.key,
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=anatomy.n_layers,
        heads=anatomy.n_heads,
        kv_heads=anatomy.n_kv_heads,
        head_dim=anatomy.head_dim,
        hidden=anatomy.hidden_size,
        vocabulary=anatomy.vocab_size,
        layer_weights=sum(one.weight.numel() for one in maps) / anatomy.n_layers,
        widest=max(one.out_features for one in maps),
        head_weights=anatomy.head.weight.numel(),
        image_tokens=float(np.mean(images)),
        prompt_tokens=float(np.mean(lengths)),
        tail_tokens=float(np.mean(tails)),
        prefill_flops=float(np.mean([prefill_flops(anatomy, [length] * anatomy.n_layers) for length in lengths])),
        image_flops=_image_flops(anatomy, batches[0].inputs, images[0]),
        image_size=tuple(image_size),
    )


def _image_flops(anatomy: Anatomy, inputs: dict[str, torch.Tensor], tokens: int) -> int:
    """Operations on one image: each patch through the tower's maps, patches of a view with each other, visual tokens through the rest."""
    tower = anatomy.base.get_encoder(modality="image")
    if tower is anatomy.base:
        return 0
    convolutions = [one for one in tower.modules() if isinstance(one, nn.Conv2d | nn.Conv3d)]
    pixels = inputs["pixel_values"]
    kernel = convolutions[0].weight[0].numel() if convolutions else pixels.shape[-1]
    patches = pixels.numel() // kernel
    views = pixels.shape[0] if pixels.ndim == 4 else pixels.shape[1] if pixels.ndim == 5 else 1
    # Where patches are merged inside the tower, the maps that merge them see as many as there are visual tokens.
    merging = {id(one) for name, part in tower.named_modules() if "merger" in name.split(".")[-1] for one in part.modules()}
    merges = sum(one.weight.numel() for one in _linear(tower) if id(one) in merging)
    weights = sum(one.weight.numel() for one in (*convolutions, *_linear(tower))) - merges
    config = anatomy.base.config.vision_config
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", 0)
    width = getattr(config, "hidden_size", 0)
    inside = {id(one) for part in (tower, anatomy.language_model, anatomy.head) for one in part.modules()}
    between = sum(one.weight.numel() for one in _linear(anatomy.base) if id(one) not in inside)
    each = patches / views
    return round(2 * patches * weights + 4 * width * depth * views * each * each + 2 * tokens * (between + merges))


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]
