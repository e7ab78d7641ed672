"""Real processors of many families beside tiny random-weight models that fit them, nothing downloaded.

``PROCESSORS[model_type]()``   ``(processor, model)``
``VARIANTS[name]()``           other settings of a family: another tower, padding, pan-and-scan ...
``save(directory, name)``      both as a checkpoint on disk

Image processors are those of the PIL backend. Tokenizers know the words of ``tiny.WORDS`` and the family's special
tokens; processors with a video processor, which only torchvision has, are made without.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from vlm_core.families.processing import images_only, processor_class
from vlm_core.tests.tiny import WORDS, loud

PATCH = 8
SIDE = 32
LAYERS = 4
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER : "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT : {{ m['content'][0]['text'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def _tokenizer(*special: str, **named: str) -> tf.PreTrainedTokenizerFast:
    words = dict.fromkeys(("<pad>", "<s>", "</s>", "<unk>", *WORDS, *special, *named.values()))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    if special:
        fast.add_tokens(list(special), special_tokens=True)
    return fast


def _text(model_type: str, tokenizer, **more) -> dict:
    return {
        "model_type": model_type,
        # Room for tokens that a processor adds (PaliGemma's places and segments).
        "vocab_size": len(tokenizer) + 1300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **more,
    }


def _model(cls, config, attention="sdpa"):
    torch.manual_seed(0)
    # The language model's: not every Q-Former has it under every transformers.
    model = loud(cls._from_config(config, attn_implementation={"text_config": attention})).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def _template(image: str) -> str:
    return TEMPLATE.replace("IMAGE", image)


def _image_processor(module: str, name: str, **settings):
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)(**settings)


def _clip(**settings):
    size = {"shortest_edge": SIDE}
    crop = {"height": SIDE, "width": SIDE}
    return _image_processor(
        "clip.image_processing_pil_clip", "CLIPImageProcessorPil", **{"size": size, "crop_size": crop, **settings}
    )


def _square(**settings):
    return {"size": {"height": SIDE, "width": SIDE}, **settings}


def _llava(image_processor, strategy="default", extra=1):
    tokenizer = _tokenizer("<image>")
    processor = tf.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=_template("<image>"),
    )
    config = tf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=_text("llama", tokenizer),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    return processor, _model(tf.LlavaForConditionalGeneration, config)


def llava():
    return _llava(_clip())


def llava_padded():
    """Padded to a square first, CLS kept."""
    name = "LlavaImageProcessorPil"
    square = {"height": SIDE, "width": SIDE}
    settings = {"do_pad": True, "size": square, "crop_size": square}
    return _llava(_image_processor("llava.image_processing_pil_llava", name, **settings), "full")


def llava_stretched():
    """Stretched to the square instead of cropped."""
    return _llava(_clip(size={"height": SIDE, "width": SIDE}, do_center_crop=False))


def _pixtral_processor(tokenizer, merge):
    pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    cls = processor_class("PixtralProcessor")
    image_processor = pil.PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": PATCH * merge, "width": PATCH * merge}
    )
    return cls(image_processor, tokenizer, patch_size=PATCH, spatial_merge_size=merge, chat_template=_template("[IMG]"))


PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 8, "image_size": 64}
IMG = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def llava_pixtral():
    """LLaVA around a Pixtral tower."""
    tokenizer = _tokenizer(*IMG)
    processor = _pixtral_processor(tokenizer, 1)
    config = tf.LlavaConfig(
        vision_config=PIXTRAL,
        text_config=_text("mistral", tokenizer, sliding_window=None),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return processor, _model(tf.LlavaForConditionalGeneration, config)


def mistral3():
    tokenizer = _tokenizer(*IMG)
    processor = _pixtral_processor(tokenizer, 2)
    config = tf.Mistral3Config(
        vision_config=PIXTRAL,
        text_config=_text("mistral", tokenizer, sliding_window=None),
        image_token_id=processor.image_token_id,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return processor, _model(tf.Mistral3ForConditionalGeneration, config)


def vipllava():
    tokenizer = _tokenizer("<image>")
    processor = tf.LlavaProcessor(
        _clip(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    config = tf.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=_text("llama", tokenizer),
        image_token_id=processor.image_token_id,
        vision_feature_layer=[-1, -2],
    )
    return processor, _model(tf.VipLlavaForConditionalGeneration, config)


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def llava_next():
    tokenizer = _tokenizer("<image>")
    name = "LlavaNextImageProcessorPil"
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = tf.LlavaNextProcessor(
        _image_processor(
            "llava_next.image_processing_pil_llava_next", name, image_grid_pinpoints=PINPOINTS, **settings
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )
    config = tf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        text_config=_text("llama", tokenizer),
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return processor, _model(tf.LlavaNextForConditionalGeneration, config)


def _onevision(most, side=SIDE):
    tokenizer = _tokenizer("<image>", "<video>")
    name = "LlavaOnevisionImageProcessorPil"
    pinpoints = [[side * row, side * column] for row in (1, 2, 3) for column in (1, 2, 3)]
    processor = images_only(tf.LlavaOnevisionProcessor)(
        _image_processor(
            "llava_onevision.image_processing_pil_llava_onevision",
            name,
            size={"height": side, "width": side},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer,
        num_image_tokens=(side // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
        chat_template=_template("<image>"),
    )
    config = tf.LlavaOnevisionConfig(
        vision_config={**SIGLIP, "image_size": side},
        text_config=_text("qwen2", tokenizer),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    return processor, _model(tf.LlavaOnevisionForConditionalGeneration, config)


def llava_onevision():
    return _onevision(9)


def llava_onevision_shrunk():
    """So few tokens allowed that the stitched grid is interpolated down."""
    return _onevision(2)


def llava_onevision_uneven():
    """Patches that do not fill a tile, as 14 does not fill 384."""
    return _onevision(9, SIDE + 6)


def internvl():
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    name = "GotOcr2ImageProcessorPil"
    processor = images_only(tf.InternVLProcessor)(
        _image_processor("got_ocr2.image_processing_pil_got_ocr2", name, **_square(max_patches=6)),
        tokenizer,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=_text("qwen2", tokenizer),
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=0.5,
    )
    return processor, _model(tf.InternVLForConditionalGeneration, config)


def aya_vision():
    numbered = [f"TILE_{number}" for number in range(1, 7)]
    tokenizer = _tokenizer(
        "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", *numbered
    )
    name = "GotOcr2ImageProcessorPil"
    processor = tf.AyaVisionProcessor(
        _image_processor("got_ocr2.image_processing_pil_got_ocr2", name, **_square(max_patches=6)),
        tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=_template("<image>"),
    )
    config = tf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config=_text("cohere2", tokenizer, logit_scale=0.25, sliding_window=128),
        image_token_id=processor.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=32,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return processor, _model(tf.AyaVisionForConditionalGeneration, config)


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MERGED = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen(processor_cls, model_cls, config_cls, vision):
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    processor = images_only(processor_cls)(
        _image_processor(
            "qwen2_vl.image_processing_pil_qwen2_vl",
            "Qwen2VLImageProcessorPil",
            patch_size=PATCH,
            size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        ),
        tokenizer,
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    named = zip(
        ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
        tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]),
        strict=True,
    )
    model_type = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}
    config = config_cls(
        vision_config={**MERGED, **vision},
        text_config=_text(model_type[config_cls.model_type], tokenizer, **MROPE),
        **dict(named),
    )
    return processor, _model(model_cls, config)


def qwen2_vl():
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen(tf.Qwen2VLProcessor, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision)


def qwen2_5_vl():
    vision = {
        "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 32, "fullatt_block_indexes": [1]
    }
    return _qwen(tf.Qwen2_5_VLProcessor, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision)


def qwen3_vl():
    vision = {
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(tf.Qwen3VLProcessor, tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, vision)


def glm4v():
    names = {
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "image_token_id": "<|image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
        "video_token_id": "<|video|>",
    }
    tokenizer = _tokenizer(*names.values())
    processor = images_only(tf.Glm4vProcessor)(
        _image_processor(
            "glm4v.image_processing_pil_glm4v",
            "Glm4vImageProcessorPil",
            patch_size=PATCH,
            size={"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 96 * 96},
        ),
        tokenizer,
        chat_template=_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    config = tf.Glm4vConfig(
        vision_config={
            **MERGED, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "image_size": SIDE
        },
        text_config=_text("glm4v_text", tokenizer, **MROPE),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return processor, _model(tf.Glm4vForConditionalGeneration, config)


def _idefics_tokens():
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)


def _split(processor_cls, image_processor, model_cls, config_cls):
    tokenizer = _tokenizer(*_idefics_tokens())
    settings = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = processor_cls.from_args_and_dict(
        [image_processor(**settings), tokenizer],
        {"image_seq_len": (SIDE // PATCH // 2) ** 2, "chat_template": _template("<image>")},
    )
    config = config_cls(
        vision_config=VISION,
        text_config=_text("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return processor, _model(model_cls, config)


def idefics3():
    module = importlib.import_module("transformers.models.idefics3.image_processing_pil_idefics3")
    return _split(
        tf.Idefics3Processor, module.Idefics3ImageProcessorPil, tf.Idefics3ForConditionalGeneration, tf.Idefics3Config
    )


def idefics3_whole():
    """Without splitting."""
    processor, model = idefics3()
    processor.image_processor.do_image_splitting = False
    return processor, model


def smolvlm():
    module = importlib.import_module("transformers.models.smolvlm.image_processing_pil_smolvlm")
    return _split(
        images_only(tf.SmolVLMProcessor),
        module.SmolVLMImageProcessorPil,
        tf.SmolVLMForConditionalGeneration,
        tf.SmolVLMConfig,
    )


def idefics2():
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    name = "Idefics2ImageProcessorPil"
    size = {"shortest_edge": 24, "longest_edge": 64}
    processor = tf.Idefics2Processor(
        _image_processor("idefics2.image_processing_pil_idefics2", name, size=size, do_image_splitting=True),
        tokenizer,
        image_seq_len=3,
        chat_template=_template("<image>"),
    )
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 64},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        text_config=_text("mistral", tokenizer, sliding_window=None),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, _model(tf.Idefics2ForConditionalGeneration, config)


def _paligemma(model_type, **text):
    tokenizer = _tokenizer("<image>")
    image_processor = _image_processor(
        "siglip.image_processing_pil_siglip", "SiglipImageProcessorPil", **_square()
    )
    image_processor.image_seq_length = (SIDE // PATCH) ** 2
    processor = tf.PaliGemmaProcessor(image_processor, tokenizer)
    config = tf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config=_text(model_type, tokenizer, **text),
        image_token_id=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return processor, _model(tf.PaliGemmaForConditionalGeneration, config, "eager" if text else "sdpa")


def paligemma():
    return _paligemma("gemma")


def paligemma2():
    """Around Gemma 2."""
    caps = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
    return _paligemma("gemma2", query_pre_attn_scalar=8, sliding_window=64, **caps)


def gemma3():
    tokenizer = _tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    processor = tf.Gemma3Processor(
        _image_processor("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil", **_square()),
        tokenizer,
        image_seq_length=4,
        chat_template=_template("<start_of_image>"),
    )
    config = tf.Gemma3Config(
        vision_config=SIGLIP,
        text_config=_text(
            "gemma3_text",
            tokenizer,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
    )
    return processor, _model(tf.Gemma3ForConditionalGeneration, config)


def gemma3_pan_and_scan():
    """Crops of long images beside the whole."""
    processor, model = gemma3()
    processor.images_kwargs = {
        **processor.images_kwargs, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16
    }
    return processor, model


def mllama():
    tokenizer = _tokenizer("<|image|>", "<|python_tag|>")
    processor = tf.MllamaProcessor(
        _image_processor("mllama.image_processing_pil_mllama", "MllamaImageProcessorPil", **_square()),
        tokenizer,
        chat_template=_template("<|image|>"),
    )
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1,
            "intermediate_size": 32, "vision_output_dim": 32, "image_size": SIDE, "patch_size": PATCH,
            "intermediate_layers_indices": [0],
        },
        text_config=_text("mllama_text_model", tokenizer, cross_attention_layers=[1, 3]),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return processor, _model(tf.MllamaForConditionalGeneration, config)


OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True, "activation_function": "relu"}


def _blip(processor_cls, model_cls, config_cls, decoder="opt", **more):
    tokenizer = _tokenizer("<image>")
    processor = processor_cls(
        _image_processor("blip.image_processing_pil_blip", "BlipImageProcessorPil", **_square()),
        tokenizer,
        num_query_tokens=5,
        **({"qformer_tokenizer": _tokenizer()} if more else {}),
    )
    config = config_cls(
        vision_config=VISION,
        qformer_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "encoder_hidden_size": 16, "vocab_size": len(tokenizer), "cross_attention_frequency": 1,
        },
        text_config=_text(decoder, tokenizer, **(OPT if decoder == "opt" else {})),
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, _model(model_cls, config)


def blip2():
    return _blip(tf.Blip2Processor, tf.Blip2ForConditionalGeneration, tf.Blip2Config)


def instructblip():
    return _blip(
        tf.InstructBlipProcessor, tf.InstructBlipForConditionalGeneration, tf.InstructBlipConfig, qformer=True
    )


def blip2_llama():
    """BLIP-2 around a Llama."""
    return _blip(tf.Blip2Processor, tf.Blip2ForConditionalGeneration, tf.Blip2Config, "llama")


def instructblip_llama():
    """InstructBLIP around a Llama."""
    return _blip(
        tf.InstructBlipProcessor, tf.InstructBlipForConditionalGeneration, tf.InstructBlipConfig, "llama", qformer=True
    )


PROCESSORS = {
    **{
        builder.__name__: builder
        for builder in (
            llava, vipllava, llava_next, llava_onevision, mistral3, aya_vision, internvl, qwen2_vl, qwen2_5_vl, qwen3_vl,
            glm4v, idefics2, idefics3, smolvlm, paligemma, gemma3, mllama, instructblip,
        )
    },
    "blip-2": blip2,
}
VARIANTS = {
    variant.__name__: variant
    for variant in (
        llava_padded, llava_stretched, llava_pixtral, llava_onevision_shrunk, llava_onevision_uneven, idefics3_whole,
        paligemma2, gemma3_pan_and_scan, blip2_llama, instructblip_llama,
    )
}


def save(directory: Path, name: str) -> Path:
    """The checkpoint of ``PROCESSORS[name]`` (or a variant) written to ``directory``."""
    processor, model = {**PROCESSORS, **VARIANTS}[name]()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
