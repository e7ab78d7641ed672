"""Image features once per image, however many prompts ask about it, and however many images a prompt has.

``encode_distinct(subject, items, known)``   like ``vlm_core.subjects.embed.encode_items``, but no image passes the vision tower twice
``KnownFeatures``                            what the vision tower made of images, within so many bytes
``recalling(subject, known)``                context manager: the subject's vision tower computes only images that it does not know
``Prompt``, ``prompts_of(...)``              the tokens of items' prompts, for which nothing of the model has to run

One mechanism serves every family: the output of the *vision tower*, remembered image by image. What reaches the tower are pixels as the
processor made them, so an image is known by those (with what else the tower is told about it), wherever it came from: another prompt,
another place in a list of images, another tile with the same content. Everything after the tower is the model's own code and runs for
every prompt, a Q-Former that reads the question (InstructBLIP) included. How images lie in a tower's inputs is told by the inputs' names
(``_CUTS``); a tower whose tensors cannot be cut image by image runs as it is, every time, and so does one whose attention is recorded.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from vlm_core.items import item_field
from vlm_core.memory import Bounded
from vlm_core.seam.tower import recording
from vlm_core.subjects.embed import Encoded, encode_items
from vlm_core.subjects.remembering import prompt_key
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.budget import free_bytes

__all__ = ["KnownFeatures", "Prompt", "encode_distinct", "prompts_of", "recalling", "vision_tower"]

_SHARE_OF_MEMORY = 0.1
# A tower's forward is replaced while items are encoded: one thread at a time, of several subjects if it wants to.
_ENCODING = threading.RLock()


def encode_distinct(
    subject: Subject, items: Sequence, known: KnownFeatures | None = None, batch: int = 32, reads: Collection[str] = ()
) -> list[Encoded]:
    """Encode items, every image once.

    Parameters
    ----------
    items : sequence of items
        Each with an image or a list of them.
    known : KnownFeatures, optional
        Of this subject: images encoded before. Default: none, and nothing is kept beyond this call.
    batch : int
        Prompts per call of the model.
    reads : collection of str
        As in ``vlm_core.subjects.embed.encode_items``.
    """
    with recalling(subject, KnownFeatures.of(subject) if known is None else known):
        return encode_items(subject, items, batch=batch, reads=reads)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens of an item's prompt, before anything of the model has run.

    Parameters
    ----------
    ids : LongTensor ``[token]``
    image : BoolTensor ``[token]``
        Image tokens, of all images of the prompt.
    n_prompt : int
        Its tokens: all of them.
    groups : dict of str to BoolTensor ``[token]``
        Named token groups (``vlm_core.subjects.groups``).
    """

    ids: torch.Tensor
    image: torch.Tensor
    n_prompt: int
    groups: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.n_prompt

    @classmethod
    def of(cls, encoded: Encoded) -> Prompt:
        """The tokens of an encoded prompt."""
        return cls(encoded.ids.cpu(), encoded.image.cpu(), encoded.n_prompt)


def prompts_of(subject: Subject, items: Sequence, batch: int = 32) -> list[Prompt]:
    """The prompts of items as the processor lays them out; those that the subject remembers (``vlm_core.subjects.remembering``) are known."""
    if subject.known_prompts is not None:
        keys = [prompt_key(item_field(item, "image"), item_field(item, "prompt")) for item in items]
        encoded = subject.known_prompts.find(subject.weights_state(), keys)
        if None not in encoded:
            return [Prompt.of(one) for one in encoded]
    prompts = []
    for start in range(0, len(items), batch):
        prepared = subject.encode_items(items[start : start + batch], padding_side="right")
        for ids, image, valid in zip(prepared.inputs["input_ids"].cpu(), prepared.image.cpu(), prepared.valid.cpu(), strict=True):
            n = int(valid.sum())
            prompts.append(Prompt(ids[:n], image[:n], n))
    return prompts


