"""The model under test, ready to be measured.

``Subject(model, processor)``    a model in memory, the seam on it; ``vlm_core.subjects.load`` makes one from a checkpoint
``require_subject(value)``       refuse what is no subject, in one sentence; ``require_run(...)`` what no run can take
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy, HeadId
from vlm_core.families.layout import Layout, image_layouts
from vlm_core.interventions import Intervention, require_row
from vlm_core.interventions.numeric import integer
from vlm_core.interventions.policy import Visual
from vlm_core.items import item_field, item_number, require_items, take
from vlm_core.placement import home
from vlm_core.quantization import n_values, quantization_of
from vlm_core.seam.nothing import Nothing
from vlm_core.seam.plan import Program, require_possible
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active, install
from vlm_core.subjects.batch import Batch, encode
from vlm_core.subjects.checkpoint import Checkpoint
from vlm_core.subjects.fingerprint import settings_digest, weights_digest, weights_state
from vlm_core.subjects.remembering import KnownPrompts
from vlm_core.subjects.visual import asked_outside, visuals
from vlm_core.subjects.wording import Wording

__all__ = ["Subject", "require_run", "require_subject"]


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
    batch_rows : int
        Rows per forward pass where nothing else is asked for: what fits a CPU's cache, or keeps a GPU busy; fewer where memory is short.
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
        self.batch_rows = 32 if self.device.type == "cpu" else 128
        self.known_prompts: KnownPrompts | None = None  # see ``vlm_core.subjects.remembering``
        self._wording: Wording | None = None
        self._fingerprint: tuple[tuple, tuple[str, str, str]] | None = None
        self._loaded_state = self.weights_state()

    def __deepcopy__(self, memo: dict) -> Subject:
        copied = Subject(copy.deepcopy(self.model, memo), copy.deepcopy(self.processor, memo), self.name, self.checkpoint)
        copied.batch_rows = self.batch_rows
        return copied

    def __repr__(self) -> str:
        anatomy = self.anatomy
        return f"Subject({self.name!r}, {anatomy.family.model_type}, {anatomy.n_layers}x{anatomy.n_heads} heads)"

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Every attention head of the language model."""
        return self.anatomy.heads

    @property
    def image_heads(self) -> tuple[HeadId, ...]:
        """The heads that can see the image: all of them, or those of the cross-attention layers."""
        return self.anatomy.image_heads

    @property
    def capabilities(self) -> frozenset[str]:
        """What can be done on this subject, out of ``vlm_core.families.family.CAPABILITIES``."""
        return self.anatomy.capabilities

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return home(self.anatomy.embedding)

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

    def _devices(self) -> list[str]:
        """Where modules compute: one device, or those that a device map spreads them over."""
        spread = getattr(self.model, "hf_device_map", None) or {"": self.device}
        return sorted({str(torch.device("cuda", place) if isinstance(place, int) else place) for place in spread.values()})

    def identity(self) -> dict[str, Any]:
        """Facts that name the subject in a record, builtins only."""
        checkpoint, anatomy = self.checkpoint, self.anatomy
        return {
            "name": self.name,
            "path": str(checkpoint.source) if checkpoint else None,
            "revision": checkpoint.commit if checkpoint else None,
            "content": checkpoint.content() if checkpoint else None,
            "family": anatomy.family.model_type,
            "model_type": self.model.config.model_type,
            "n_parameters": sum(map(n_values, self.model.parameters())),
            "n_layers": anatomy.n_layers,
            "n_heads": anatomy.n_heads,
            "n_kv_heads": anatomy.n_kv_heads,
            "dtype": str(anatomy.embedding.weight.dtype).removeprefix("torch."),
            "quantization": quantization_of(self.model),
            "device": ", ".join(self._devices()),
            "weights": checkpoint.sha256() if checkpoint else weights_digest(self.model),
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
            weights = (self.checkpoint.sha256() if untouched else None) or weights_digest(self.model)
            self._fingerprint = state, (weights, str(self.anatomy.embedding.weight.dtype).removeprefix("torch."), self.device.type)
        return *self._fingerprint[1], settings_digest(self.model, self.processor, self.seam.original)

    def weights_state(self) -> tuple:
        """What tells of weights that were changed in memory: equal as long as they were not."""
        return weights_state(self.model)

    # -- text -------------------------------------------------------------------------------------------------------

    @property
    def wording(self) -> Wording:
        """How texts are written for this subject; a ``SubjectError`` without a processor."""
        self._require_processor()
        if self._wording is None or self._wording.processor is not self.processor:
            self._wording = Wording(self.processor, self.anatomy.family, self.name)
        return self._wording

    def render(self, prompt: str, answer: str | None = None) -> str:
        """The text given to the processor: chat template where there is one, up to where the answer starts.

        ``prompt`` is the user's text without image token. With ``answer`` the text goes on to the end of the answer.
        """
        return self.wording.render(prompt, answer)

    def continuation(self, answer: str) -> tuple[int, ...]:
        """Token ids of ``answer`` as it follows a prompt.

        Raises
        ------
        SubjectError
            If the tokenizer gives it no token, or only unknown ones.
        """
        return self.wording.continuation(answer)

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
        return encode(self, images, prompts, answers, padding_side)

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

    def intervene(
        self,
        interventions: Intervention | tuple | Sequence | None,
        batch: Batch,
        observers: Sequence = (),
        items: Sequence[int] | None = None,
        groups: Mapping[str, torch.Tensor] | None = None,
    ) -> active:
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
        if interventions is None and items is None and groups is None and observers == ():
            return active(Nothing(self.anatomy, batch))
        require_run(observers, items, groups)
        if batch.labels is not None:
            groups = {"answer": batch.labels != -100, **(groups or {})}
        items = batch.items if items is None else items
        if items is not None and len(items) != len(batch):
            raise ValueError(f"{len(items)} items were named for {len(batch)} prompts: give one number per prompt")
        program, visual = self._compiled(interventions, batch)
        tokens = None if groups else batch.tokens
        run = Run(
            self.anatomy, program, batch.image, batch.valid, items=items, observers=observers, groups=groups, tokens=tokens, visual=visual
        )
        return active(run)

    def _compiled(self, interventions: Intervention | tuple | Sequence | None, batch: Batch) -> tuple[Program, list[Visual] | None]:
        anatomy = self.anatomy
        if interventions is None:
            return Program.compile([None] * len(batch), anatomy.n_layers, anatomy.n_heads), None
        rows = interventions if isinstance(interventions, list) else [interventions]
        for row in rows:
            require_row(row)
        for row in dict.fromkeys(rows):
            require_possible(row, anatomy)
        reads = asked_outside(set(rows))
        rows = rows if isinstance(interventions, list) else rows * len(batch)
        program = Program.compile(rows, anatomy.n_layers, anatomy.n_heads, self.device, anatomy.embedding.weight.dtype)
        return program, visuals(self, batch.inputs, batch.sizes, reads) if reads else None

    def encode_items(self, items: Sequence, padding_side: str = "left") -> Batch:
        """``encode`` on the images and prompts of items, which stay named by their ids (``Batch.items``)."""
        require_items(items)
        items = take(items, range(len(items)))
        batch = self.encode(
            [item_field(item, "image") for item in items],
            [item_field(item, "prompt") for item in items],
            padding_side=padding_side,
        )
        return replace(batch, items=tuple(map(item_number, items))).lay_out()


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


def require_run(observers: Any, items: Any = None, groups: Any = None) -> None:
    """Refuse observers, items or groups that no run can take.

    Raises
    ------
    TypeError, ValueError
    """
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
