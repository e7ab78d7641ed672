"""A family resolved on one loaded model: modules in hand, sizes checked, ``require(capability)``.

``Anatomy``                          where things are in this model
``HeadId``                           one attention head
``image_token_of(config, family)``   the image token's id
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_core.errors import NotMeasurable, SubjectError
from vlm_core.families.family import CAPABILITIES, Family, find_family

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Anatomy", "HeadId", "image_token_of"]

# Layers whose attention the seam sees. Anything else (linear attention, state spaces, convolutions) mixes tokens elsewhere.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class _LayerHead(NamedTuple):
    layer: int
    head: int


class HeadId(_LayerHead):
    """One attention head of the language model, counted from 0 (query heads under grouped-query attention).

    Raises
    ------
    ValueError
        For a layer or head that is no whole number.
    """

    __slots__ = ()

    def __new__(cls, layer: int, head: int) -> HeadId:
        if type(layer) is not int or type(head) is not int:
            layer, head = _whole(layer, "layer"), _whole(head, "number")
        return super().__new__(cls, layer, head)

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"


def _whole(value: Any, what: str) -> int:
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"a head's {what} must be an integer, got {value!r} ({type(value).__name__}): pass a whole number as int"
        ) from None


def _walk(root: nn.Module, path: str, name: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        if getattr(module, part, None) is None:
            raise SubjectError(
                f"subject '{name}' has no module '{path}' ({type(root).__name__} stops before '{part}'): "
                f"its Family in vlm_core/families/family.py does not fit this model."
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

    @cached_property
    def cross_layers(self) -> frozenset[int]:
        """Layers that attend to the image instead of the sequence; empty where the image is in the sequence."""
        return frozenset(layer for layer, kind in enumerate(self.layer_types) if kind == "cross_attention")

    @cached_property
    def first_own_layer(self) -> int:
        """First layer whose keys are the sequence's."""
        return next(layer for layer in range(self.n_layers) if layer not in self.cross_layers)

    @property
    def image_layers(self) -> tuple[int, ...]:
        """Layers that hold image keys: all of them, or only the cross-attention layers."""
        return tuple(range(self.n_layers)) if self.family.image_in_sequence else tuple(sorted(self.cross_layers))

    @property
    def n_deepstack(self) -> int:
        """After how many of the first layers visual features are added again, to a sequence of full length (Qwen3-VL)."""
        return len(self.base.config.vision_config.deepstack_visual_indexes) if self.family.deepstack else 0

    @property
    def image_heads(self) -> tuple[HeadId, ...]:
        """Every head that can see the image, layer by layer: those of ``image_layers``."""
        return tuple(head for head in self.heads if head.layer in self.image_layers)

    @property
    def capabilities(self) -> frozenset[str]:
        """What can be done on this model, out of ``CAPABILITIES``."""
        return frozenset(CAPABILITIES) - self.family.refusals.keys()

    def require(self, capability: str, image_layers: Iterable[int] = ()) -> None:
        """Refuse what the family lacks.

        Parameters
        ----------
        capability : str
            One of ``CAPABILITIES``.
        image_layers : iterable of int, optional
            Layers in which image keys are needed.

        Raises
        ------
        NotMeasurable
            One sentence: what the family lacks, why, and what is possible instead.
        ValueError
            For an unknown capability, or a layer that holds no image keys.
        """
        if capability not in CAPABILITIES:
            raise ValueError(f"unknown capability '{capability}': it must be one of {', '.join(CAPABILITIES)}")
        refused = self.family.refusals.get(capability)
        if refused is not None:
            raise NotMeasurable(f"family '{self.family.key}' lacks '{capability}': {refused}.")
        without = sorted(set(image_layers) - set(self.image_layers))
        if without:
            raise ValueError(
                f"family '{self.family.key}' holds no image keys in layer {without[0]}: its image is seen by the "
                f"cross-attention layers {', '.join(map(str, self.image_layers))}, ask for '{capability}' there."
            )

    @cached_property
    def mlps(self) -> tuple[nn.Module, ...]:
        """The MLP of every layer."""
        return tuple(_walk(layer, self.family.mlp, self.family.key) for layer in self.layers)

    @cached_property
    def attention_layers(self) -> dict[nn.Module, int]:
        """Layer of every attention module."""
        return {module: layer for layer, module in enumerate(self.attentions)}

    @cached_property
    def decoder_layers(self) -> dict[nn.Module, int]:
        """Number of every decoder layer; the final norm has ``n_layers``."""
        return {module: layer for layer, module in enumerate((*self.layers, self.norm))}

    @cached_property
    def mlp_layers(self) -> dict[nn.Module, int]:
        """Layer of every MLP."""
        return {module: layer for layer, module in enumerate(self.mlps)}

    def output_projection(self, layer: int) -> nn.Module:
        """The linear map that mixes the heads of ``layer``."""
        return getattr(self.attentions[layer], self.family.output_projection)

    @classmethod
    def of(cls, model: nn.Module, name: str = "subject") -> Anatomy:
        """Resolve the model's family on the model, checking that everything declared is there.

        Raises
        ------
        SubjectError
            One sentence: an encoder-decoder, an undeclared family, a layer that is no attention, a module that is not
            where the family says, no image token.
        """
        config = model.config
        text = _decoder_only(config, name)
        layer_types = _attention_layers(text, name)
        family = find_family(config.model_type, name, text.model_type)
        language_model = _walk(model, family.language_model, name)
        layers = tuple(_walk(language_model, family.layers, name))
        crossed = [family.cross_attention is not None and hasattr(layer, family.cross_attention) for layer in layers]
        attentions = tuple(
            _walk(layer, family.cross_attention if cross else family.attention, name)
            for layer, cross in zip(layers, crossed, strict=True)
        )
        layer_types = tuple(
            "cross_attention" if cross else kind
            for cross, kind in zip(crossed, layer_types or _one_kind(text) * len(layers), strict=True)
        )
        image_token_id = image_token_of(config, family, name)
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
            image_token_id=image_token_id,
            n_layers=len(layers),
            n_heads=n_heads,
            n_kv_heads=n_heads // getattr(attentions[0], "num_key_value_groups", 1),
            head_dim=head_dim,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            layer_types=layer_types,
            logit_softcap=_logit_softcap(family, text),
            spatial_merge=getattr(config.vision_config, "spatial_merge_size", 1),
        )


