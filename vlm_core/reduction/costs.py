"""What fewer visual tokens save: arithmetic by formula, time and memory as measured.

``layer_lengths(...)``    tokens in every layer under a reduction
``prefill_flops(...)``    operations of the language model on one prompt, by formula
``saved_flops(...)``      the share that a reduction saves
``prefill_pairs(...)``    prefill time with and without, paired and interleaved; ``prefill_rounds(...)`` several reductions beside each other
``decode_pairs(...)``     the same for one generated token
``cache_bytes(...)``      keys and values that a prompt leaves
``generation_seconds(...)``  how long so many tokens after a batch of prompts take
``peak_pairs(...)``       peak memory of a prefill with and without

Time and arithmetic are those of the language model: the vision tower sees every patch whatever happens later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from vlm_core.allocation import peak_bytes
from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions import Row, parts
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_number, require_items
from vlm_core.quantization import n_weights
from vlm_core.subjects.batch import Batch
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.subjects.subject import Subject
from vlm_core.subjects.visual import asked_outside, visuals
from vlm_core.sweeps.features import encode_distinct
from vlm_core.timing import paired, seconds

__all__ = [
    "cache_bytes",
    "cycled",
    "decode_pairs",
    "generation_seconds",
    "layer_lengths",
    "peak_pairs",
    "prefill_flops",
    "prefill_pairs",
    "prefill_rounds",
    "prompt_lengths",
    "saved_flops",
]


def layer_lengths(row: Row, n_tokens: int, n_image: int, n_layers: int) -> tuple[int, ...]:
    """Tokens of one prompt in every layer.

    Parameters
    ----------
    row : Row
        Parts that drop or merge count, each for all image tokens; a policy that chooses its own number counts with the number asked for.
    n_tokens, n_image : int
        Of the whole prompt, and image tokens among them.
    """
    left, lengths = n_image, []
    shorter = {part.layer: part for part in parts(row) if hasattr(part, "keep")}
    for layer in range(n_layers):
        if layer in shorter:
            left = min(left, shorter[layer].count(n_image))
        lengths.append(n_tokens - n_image + left)
    return tuple(lengths)


def prefill_flops(anatomy: Anatomy, lengths: Sequence[int], read: int = 1) -> int:
    """Floating-point operations (two a multiply-add) of the language model on one prompt.

    ``2`` per weight of a layer's linear maps and token, ``4 x`` the width of all heads per query and key (a kernel multiplies
    all pairs, also those that a causal order hides), and the unembedding of ``read`` tokens. Norms, rotation and softmax are not counted.

    Parameters
    ----------
    lengths : sequence of int, one per layer
        Tokens in each (`layer_lengths`).
    """
    width = anatomy.n_heads * anatomy.head_dim
    weights = [sum(n_weights(one) for one in layer.modules() if isinstance(one, nn.Linear)) for layer in anatomy.layers]
    layers = sum(2 * n * own + 4 * width * n * n for n, own in zip(lengths, weights, strict=True))
    return layers + 2 * read * anatomy.head.weight.numel()


def saved_flops(subject: Subject, items: Sequence, row: Row) -> np.ndarray:
    """Share of each prompt's prefill operations that a reduction saves, ``[item]``."""
    require_items(items)
    anatomy = subject.anatomy
    whole, less = ([prefill_flops(anatomy, lengths) for lengths in prompt_lengths(subject, items, each)] for each in (None, row))
    return 1 - np.array(less) / np.array(whole)


def prompt_lengths(subject: Subject, items: Sequence, row: Row = None) -> list[tuple[int, ...]]:
    """`layer_lengths` of each prompt, ``[item][layer]``."""
    n_layers = subject.anatomy.n_layers
    return [layer_lengths(row, len(one), int(one.image.sum()), n_layers) for one in encode_distinct(subject, items)]


def prefill_pairs(subject: Subject, items: Sequence, row: Row, *, batch: int = 8, rounds: int = 40, seed: int = 0) -> pd.DataFrame:
    """Seconds of the language model on prompts, with a reduction and without, side by side.

    What the policy computes is part of it, its own look at places and at the vision tower included; the tower's pass that every prompt needs
    is not. Each round takes the next ``batch`` prompts, runs both in random order,
    and gives one ratio, so that what slows the machine down for a while slows both.

    Parameters
    ----------
    items : sequence of items
    batch : int
        Prompts per pass: how a server runs them; 1 shows what one user waits for.
    rounds : int
    seed : int
        Of the order within rounds.

    Returns
    -------
    DataFrame
        ``round, whole, reduced, saved``: seconds, and ``1 - reduced / whole``.
    """
    table = prefill_rounds(subject, items, {"whole": None, "reduced": row}, batch=batch, rounds=rounds, seed=seed)
    return _saved(table)