class KnownFeatures(Bounded):
    """What a vision tower made of images: of each, and the type that it came in; see ``vlm_core.memory.Bounded``.

    Parameters
    ----------
    limit : int
        Bytes that may be kept.
    alone : bool
        Whether every image passes the tower alone. The last bits of what is known of it then do not depend on what came with it.
    """

    def __init__(self, limit: int, alone: bool = False) -> None:
        super().__init__(limit)
        self.alone = alone

    @classmethod
    def of(cls, subject: Subject, alone: bool = False) -> KnownFeatures:
        """Room for a tenth of the memory that is free where the subject is."""
        return cls(int(free_bytes(subject.device) * _SHARE_OF_MEMORY), alone)

    def learn(self, key: bytes, piece: tuple[type, dict]) -> None:
        """Remember what the tower gave for one image."""
        self.keep(key, piece, sum(tensor.numel() * tensor.element_size() for tensor in _tensors(piece)))


def vision_tower(subject: Subject) -> nn.Module | None:
    """The module that sees the pixels; None where the model names none."""
    found = subject.anatomy.base.get_encoder(modality="image")
    return None if found is subject.anatomy.base else found


@contextmanager
def recalling(subject: Subject, known: KnownFeatures) -> Iterator[None]:
    """In this context (and this thread) the subject's vision tower computes only images that ``known`` does not hold, each once."""
    tower = vision_tower(subject)
    if tower is None:
        yield
        return
    with _ENCODING:
        thread, original, own = threading.get_ident(), tower.forward, tower.__dict__.get("forward")
        signature = inspect.signature(original)

        def forward(*args, **kwargs):
            if threading.get_ident() != thread or recording():
                return original(*args, **kwargs)
            return _recall(original, signature, known, args, kwargs)

        tower.forward = forward
        try:
            yield
        finally:
            if own is None:
                del tower.forward
            else:
                tower.forward = own


def _recall(original: Callable, signature: inspect.Signature, known: KnownFeatures, args: tuple, kwargs: dict) -> Any:
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        given.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in given.items() if name not in tensors}
    cut = next((make for name, make in _CUTS.items() if name in tensors), _rows)(tensors)
    if cut is None or any(True for _ in _tensors(others)):
        return original(*args, **kwargs)
    keys = [_digest(one, others) for one in cut.identities]
    pieces = {key: known.get(key) for key in keys}
    missing = [keys.index(key) for key, piece in pieces.items() if piece is None]
    for some in [[number] for number in missing] if known.alone else [missing] if missing else []:
        output = original(**cut.inputs(some), **others)
        found = cut.outputs(output, some)
        if found is None:
            return output if len(some) == len(keys) else original(*args, **kwargs)
        for number, piece in zip(some, found, strict=True):
            pieces[keys[number]] = type(output), piece
            known.learn(keys[number], pieces[keys[number]])
        if len(some) == len(keys):
            return output
    kind, _ = pieces[keys[0]]
    return kind(**cut.joined([pieces[key][1] for key in keys]))


