"""Tiny random-weight models of many families with ready-made inputs, built from configs without any download.

``BUILDERS[model_type]()`` gives ``(model, inputs)`` with one unpadded prompt: text, one image, text.
"""

from __future__ import annotations

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
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_TOKEN = 60


def _ids(n_image: int, before=(1, 10, 11), after=(12, 13, 14, 15, 16)) -> torch.Tensor:
    return torch.tensor([[*before, *[IMAGE_TOKEN] * n_image, *after]])


def _inputs(n_image: int, pixels: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    ids = _ids(n_image)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **extra}


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _model(cls, config, attention: str = "sdpa"):
    torch.manual_seed(0)
    return loud(cls._from_config(config, attn_implementation=attention)).eval()


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=16),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _model(tf.LlavaForConditionalGeneration, config), _inputs(16, _pixels(1, 3, 16, 16))


def _qwen(cls, config_cls, vision: dict, text: dict):
    config = config_cls(
        vision_config=vision,
        text_config={**TEXT, **text},
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    grid = torch.tensor([[1, 8, 6]])
    ids = _ids(12)
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    inputs = _inputs(
        12, _pixels(48, patch), image_grid_thw=grid, mm_token_type_ids=(ids == IMAGE_TOKEN).int()
    )
    return _model(cls, config), inputs


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def qwen2_vl():
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }
    return _qwen(tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision, MROPE)


def qwen2_5_vl():
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4,
        "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen(tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision, MROPE)


def qwen3_vl():
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4,
        "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, vision, MROPE)


def internvl():
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
    )
    return _model(tf.InternVLForConditionalGeneration, config), _inputs(4, _pixels(1, 3, 16, 16))


def _idefics(cls, config_cls):
    config = config_cls(
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return _model(cls, config), _inputs(8, _pixels(1, 2, 3, 16, 16))


def idefics3():
    return _idefics(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config)


def smolvlm():
    return _idefics(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig)


def paligemma():
    config = tf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "gemma", **TEXT},
        image_token_id=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    ids = _ids(16)
    types = torch.zeros_like(ids)
    types[:, -2:] = 1
    return _model(tf.PaliGemmaForConditionalGeneration, config), _inputs(
        16, _pixels(1, 3, 16, 16), token_type_ids=types
    )


def paligemma2():
    config = tf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={
            "model_type": "gemma2", **TEXT, "query_pre_attn_scalar": 8, "sliding_window": 64,
            "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
        },
        image_token_id=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    ids = _ids(16)
    types = torch.zeros_like(ids)
    types[:, -2:] = 1
    model = _model(tf.PaliGemmaForConditionalGeneration, config, attention="eager")
    return model, _inputs(16, _pixels(1, 3, 16, 16), token_type_ids=types)


def glm4v():
    vision = {
        "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 4,
        "image_size": 32, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }
    return _qwen(tf.Glm4vForConditionalGeneration, tf.Glm4vConfig, vision, MROPE)


def gemma3():
    config = tf.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={
            "model_type": "gemma3_text",
            **TEXT,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        image_token_id=IMAGE_TOKEN,
        mm_tokens_per_image=4,
    )
    ids = _ids(4)
    return _model(tf.Gemma3ForConditionalGeneration, config), _inputs(
        4, _pixels(1, 3, 16, 16), token_type_ids=(ids == IMAGE_TOKEN).long()
    )


def aya_vision():
    config = tf.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "cohere2", **TEXT, "logit_scale": 0.25, "sliding_window": 128},
        image_token_id=IMAGE_TOKEN,
        downsample_factor=2,
        alignment_intermediate_size=32,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return _model(tf.AyaVisionForConditionalGeneration, config), _inputs(4, _pixels(1, 3, 16, 16))


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = _model(tf.LlavaOnevisionForConditionalGeneration, config)
    # One base view and one tile of 4 x 4 patches, each tile row closed by a newline feature.
    return model, _inputs(16 + 20, _pixels(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]]))


def mistral3():
    config = tf.Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_id=IMAGE_TOKEN,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return _model(tf.Mistral3ForConditionalGeneration, config), _inputs(
        4, _pixels(1, 3, 16, 16), image_sizes=torch.tensor([[16, 16]])
    )


BUILDERS = {
    builder.__name__: builder
    for builder in (
        llava, llava_onevision, mistral3, aya_vision, internvl, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm,
        paligemma, paligemma2, gemma3, glm4v,
    )
}
