"""How probable a model finds answers to prompts with pictures, for training on whole answers.

``whole_sequences(model, batch)``       summed log-probability of each answer of TRL's batch, one pass over all sequences
``SharedPrompts(...)``, ``shared(...)``   the same numbers from one pass over each prompt, which its answers then read from the cache

Two answers to one prompt of many image tokens differ in a few tokens at the end; read from the cache, the prompt is computed, and its
gradients, once for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

__all__ = ["SharedPrompts", "shared", "whole_sequences"]

_IGNORED = -100


def whole_sequences(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probabilities ``[sequence]`` of what ``completion_mask`` marks, by TRL's ``fused_lm_head``."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, _IGNORED)
    log_probs = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    return log_probs.sum(dim=1)


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """Prompts, and answers that each continue one of them.

    Parameters
    ----------
    inputs : dict of tensors
        The prompts, padded on the left, with what the model is told of their pictures.
    answers : LongTensor ``[answer, token]``
        Padded on the right with -100.
    prompt : LongTensor ``[answer]``
        Which prompt an answer continues.
    """

    inputs: dict[str, torch.Tensor]
    answers: torch.Tensor
    prompt: torch.Tensor

    @property
    def read(self) -> torch.Tensor:
        """Tokens of the prompts that answers begin after: the last ones, bool ``[prompt, token]``."""
        last = torch.zeros_like(self.inputs["input_ids"], dtype=torch.bool)
        last[:, -1] = True
        return last

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, torch.Tensor]], answers: Sequence[int], pad_token_id: int) -> SharedPrompts:
        """From TRL's batches.

        Parameters
        ----------
        batches : sequence of batches
            Of ``2 n`` sequences each: ``n`` prompts with one answer, then the same prompts with another.
        answers : sequence of int
            How many of the two answers of each batch are read: 2, or 1 for the first.
        """
        fields: dict[str, list[torch.Tensor]] = {}
        ids: list[torch.Tensor] = []
        numbers: list[torch.Tensor] = []
        before = 0
        for batch, read in zip(batches, answers, strict=True):
            valid, said = batch["attention_mask"].bool(), batch["completion_mask"].bool()
            n = len(valid) // 2
            for name, value in batch.items():
                if name == "completion_mask":
                    continue
                per_token = value.shape == valid.shape
                own = [value[row][valid[row] & ~said[row]] for row in range(n)] if per_token else [value[: len(value) // 2]]
                fields.setdefault(name, []).extend(own)
            ids += [batch["input_ids"][row][said[row]] for row in range(n * read)]
            numbers += [torch.arange(before, before + n)] * read
            before += n
        lengths = [len(mask) for mask in fields["attention_mask"]]
        inputs = {}
        for name, values in fields.items():
            if [len(value) for value in values] == lengths and values[0].ndim == 1:
                padding = pad_token_id if name == "input_ids" else 0
                inputs[name] = pad_sequence(values, batch_first=True, padding_value=padding, padding_side="left")
            else:
                inputs[name] = torch.cat(values)
        return cls(inputs, pad_sequence(ids, batch_first=True, padding_value=_IGNORED), torch.cat(numbers))


def shared(model: Any, prompts: SharedPrompts) -> torch.Tensor:
    """Summed log-probabilities ``[answer]``: a pass over the prompts, then one over the answers with the prompts' keys and values."""
    chosen = prompts.prompt.to(prompts.answers.device)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model(**prompts.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
    logits, answers = first[chosen], prompts.answers
    if answers.shape[1] > 1:
        said = answers[:, :-1]
        cache.batch_select_indices(chosen)
        mask = torch.cat([prompts.inputs["attention_mask"][chosen], (said != _IGNORED).long()], dim=1)
        later = model(input_ids=said.clamp(min=0), attention_mask=mask, past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, later], dim=1)
    log_probs = logits.float().log_softmax(-1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
    return log_probs.masked_fill(answers == _IGNORED, 0).sum(1)