def image_token_of(config: Any, family: Family, name: str = "subject") -> int:
    """The image token's id in a model's config.

    Raises
    ------
    SubjectError
        One sentence, where it has none.
    """
    ids = (getattr(config, key, None) for key in family.image_token)
    image_token_id = next((found for found in ids if found is not None), None)
    if image_token_id is None:
        raise SubjectError(
            f"subject '{name}' has no image token in its config (looked for {', '.join(family.image_token)}): "
            f"it cannot be asked about images."
        )
    return int(image_token_id)


def _logit_softcap(family: Family, text: Any) -> float | None:
    if family.logit_softcap is None or _minor(version("transformers")) < _minor(family.logit_softcap_since or "0.0"):
        return None
    return getattr(text, family.logit_softcap, None)


def _minor(named: str) -> tuple[int, ...]:
    return tuple(map(int, named.split(".")[:2]))


def _decoder_only(config: Any, name: str) -> Any:
    text = config.get_text_config()
    wrapped = getattr(config, "text_config", None) or text
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text, wrapped)):
        raise SubjectError(
            f"subject '{name}' ({config.model_type}) wraps the encoder-decoder language model '{wrapped.model_type}', "
            f"which reads the image in its encoder: only decoder-only language models are measured, choose a checkpoint "
            f"around one (BLIP-2 with OPT, InstructBLIP with Vicuna)."
        )
    return text


def _attention_layers(text: Any, name: str) -> tuple[str, ...] | None:
    layer_types = getattr(text, "layer_types", None)
    for layer, kind in enumerate(layer_types or ()):
        if kind not in ATTENTION_LAYERS:
            raise SubjectError(
                f"subject '{name}' is a hybrid: its layer {layer} is '{kind}', which has no attention heads to observe or "
                f"change; choose a model whose layers all are softmax attention."
            )
    return tuple(layer_types) if layer_types else None


def _one_kind(text: Any) -> tuple[str]:
    # The rule of transformers' own caches for configs that do not list their layers.
    if getattr(text, "sliding_window", None) is not None:
        return ("sliding_attention",)
    return ("chunked_attention" if getattr(text, "attention_chunk_size", None) is not None else "full_attention",)
