"""Images and prompts as a model's inputs.

``Batch``          a few prompts as the processor lays them out
``encode(...)``    makes one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from vlm_core.errors import SubjectError
from vlm_core.images import as_rgb, require_image
from vlm_core.seam.views import Tokens
from vlm_core.subjects.wording import require_texts

if TYPE_CHECKING:
    from vlm_core.subjects.subject import Subject

__all__ = ["Batch", "encode"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Processor outputs for a few prompts.

    Parameters
    ----------
    inputs : dict
        For ``model(**inputs)`` or ``model.generate(**inputs)``.
    image, valid : BoolTensor ``[prompt, token]``
        Image tokens; tokens that are not padding.
    labels : LongTensor ``[prompt, token]`` or None
        With ``answers``: answer tokens, -100 elsewhere.
    items : tuple of int or None
        One number per prompt that names its item, where it was made of items.
    sizes : tuple of tuples of (height, width)
        The images of each prompt; empty where the batch was not made of images.
    """

    inputs: dict[str, torch.Tensor]
    image: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor | None = None
    items: tuple[int, ...] | None = None
    sizes: tuple[tuple[tuple[int, int], ...], ...] = ()
    _tokens: tuple[tuple, Tokens] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return self.image.shape[0]

    def __post_init__(self) -> None:
        for name, mask in (("image", self.image), ("valid", self.valid)):
            if not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim == 2):
                found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise ValueError(f"{name} of a batch must be a BoolTensor [prompt, token], got {found}")
        if self.image.shape != self.valid.shape or not self.image.numel():
            raise ValueError(
                f"image is {tuple(self.image.shape)} and valid {tuple(self.valid.shape)}: a batch needs both of one shape, [prompt, token], "
                f"with at least one token"
            )

    @property
    def tokens(self) -> Tokens:
        """Which token is what, with what is worked out from it once for every run on prompts that are laid out like these."""
        state = self.state
        if self._tokens is None or self._tokens[0] != state:
            masks = tuple(mask.cpu().numpy().tobytes() for mask in (self.image & self.valid, self.valid))
            object.__setattr__(self, "_tokens", (state, _laid_out(*masks, tuple(self.valid.shape), self.valid.device)))
        return self._tokens[1]

    def lay_out(self) -> Batch:
        """The same, with its tokens known: once, where the prompt is encoded."""
        _ = self.tokens
        return self

    @property
    def state(self) -> tuple[int, int]:
        """What tells of a change in place of ``image`` or ``valid``."""
        return tuple(-1 if mask.is_inference() else mask._version for mask in (self.image, self.valid))


@lru_cache(maxsize=16)
def _laid_out(image: bytes, valid: bytes, shape: tuple[int, int], device: torch.device) -> Tokens:
    """Tokens of a layout; batches that have it share them, for most prompts of a set are laid out alike."""
    with torch.inference_mode(False):
        masks = [torch.frombuffer(bytearray(mask), dtype=torch.bool).view(shape).to(device) for mask in (image, valid)]
        tokens = Tokens(*masks, torch.arange(shape[0], device=device))
        for group in ("image", "text"):
            tokens.members(group)
        return tokens


def encode(subject: Subject, images: Sequence, prompts: Sequence[str], answers: Sequence[str] | None, padding_side: str) -> Batch:
    """See ``Subject.encode``."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' (for generate) or 'right', got {padding_side!r}")
    pictures = _pictures(subject, images, prompts)
    tokenizer, wording = subject.tokenizer, subject.wording
    texts = [
        wording.turns(prompt, n_images=len(shown)) for prompt, shown in zip(prompts, pictures, strict=True)
    ]
    questions, options = texts, {}
    if answers is not None:
        require_texts(answers, "answers")
        if len(answers) != len(texts):
            raise ValueError(f"{len(answers)} answers for {len(texts)} prompts: give one per prompt")
        if subject.anatomy.family.answer_apart:
            options["suffix"] = list(answers)
        else:
            texts = [text + wording.lead() + answer for text, answer in zip(texts, answers, strict=True)]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    nested = subject.anatomy.family.nested_images
    inputs = subject.processor(
        images=pictures if nested else [picture for shown in pictures for picture in shown],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side=padding_side,
        **options,
        **_special_tokens(tokenizer, texts),
    )
    if answers is not None and "qformer_input_ids" in inputs:
        # A Q-Former is asked the question alone: with the answer in it the image features would give it away.
        asked = subject.processor.qformer_tokenizer(
            questions, return_tensors="pt", padding=True, padding_side=padding_side
        )
        inputs["qformer_input_ids"], inputs["qformer_attention_mask"] = asked["input_ids"], asked["attention_mask"]
    # Some processors add labels of their own, which would make every forward pass compute a loss.
    inputs = {name: value.to(subject.device) for name, value in inputs.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(subject.anatomy.embedding.weight.dtype)
    image = inputs["input_ids"] == subject.anatomy.image_token_id
    if not bool(image.any(1).all()):
        raise SubjectError(
            f"subject '{subject.name}' has no image tokens in this prompt: its processor needs the image token "
            f"(id {subject.anatomy.image_token_id}) once per image; check its chat template."
        )
    valid = inputs["attention_mask"].bool()
    labels = None if answers is None else _labels(subject, inputs["input_ids"], valid, answers)
    sizes = tuple(tuple((picture.height, picture.width) for picture in shown) for shown in pictures)
    return Batch(inputs, image, valid, labels, sizes=sizes).lay_out()


def _pictures(subject: Subject, images: Sequence, prompts: Sequence[str]) -> list[list]:
    require_texts(prompts, "prompts")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: write out what the model is asked")
    if isinstance(images, str) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise ValueError(f"images must be a list with one entry per prompt, got {type(images).__name__}: write [image], also of one")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts: give one, or a list of them, per prompt")
    if not len(prompts):
        raise ValueError("there is nothing to encode: give at least one image and its prompt")
    pictures = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in images]
    most = subject.anatomy.family.max_images
    for prompt, shown in zip(prompts, pictures, strict=True):
        if not shown:
            raise SubjectError(
                f"subject '{subject.name}' has no image tokens in the prompt '{prompt}': give it at least one image."
            )
        if most is not None and len(shown) > most:
            raise SubjectError(
                f"subject '{subject.name}' takes {most} image per prompt, got {len(shown)} for '{prompt}': its family "
                f"({subject.anatomy.family.model_type}) has no place for more; ask about them one by one."
            )
    for prompt, shown in zip(prompts, pictures, strict=True):
        require_image(shown if len(shown) > 1 else shown[0], f"the image of the prompt '{prompt}'")
    return [[as_rgb(picture) for picture in shown] for shown in pictures]


def _labels(subject: Subject, ids: torch.Tensor, valid: torch.Tensor, answers: Sequence[str]) -> torch.Tensor:
    labels = torch.full_like(ids, -100)
    # A processor that takes answers apart closes them with one end token.
    ends = valid.shape[1] - valid.flip(1).int().argmax(1) - int(subject.anatomy.family.answer_apart)
    for row, answer in enumerate(answers):
        end = int(ends[row])
        start = end - len(subject.continuation(answer))
        labels[row, start:end] = ids[row, start:end]
    return labels


def _special_tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, bool]:
    # A chat template that writes the first special token itself must not get a second one.
    bos = tokenizer.bos_token
    return {"add_special_tokens": False} if bos and texts and texts[0].startswith(bos) else {}
