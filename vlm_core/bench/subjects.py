"""The models that are measured on, and their prompts.

``open_case(name)``    a subject, its prompts, and the same weights in a plain transformers model
``Shape``              sizes of a LLaVA that is built here with random weights
``random_llava(shape)``    that LLaVA and its processor

Every prompt has its own noise image, so nothing that a tool keeps from one prompt helps it with the next.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from vlm_core import Batch, HeadId, ImageKVMeans, Subject, SubjectError, image_kv_means, load_vlm

__all__ = ["CANDIDATES", "EMBEDDED", "SHAPES", "Case", "Prompt", "Shape", "open_case", "own_tree", "random_llava"]

CANDIDATES = ("yes", "no")
EMBEDDED = Path(__file__).resolve().parents[2] / "fixtures" / "embedded" / "vlm"
MEANS_OVER = 4
TOKENS_AROUND_QUESTION = 5  # <s> USER : ... ASSISTANT :


@dataclass(frozen=True)
class Shape:
    """Sizes of a random-weights LLaVA: ``grid²`` image tokens and ``text`` text tokens in a prompt."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    grid: int
    text: int
    vocabulary: int
    patch: int = 14
    vision_layers: int = 2
    vision_hidden: int = 128
    vision_heads: int = 4


SHAPES = {
    # 24 x 24 patches of 14 pixels, as LLaVA 1.5 has; the decoder's proportions are Llama's. The vision tower is small: it is not compared.
    "midsize": Shape(layers=12, heads=8, hidden=512, intermediate=1376, grid=24, text=24, vocabulary=1024),
    # LLaVA 1.5 with 7 G parameters, tower included: for a GPU.
    "7b": Shape(
        layers=32, heads=32, hidden=4096, intermediate=11008, grid=24, text=24, vocabulary=32064, vision_layers=24, vision_hidden=1024,
        vision_heads=16,
    ),
    "tiny": Shape(layers=3, heads=2, hidden=32, intermediate=64, grid=4, text=12, vocabulary=64, patch=4, vision_hidden=32),
}


