"""A model that keeps fewer visual tokens, whoever calls it: plain forward passes, ``generate``, trainers.

``keep_tokens(vlm, recipe)``    from here on (or in a ``with`` block) the model drops or merges image tokens as the recipe says
``KeptTokens``                  what that gives back: ``remove()`` makes the model what it was
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlm_core.errors import NotMeasurable, SubjectError
from vlm_core.interventions import DropTokens, MergeTokens, Row, parts, require_row
from vlm_core.interventions.policy import Visual
from vlm_core.seam.plan import Program, require_possible
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active, current_run
from vlm_core.subjects.visual import asked_outside, visuals

if TYPE_CHECKING:
    from vlm_core.reduction.recipe import Recipe
    from vlm_core.subjects.subject import Subject

__all__ = ["KeptTokens", "keep_tokens"]

_CUT_BY_SIZE = frozenset({"anyres", "canvas", "split", "pan_and_scan"})
"""Layouts that differ with the size of the image; a square one stands for any size of the others."""


class KeptTokens:
    """A model under a recipe. Ends with ``remove()``, or with the ``with`` block that it was made for.

    Attributes
    ----------
    row : Row
        What is done to every prompt.
    image_tokens : tuple of int
        Image tokens of the prompts of the last pass that are left in the last layer.
    """

    def __init__(self, subject: Subject, row: Row) -> None:
        self.row = row
        self.image_tokens: tuple[int, ...] = ()
        self._subject = subject
        self._reads = asked_outside([row])
        self._caches: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()
        self._local = threading.local()
        self._unwatch = _watch_features(subject.anatomy.base, self._shown) if self._reads else lambda: None
        # Trainers that compute their own loss call the model without its head.
        self._handles = [
            handle
            for module in (subject.model, subject.anatomy.base)
            for handle in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            )
        ]

    def remove(self) -> None:
        """The model keeps all its tokens again; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._unwatch()
        self._unwatch = lambda: None

    @contextmanager
    def answering(self, answer: torch.Tensor) -> Iterator[None]:
        """Passes within (of this thread) end in answers, which are no part of what is asked: ``answer`` ``[prompt, token]`` marks them.

        What ``labels`` tell where they are given.
        """
        before = self._local.__dict__.get("answer")
        self._local.answer = answer
        try:
            yield
        finally:
            self._local.answer = before

    def __enter__(self) -> KeptTokens:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def _before(self, module, args: tuple, kwargs: dict) -> None:
        contexts = self._local.__dict__.setdefault("contexts", [])
        looking = self._local.__dict__.get("looking", False)  # at the tower, by way of the model
        run = None if looking or current_run() is not None else self._run(args, kwargs)
        context = None if run is None else active(run)
        contexts.append((run, context))
        if context is not None:
            try:
                context.__enter__()
            except BaseException:
                contexts[-1] = (None, None)
                raise

    def _after(self, module, args: tuple, kwargs: dict, output):
        contexts = self._local.__dict__.get("contexts")
        if not contexts:
            return  # a pass that was refused before it began
        run, context = contexts.pop()
        if context is None:
            return
        context.__exit__(None, None, None)
        if not run.decoding:
            left = run.tokens.image & run.tokens.valid
            self.image_tokens = tuple(left.sum(1).tolist())
        cache = kwargs.get("past_key_values")
        if cache is None and isinstance(output, Mapping):
            cache = output.get("past_key_values")
        if cache is not None:
            self._caches[cache] = run

    def _run(self, args: tuple, kwargs: dict) -> Run | None:
        """The run of this pass: a new one for new prompts, the one that a cache was begun with; None for prompts without an image."""
        subject, cache = self._subject, kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            return self._caches.get(cache)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and not isinstance(ids, torch.Tensor):
            return None  # a trainer calls a method of its own by way of the model
        if ids is None:
            raise SubjectError(
                f"subject '{subject.name}' keeps tokens by its recipe, which needs to know the image tokens: call it with input_ids, not "
                f"with inputs_embeds alone"
            )
        image = ids == subject.anatomy.image_token_id
        if not bool(image.any()):
            return None
        mask = kwargs.get("attention_mask")
        valid = torch.ones_like(image) if mask is None else mask.bool()
        if subject.model.training and any(getattr(one, "gradient_checkpointing", False) for one in subject.anatomy.layers):
            raise SubjectError(
                f"subject '{subject.name}' would compute its layers again with all tokens when gradients are checkpointed: switch gradient "
                f"checkpointing off, or train without the recipe"
            )
        anatomy = subject.anatomy
        outside = self._outside({**kwargs, "input_ids": ids}, image) if self._reads else None
        rows = [self.row] * len(ids)
        program = Program.compile(rows, anatomy.n_layers, anatomy.n_heads, subject.device, anatomy.embedding.weight.dtype)
        with torch.inference_mode(False):
            return Run(
                anatomy, program, image & valid, valid, items=_numbers(ids, valid), visual=outside, restores=True,
                groups=self._answers(kwargs.get("labels")),
            )  # fmt: skip

    def _answers(self, labels: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
        """An answer that is trained on is no part of what is asked."""
        answer = self._local.__dict__.get("answer") if labels is None else labels != -100
        return None if answer is None else {"answer": answer}

    def _shown(self, given: dict[str, Any], features: Any) -> None:
        """The images of a pass that is to come: ``generate`` has their features made before it calls the model, without them."""
        if not self._local.__dict__.get("contexts") and not self._local.__dict__.get("looking", False):  # else a pass has its images at hand
            pooled = getattr(features, "pooler_output", features)
            n_tokens = sum(len(one.flatten(0, -2)) for one in (pooled if isinstance(pooled, list | tuple) else [pooled]))
            self._local.shown = given, features, n_tokens

    def _with_images(self, inputs: dict[str, Any], image: torch.Tensor) -> tuple[dict[str, Any], int]:
        """Inputs with the images that the features in them were made of; and how often in a row ``generate`` repeats each prompt (beams)."""
        given, features, n_tokens = self._local.__dict__.pop("shown", (None, None, 0))
        encoded = inputs.get("mm_encoder_outputs") or {}
        if inputs.get("pixel_values") is not None or given is None or encoded.get("image") is not features:
            return inputs, 1  # its own images, or features of which no images are known
        repeats, rest = divmod(int(image.sum()), max(1, n_tokens))
        if rest or not repeats or len(image) % repeats:
            return inputs, 1
        rows = {name: one[::repeats] for name, one in inputs.items() if isinstance(one, torch.Tensor) and len(one) == len(image)}
        return {**rows, **given}, repeats

    def _outside(self, inputs: dict[str, Any], image: torch.Tensor) -> list[Visual]:
        """Places of image tokens, and what the tower saw, as far as the inputs tell."""
        subject = self._subject
        inputs, repeats = self._with_images(inputs, image)
        image, named = image[::repeats], inputs.get("image_sizes")
        told = named is not None and len(named) == len(image)
        sizes = [[(int(height), int(width))] for height, width in named] if told else [[(1, 1)]] * len(image)
        try:
            if not told and subject.anatomy.family.layout in _CUT_BY_SIZE:
                raise SubjectError("how an image is cut depends on its size")
            self._local.looking = True
            found = visuals(subject, inputs, sizes, self._reads)
            return [one for one in found for _ in range(repeats)]
        except NotMeasurable:
            raise
        except (SubjectError, ValueError) as error:
            raise SubjectError(
                f"subject '{subject.name}' keeps tokens by a policy that reads {' and '.join(sorted(self._reads))}, which inputs alone do not tell "
                f"of these prompts: run them in subject.intervene(...) on a batch of subject.encode(images, prompts), or take a policy that reads "
                f"neither"
            ) from error
        finally:
            self._local.looking = False


def _watch_features(base: nn.Module, seen: Callable[[dict[str, Any], Any], None]) -> Callable[[], None]:
    """Tell ``seen`` of every call of a model's ``get_image_features``, with its arguments by name; what is given back ends that."""
    original = getattr(base, "get_image_features", None)
    if original is None:
        return lambda: None
    before, signature = vars(base).get("get_image_features"), inspect.signature(original)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        features = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        seen({name: one for name, one in given.items() if isinstance(one, torch.Tensor)}, features)
        return features

    def end() -> None:
        if vars(base).get("get_image_features") is watched:
            del base.get_image_features
            if before is not None:
                base.get_image_features = before

    base.get_image_features = watched
    return end


def keep_tokens(subject: Subject, recipe: Recipe | Row) -> KeptTokens:
    """From here on the model keeps only the image tokens that a recipe leaves, in every call.

    ``kept = keep_tokens(vlm, recipe)`` lasts until ``kept.remove()``; ``with keep_tokens(vlm, recipe): ...`` for the block. Sequences and
    caches are really shorter from the recipe's layer on. Logits have the length that came in (zero where tokens are gone), so that
    labels, ``generate`` and trainers fit. A run of ``subject.intervene`` within is left alone.

    Parameters
    ----------
    subject : Subject
    recipe : Recipe, or interventions that drop or merge tokens
        A `vlm_core.reduction.recipe.Recipe` is fitted to the subject's depth.

    Raises
    ------
    TypeError
        For what is neither, or an intervention that is no reduction.
    ValueError
        One sentence: a layer that the subject does not have, a capability that its family lacks.
    """
    row = recipe.row(subject.anatomy) if hasattr(recipe, "row") else recipe
    require_row(row, "the recipe")
    wrong = [part.describe() for part in parts(row) if not isinstance(part, DropTokens | MergeTokens)]
    if wrong or row is None:
        raise TypeError(f"a recipe drops or merges image tokens, got {wrong[0] if wrong else None}: pass DropTokens or MergeTokens, or a Recipe")
    require_possible(row, subject.anatomy)
    return KeptTokens(subject, row)


def _numbers(ids: torch.Tensor, valid: torch.Tensor) -> list[int]:
    """A number per prompt that its tokens name, whatever the padding: the same prompt loses the same tokens in every batch."""
    rows = zip(ids.tolist(), valid.tolist(), strict=True)
    texts = [repr([token for token, real in zip(row, there, strict=True) if real]) for row, there in rows]
    return [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
