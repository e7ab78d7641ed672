"""Where things are inside a vision-language model: family differences as data.

``Family``     declares what differs: paths, conventions, what cannot be done; ``FAMILIES`` holds the declared ones
``Anatomy``    a family resolved on one loaded model: modules in hand, sizes checked, ``require(capability)``

Another family is one dataclass away. Take the nearest one, replace what differs, declare it, and let the self-check judge:

>>> from dataclasses import replace
>>> from vlm_core.families.anatomy import LLAVA, declare
>>> declare(replace(LLAVA, model_type="newvlm", language_model="model.text_model"))      # doctest: +SKIP
>>> selfcheck(Subject(model, processor))                                                 # doctest: +SKIP

To ship it, add the same ``replace(...)`` to ``FAMILIES`` below and a tiny model of it to ``tests/family_models.py``, its
processor to ``tests/family_processors.py``: the conformance suite and the check of its image tokens' places then run on it
and ``SUPPORT.md`` gets its row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_core.errors import SubjectError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CAPABILITIES", "FAMILIES", "LLAVA", "Anatomy", "Family", "HeadId", "declare", "find_family"]

CAPABILITIES = (
    "heads",
    "image_kv",
    "knock_out",
    "drop",
    "merge",
    "patch",
    "steer",
    "replace_tokens",
    "generate",
    "shared_prefix",
    "resume",
)

# Layers whose attention the seam sees. Anything else (linear attention, state spaces, convolutions) mixes tokens elsewhere.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


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
    decoder : str
        ``model_type`` of the text config, where a family wraps language models that are built differently (BLIP-2 around
        OPT or Llama). Default ``""``: any.
    language_model : str
        Path from the model to the module that owns the decoder layers. Default ``"model.language_model"``.
    base : str
        Path to the module that merges image and text before the language model; ``""`` is the model itself.
        Default ``"model"``.
    layers, norm : str
        Names inside the language model. Defaults ``"layers"``, ``"norm"``.
    attention, output_projection : str
        Names inside a decoder layer. Defaults ``"self_attn"``, ``"o_proj"``.
    mlp : str
        Name, inside a decoder layer, of the module whose output the residual stream gets from the MLP. Default ``"mlp"``.
    cross_attention : str or None
        Name that replaces ``attention`` in decoder layers that attend to the image instead of the sequence (Mllama).
        Where it is set the image is not in the token sequence: its keys live in those layers only.
    head : str
        Path to the unembedding. Default ``"lm_head"``.
    image_token : tuple of str
        Names under which the config holds the image token's id; the first that exists counts.
    enter : {"language_model", "base"}
        Which module the row engine calls with merged embeddings. ``"base"`` where the outer model itself builds the
        attention masks (bidirectional image blocks), so that the mask is always the model's own.
    token_types : tuple of (str, int)
        Per-token inputs that ``enter="base"`` needs again, with the value of a causal text token.
    causal_prompt : bool
        Whether earlier prompt tokens are blind to later ones. False where the whole prompt sees itself (PaliGemma).
    max_images : int or None
        Most images per prompt, where the family has a limit.
    answer_apart : bool
        Whether the processor closes the prompt itself and takes the answer as ``suffix`` (PaliGemma).
    nested_images : bool
        Whether the processor wants ``[[image], [image]]`` instead of ``[image, image]``.
    prompt_has_image_token : bool
        Whether a prompt without chat template needs the image token written into it.
    deepstack : bool
        Whether visual features are added again after the first layers (Qwen3-VL).
    layout : str
        How images are cut and where their tokens lie on them: a name in ``vlm_core.families.tiling.CUTS``. Default ``"whole"``.
    logit_softcap : str or None
        Field of the text config that caps the logits after the unembedding (PaliGemma 2), where the model reads it.
    """

    model_type: str
    decoder: str = ""
    language_model: str = "model.language_model"
    base: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    output_projection: str = "o_proj"
    mlp: str = "mlp"
    cross_attention: str | None = None
    head: str = "lm_head"
    image_token: tuple[str, ...] = ("image_token_id", "image_token_index")
    enter: str = "language_model"
    token_types: tuple[tuple[str, int], ...] = ()
    causal_prompt: bool = True
    max_images: int | None = None
    answer_apart: bool = False
    nested_images: bool = False
    prompt_has_image_token: bool = True
    deepstack: bool = False
    layout: str = "whole"
    logit_softcap: str | None = None

    @property
    def key(self) -> str:
        """Its name in ``FAMILIES``."""
        return f"{self.model_type}/{self.decoder}" if self.decoder else self.model_type

    @property
    def image_in_sequence(self) -> bool:
        """Whether image tokens are positions of the token sequence."""
        return self.cross_attention is None

    @property
    def refusals(self) -> dict[str, str]:
        """Capabilities the family lacks, each with the reason and what is possible instead."""
        refused = {}
        if not self.image_in_sequence:
            outside = "its image is not in the token sequence but behind cross-attention layers"
            for capability in ("drop", "merge", "replace_tokens"):
                refused[capability] = f"{outside}: use ReplaceImageKV or KnockOut in those layers"
            for capability in ("shared_prefix", "resume"):
                refused[capability] = f"{outside}, which each row carries along: rows run as whole forward passes"
        if not self.causal_prompt:
            refused["shared_prefix"] = (
                "its prompt attends to itself both ways, so no part before the question is independent of it: rows resume "
                "at the first layer that they touch"
            )
        return refused