def random_llava(
    shape: Shape, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, object]:
    """A LLaVA with random weights, made where it is used, and its processor; nothing is downloaded.

    Weight matrices are drawn wider than an initialisation would, so that every head visibly matters to the logits.
    """
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

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":", *CANDIDATES]
    words += [f"w{number}" for number in range(shape.vocabulary - len(words))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"height": shape.grid * shape.patch, "width": shape.grid * shape.patch}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
        ),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "<s> USER : {% for m in messages %}{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
            "{% endfor %}{% endfor %}ASSISTANT :"
        ),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=(4 if shape.vision_layers > 2 else 2) * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
            image_size=size["height"],
            patch_size=shape.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=words.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=shape.grid**2,
        architectures=["LlavaForConditionalGeneration"],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval(), processor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt in every form that a tool may want.

    Parameters
    ----------
    item : dict
        For ``vlm_core.sweep`` and ``observe``.
    batch : Batch
        Processor outputs, one prompt, no padding.
    embeds : Tensor ``[1, token, hidden]``
        Text embeddings with the image features merged in: a peer starts here, its image is encoded for free.
    cos, sin : Tensor ``[1, token, head_dim]``
        Rotary tables of the prompt.
    """

    item: dict
    batch: Batch
    embeds: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @cached_property
    def image(self) -> torch.Tensor:
        """Image tokens, BoolTensor ``[token]``."""
        return self.batch.image[0]

    @cached_property
    def text(self) -> torch.Tensor:
        """Positions of the text tokens, LongTensor ``[text]``."""
        return (~self.image).nonzero()[:, 0]

    @cached_property
    def question(self) -> int:
        """How many tokens follow the last image token."""
        return int((self.image.int().flip(0).argmax()).item())


@dataclass(eq=False)
class Case:
    """A subject to measure on.

    Attributes
    ----------
    subject : Subject
    plain : nn.Module
        A second model around the same parameters, without seam, hooks or changed attention.
    means : ImageKVMeans
        What ``ReplaceImageKV`` puts in place of image keys and values.
    """

    name: str
    subject: Subject
    plain: nn.Module
    question: str
    image_size: int
    seed: int = 0
    _prompts: dict[int, Prompt] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.subject.anatomy.embedding.weight.dtype

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Every head: the interventions of a sweep."""
        return self.subject.heads

    @cached_property
    def means(self) -> ImageKVMeans:
        """Over prompts that are measured nowhere."""
        return image_kv_means(self.subject, [self.item(-1 - number) for number in range(MEANS_OVER)])

    def item(self, number: int) -> dict:
        """A probe item: a noise image, the question, two candidates."""
        generator = np.random.default_rng([self.seed, number + MEANS_OVER])
        pixels = generator.integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)
        return {
            "id": f"{self.name}-{number}",
            "scene_id": f"{self.name}-{number}",
            "task": "bench",
            "image": Image.fromarray(pixels),
            "prompt": self.question,
            "answer": CANDIDATES[0],
            "candidates": list(CANDIDATES),
        }

    def prompt(self, number: int) -> Prompt:
        """Prompt ``number``, prepared once."""
        if number not in self._prompts:
            item = self.item(number)
            batch = self.subject.encode_items([item])
            with torch.inference_mode():
                base = self.plain.model
                embeds = base.get_input_embeddings()(batch.inputs["input_ids"])
                features = base.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output
                embeds = embeds.masked_scatter(batch.image[..., None], torch.cat(list(features)).to(embeds.dtype))
                positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
                cos, sin = base.language_model.rotary_emb(embeds, positions)
            self._prompts[number] = Prompt(item, batch, embeds, cos, sin)
        return self._prompts[number]

    def values(self, logits: torch.Tensor) -> np.ndarray:
        """What a sweep tells of next-token logits ``[n, vocabulary]``: ``[n, 1 + candidate]``.

        The raw logit of the right answer and every candidate's log-probability, which the whole vocabulary enters.
        """
        logits = logits.float()
        tokens = [self.subject.continuation(candidate)[0] for candidate in CANDIDATES]
        return torch.cat([logits[:, tokens[:1]], logits.log_softmax(1)[:, tokens]], dim=1).cpu().numpy()


def own_tree(model: nn.Module) -> nn.Module:
    """Modules of their own around the same parameters: hooks and wrappers of one tool stay out of another's way."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def open_case(
    name: str, checkpoint: Path | None = None, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Case:
    """A subject by name: ``embedded`` (from ``checkpoint``), or one of ``SHAPES`` (random weights).

    Raises
    ------
    SubjectError
        Where the checkpoint is not there, or is none that the plain way of working is written for.
    """
    if name in SHAPES:
        shape = SHAPES[name]
        model, processor = random_llava(shape, seed, device, dtype)
        plain = own_tree(model)
        filler = " ".join(f"w{number}" for number in range(shape.text - TOKENS_AROUND_QUESTION))
        case = Case(name, Subject(model, processor, name=name), plain, filler, shape.grid * shape.patch, seed)
    elif name == "embedded":
        path = EMBEDDED if checkpoint is None else Path(checkpoint)
        if not path.is_dir():
            raise SubjectError(
                f"subject 'embedded' needs a checkpoint, there is none at {path}: run from a checkout or name one with --checkpoint"
            )
        subject = load_vlm(path, device=str(device), dtype=dtype)
        if subject.anatomy.family.model_type != "llava" or subject.model.config.text_config.model_type != "llama":
            raise SubjectError(f"subject '{path}' is no LLaVA with a Llama decoder: the hooks it is compared with are written for one")
        subject.seam.remove()
        plain = own_tree(subject.model)
        subject = Subject(subject.model, subject.processor, name=name, checkpoint=subject.checkpoint)
        case = Case(name, subject, plain, "is there a red circle ?", subject.model.config.vision_config.image_size, seed)
    else:
        raise SubjectError(f"unknown subject '{name}': choose embedded, {' or '.join(SHAPES)}")
    for candidate in CANDIDATES:
        if len(case.subject.continuation(candidate)) != 1:
            raise SubjectError(f"subject '{name}' needs more than one token for '{candidate}': choose another checkpoint")
    return case