def _digest(tensors: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(repr(sorted(others.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class _Cut:
    """A tower's inputs and outputs, image by image.

    Parameters
    ----------
    identities : list of dict of tensors, one per image
        What of the inputs is the image's.
    inputs : function
        From numbers of images to the inputs that hold only them.
    lengths : list of int, one per image
        Its share of an output's ``dim``.
    merges : bool
        Whether outputs may be shorter by a factor common to all images (patches merged into tokens).
    dim : int
        The output's dimension along which images lie.
    folded : tuple of int, optional
        The leading dimensions of the inputs that were made one; the outputs get them back.
    """

    identities: list[dict[str, torch.Tensor]]
    inputs: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    lengths: list[int]
    merges: bool = False
    dim: int = 0
    folded: tuple[int, ...] = ()

    def outputs(self, output: Any, numbers: Sequence[int]) -> list[dict] | None:
        """Each image's part of what the tower gave for some; None where it cannot be cut."""
        if not isinstance(output, Mapping):
            return None
        lengths = [self.lengths[number] for number in numbers]
        total = sum(lengths)

        def pieces(value: Any) -> list | None:
            if isinstance(value, torch.Tensor):
                n = value.shape[self.dim] if value.ndim > self.dim else 0
                fits = (self.merges or n == total) and n and not any(length * n % total for length in lengths)
                # Cloned: a slice would hold the whole output.
                return [part.clone() for part in value.split([length * n // total for length in lengths], self.dim)] if fits else None
            if isinstance(value, tuple | list):
                inner = [pieces(one) for one in value]
                return None if any(one is None for one in inner) else [type(value)(part) for part in zip(*inner, strict=True)]
            return [value] * len(lengths) if value is None else None

        found = {name: pieces(value) for name, value in output.items()}
        if any(one is None for one in found.values()):
            return None
        return [{name: parts[number] for name, parts in found.items()} for number in range(len(lengths))]

    def joined(self, pieces: Sequence[dict]) -> dict:
        """The output for all images, of tensors that nobody else holds."""

        def join(values: Sequence) -> Any:
            if values[0] is None:
                return None
            if isinstance(values[0], tuple | list):
                return type(values[0])(join(inner) for inner in zip(*values, strict=True))
            whole = torch.cat(list(values), dim=self.dim)
            return whole.reshape(*self.folded, *whole.shape[2:]) if self.folded else whole

        return {name: join([piece[name] for piece in pieces]) for name in pieces[0]}


def _rows(tensors: Mapping[str, torch.Tensor]) -> _Cut | None:
    """One row per image (or tile): the first dimension of every input and output."""
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors.values()}
    if len(sizes) != 1 or sizes == {0}:
        return None
    (n,) = sizes
    return _Cut(
        [{name: tensor[row] for name, tensor in tensors.items()} for row in range(n)], partial(_take_rows, tensors), [1] * n
    )


def _take_rows(tensors: Mapping[str, torch.Tensor], numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    return {name: tensor if len(numbers) == tensor.shape[0] else tensor[list(numbers)] for name, tensor in tensors.items()}


def _images_of_prompts(tensors: Mapping[str, torch.Tensor]) -> _Cut | None:
    """``[prompt, image, ...]``: a prompt's images side by side (Mllama)."""
    shapes = {tensor.shape[:2] for tensor in tensors.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2:
        return None
    rows = _rows({name: tensor.flatten(0, 1)[:, None] for name, tensor in tensors.items()})
    return None if rows is None else _Cut(rows.identities, rows.inputs, rows.lengths, folded=tuple(shape))


def _padded(tensors: Mapping[str, torch.Tensor]) -> _Cut | None:
    """One padded row per image with its size, their patches in one sequence (Pixtral)."""
    if set(tensors) != {"pixel_values", "image_sizes"}:
        return None
    rows, sizes = _rows(tensors), tensors["image_sizes"].tolist()
    if rows is None:
        return None
    identities = [
        {"pixel_values": tensors["pixel_values"][number, :, :height, :width]} for number, (height, width) in enumerate(sizes)
    ]
    return _Cut(identities, rows.inputs, [height * width for height, width in sizes], merges=True, dim=1)


def _packed(tensors: Mapping[str, torch.Tensor]) -> _Cut | None:
    """The patches of all images in one sequence, each image's grid beside it (Qwen-VL, GLM-V)."""
    grid = tensors["grid_thw"]
    packed = [name for name in tensors if name != "grid_thw"]
    counts = grid.prod(-1).tolist()
    if len(packed) != 1 or tensors[packed[0]].shape[0] != sum(counts):
        return None
    patches = tensors[packed[0]].split(counts)

    def inputs(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        if len(numbers) == len(counts):
            return dict(tensors)
        return {packed[0]: torch.cat([patches[number] for number in numbers]), "grid_thw": grid[list(numbers)]}

    identities = [{packed[0]: patches[number], "grid_thw": grid[number]} for number in range(len(counts))]
    return _Cut(identities, inputs, counts, merges=True)


_CUTS: dict[str, Callable[[Mapping[str, torch.Tensor]], _Cut | None]] = {
    "grid_thw": _packed,
    "image_sizes": _padded,
    "aspect_ratio_ids": _images_of_prompts,
}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