LLAVA = Family("llava")
QWEN2_VL = replace(LLAVA, model_type="qwen2_vl", layout="thw")
IDEFICS = replace(
    LLAVA, model_type="idefics3", language_model="model.text_model", nested_images=True, layout="split"
)
PALIGEMMA = replace(
    LLAVA,
    model_type="paligemma",
    enter="base",
    token_types=(("token_type_ids", 1),),
    causal_prompt=False,
    answer_apart=True,
    nested_images=True,
    prompt_has_image_token=False,
    logit_softcap="final_logit_softcapping",
)
GEMMA3 = replace(
    LLAVA,
    model_type="gemma3",
    enter="base",
    token_types=(("token_type_ids", 0),),
    nested_images=True,
    layout="pan_and_scan",
)
MLLAMA = replace(LLAVA, model_type="mllama", cross_attention="cross_attn", nested_images=True, layout="keys")
BLIP2_OPT = replace(
    LLAVA,
    model_type="blip-2",
    layout="queries",
    decoder="opt",
    language_model="language_model.model.decoder",
    base="",
    norm="final_layer_norm",
    output_projection="out_proj",
    mlp="fc2",
    head="language_model.lm_head",
    max_images=1,
    prompt_has_image_token=False,
)
BLIP2_LLAMA = replace(
    BLIP2_OPT, decoder="llama", language_model="language_model.model", norm="norm", output_projection="o_proj", mlp="mlp"
)

FAMILIES: dict[str, Family] = {}


def declare(family: Family) -> Family:
    """Add ``family`` to ``FAMILIES``, where every subject of its ``model_type`` finds it."""
    FAMILIES[family.key] = family
    return family


for _family in (
    LLAVA,
    replace(LLAVA, model_type="vipllava"),
    replace(LLAVA, model_type="llava_next", layout="anyres"),
    replace(LLAVA, model_type="llava_onevision", layout="anyres"),
    replace(LLAVA, model_type="mistral3", layout="native"),
    replace(LLAVA, model_type="aya_vision", layout="canvas"),
    replace(LLAVA, model_type="internvl", layout="canvas"),
    QWEN2_VL,
    replace(QWEN2_VL, model_type="qwen2_5_vl"),
    replace(QWEN2_VL, model_type="qwen3_vl", deepstack=True),
    replace(QWEN2_VL, model_type="glm4v"),
    replace(IDEFICS, model_type="idefics2", layout="queries"),
    IDEFICS,
    replace(IDEFICS, model_type="smolvlm"),
    PALIGEMMA,
    GEMMA3,
    MLLAMA,
    BLIP2_OPT,
    BLIP2_LLAMA,
    replace(BLIP2_OPT, model_type="instructblip"),
    replace(BLIP2_LLAMA, model_type="instructblip"),
):
    declare(_family)


def find_family(model_type: str, name: str = "subject", decoder: str = "") -> Family:
    """The family declared for ``model_type`` (around a language model of type ``decoder``).

    Raises
    ------
    SubjectError
        Naming the declared ones, if there is none.
    """
    found = FAMILIES.get(f"{model_type}/{decoder}") or FAMILIES.get(model_type)
    if found is None:
        wrapped = sorted(family.decoder for family in FAMILIES.values() if family.model_type == model_type)
        if wrapped and decoder:
            raise SubjectError(
                f"subject '{name}' is a {model_type} around the language model '{decoder}', the decoder-only ones declared in "
                f"vlm_core/families/anatomy.py are {', '.join(wrapped)}: choose a checkpoint around one of those, or declare a Family."
            )
        if wrapped:
            return next(family for family in FAMILIES.values() if family.model_type == model_type)
        known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
        raise SubjectError(
            f"subject '{name}' has model_type '{model_type}', which is not declared in vlm_core/families/anatomy.py "
            f"(declared: {known}): declare a Family for it or choose another checkpoint."
        )
    return found


def _walk(root: nn.Module, path: str, name: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        if getattr(module, part, None) is None:
            raise SubjectError(
                f"subject '{name}' has no module '{path}' ({type(root).__name__} stops before '{part}'): "
                f"its Family in vlm_core/families/anatomy.py does not fit this model."
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
        ValueError
            One sentence: what the family lacks, why, and what is possible instead.
        """
        if capability not in CAPABILITIES:
            raise ValueError(f"unknown capability '{capability}': it must be one of {', '.join(CAPABILITIES)}")
        refused = self.family.refusals.get(capability)
        if refused is not None:
            raise ValueError(f"family '{self.family.key}' lacks '{capability}': {refused}.")
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
        ids = (getattr(config, key, None) for key in family.image_token)
        image_token_id = next((found for found in ids if found is not None), None)
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
            n_kv_heads=n_heads // getattr(attentions[0], "num_key_value_groups", 1),
            head_dim=head_dim,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            layer_types=layer_types,
            logit_softcap=getattr(text, family.logit_softcap, None) if family.logit_softcap else None,
            spatial_merge=getattr(config.vision_config, "spatial_merge_size", 1),
        )


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
