"""What a student costs: to train, by the log of each run; to use, beside its teacher.

``training_costs(folders)``           steps, tokens, operations and seconds of each stage, and all of them so far
``quality_per_flop(costs, accuracy)`` what was gained for the operations spent
``speed_pairs(models, items)``        seconds to the first token and for each further one, all models in every round
``model_costs(models, items)``        parameters, bytes, operations and times, each beside the teacher's

Unlike `vlm_core.reduction.costs`, times and memory are those of the whole model, vision tower included: a student may have another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vlm_core.allocation import peak_bytes
from vlm_core.interventions import Row
from vlm_core.interventions.numeric import integer
from vlm_core.items import require_items
from vlm_core.reduction.costs import cache_bytes, cycled, generation_seconds, prefill_flops, prompt_lengths
from vlm_core.subjects.subject import Subject
from vlm_core.timing import paired

__all__ = ["model_costs", "quality_per_flop", "speed_pairs", "training_costs"]

SPENT = ("images", "tokens", "supervised_tokens", "flops", "seconds")
UNITS = {
    "parameters": "",
    "weights": "bytes",
    "peak memory": "bytes",
    "cache": "bytes",
    "prefill operations": "FLOP",
    "first token": "s",
    "further token": "s",
}


def training_costs(folders: Mapping[str, str | Path]) -> pd.DataFrame:
    """What each stage spent, from the ``training.json`` beside its student.

    Parameters
    ----------
    folders : mapping of stage to folder
        In the order trained.

    Returns
    -------
    DataFrame
        ``stage, kind, steps, images, tokens, supervised_tokens, flops, seconds``, and ``flops_so_far``: of this stage and all before it.
    """
    rows = []
    for stage, folder in folders.items():
        log = json.loads((Path(folder) / "training.json").read_text())
        rows.append({"stage": stage, "kind": log["kind"], "steps": log["budget"]["steps"], **{name: log[name] for name in SPENT}})
    table = pd.DataFrame(rows, columns=["stage", "kind", "steps", *SPENT])
    return table.assign(flops_so_far=table["flops"].cumsum())


def quality_per_flop(costs: pd.DataFrame, accuracy: Mapping[str, float], before: float) -> pd.DataFrame:
    """What the operations spent on training bought.

    Parameters
    ----------
    costs : DataFrame
        See `training_costs`.
    accuracy : mapping of stage to share
        Of right answers after each stage.
    before : float
        The same before training.

    Returns
    -------
    DataFrame
        ``costs`` with ``accuracy``, ``gain`` (over ``before``, in points of 100) and ``gain_per_petaflop`` (of all operations so far).
    """
    found = np.array([accuracy[stage] for stage in costs["stage"]], dtype=float)
    gain = 100 * (found - before)
    return costs.assign(accuracy=found, gain=gain, gain_per_petaflop=gain / (costs["flops_so_far"] / 1e15))


def speed_pairs(
    models: Mapping[str, tuple[Subject, Row]], items: Sequence, *, batch: int = 8, rounds: int = 10, tokens: int = 8, seed: int = 0
) -> pd.DataFrame:
    """Seconds to the first token, and for each of ``tokens`` further ones (NaN of none), of batches of prompts.

    In each round every model answers the same ``batch`` prompts, in an order drawn anew: rounds are pairs.

    Parameters
    ----------
    models : mapping of name to (subject, reduction in force or None)
    items : sequence of items

    Returns
    -------
    DataFrame
        ``round, model, first_token, further_token``.
    """
    require_items(items)
    integer(tokens, "tokens", least=0)
    batches = {name: [subject.encode_items(some) for some in cycled(items, batch)] for name, (subject, _) in models.items()}

    def took(name: str, n: int, turn: int) -> float:
        (subject, row), own = models[name], batches[name]
        return generation_seconds(subject, own[turn % len(own)], row, n)

    numbers = (1, tokens + 1) if tokens else (1,)
    table = paired({f"{name} {n}": partial(took, name, n) for name in models for n in numbers}, rounds, seed)
    rows = []
    for name in models:
        one = table[f"{name} 1"]
        further = (table[f"{name} {tokens + 1}"] - one) / tokens if tokens else np.nan
        rows.append(pd.DataFrame({"round": table["round"], "model": name, "first_token": one, "further_token": further}))
    return pd.concat(rows, ignore_index=True).sort_values("round", kind="stable", ignore_index=True)


def model_costs(
    models: Mapping[str, tuple[Subject, Row]],
    items: Sequence,
    *,
    reference: str | None = "teacher",
    batch: int = 8,
    rounds: int = 10,
    tokens: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """What using each model costs, and how that compares with a reference.

    Parameters
    ----------
    models : mapping of name to (subject, reduction in force or None)
    reference : str or None
        Name among ``models`` that shares are taken of.
    batch : int
        Prompts per pass of times and peak memory.
    rounds : int
        Of times; 0 measures none.

    Returns
    -------
    DataFrame
        One row a model and quantity: ``model, quantity, unit, value, of_reference, lower, upper``. Times are medians over rounds, their
        shares medians of the rounds' ratios with quartiles ``lower`` and ``upper``. Parameters and bytes of weights count what is in
        memory, tied weights once; peak memory is what a pass to the first token holds at once beyond the weights; cache and prefill
        operations (of the language model) are of one prompt, on average.
    """
    require_items(items)
    integer(tokens, "tokens", least=1)
    if reference is not None and reference not in models:
        raise ValueError(f"the reference '{reference}' is none of the models {', '.join(models)}")
    found = {name: _standing(subject, row, items, batch) for name, (subject, row) in models.items()}
    rows = []
    for name, quantities in found.items():
        for quantity, value in quantities.items():
            share = np.nan if reference is None else value / found[reference][quantity]
            rows.append((name, quantity, value, share, np.nan, np.nan))
    if rounds:
        speed = speed_pairs(models, items, batch=batch, rounds=rounds, tokens=tokens, seed=seed)
        for column, quantity in (("first_token", "first token"), ("further_token", "further token")):
            wide = speed.pivot(index="round", columns="model", values=column)
            for name in models:
                ratio = [np.nan] * 3 if reference is None else np.quantile(wide[name] / wide[reference], [0.5, 0.25, 0.75]).tolist()
                rows.append((name, quantity, float(wide[name].median()), *ratio))
    table = pd.DataFrame(rows, columns=["model", "quantity", "value", "of_reference", "lower", "upper"])
    table.insert(2, "unit", table["quantity"].map(UNITS))
    return table


def _standing(subject: Subject, row: Row, items: Sequence, batch: int) -> dict[str, float]:
    """What does not depend on the moment."""
    weights = list(subject.model.parameters())
    some = cycled(items, batch)[0]
    prepared = subject.encode_items(some)

    def first_token() -> None:
        generation_seconds(subject, prepared, row)

    first_token()
    lengths = prompt_lengths(subject, items, row)
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "peak memory": peak_bytes(first_token, torch.device(subject.device)),
        "cache": float(cache_bytes(subject, some, row).mean()),
        "prefill operations": float(np.mean([prefill_flops(subject.anatomy, one) for one in lengths])),
    }
