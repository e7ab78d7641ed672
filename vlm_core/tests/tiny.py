"""Tiny random-weight models, a word tokenizer and items: everything the tests of this package measure.

``tiny_llava(...)``    a LLaVA of a few thousand parameters with its processor, nothing downloaded
``make_items(n)``      items with a colour patch as image and colour candidates
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_core import Subject

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "yellow": (200, 200, 30)}
WORDS = (
    *COLOURS,
    *"what is in the image ? color shape of big small circle square question reply USER ASSISTANT : dark light".split(),
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER : "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT : {{ m['content'][0]['text'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the test vocabulary."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def llava_processor(image_size: int, patch_size: int, chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """The processor of ``tiny_llava``, on the PIL backend."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": image_size, "width": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        tokenizer=word_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def loud(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraw all matrices with a larger spread, so that every head and every image visibly matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                spread = 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_llava(
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 4,
    hidden: int = 32,
    image_size: int = 16,
    patch_size: int = 4,
    attention: str = "sdpa",
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    intermediate: int | None = None,
    vision_layers: int = 2,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with random weights and its processor. One CLS token and ``(image_size / patch_size)²`` patches."""
    processor = llava_processor(image_size, patch_size, chat_template)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate or 2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(image_size // patch_size) ** 2 + 1,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return loud(model, seed).eval(), processor


def tiny_subject(**options) -> Subject:
    """``tiny_llava`` as a subject."""
    model, processor = tiny_llava(**options)
    return Subject(model, processor, name="tiny")


def make_items(n: int, *, size: int = 16, seed: int = 0, multi_token: bool = False) -> list[dict]:
    """Items whose image is a noisy colour patch; two items a scene; prompts of two lengths."""
    generator = np.random.default_rng(seed)
    names = list(COLOURS)
    items = []
    for index in range(n):
        colour = names[int(generator.integers(len(names)))]
        pixels = np.array(COLOURS[colour]) + generator.integers(-30, 30, (size, size, 3))
        candidates = [f"dark {name}" if multi_token and name in ("red", "blue") else name for name in names]
        items.append(
            {
                "id": f"item-{index}",
                "scene_id": f"scene-{index // 2}",
                "task": "color" if index % 2 == 0 else "shape",
                "image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)),
                "prompt": "what color is in the image ?" if index % 3 else "what is the color of the big circle ?",
                "answer": candidates[names.index(colour)],
                "candidates": candidates,
            }
        )
    return items
