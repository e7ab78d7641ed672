"""A data card of what a student is taught, written from what was built.

``data_card(...)``      the card, Markdown
``content_digest(...)`` hash of pictures, prompts and answers
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_core.distill.filters import Kept
from vlm_core.distill.instructions import require_answers
from vlm_core.distill.pairs import Pair
from vlm_core.identity import picture_digest
from vlm_core.items import item_field, plain, require_items, take

if TYPE_CHECKING:
    from vlm_core.distill.teachers import Teacher

__all__ = ["content_digest", "data_card"]

KINDS = ("plain", "grounded", "self-consistent")


def data_card(
    name: str,
    items: Sequence,
    answers: Sequence[str],
    *,
    licence: str,
    kinds: str | Sequence[str] = "plain",
    teacher: Teacher | Mapping[str, Any] | None = None,
    filters: Sequence[Kept] = (),
    pairs: Sequence[Pair] = (),
    leakage: pd.DataFrame | None = None,
    evaluated: Sequence[str] = (),
    source: str = "",
    n_examples: int = 5,
) -> str:
    """A Markdown card: every number in it is counted here.

    Parameters
    ----------
    name : str
        Of the data.
    items, answers : sequences
        What is taught, after filters: one answer an item.
    licence : str
        Of pictures, questions and answers.
    kinds : str or sequence of str
        What kind of answer each is ("plain", "grounded", "self-consistent"), one for all or one an item.
    teacher : Teacher or its identity, optional
        Who answered.
    filters : sequence of Kept
        In the order in which they were applied.
    pairs : sequence of Pair
        The preference pairs beside the answers.
    leakage : DataFrame, optional
        What ``vlm_core.distill.leaks`` found; None where nothing was compared, which the card says.
    evaluated : sequence of str
        Names of the sets that were compared.
    source : str
        Where items come from, in words.
    n_examples : int
        Questions and answers that are shown, spread over the tasks.

    Raises
    ------
    ValueError
        If answers or kinds are not one an item, or there are no items.
    """
    require_answers(items, answers, "a data card")
    if not len(items):
        raise ValueError(f"a data card of '{name}' needs at least one item")
    items = take(items, range(len(items)))
    kinds = [kinds] * len(items) if isinstance(kinds, str) else list(kinds)
    if len(kinds) != len(items):
        raise ValueError(f"{len(items)} items but {len(kinds)} kinds of answers: give one an item, or one for all")
    rows = _rows(items, answers, kinds)
    identity = teacher.identity() if hasattr(teacher, "identity") else teacher
    sections = [
        f"# Data card: {name}",
        _summary(rows, items, answers, licence, source),
        "## Tasks\n\n" + _markdown(_tasks(rows)),
        "## Teacher\n\n" + _teacher(identity, rows),
        "## Lengths of answers\n\n" + _lengths(rows),
        "## Filters\n\n" + _filters(filters),
        "## Preference pairs\n\n" + _pairs(pairs),
        "## Leakage\n\n" + _leakage(leakage, evaluated),
        "## Examples\n\n" + _markdown(_examples(rows, n_examples)),
    ]
    return "\n\n".join(sections) + "\n"


def content_digest(items: Sequence, answers: Sequence[str]) -> str:
    """SHA-256 of the pictures, prompts and answers that are taught, whatever their order."""
    require_answers(items, answers, "a digest of what is taught")
    lines = sorted(
        json.dumps([picture_digest(item_field(item, "image")), item_field(item, "prompt"), answer])
        for item, answer in zip(take(items, range(len(items))), answers, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rows(items: list, answers: Sequence[str], kinds: list[str]) -> pd.DataFrame:
    require_items(items, ("id", "scene_id", "task", "image", "prompt"))
    known = [item.get("answer") if isinstance(item, Mapping) else getattr(item, "answer", None) for item in items]
    return pd.DataFrame(
        {
            "task": [str(item_field(item, "task")) for item in items],
            "scene": [str(item_field(item, "scene_id")) for item in items],
            "picture": [picture_digest(item_field(item, "image")) for item in items],
            "prompt": [item_field(item, "prompt") for item in items],
            "answer": list(answers),
            "kind": kinds,
            "known": known,
            "words": [len(answer.split()) for answer in answers],
            "right": [None if truth is None else _right(answer, truth) for answer, truth in zip(answers, known, strict=True)],
        }
    )


def _right(answer: str, truth: str) -> bool:
    """An answer is right where it is the known one, or begins with it (a grounded answer goes on to say where)."""
    said, expected = plain(answer).split(), plain(truth).split()
    return bool(expected) and said[: len(expected)] == expected


def _summary(rows: pd.DataFrame, items: list, answers: Sequence[str], licence: str, source: str) -> str:
    facts = {
        "Questions": len(rows),
        "Pictures": rows["picture"].nunique(),
        "Scenes": rows["scene"].nunique(),
        "Distinct prompts": rows["prompt"].nunique(),
        "Distinct answers": rows["answer"].nunique(),
        "Kinds of answers": ", ".join(f"{kind} ({n})" for kind, n in sorted(Counter(rows["kind"]).items())),
        "Source": source or "not stated",
        "Licence": licence,
        "Content (SHA-256)": f"`{content_digest(items, answers)}`",
    }
    return "\n".join(f"* {key}: {value}" for key, value in facts.items())


def _tasks(rows: pd.DataFrame) -> pd.DataFrame:
    table = []
    for task, group in [*rows.groupby("task", sort=True), ("all", rows)]:
        commonest, n = Counter(group["answer"]).most_common(1)[0]
        right = group["right"].dropna()
        table.append(
            {
                "task": task,
                "questions": len(group),
                "pictures": group["picture"].nunique(),
                "answers": group["answer"].nunique(),
                "commonest": f"{commonest} ({n / len(group):.0%})",
                "right": f"{right.astype(bool).mean():.1%} of {len(right)}" if len(right) else "not known",
            }
        )
    return pd.DataFrame(table)


def _teacher(identity: Mapping[str, Any] | None, rows: pd.DataFrame) -> str:
    right = rows["right"].dropna()
    known = f"Of {len(right)} questions whose answer is known, {right.astype(bool).mean():.1%} are answered right." if len(right) else (
        "No question's right answer is known: how often the answers are right was not measured."
    )
    if identity is None:
        return f"No teacher is named.\n\n{known}"
    return "\n".join(f"* {key}: {value}" for key, value in identity.items() if value is not None) + f"\n\n{known}"


def _lengths(rows: pd.DataFrame) -> str:
    quantiles = np.quantile(rows["words"], (0, 0.5, 0.95, 1))
    return "Words: least {:.0f}, median {:.0f}, 95th percentile {:.0f}, most {:.0f}.".format(*quantiles)


def _filters(filters: Sequence[Kept]) -> str:
    if not filters:
        return "None."
    table = []
    for one in filters:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in one.dropped.items()) or "nothing"
        n = len(one.kept) + sum(one.dropped.values())
        table.append({"filter": one.name, "looked at": n, "kept": len(one.kept), "dropped": reasons})
    return _markdown(pd.DataFrame(table))


def _pairs(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return "None."
    table = []
    for source in sorted({pair.source for pair in pairs}):
        own = [pair for pair in pairs if pair.source == source]
        margins = [pair.margin for pair in own if pair.margin is not None]
        median = f"{np.median(margins):.2f}" if margins else "not scored"
        table.append({"source": source, "pairs": len(own), "items": len({pair.item for pair in own}), "median margin": median})
    return _markdown(pd.DataFrame(table))


def _leakage(leakage: pd.DataFrame | None, evaluated: Sequence[str]) -> str:
    if leakage is None:
        return "Not compared with any set that is evaluated on."
    names = ", ".join(evaluated) or "no set"
    if not len(leakage):
        return f"No picture is shared with {names} (compared by pixels)."
    counts = leakage.groupby(["evaluated", "what"]).size()
    shared = ", ".join(f"{n} items share a {what} with {name}" for (name, what), n in counts.items())
    return f"Compared by pixels with {names}: {shared}."


def _examples(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    order = rows.assign(place=rows.groupby("task").cumcount()).sort_values(["place", "task"], kind="stable")
    shown = order.head(n)[["task", "prompt", "answer", "known"]]
    return shown.assign(known=["not known" if truth is None else truth for truth in shown["known"]])


def _markdown(table: pd.DataFrame) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in [tuple(table.columns), *table.itertuples(index=False)]]
    return "\n".join([lines[0], "|" + "---|" * len(table.columns), *lines[1:]])
