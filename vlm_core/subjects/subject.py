"""The model under test, ready to be measured.

``Subject(model, processor)``    a model in memory, the seam on it; ``vlm_core.subjects.load`` makes one from a checkpoint
``Batch``                        a few prompts as its inputs
``require_subject(value)``       refuse what is no subject, in one sentence
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy, HeadId
from vlm_core.families.layout import Layout, image_layouts
from vlm_core.images import as_rgb, require_image
from vlm_core.interventions import Intervention, require_row
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_field, item_number, require_items, take
from vlm_core.placement import home, present
from vlm_core.seam.plan import Program, require_possible
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active, install
from vlm_core.subjects.checkpoint import Checkpoint

__all__ = ["Batch", "Subject", "require_subject"]


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
    """

    inputs: dict[str, torch.Tensor]
    image: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor | None = None
    items: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.image.shape[0]


class Subject:
    """A vision-language model with its processor and the seam installed.

    Parameters
    ----------
    model : transformers model for image-text-to-text
    processor : its processor
        May be None where only ready-made inputs are used.
    name : str
    checkpoint : Checkpoint, optional
        Where it came from.

    Attributes
    ----------
    anatomy : Anatomy
        Where things are and how many.
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, name: str = "subject", checkpoint: Checkpoint | None = None
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise SubjectError(
                f"subject '{name}' is no transformers model but a {type(model).__name__}: pass a model for image-text-to-text, or load "
                f"one with load_vlm(path_or_id)."
            )
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self.checkpoint = checkpoint
        self.anatomy = Anatomy.of(model, name)
        self.seam = install(model, self.anatomy, name)
        self._lead: str | None = None
        self._fingerprint: tuple[tuple, tuple[str, str, str]] | None = None
        self._loaded_state = self.weights_state()
        self._continuations: dict[str, tuple[int, ...]] = {}

    def __repr__(self) -> str:
        anatomy = self.anatomy
        return f"Subject({self.name!r}, {anatomy.family.model_type}, {anatomy.n_layers}x{anatomy.n_heads} heads)"

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Every attention head of the language model."""
        return self.anatomy.heads

    @property
    def capabilities(self) -> frozenset[str]:
        """What can be done on this subject, out of ``vlm_core.families.family.CAPABILITIES``."""
        return self.anatomy.capabilities

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return home(self.anatomy.embedding)

    @property
    def batch_rows(self) -> int:
        """Rows per forward pass where nothing else is asked for: what fits a CPU's cache, or keeps a GPU busy."""
        return 32 if self.device.type == "cpu" else 128

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; a ``SubjectError`` without a processor."""
        self._require_processor()
        return self.processor.tokenizer

    def _require_processor(self) -> None:
        if self.processor is None:
            raise SubjectError(
                f"subject '{self.name}' has no processor, so it takes ready-made inputs only: make it Subject(model, processor), or load "
                f"it with load_vlm."
            )

    def identity(self) -> dict[str, Any]:
        """Facts that name the subject in a record, builtins only."""
        checkpoint, anatomy = self.checkpoint, self.anatomy
        return {
            "name": self.name,
            "path": str(checkpoint.source) if checkpoint else None,
            "revision": checkpoint.revision if checkpoint else None,
            "family": anatomy.family.model_type,
            "model_type": self.model.config.model_type,
            "n_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "n_layers": anatomy.n_layers,
            "n_heads": anatomy.n_heads,
            "n_kv_heads": anatomy.n_kv_heads,
            "dtype": str(anatomy.embedding.weight.dtype).removeprefix("torch."),
            "device": str(self.device),
            "weights": checkpoint.sha256() if checkpoint else self._sha256(),
        }

    @property
    def fingerprint(self) -> tuple[str, str, str, str]:
        """Weights, dtype, kind of device, and settings: what a stored measurement depends on.

        Weights are those in memory: where they were changed after loading, they are digested anew. Settings are the model's and the
        processor's configuration, the attention that the seam delegates to, and the versions of torch and transformers.
        """
        state = self.weights_state()
        if self._fingerprint is None or self._fingerprint[0] != state:
            untouched = state == self._loaded_state and self.checkpoint is not None
            weights = (self.checkpoint.sha256() if untouched else None) or self._sha256()
            self._fingerprint = state, (weights, str(self.anatomy.embedding.weight.dtype).removeprefix("torch."), self.device.type)
        return *self._fingerprint[1], self._settings()

    def weights_state(self) -> tuple:
        """What tells of weights that were changed in memory: equal as long as they were not."""
        # Version counters tell of edits in place, a sample of values of those that pass them by (``.data``).
        return tuple(
            (tensor.data_ptr(), tensor._version, tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].double().sum().item())
            for tensor in self.model.parameters()
            if not tensor.is_meta
        )

    def _settings(self) -> str:
        processor = self.processor
        parts = [self.model.config.to_json_string(), self.seam.original, torch.__version__, transformers.__version__]
        if processor is not None:
            parts.append(processor.to_json_string())
            parts.append(str(getattr(processor, "chat_template", None)))
            if self.tokenizer.is_fast:
                content = json.loads(self.tokenizer.backend_tokenizer.to_str())
                # How the last batch was padded is no setting.
                parts.append(json.dumps({key: value for key, value in content.items() if key not in ("padding", "truncation")}))
            else:
                parts.append(json.dumps(sorted(self.tokenizer.get_vocab().items())))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            owner, _, own = name.rpartition(".")
            with present(self.model.get_submodule(owner)) if tensor.is_meta else nullcontext():
                tensor = getattr(self.model.get_submodule(owner), own) if tensor.is_meta else tensor
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # -- text -------------------------------------------------------------------------------------------------------

    def render(self, prompt: str, answer: str | None = None) -> str:
        """The text given to the processor: chat template where there is one, up to where the answer starts.

        ``prompt`` is the user's text without image token. With ``answer`` the text goes on to the end of the answer.
        """
        self._require_processor()
        _require_texts([prompt, *([] if answer is None else [answer])], "prompt and answer")
        text = self._render_turns(prompt)
        if answer is None:
            return text
        return text + ("\n" if self.anatomy.family.answer_apart else self._answer_lead()) + answer

    def _render_turns(self, prompt: str, answer: str | None = None, n_images: int = 1) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            if answer is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return self.processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
        placeholder = self.anatomy.family.placeholder
        shown = placeholder.format(self.processor.image_token) * n_images if placeholder else ""
        return shown + prompt + ("" if answer is None else f" {answer}")

    def _answer_lead(self) -> str:
        # The white space between the prompt and the answer, as the subject's own template writes it.
        if self._lead is None and self.anatomy.family.answer_apart:
            self._lead = ""
        elif self._lead is None:
            start, whole = self._render_turns("question"), self._render_turns("question", "reply")
            rest = whole[len(start) :] if whole.startswith(start) else None
            if rest is not None and rest.lstrip().startswith("reply"):
                self._lead = rest[: len(rest) - len(rest.lstrip())]
            else:
                self._lead = "" if start[-1:].isspace() else " "
        return self._lead

    def continuation(self, answer: str) -> tuple[int, ...]:
        """Token ids of ``answer`` as it follows a prompt.

        Raises
        ------
        SubjectError
            If the tokenizer gives it no token, or only unknown ones.
        """
        if not isinstance(answer, str):
            raise ValueError(f"an answer must be a str, got {answer!r} ({type(answer).__name__}): write it as the model would")
        if answer not in self._continuations:
            tokenizer = self.tokenizer
            anchor = self._render_turns("question")[-1:] if self._answer_lead() else ""
            anchor = anchor if anchor.strip() else ""
            before = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
            ids = tokenizer(anchor + self._answer_lead() + answer, add_special_tokens=False)["input_ids"]
            if ids[: len(before)] == before and len(ids) > len(before):
                ids = ids[len(before) :]
            else:
                ids = tokenizer(self._answer_lead() + answer, add_special_tokens=False)["input_ids"]
            unknown = tokenizer.unk_token_id
            if not ids or (unknown is not None and unknown in ids):
                raise SubjectError(
                    f"subject '{self.name}' cannot write the answer '{answer}': its tokenizer does not know all of it; "
                    f"use candidates from its vocabulary."
                )
            self._continuations[answer] = tuple(ids)
        return self._continuations[answer]

    def encode(
        self,
        images: Sequence,
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        padding_side: str = "left",
    ) -> Batch:
        """Images and prompts as model inputs, padded to the longest.

        Parameters
        ----------
        images : sequence, one entry per prompt
            A PIL image, or a list of them: they precede the prompt's text in that order.
        prompts : sequence of str
            User text without image token.
        answers : sequence of str, optional
            Appended to the prompts, with ``labels`` on their tokens.
        padding_side : {"left", "right"}
            ``"left"`` for ``generate``.

        Raises
        ------
        SubjectError
            If a prompt has no image, more images than the family takes, or the inputs carry no image tokens.
        ValueError
            If there are not as many entries of images (and answers) as prompts, or none, or they are no images and texts.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' (for generate) or 'right', got {padding_side!r}")
        pictures = self._pictures(images, prompts)
        self._require_processor()
        texts = [
            self._render_turns(prompt, n_images=len(shown)) for prompt, shown in zip(prompts, pictures, strict=True)
        ]
        questions, options = texts, {}
        if answers is not None:
            _require_texts(answers, "answers")
            if len(answers) != len(texts):
                raise ValueError(f"{len(answers)} answers for {len(texts)} prompts: give one per prompt")
            if self.anatomy.family.answer_apart:
                options["suffix"] = list(answers)
            else:
                texts = [text + self._answer_lead() + answer for text, answer in zip(texts, answers, strict=True)]
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        nested = self.anatomy.family.nested_images
        inputs = self.processor(
            images=pictures if nested else [picture for shown in pictures for picture in shown],
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side,
            **options,
            **self._special_tokens(texts),
        )
        if answers is not None and "qformer_input_ids" in inputs:
            # A Q-Former is asked the question alone: with the answer in it the image features would give it away.
            asked = self.processor.qformer_tokenizer(
                questions, return_tensors="pt", padding=True, padding_side=padding_side
            )
            inputs["qformer_input_ids"], inputs["qformer_attention_mask"] = asked["input_ids"], asked["attention_mask"]
        # Some processors add labels of their own, which would make every forward pass compute a loss.
        inputs = {name: value.to(self.device) for name, value in inputs.items() if name != "labels"}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.anatomy.embedding.weight.dtype)
        image = inputs["input_ids"] == self.anatomy.image_token_id
        if not bool(image.any(1).all()):
            raise SubjectError(
                f"subject '{self.name}' has no image tokens in this prompt: its processor needs the image token "
                f"(id {self.anatomy.image_token_id}) once per image; check its chat template."
            )
        valid = inputs["attention_mask"].bool()
        labels = None if answers is None else self._labels(inputs["input_ids"], valid, answers)
        return Batch(inputs, image, valid, labels)

    def _pictures(self, images: Sequence, prompts: Sequence[str]) -> list[list]:
        _require_texts(prompts, "prompts")
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
        most = self.anatomy.family.max_images
        for prompt, shown in zip(prompts, pictures, strict=True):
            if not shown:
                raise SubjectError(
                    f"subject '{self.name}' has no image tokens in the prompt '{prompt}': give it at least one image."
                )
            if most is not None and len(shown) > most:
                raise SubjectError(
                    f"subject '{self.name}' takes {most} image per prompt, got {len(shown)} for '{prompt}': its family "
                    f"({self.anatomy.family.model_type}) has no place for more; ask about them one by one."
                )
        for prompt, shown in zip(prompts, pictures, strict=True):
            require_image(shown if len(shown) > 1 else shown[0], f"the image of the prompt '{prompt}'")
        return [[as_rgb(picture) for picture in shown] for shown in pictures]

    def _labels(self, ids: torch.Tensor, valid: torch.Tensor, answers: Sequence[str]) -> torch.Tensor:
        labels = torch.full_like(ids, -100)
        # A processor that takes answers apart closes them with one end token.
        ends = valid.shape[1] - valid.flip(1).int().argmax(1) - int(self.anatomy.family.answer_apart)
        for row, answer in enumerate(answers):
            end = int(ends[row])
            start = end - len(self.continuation(answer))
            labels[row, start:end] = ids[row, start:end]
        return labels

    def _special_tokens(self, texts: Sequence[str]) -> dict[str, bool]:
        # A chat template that writes the first special token itself must not get a second one.
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and texts and texts[0].startswith(bos) else {}

    def layout(self, images: Any, prompt: str = "?") -> Layout:
        """Where the image tokens of one prompt lie on its images.

        Parameters
        ----------
        images : PIL image, or a list of them
        prompt : str
            User text without image token.

        Raises
        ------
        SubjectError
            See ``vlm_core.families.layout.image_layouts``.
        """
        batch = self.encode([images], [prompt])
        shown = images if isinstance(images, list | tuple) else [images]
        sizes = [[(image.height, image.width) for image in shown]]
        return image_layouts(self.anatomy.family, self.model.config, self.processor, batch.inputs, sizes)[0]

    # -- interventions ----------------------------------------------------------------------------------------------

    @contextmanager
    def intervene(
        self,
        interventions: Intervention | tuple | Sequence | None,
        batch: Batch,
        observers: Sequence = (),
        items: Sequence[int] | None = None,
        groups: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator[Run]:
        """Everything the model computes on ``batch`` in this context, ``generate`` included, is intervened on.

        Parameters
        ----------
        interventions
            One for all prompts (an intervention, a tuple of them, or None) or a list with one per prompt.
        batch : Batch
            What ``model(**batch.inputs)`` or ``model.generate(**batch.inputs)`` will be called with.
        observers : sequence
            Their records are the run's (``run.record``).
        items : sequence of int, optional
            One number per prompt that names its item, for what is drawn at random (``vlm_core.items.item_number``): the same item
            gets the same noise and the same random tokens in every batch and in a sweep. Default: ``batch.items``, or, where a
            batch was not made of items, each prompt's place in it, so that equal prompts get noise of their own.
        groups : mapping of str to BoolTensor ``[prompt, token]``, optional
            Named token groups for interventions and observers ("object", "background").

        Raises
        ------
        ValueError
            One sentence: a layer, head, position or group that is not there, parts that cannot be combined, a
            capability that the family lacks, a source that does not fit, another number of items than prompts.
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be what subject.encode(images, prompts) gives, got {type(batch).__name__}")
        rows = list(interventions) if isinstance(interventions, list) else [interventions] * len(batch)
        for row in rows:
            require_row(row)
        _require_run(observers, items, groups)
        if batch.labels is not None:
            groups = {"answer": batch.labels != -100, **(groups or {})}
        items = batch.items if items is None else items
        if items is not None and len(items) != len(batch):
            raise ValueError(f"{len(items)} items were named for {len(batch)} prompts: give one number per prompt")
        anatomy = self.anatomy
        for row in dict.fromkeys(rows):
            require_possible(row, anatomy)
        program = Program.compile(rows, anatomy.n_layers, anatomy.n_heads, self.device, anatomy.embedding.weight.dtype)
        with active(Run(anatomy, program, batch.image, batch.valid, items=items, observers=observers, groups=groups)) as run:
            yield run

    def encode_items(self, items: Sequence, padding_side: str = "left") -> Batch:
        """``encode`` on the images and prompts of items, which stay named by their ids (``Batch.items``)."""
        require_items(items)
        items = take(items, range(len(items)))
        batch = self.encode(
            [item_field(item, "image") for item in items],
            [item_field(item, "prompt") for item in items],
            padding_side=padding_side,
        )
        return replace(batch, items=tuple(map(item_number, items)))


def require_subject(value: Any) -> None:
    """Refuse what is no subject.

    Raises
    ------
    TypeError
    """
    if not isinstance(value, Subject):
        raise TypeError(
            f"the subject must be a Subject, got {value!r:.60} ({type(value).__name__}): load it with load_vlm(path_or_id), or make "
            f"it Subject(model, processor)"
        )


def _require_texts(texts: Any, name: str) -> None:
    if isinstance(texts, str) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise ValueError(f"{name} must be a list of str, got {texts!r:.60} ({type(texts).__name__}): write [text], also of one")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a list of str, got {text!r:.60} ({type(text).__name__}) among them")


def _require_run(observers: Any, items: Any, groups: Any) -> None:
    if not isinstance(observers, list | tuple):
        raise TypeError(f"observers must be a list, got {observers!r:.60} ({type(observers).__name__}): write [observer], also of one")
    for one in observers:
        if isinstance(one, type | str) or not any(hasattr(one, name) for name in ("attention", "layer", "site")):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"{one!r:.60}"
            raise TypeError(f"a run takes observers with attention(view) or layer(view), got {what}: make one, or use observe(...)")
    for item in () if items is None else items:
        integer(item, "an item's number")
    if groups is not None and not (isinstance(groups, Mapping) and all(isinstance(one, torch.Tensor) for one in groups.values())):
        raise TypeError("groups must be a mapping of names to BoolTensors [prompt, token]")
