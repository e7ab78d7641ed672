"""Tiny random-weight models of every family, with ready-made inputs, built from configs without any download.

``BUILDERS[name]()``        ``(model, inputs)`` with one unpadded prompt: text, one image, text
``TINY[name].prompts(...)`` inputs of several prompts, any number of images each, padded on either side
``FAMILY_OF[name]``         the ``Family.key`` that the model belongs to
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as tf

from vlm_core.tests.tiny import loud

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
WITHOUT_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {**VISION, "image_size": 16, "patch_size": 4}
SIGLIP = {"model_type": "siglip_vision_model", **PATCHES}
IMAGE_TOKEN = 60
AFTER = (12, 13, 14, 15, 16)


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family and how its processor would lay out its inputs.

    Parameters
    ----------
    cls, config : type and function
        Model class, and what builds its config.
    image : tuple of int
        Token ids that stand for one image.
    pixels : function
        From the number of images of each prompt, and the number of the first, to the per-image inputs.
    per_token : function
        From padded ids and the number of images of each prompt to further per-token inputs.
    before : tuple of int
        Text in front of the first image.
    attentions : tuple of str
        Implementations that the seam delegates to and the model has; the first is its default.
    """

    cls: type
    config: Callable[[], tf.PretrainedConfig]
    image: tuple[int, ...]
    pixels: Callable[[Sequence[int], int], dict[str, torch.Tensor]]
    per_token: Callable[[torch.Tensor, Sequence[int]], dict[str, torch.Tensor]] = lambda ids, counts: {}
    before: tuple[int, ...] = (1, 10, 11)
    attentions: tuple[str, ...] = ("sdpa", "eager")

    def model(self, attention: str | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model; the same weights for every attention."""
        torch.manual_seed(0)
        # The language model's: not every Q-Former has it under every transformers.
        named = {"text_config": attention or self.attentions[0]}
        model = loud(self.cls._from_config(self.config(), attn_implementation=named)).eval()
        with torch.no_grad():
            # Cross-attention and its feed-forward enter through gates that start at zero.
            for name, parameter in model.named_parameters():
                if name.endswith("_gate"):
                    parameter.fill_(0.5)
        return model.to(dtype)

    def prompts(
        self,
        counts: Sequence[int] = (1,),
        after: Sequence[tuple[int, ...]] = (AFTER,),
        side: str = "right",
        start: int = 0,
    ) -> dict[str, torch.Tensor]:
        """Inputs of prompts with ``counts`` images (from number ``start`` on) and closing texts ``after``, padded on ``side``."""
        rows = []
        for count, closing in zip(counts, after, strict=True):
            images = [token for number in range(count) for token in ((20,) if number else ()) + self.image]
            rows.append(torch.tensor([*self.before, *images, *closing]))
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            where = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
            ids[row, where], mask[row, where] = tokens, 1
        return {"input_ids": ids, "attention_mask": mask, **self.pixels(counts, start), **self.per_token(ids, counts)}


def _noise(start: int, n: int, *shape: int) -> torch.Tensor:
    # Image i looks the same however many there are.
    return torch.stack([
        torch.randn(*shape, generator=torch.Generator().manual_seed(number)) for number in range(start + 1, start + n + 1)
    ])


def _flat(*shape: int, **extra: Sequence[int]) -> Callable:
    def pixels(counts: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        n = sum(counts)
        return {
            "pixel_values": _noise(start, n, *shape), **{name: torch.tensor([list(row)] * n) for name, row in extra.items()}
        }

    return pixels


def _nested(*shape: int) -> Callable:
    def pixels(counts: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        images = iter(_noise(start, sum(counts), *shape))
        values = torch.zeros(len(counts), max(counts), *shape)
        for row, count in enumerate(counts):
            for number in range(count):
                values[row, number] = next(images)
        return {"pixel_values": values}

    return pixels


def _clip() -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**PATCHES, projection_dim=16)


def _llava_like(cls: type, config_cls: type, n_image: int, pixels: Callable, **extra) -> Tiny:
    return Tiny(
        cls,
        lambda: config_cls(
            vision_config=_clip(), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN, **extra
        ),
        (IMAGE_TOKEN,) * n_image,
        pixels,
    )


def _qwen(cls: type, config_cls: type, vision: dict, after_merge: int = 12) -> Tiny:
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2,
        "temporal_patch_size": 2, **vision,
    }

    def config():
        return config_cls(
            vision_config=vision,
            text_config={
                **TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        )

    def pixels(counts: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        n = sum(counts)
        return {
            "pixel_values": _noise(start, n, 4 * after_merge, 3 * 2 * 4**2).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 8, 6]] * n),
        }

    return Tiny(
        cls,
        config,
        (62, *(IMAGE_TOKEN,) * after_merge, 63),
        pixels,
        lambda ids, counts: {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()},
    )


def _idefics(cls: type, config_cls: type) -> Tiny:
    return Tiny(
        cls,
        lambda: config_cls(
            vision_config=PATCHES,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        (IMAGE_TOKEN,) * 4,
        _nested(3, 16, 16),
    )


def _idefics2() -> tf.Idefics2Config:
    return tf.Idefics2Config(
        vision_config=PATCHES,
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        text_config={"model_type": "mistral", **TEXT, "sliding_window": 10},
        image_token_id=IMAGE_TOKEN,
    )


def _prefix(ids: torch.Tensor, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    # What the processor gives for a prompt without answer: all of it is prefix.
    return {"token_type_ids": torch.zeros_like(ids)}


def _paligemma(text: dict, attentions: tuple[str, ...] = ("sdpa", "eager")) -> Tiny:
    return Tiny(
        tf.PaliGemmaForConditionalGeneration,
        lambda: tf.PaliGemmaConfig(
            vision_config=SIGLIP, text_config={**TEXT, **text}, image_token_id=IMAGE_TOKEN, projection_dim=32, hidden_size=32
        ),
        (IMAGE_TOKEN,) * 16,
        _flat(3, 16, 16),
        _prefix,
        before=(),
        attentions=attentions,
    )


def _gemma3() -> tf.Gemma3Config:
    return tf.Gemma3Config(
        vision_config=SIGLIP,
        text_config={
            "model_type": "gemma3_text", **TEXT, "sliding_window": 12, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        image_token_id=IMAGE_TOKEN,
        mm_tokens_per_image=4,
    )


def _pixtral() -> dict:
    return {"model_type": "pixtral", **PATCHES, "head_dim": 8}


def _mllama() -> tf.MllamaConfig:
    return tf.MllamaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1], "vision_output_dim": 48,
        },
        text_config={
            **WITHOUT_HEAD_DIM, "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=IMAGE_TOKEN,
    )


def _mllama_pixels(counts: Sequence[int], start: int) -> dict[str, torch.Tensor]:
    # Two of four tiles are used; an image that a prompt does not have is all padding.
    values = _nested(4, 3, 16, 16)(counts, start)["pixel_values"]
    real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return {
        "pixel_values": values,
        "aspect_ratio_ids": 2 * real.long(),
        "aspect_ratio_mask": torch.tensor([1, 1, 0, 0]) * real[:, :, None].long(),
    }


def _mllama_mask(ids: torch.Tensor, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    seen = (ids == IMAGE_TOKEN).cumsum(1)
    images = torch.arange(max(counts)) < seen[:, :, None]
    return {"cross_attention_mask": images[..., None].long() * torch.tensor([1, 1, 0, 0])}


def _blip(cls: type, config_cls: type, decoder: str, asks_qformer: bool = False) -> Tiny:
    text = {"model_type": decoder, **WITHOUT_HEAD_DIM}
    if decoder == "opt":
        text |= {"ffn_dim": 48, "word_embed_proj_dim": 32}

    def pixels(counts: Sequence[int], start: int) -> dict[str, torch.Tensor]:
        question = torch.tensor([[1, 12, 13, 14]] * len(counts))
        asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
        return {"pixel_values": _noise(start, sum(counts), 3, 16, 16), **(asked if asks_qformer else {})}

    return Tiny(
        cls,
        lambda: config_cls(
            vision_config={**VISION, "image_size": 16, "patch_size": 8},
            qformer_config={**VISION, "encoder_hidden_size": 16, "vocab_size": 64},
            text_config=text,
            num_query_tokens=6,
            image_token_index=IMAGE_TOKEN,
        ),
        (IMAGE_TOKEN,) * 6,
        pixels,
        before=(),
    )


# One base view and one tile of 4 x 4 patches, each tile row closed by a newline feature.
_TILED = _flat(2, 3, 16, 16, image_sizes=(16, 16))

TINY: dict[str, Tiny] = {
    "llava": _llava_like(
        tf.LlavaForConditionalGeneration, tf.LlavaConfig, 16, _flat(3, 16, 16),
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    ),
    # Three rows of four patches, each row closed by a text token.
    "llava_pixtral": Tiny(
        tf.LlavaForConditionalGeneration,
        lambda: tf.LlavaConfig(
            vision_config=_pixtral(),
            text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        ((*(IMAGE_TOKEN,) * 4, 21) * 3)[:-1] + (22,),
        _flat(3, 12, 16, image_sizes=(12, 16)),
    ),
    "llava_next": _llava_like(
        tf.LlavaNextForConditionalGeneration, tf.LlavaNextConfig, 16 + 20, _TILED,
        image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1, vision_feature_select_strategy="default",
    ),
    "llava_onevision": Tiny(
        tf.LlavaOnevisionForConditionalGeneration,
        lambda: tf.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_TOKEN,
            image_grid_pinpoints=[[16, 16]],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        (IMAGE_TOKEN,) * (16 + 20),
        _TILED,
    ),
    "vipllava": _llava_like(
        tf.VipLlavaForConditionalGeneration, tf.VipLlavaConfig, 16, _flat(3, 16, 16), vision_feature_layers=[-1, -2]
    ),
    "mistral3": Tiny(
        tf.Mistral3ForConditionalGeneration,
        lambda: tf.Mistral3Config(
            vision_config=_pixtral(),
            text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
            image_token_id=IMAGE_TOKEN,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        (IMAGE_TOKEN,) * 2 + (21,) + (IMAGE_TOKEN,) * 2 + (22,),
        _flat(3, 16, 16, image_sizes=(16, 16)),
    ),
    "aya_vision": Tiny(
        tf.AyaVisionForConditionalGeneration,
        lambda: tf.AyaVisionConfig(
            vision_config=SIGLIP,
            text_config={"model_type": "cohere2", **TEXT, "logit_scale": 0.25, "sliding_window": 10},
            image_token_id=IMAGE_TOKEN,
            downsample_factor=2,
            alignment_intermediate_size=32,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        (IMAGE_TOKEN,) * 4,
        _flat(3, 16, 16),
    ),
    "internvl": Tiny(
        tf.InternVLForConditionalGeneration,
        lambda: tf.InternVLConfig(
            vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE_TOKEN,
            downsample_ratio=0.5,
        ),
        (IMAGE_TOKEN,) * 4,
        _flat(3, 16, 16),
    ),
    "qwen2_vl": _qwen(
        tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    ),
    "qwen2_5_vl": _qwen(
        tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig,
        {"out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _qwen(
        tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig,
        {
            "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
    "glm4v": _qwen(
        tf.Glm4vForConditionalGeneration, tf.Glm4vConfig,
        {"out_hidden_size": 32, "intermediate_size": 32, "image_size": 32},
    ),
    "idefics2": Tiny(
        tf.Idefics2ForConditionalGeneration, _idefics2, (IMAGE_TOKEN,) * 4, _nested(3, 16, 16)
    ),
    "idefics3": _idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config),
    "smolvlm": _idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig),
    "paligemma": _paligemma({"model_type": "gemma"}),
    "paligemma2": _paligemma(
        {
            "model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 64, "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
        attentions=("eager",),
    ),
    "gemma3": Tiny(
        tf.Gemma3ForConditionalGeneration,
        _gemma3,
        (IMAGE_TOKEN,) * 4,
        _flat(3, 16, 16),
        lambda ids, counts: {"token_type_ids": (ids == IMAGE_TOKEN).long()},
    ),
    "mllama": Tiny(
        tf.MllamaForConditionalGeneration, _mllama, (IMAGE_TOKEN,), _mllama_pixels, _mllama_mask
    ),
    "blip2_opt": _blip(tf.Blip2ForConditionalGeneration, tf.Blip2Config, "opt"),
    "blip2_llama": _blip(tf.Blip2ForConditionalGeneration, tf.Blip2Config, "llama"),
    "instructblip_opt": _blip(tf.InstructBlipForConditionalGeneration, tf.InstructBlipConfig, "opt", True),
    "instructblip_llama": _blip(tf.InstructBlipForConditionalGeneration, tf.InstructBlipConfig, "llama", True),
}

FAMILY_OF = {
    name: {
        "llava_pixtral": "llava",
        "paligemma2": "paligemma",
        "blip2_opt": "blip-2/opt",
        "blip2_llama": "blip-2/llama",
        "instructblip_opt": "instructblip/opt",
        "instructblip_llama": "instructblip/llama",
    }.get(name, name)
    for name in TINY
}


def _builder(name: str) -> Callable:
    def build(attention: str | None = None):
        return TINY[name].model(attention), TINY[name].prompts()

    build.__name__ = name
    return build


BUILDERS = {name: _builder(name) for name in TINY}
