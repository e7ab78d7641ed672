"""What differs between model families, as data.

``Family``        what is declared: paths, conventions, what cannot be done and why
``FAMILIES``      the declared ones; ``declare`` adds one, ``find_family`` finds it

Another family is one dataclass away. Take the nearest one, replace what differs, declare it, and let the self-check judge:

>>> from dataclasses import replace
>>> from vlm_core.families.family import LLAVA, declare
>>> declare(replace(LLAVA, model_type="newvlm", language_model="model.text_model"))      # doctest: +SKIP
>>> selfcheck(Subject(model, processor))                                                 # doctest: +SKIP

To ship it, add the same ``replace(...)`` to ``FAMILIES`` below and a tiny model of it to ``tests/family_models.py``, its
processor to ``tests/family_processors.py``: the conformance suite and the check of its image tokens' places then run on it
and ``SUPPORT.md`` gets its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm_core.errors import SubjectError

__all__ = ["CAPABILITIES", "FAMILIES", "LLAVA", "Family", "declare", "find_family"]

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
    placeholder : str
        What a prompt without chat template begins with, once per image; ``{}`` is the processor's image token. Default ``"{} "``;
        ``""`` where the processor writes it itself (BLIP-2).
    deepstack : bool
        Whether visual features are added again after the first layers (Qwen3-VL).
    layout : str
        How images are cut and where their tokens lie on them: a name in ``vlm_core.families.tiling.CUTS``. Default ``"whole"``.
    patch_order : {"raster", "blocks", "windows"}
        How the vision tower's patches are packed: row by row, in blocks that are merged to one token (Qwen2-VL), or in such blocks
        window by window (Qwen2.5-VL). Default ``"raster"``.
    logit_softcap : str or None
        Field of the text config that caps the logits after the unembedding (PaliGemma 2), where the model reads it.
    logit_softcap_since : str
        First version of transformers whose model reads it: under earlier ones logits are left uncapped. Default ``""``: any.
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
    placeholder: str = "{} "
    deepstack: bool = False
    layout: str = "whole"
    patch_order: str = "raster"
    logit_softcap: str | None = None
    logit_softcap_since: str = ""

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
QWEN2_VL = replace(LLAVA, model_type="qwen2_vl", layout="thw", patch_order="blocks")
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
    placeholder="{}",
    logit_softcap="final_logit_softcapping",
    logit_softcap_since="5.23",
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
    placeholder="",
)
BLIP2_LLAMA = replace(
    BLIP2_OPT, decoder="llama", language_model="language_model.model", norm="norm", output_projection="o_proj", mlp="mlp"
)

FAMILIES: dict[str, Family] = {}


def declare(family: Family) -> Family:
    """Add ``family`` to ``FAMILIES``, where every subject of its ``model_type`` finds it."""
    if not isinstance(family, Family):
        raise TypeError(f"a family is declared by a Family, got {family!r:.60} ({type(family).__name__}): write Family(model_type=..., ...)")
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
    replace(QWEN2_VL, model_type="qwen2_5_vl", patch_order="windows"),
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
                f"vlm_core/families/family.py are {', '.join(wrapped)}: choose a checkpoint around one of those, or declare a Family."
            )
        if wrapped:
            return next(family for family in FAMILIES.values() if family.model_type == model_type)
        known = ", ".join(sorted({family.model_type for family in FAMILIES.values()}))
        raise SubjectError(
            f"subject '{name}' has model_type '{model_type}', which is not declared in vlm_core/families/family.py "
            f"(declared: {known}): declare a Family for it or choose another checkpoint."
        )
    return found
