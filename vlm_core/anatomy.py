"""Where things are inside a vision-language model: family differences as data.

``Family`` declares, per ``model_type``, the paths and conventions that differ; ``FAMILIES`` is the only place that
knows them; ``Anatomy`` is a family resolved on one loaded model (modules in hand, sizes checked).

A new family is one entry here, usually ``replace(LLAVA, model_type=...)``, plus one line in
``tests/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

from vlm_core.errors import SubjectError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FAMILIES", "Anatomy", "Family", "HeadId", "find_family"]


class HeadId(NamedTuple):
    """One attention head of the language model, counted from 0 (query heads under grouped-query attention)."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"


@dataclass(frozen=True)
class Family:
    """What differs between model families, as data.

    Parameters
    ----------
    model_type : str
        ``config.model_type`` of the checkpoints it describes.
    language_model : str
        Path from the model to the module that owns the decoder layers. Default ``"model.language_model"``.
    base : str
        Path to the module that merges image and text before the language model. Default ``"model"``.
    layers, norm : str
        Names inside the language model. Defaults ``"layers"``, ``"norm"``.
    attention, output_projection : str
        Names inside a decoder layer. Defaults ``"self_attn"``, ``"o_proj"``.
    head : str
        Path to the unembedding. Default ``"lm_head"``.
    image_token : tuple of str
        Names under which the config holds the image token's id; the first that exists counts.
    enter : {"language_model", "base"}
        Which module the row engine calls with merged embeddings. ``"base"`` where the outer model itself builds the
        attention masks (bidirectional image blocks), so that the mask is always the model's own.
    token_types : dict of str to int
        Per-token inputs that ``enter="base"`` needs again, with the value of a causal text token.
    nested_images : bool
        Whether the processor wants ``[[image], [image]]`` instead of ``[image, image]``.
    prompt_has_image_token : bool
        Whether a prompt without chat template needs the image token written into it.
    deepstack : bool
        Whether visual features are added again inside the first layers (Qwen3-VL).
    grid : {"square", "thw", "none"}
        How image tokens lie on the image: one square grid, ``image_grid_thw`` after merging, or no single grid (tiles).
    logit_softcap : str or None
        Field of the text config that caps the logits after the unembedding (PaliGemma 2), where the model reads it.
    """

    model_type: str
    language_model: str = "model.language_model"
    base: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    output_projection: str = "o_proj"
    head: str = "lm_head"
    image_token: tuple[str, ...] = ("image_token_id", "image_token_index")
    enter: str = "language_model"
    token_types: tuple[tuple[str, int], ...] = ()
    nested_images: bool = False
    prompt_has_image_token: bool = True
    deepstack: bool = False
    grid: str = "square"
    logit_softcap: str | None = None


LLAVA = Family("llava")
QWEN2_VL = replace(LLAVA, model_type="qwen2_vl", grid="thw")
IDEFICS3 = replace(LLAVA, model_type="idefics3", language_model="model.text_model", nested_images=True, grid="none")
PALIGEMMA = replace(
    LLAVA,
    model_type="paligemma",
    enter="base",
    token_types=(("token_type_ids", 1),),
    prompt_has_image_token=False,
    logit_softcap="final_logit_softcapping",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAVA,
        replace(LLAVA, model_type="llava_onevision", grid="none"),
        replace(LLAVA, model_type="mistral3", grid="none"),
        replace(LLAVA, model_type="aya_vision", grid="none"),
        replace(LLAVA, model_type="internvl", grid="none"),
        QWEN2_VL,
        replace(QWEN2_VL, model_type="qwen2_5_vl"),
        replace(QWEN2_VL, model_type="qwen3_vl", deepstack=True),
        replace(QWEN2_VL, model_type="glm4v"),
        IDEFICS3,
        replace(IDEFICS3, model_type="smolvlm"),
        PALIGEMMA,
        replace(
            PALIGEMMA,
            model_type="gemma3",
            token_types=(("token_type_ids", 0),),
            prompt_has_image_token=True,
            logit_softcap=None,
        ),
    )
}


def find_family(model_type: str, name: str = "subject") -> Family:
    """The family declared for ``model_type``; a ``SubjectError`` naming the known ones if there is none."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise SubjectError(
            f"subject '{name}' has model_type '{model_type}', which is not declared in vlm_core/anatomy.py "
            f"(declared: {known}): add a Family for it or choose another checkpoint."
        )
    return FAMILIES[model_type]


def _walk(root: nn.Module, path: str, name: str) -> nn.Module:
    module = root
    for part in path.split("."):
        if not hasattr(module, part):
            raise SubjectError(
                f"subject '{name}' has no module '{path}' ({type(root).__name__} stops before '{part}'): "
                f"its Family in vlm_core/anatomy.py does not fit this model."
            )
        module = getattr(module, part)
    return module


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A family resolved on one model: its modules in hand and its sizes."""

    family: Family
    base: nn.Module
    language_model: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module
    embedding: nn.Module
    image_token_id: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    layer_types: tuple[str, ...]
    logit_softcap: float | None
    spatial_merge: int

    @property
    def kv_groups(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Every head, layer by layer."""
        return tuple(HeadId(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads))

    def output_projection(self, layer: int) -> nn.Module:
        """The linear map that mixes the heads of ``layer``."""
        return getattr(self.attentions[layer], self.family.output_projection)

    def grid(self, n_image: int, inputs: Mapping) -> tuple[int, int] | None:
        """Rows and columns of ``n_image`` image tokens on the image; None where they form no single grid.

        Parameters
        ----------
        inputs : mapping
            Processor outputs of one prompt (``image_grid_thw`` is read where the family has it).
        """
        if self.family.grid == "square":
            side = isqrt(n_image)
            return (side, side) if side and side * side == n_image else None
        if self.family.grid == "thw":
            _, rows, columns = (int(size) for size in inputs["image_grid_thw"][0])
            rows, columns = rows // self.spatial_merge, columns // self.spatial_merge
            return (rows, columns) if rows * columns == n_image else None
        return None

    @classmethod
    def of(cls, model: nn.Module, name: str = "subject") -> Anatomy:
        """Resolve the model's family on the model, checking that everything declared is there."""
        config = model.config
        family = find_family(config.model_type, name)
        language_model = _walk(model, family.language_model, name)
        layers = tuple(_walk(language_model, family.layers, name))
        attentions = tuple(_walk(layer, family.attention, name) for layer in layers)
        text = config.get_text_config()
        image_token_id = next((getattr(config, key) for key in family.image_token if hasattr(config, key)), None)
        if image_token_id is None:
            raise SubjectError(
                f"subject '{name}' has no image token in its config (looked for {', '.join(family.image_token)}): "
                f"it cannot be asked about images."
            )
        n_heads = text.num_attention_heads
        head_dim = getattr(attentions[0], "head_dim", None) or text.hidden_size // n_heads
        return cls(
            family=family,
            base=_walk(model, family.base, name),
            language_model=language_model,
            layers=layers,
            attentions=attentions,
            norm=_walk(language_model, family.norm, name),
            head=_walk(model, family.head, name),
            embedding=model.get_input_embeddings(),
            image_token_id=int(image_token_id),
            n_layers=len(layers),
            n_heads=n_heads,
            n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
            head_dim=head_dim,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            layer_types=tuple(getattr(text, "layer_types", None) or ("full_attention",) * len(layers)),
            logit_softcap=getattr(text, family.logit_softcap, None) if family.logit_softcap else None,
            spatial_merge=getattr(config.vision_config, "spatial_merge_size", 1),
        )
