"""How well a subject answers, item by item.

``evaluate(subject, items)``    one row per item, by candidates or by greedy generation, sighted or blind
``accuracy_table(results)``     accuracy per task with its interval
``generated(...)``              what a subject generates for each item, and in how many tokens; ``greedy_answers(...)`` the texts alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from PIL import Image

from vlm_core.errors import SubjectError
from vlm_core.images import as_rgb
from vlm_core.interventions import Intervention, require_row
from vlm_core.interventions.numeric import integer, real
from vlm_core.items import SCORED, SHOWN, item_field, plain, require_item, require_items, take
from vlm_core.stats import interval
from vlm_core.subjects.subject import Subject, require_subject
from vlm_core.sweeps.budget import Budget, in_batches
from vlm_core.sweeps.features import KnownFeatures, recalling
from vlm_core.sweeps.scoring import candidate_metric
from vlm_core.sweeps.sweep import sweep

__all__ = ["UNALTERED", "Generated", "accuracy_table", "evaluate", "generated", "greedy_answers", "shown_items"]

_ALTERING = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "exponential_decay_length_penalty", "guidance_scale", "watermarking_config",
)  # fmt: skip
UNALTERED = MappingProxyType(dict.fromkeys(_ALTERING))
"""For ``generate``: the model's own logits, whatever its generation_config.json asks to be made of them. A repetition penalty, say, lowers tokens
that were there before, those of the question's options among them."""

COLUMNS = ("item", "cluster", "task", "prompt", "image", "output", "answer", "correct", "score")


def evaluate(
    subject: Subject,
    items: Sequence,
    *,
    plan: Intervention | tuple[Intervention, ...] | None = None,
    blind: str | None = None,
    mode: str = "candidates",
    out: str | Path | None = None,
    logits: bool = False,
    batch_rows: int | None = None,
    max_new_tokens: int = 16,
) -> pd.DataFrame:
    """Answer every item.

    Parameters
    ----------
    items : sequence of items
        With ``id, scene_id, task, image, prompt, answer``, and in mode ``"candidates"`` with those.
    plan : optional
        An intervention (or a tuple of them) in force throughout.
    blind : {None, "mean", "swap"}
        ``"mean"``: every image is the mean over the items' images; ``"swap"``: every image is another scene's (the
        next item of the same task with a different ``scene_id``). What is answered then needs no look at the image.
    mode : {"candidates", "greedy"}
        ``"candidates"``: the best-scoring candidate; ``"greedy"``: generated text, right if it equals the answer
        ignoring case, punctuation and spacing.
    out : path, optional
        Also write the rows there as JSON lines.
    logits : bool
        Also give, in column ``logits``, every candidate's summed log-probability as ``{candidate: value}``. Candidates mode only.

    Returns
    -------
    DataFrame
        ``item, cluster, task, prompt, image, output, answer, correct, score``. ``image`` names the scene that was shown
        (``"mean"`` for the mean image); ``score`` is the margin in ``"candidates"`` mode, NaN in ``"greedy"``.

    Raises
    ------
    SubjectError
        In ``"candidates"`` mode where the model's numbers are not finite: there is no answer to be right or wrong.
    """
    if mode not in ("candidates", "greedy"):
        raise ValueError(f"mode must be 'candidates' or 'greedy', got '{mode}'")
    fields = SCORED if mode == "candidates" else tuple(name for name in SCORED if name != "candidates")
    require_items(items, fields)
    require_row(plan, "plan")
    if mode == "greedy":
        require_subject(subject)
    if batch_rows is not None:
        integer(batch_rows, "batch_rows", least=1)
    integer(max_new_tokens, "max_new_tokens", least=1)
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out {str(out)!r} is a directory: name the file that the rows go to")
    if logits and mode == "greedy":
        raise ValueError("logits are those of the candidates: ask for them in mode 'candidates'")
    shown, names = shown_items(items, blind, fields)
    if mode == "candidates":
        outputs, correct, score, each = _by_candidates(subject, shown, names, plan, batch_rows, logits)
    else:
        outputs = greedy_answers(subject, shown, plan=plan, batch_rows=batch_rows, max_new_tokens=max_new_tokens)
        answers = [str(item_field(item, "answer")) for item in shown]
        correct = [plain(output) == plain(answer) for output, answer in zip(outputs, answers, strict=True)]
        score = [np.nan] * len(outputs)
    results = pd.DataFrame(
        {
            "item": [str(item_field(item, "id")) for item in shown],
            "cluster": [str(item_field(item, "scene_id")) for item in shown],
            "task": [str(item_field(item, "task")) for item in shown],
            "prompt": [str(item_field(item, "prompt")) for item in shown],
            "image": names,
            "output": outputs,
            "answer": [str(item_field(item, "answer")) for item in shown],
            "correct": np.array(correct, dtype=bool),
            "score": np.array(score, dtype=float),
        },
        columns=list(COLUMNS),
    )
    if logits:
        results["logits"] = each
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        results.to_json(out, orient="records", lines=True, force_ascii=False)
    return results


