"""What a subject says when it is drawn from rather than asked for its best: many samples an item, at a temperature.

``sample_answers(subject, items, n)``   ``n`` sampled answers an item
``sampled(subject, items, n)``          the same with their tokens and the length of the prompt: `Sampled`

Samples of an item that have said the same so far have the same next-token distribution: they are one row of the batch until they part, and
a row all of whose samples have ended leaves it. A prompt runs once however many samples are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_core.evaluation import UNALTERED
from vlm_core.interventions.numeric import integer, real
from vlm_core.items import SHOWN, item_field, item_number, require_item, require_items, take
from vlm_core.subjects.subject import Subject, require_subject
from vlm_core.sweeps.features import KnownFeatures, recalling

__all__ = ["Sampled", "sample_answers", "sampled"]


@dataclass(frozen=True)
class Sampled:
    """What was drawn for one item.

    Parameters
    ----------
    answers : tuple of str
        Without special tokens and surrounding spaces.
    tokens : tuple of tuples of int
        Of each answer, the one that ends it among them.
    prompt : int
        Tokens of the prompt, padding not counted.
    """

    answers: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    prompt: int


def sample_answers(
    subject: Subject,
    items: Sequence,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 16,
    batch_rows: int | None = None,
) -> list[tuple[str, ...]]:
    """The texts that `sampled` gives."""
    drawn = sampled(subject, items, n, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens, batch_rows=batch_rows)
    return [one.answers for one in drawn]


def sampled(
    subject: Subject,
    items: Sequence,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 16,
    batch_rows: int | None = None,
) -> list[Sampled]:
    """Draw answers from a subject.

    Parameters
    ----------
    n : int
        Answers an item.
    temperature : float
        The model's own logits (`vlm_core.evaluation.UNALTERED`) are divided by it.
    seed : int
        With an item's id it decides the item's draws, whatever else is in the batch; the first of more samples are the same.
    max_new_tokens : int
        Where an answer is cut off that has not ended.
    batch_rows : int, optional
        Prompts per forward pass.

    Returns
    -------
    list of Sampled
        ``n`` answers an item, in the order of ``items``.

    Raises
    ------
    ValueError
        For items without image or prompt, and numbers out of range.
    """
    require_subject(subject)
    require_items(items, SHOWN)
    integer(n, "n", least=1)
    integer(max_new_tokens, "max_new_tokens", least=1)
    integer(seed, "seed", least=0)
    if not real(temperature, "temperature") > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: for the best answer use evaluate(mode='greedy')")
    if batch_rows is not None:
        integer(batch_rows, "batch_rows", least=1)
    shown = take(items, range(len(items)))
    for item in shown:
        require_item(item, SHOWN)
    found: list[Sampled | None] = [None] * len(shown)
    known = KnownFeatures.of(subject)
    size = batch_rows or subject.batch_rows
    order = sorted(range(len(shown)), key=lambda index: len(item_field(shown[index], "prompt")))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = subject.encode_items([shown[index] for index in chosen])
        uniform = np.stack([np.random.default_rng((seed, item_number(shown[index]))).random((n, max_new_tokens)) for index in chosen])
        draw = _Draw(uniform, temperature)
        with torch.inference_mode(), recalling(subject, known), subject.intervene(None, batch):
            subject.model.generate(
                **batch.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=subject.tokenizer.pad_token_id,
                custom_generate=draw,
                **UNALTERED,
            )
        texts = [text.strip() for text in subject.tokenizer.batch_decode(draw.said, skip_special_tokens=True)]
        prompts = batch.valid.sum(1).tolist()
        for place, index in enumerate(chosen):
            own = slice(place * n, (place + 1) * n)
            found[index] = Sampled(tuple(texts[own]), tuple(map(tuple, draw.said[own])), prompts[place])
    return found


class _Draw:
    """A decoding method for ``generate``: samples by the numbers in [0, 1) that they are told, ``uniform [prompt, sample, token]``.

    Attributes
    ----------
    said : list of list of int
        Tokens of every sample, prompt by prompt.
    """

    def __init__(self, uniform: np.ndarray, temperature: float) -> None:
        n_prompts, self.n, self.length = uniform.shape
        self.uniform = torch.from_numpy(uniform.reshape(-1, self.length))
        self.temperature = temperature
        self.said: list[list[int]] = [[] for _ in range(n_prompts * self.n)]

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs) -> torch.Tensor:
        """What ``generate`` calls in place of its own loop, everything prepared."""
        ends = generation_config._eos_token_tensor
        outputs = model._prefill(input_ids, generation_config, kwargs, is_first_iteration=True)
        # Per sample that goes on, its number and its row.
        samples = torch.arange(len(self.said))
        rows = samples // self.n
        for step in range(self.length):
            scores = logits_processor(input_ids, outputs.logits[:, -1].float())
            tokens = self._tokens(scores, rows, self.uniform[samples, step])
            for sample, token in zip(samples.tolist(), tokens.tolist(), strict=True):
                self.said[sample].append(token)
            going = torch.ones_like(tokens, dtype=torch.bool) if ends is None else ~torch.isin(tokens, ends.cpu())
            samples, rows, tokens = samples[going], rows[going], tokens[going]
            if not len(samples) or step + 1 == self.length:
                break
            parted, rows = torch.unique(torch.stack([rows, tokens]), dim=1, return_inverse=True)
            parents, tokens = parted.to(input_ids.device)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder)
            if len(parents) != len(input_ids) or bool((parents != torch.arange(len(parents), device=parents.device)).any()):
                kwargs = _of_rows(kwargs, parents, len(input_ids))
            input_ids = torch.cat([input_ids[parents], tokens[:, None]], dim=1)
            ahead = 1 if kwargs.get("use_cache") else None
            outputs = model(**model.prepare_inputs_for_generation(input_ids, next_sequence_length=ahead, **kwargs), return_dict=True)
        return input_ids

    def _tokens(self, scores: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A token per sample: where its number falls in the cumulated probabilities of its row."""
        cumulated = (scores.double() / self.temperature).softmax(1).cumsum(1).cpu()
        numbers = (uniform * cumulated[rows, -1])[:, None]
        found = torch.searchsorted(cumulated[rows], numbers, right=True)[:, 0]
        return found.clamp(max=scores.shape[1] - 1)


def _of_rows(kwargs: dict[str, Any], parents: torch.Tensor, n_rows: int) -> dict[str, Any]:
    """What ``generate`` knows of a batch, of some of its rows, each as often as it is named."""
    chosen = {}
    for name, value in kwargs.items():
        if hasattr(value, "reorder_cache"):
            value.reorder_cache(parents)
        elif isinstance(value, torch.Tensor) and name == "position_ids" and value.ndim == 3:
            value = value[:, parents]
        elif isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == n_rows:
            value = value[parents]
        chosen[name] = value
    return chosen