def prefill_rounds(
    subject: Subject, items: Sequence, rows: Mapping[str, Row], *, batch: int = 8, rounds: int = 40, seed: int = 0
) -> pd.DataFrame:
    """Seconds of the language model on prompts, under each of several reductions once a round, on the same prompts; see `prefill_pairs`.

    Parameters
    ----------
    rows : mapping of name to Row
        None is the prompt as it is.

    Returns
    -------
    DataFrame
        ``round`` and a column a name.
    """
    require_items(items)
    encoded = encode_distinct(subject, items)
    passes = {name: _passes(subject, items, encoded, batch, row) for name, row in rows.items()}

    def timed(turn: int, name: str) -> float:
        work = passes[name][turn % len(passes[name])]
        return seconds(lambda: _prefill(subject, *work, rows[name]), subject.device)

    return paired({name: partial(timed, name=name) for name in rows}, rounds, seed)


def decode_pairs(
    subject: Subject, items: Sequence, row: Row, *, batch: int = 8, rounds: int = 10, tokens: int = 8, seed: int = 0
) -> pd.DataFrame:
    """Seconds per generated token (of the whole batch) after a reduced prompt and a whole one; see `prefill_pairs`.

    What ``generate`` takes for ``tokens + 1`` new tokens, less what it takes for one, shared among ``tokens``.
    """
    require_items(items)
    integer(tokens, "tokens", least=1)
    batches = [subject.encode_items(some) for some in cycled(items, batch)]

    def timed(turn: int, used: Row) -> float:
        prepared = batches[turn % len(batches)]
        one = generation_seconds(subject, prepared, used)
        return (generation_seconds(subject, prepared, used, tokens + 1) - one) / tokens

    return _saved(paired({"whole": lambda turn: timed(turn, None), "reduced": lambda turn: timed(turn, row)}, rounds, seed))


def generation_seconds(subject: Subject, prepared: Batch, row: Row = None, tokens: int = 1) -> float:
    """Seconds that ``generate`` takes for exactly ``tokens`` new tokens of each prompt in a batch, vision tower included."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with subject.intervene(row, prepared), torch.inference_mode():
        return seconds(lambda: subject.model.generate(**prepared.inputs, **options), subject.device)


def cache_bytes(subject: Subject, items: Sequence, row: Row = None) -> np.ndarray:
    """Bytes of keys and values that each prompt alone leaves in the cache, ``[item]``."""
    require_items(items)
    found = []
    for item in items:
        prepared = subject.encode_items([item])
        with subject.intervene(row, prepared), torch.inference_mode():
            output = subject.model(**prepared.inputs, use_cache=True)
        # A wrapped decoder (BLIP-2) hands its own output on whole.
        cache = (getattr(output, "language_model_outputs", None) or output).past_key_values
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        found.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    return np.array(found)


def peak_pairs(subject: Subject, items: Sequence, row: Row, batch: int = 8) -> tuple[int, int]:
    """Most bytes that a prefill of ``batch`` prompts holds at once beyond the weights, whole and reduced."""
    require_items(items)
    (encoded, numbers, prepared), *_ = _passes(subject, items, encode_distinct(subject, items), batch, row)

    def peak(used: Row) -> int:
        def work():
            return _prefill(subject, encoded, numbers, prepared, used)

        work()  # what the first pass of its kind leaves is no part of it
        return peak_bytes(work, subject.device)

    return peak(None), peak(row)


def cycled(items: Sequence, batch: int) -> list[list]:
    """Batches of ``batch`` items, the last one filled up from the first."""
    integer(batch, "batch", least=1)
    n = len(items)
    return [[items[(start + k) % n] for k in range(batch)] for start in range(0, n, batch)]


def _passes(
    subject: Subject, items: Sequence, encoded: Sequence[Encoded], batch: int, row: Row
) -> list[tuple[list[Encoded], list[int], Batch | None]]:
    """Prompts of each pass, their items' numbers, and the model's own inputs where ``row`` reads anything outside the decoder."""
    reads = asked_outside([row])
    passes = []
    for some in cycled(list(zip(items, encoded, strict=True)), batch):
        own = [item for item, _ in some]
        prepared = subject.encode_items(own, padding_side="right") if reads else None
        passes.append(([one for _, one in some], list(map(item_number, own)), prepared))
    return passes


def _prefill(subject: Subject, encoded: list[Encoded], numbers: list[int], prepared: Batch | None, row: Row) -> torch.Tensor:
    reads = asked_outside([row])
    if reads:
        outside = visuals(subject, prepared.inputs, prepared.sizes, reads)
        encoded = [replace(one, visual=visual) for one, visual in zip(encoded, outside, strict=True)]
    every = np.arange(len(encoded))
    last = np.array([one.n_prompt - 1 for one in encoded])
    hidden, _ = forward_rows(subject, encoded, every, [row] * len(encoded), numbers, (every, last))
    return read_logits(subject, hidden)


def _saved(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(saved=1 - table["reduced"] / table["whole"])