def accuracy_table(results: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Accuracy per task from ``evaluate``, with a cluster-bootstrap interval.

    Returns
    -------
    DataFrame
        ``task, n, clusters, accuracy, lower, upper``.

    Raises
    ------
    ValueError
        If ``results`` is no such table, or ``confidence`` lies outside (0, 1).
    """
    missing = [name for name in ("task", "cluster", "correct") if name not in getattr(results, "columns", ())]
    if missing:
        raise ValueError(f"results must be the table that evaluate gives, got a {type(results).__name__} without column '{missing[0]}'")
    if not 0.0 < real(confidence, "confidence") < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}: 95 % is 0.95")
    rows = []
    for task, group in results.groupby("task", sort=True):
        correct = group["correct"].to_numpy(float)
        found = interval(correct, group["cluster"].to_numpy(), confidence=confidence, bounds=(0.0, 1.0))
        rows.append((task, len(group), group["cluster"].nunique(), correct.mean(), found.lower, found.upper))
    return pd.DataFrame(rows, columns=["task", "n", "clusters", "accuracy", "lower", "upper"])


def _fields(item, fields: Sequence[str], **changes) -> dict:
    return {**{name: item_field(item, name) for name in fields}, **changes}


def shown_items(items: Sequence, blind: str | None, fields: Sequence[str] = SCORED) -> tuple[list, list[str]]:
    """Items of these ``fields`` with the images that ``evaluate(blind=...)`` shows, and the scene (or ``"mean"``) each image is of."""
    if blind not in (None, "mean", "swap"):
        raise ValueError(f"blind must be None, 'mean' or 'swap', got '{blind}'")
    shown = take(items, range(len(items)))
    for item in shown:
        require_item(item, fields)
    if blind is None or not shown:
        return shown, [str(item_field(item, "scene_id")) for item in shown]
    if blind == "mean":
        several = [item for item in shown if isinstance(item_field(item, "image"), list | tuple)]
        if several:
            raise ValueError(f"item {item_field(several[0], 'id')!r} has several images, which have no mean: use blind='swap'")
        mean = _mean_image([item_field(item, "image") for item in shown])
        return [
            _fields(item, fields, image=mean.resize(item_field(item, "image").size)) for item in shown
        ], ["mean"] * len(shown)
    partners = _partners(shown)
    return [
        _fields(item, fields, image=item_field(partner, "image")) for item, partner in zip(shown, partners, strict=True)
    ], [str(item_field(partner, "scene_id")) for partner in partners]


def _mean_image(images: Sequence[Image.Image]) -> Image.Image:
    size = images[0].size
    total = np.zeros((size[1], size[0], 3))
    for image in images:
        total += np.asarray(as_rgb(image).resize(size), dtype=float)
    return Image.fromarray(np.round(total / len(images)).astype(np.uint8))


def _partners(items: Sequence) -> list:
    partners = []
    for index, item in enumerate(items):
        rotated = [*items[index + 1 :], *items[:index]]
        partner = next(
            (
                other
                for other in rotated
                if item_field(other, "task") == item_field(item, "task")
                and item_field(other, "scene_id") != item_field(item, "scene_id")
            ),
            None,
        )
        if partner is None:
            raise ValueError(
                f"item {item_field(item, 'id')!r} has no partner for blind='swap': its task "
                f"{item_field(item, 'task')!r} needs items of at least two scenes"
            )
        partners.append(partner)
    return partners


def _by_candidates(subject, items, images, plan, batch_rows, logits) -> tuple[list[str], np.ndarray, np.ndarray, list[dict[str, float]]]:
    """What was chosen, whether it is right, its margin, and with ``logits`` every candidate's log-probability; ``images`` names what is shown."""
    candidates = [list(item_field(item, "candidates")) for item in items]
    each = [candidate_metric(k) for k in range(max(map(len, candidates), default=0))] if logits else []
    metrics = ("correct", "margin", "choice", *each)
    # Questions about one image go together: they share its prefix.
    order = np.argsort(np.unique(images, return_inverse=True)[1], kind="stable") if len(items) else np.arange(0)
    table = sweep(subject, [items[number] for number in order], {"plan": plan}, batch_rows=batch_rows, metrics=metrics)
    values = np.empty((len(items), len(metrics)))
    values[order] = table["value"].to_numpy().reshape(len(items), len(metrics))
    unknown = np.flatnonzero(np.isnan(values[:, :3]).any(1))
    if len(unknown):
        raise SubjectError(
            f"subject '{subject.name}' gives numbers that are not finite for item {item_field(items[int(unknown[0])], 'id')!r} "
            f"({len(unknown)} of {len(items)} items), so it has no answer there: load it in float32 or bfloat16, or weaken the plan."
        )
    outputs = [names[int(choice)] for names, choice in zip(candidates, values[:, 2], strict=True)]
    scores = [dict(zip(names, row.tolist(), strict=False)) for names, row in zip(candidates, values[:, 3:], strict=True)] if logits else []
    return outputs, values[:, 0] == 1.0, values[:, 1], scores


@dataclass(frozen=True)
class Generated:
    """What a subject wrote.

    Parameters
    ----------
    text : str
        Without special tokens and surrounding spaces.
    tokens : int
        How many it took, the one that ends the answer among them.
    prompt : int
        Tokens of the prompt, padding not counted.
    cut_off : bool
        Whether there was no such token: it had not ended when it had as many tokens as it may.
    """

    text: str
    tokens: int
    prompt: int
    cut_off: bool = False


def greedy_answers(
    subject: Subject,
    items: Sequence,
    *,
    plan: Intervention | tuple[Intervention, ...] | None = None,
    batch_rows: int | None = None,
    max_new_tokens: int = 16,
) -> list[str]:
    """The texts that `generated` gives."""
    found = generated(subject, items, plan=plan, batch_rows=batch_rows, max_new_tokens=max_new_tokens)
    return [one.text for one in found]


def generated(
    subject: Subject,
    items: Sequence,
    *,
    plan: Intervention | tuple[Intervention, ...] | None = None,
    batch_rows: int | None = None,
    max_new_tokens: int = 16,
) -> list[Generated]:
    """What the subject generates for each item, token by token the likeliest by its own logits (`UNALTERED`).

    Parameters
    ----------
    items : sequence of items
        With ``id``, ``image`` and ``prompt``; no answer is needed.
    plan : optional
        An intervention (or a tuple of them) in force throughout.
    batch_rows : int, optional
        Prompts per batch. Default: what keeps the device busy, where its free memory holds their keys and values. A batch that runs out of
        memory is halved.

    Raises
    ------
    SubjectError
        Where a single prompt does not fit into memory.
    """
    require_subject(subject)
    require_items(items, SHOWN)
    items = take(items, range(len(items)))
    for item in items:
        require_item(item, SHOWN)
    outputs: list[Generated | None] = [None] * len(items)
    known, budget = KnownFeatures.of(subject), Budget.of(subject, batch_rows, cached=True)

    def answer(chosen: Sequence[int]) -> None:
        batch = subject.encode_items([items[index] for index in chosen])
        n_prompt = batch.image.shape[1]
        fits = budget.whole(n_prompt + max_new_tokens, len(chosen))
        if fits < len(chosen):
            in_batches(chosen, fits, answer)
            return
        with torch.inference_mode(), recalling(subject, known), subject.intervene(plan, batch):
            tokens = subject.model.generate(
                **batch.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=subject.tokenizer.pad_token_id,
                **UNALTERED,
            )[:, n_prompt:]
        texts = subject.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        prompts = batch.valid.sum(1).tolist()
        for index, text, (length, ended), prompt in zip(chosen, texts, _lengths(subject, tokens), prompts, strict=True):
            outputs[index] = Generated(text.strip(), length, prompt, not ended)

    # Prompts of alike length share a batch: less padding.
    order = sorted(range(len(items)), key=lambda index: len(item_field(items[index], "prompt")))
    in_batches(order, batch_rows or subject.batch_rows, answer)
    return outputs


def _lengths(subject: Subject, tokens: torch.Tensor) -> list[tuple[int, bool]]:
    """Tokens of each row of what ``generate`` gave up to the one that ends it, and whether there is one; of one that was cut off, all."""
    ends = subject.model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=tokens.device, dtype=tokens.dtype).reshape(-1)
    found = torch.isin(tokens, ends)
    ended = found.any(1)
    first = torch.where(ended, found.int().argmax(1) + 1, tokens.shape[1])
    return list(zip(first.tolist(), ended.tolist(), strict=True))
