"""Tables and figures of distillation: what each way of training gave, what it cost, which items were gained and lost.

Nothing is measured here and no verdict depends on it; intervals come from ``vlm_core.stats``.

``Stage``                    what a reader must know of an arm
``students``                 ``student-metrics.csv``, Table 2 and the slope chart
``ablations``                ``distill-ablations.csv`` and differences between arms against zero
``costs``                    ``distill-costs.csv`` and accuracy over operations
``student_against_teacher``  ``student-against-teacher.csv`` and its table
``errors``                   ``distill-errors.csv``, ``distill-changed-items.csv``, items gained and lost, some of them as pictures
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from reports.exhibits.shared import mean_with_interval
from reports.pictures import png, thumbnail
from reports.wording import decimals_of, listing, number, plural, with_unit

BEFORE = "before"
ALL = "all"  # the row over all tasks
PICTURE_PIXELS = 96  # of a shown item's longer side

_TRAININGS = ("before", "first training", "second training", "third training", "fourth training")
_TOKENS = {False: "all visual tokens", True: "reduced visual tokens"}


@dataclass(frozen=True)
class Stage:
    """What a reader must know of an arm.

    Attributes
    ----------
    label : str
        The way of training, in words; arms that differ only in ``reduced`` share it.
    reduced : bool
        Whether it is trained, and answers, with the token recipe.
    start : str or None
        Label of the arm it goes on from; None for a student before training.
    """

    label: str
    reduced: bool
    start: str | None


def students(evidence, answers: Mapping[str, Sequence[pd.DataFrame]], stages: Mapping[str, Stage]) -> None:
    """``student-metrics.csv`` (per arm, seed and task), Table 2 and the slope chart.

    Parameters
    ----------
    answers : mapping of arm to frames
        One `vlm_core.evaluate` table a seed; ``"before"`` comes first and has one.
    stages : mapping of arm to Stage
        Of at least the arms in ``answers``.

    Raises
    ------
    ValueError
        Naming the arm that has no stage, no start among the arms, or other items than the first.
    """
    _check_arms(answers, stages)
    rows = []
    for arm, runs in answers.items():
        about = {"arm": arm, "label": stages[arm].label, "reduced": stages[arm].reduced}
        for seed, frame in enumerate(runs):
            for task, items in [*frame.groupby("task", sort=False), (ALL, frame)]:
                rows.append({**about, "seed": seed, "task": task, "accuracy": float(items["correct"].mean()), "items": len(items)})
    evidence.table("student-metrics.csv", pd.DataFrame(rows))
    _table_of_results(evidence, answers, stages)
    _paths(evidence, answers, stages)


def _check_arms(answers, stages):
    if next(iter(answers), None) != BEFORE or len(answers[BEFORE]) != 1:
        raise ValueError(f"the answers of {BEFORE!r} come first, with one frame: the student before training has no seeds")
    items = sorted(answers[BEFORE][0]["item"])
    labels = {stages[arm].label for arm in answers if arm in stages}
    for arm, runs in answers.items():
        if arm not in stages:
            raise ValueError(f"arm {arm!r} has no stage: expected one of {', '.join(stages)}")
        if not runs or any(sorted(frame["item"]) != items for frame in runs):
            raise ValueError(f"arm {arm!r} needs a frame a seed, each of the items of {BEFORE!r}")
        start = stages[arm].start
        if start is not None and start not in labels:
            raise ValueError(f"arm {arm!r} goes on from {start!r}, which is the label of none: {', '.join(sorted(labels))}")


def _table_of_results(evidence, answers, stages):
    labels = list(dict.fromkeys(stages[arm].label for arm in answers))
    found = {(stages[arm].label, stages[arm].reduced): _accuracy(runs) for arm, runs in answers.items()}
    sides = [reduced for reduced in _TOKENS if any(key[1] == reduced for key in found)]
    decimals = max(decimals_of((one["upper"] - one["lower"]) / 2) for one in found.values())
    seeds = sorted({len(runs) for arm, runs in answers.items() if stages[arm].start is not None})
    items, scenes = len(answers[BEFORE][0]), answers[BEFORE][0]["cluster"].nunique()
    rows = [{"label": label, "cells": [_cell(found.get((label, reduced)), decimals) for reduced in sides]} for label in labels]
    reduced = " Reduced: trained, and answering, with the token recipe." if True in sides else ""
    evidence.figure(
        "table",
        {"columns": ["student", *(_TOKENS[side] for side in sides)], "rows": rows},
        title="Table 2: the student by way of training",
        caption=f"Accuracy on {items} items in {scenes} scenes, mean over {listing([str(n) for n in seeds] or ['no'])} seeds of training, with 95 % "
        f"intervals over seeds and scenes together (before training: over scenes).{reduced}",
        alt="Accuracy of each student: "
        + "; ".join(f"{label}, {_TOKENS[side]}, {one['value']:.2f}" for (label, side), one in found.items())
        + ".",
    )


def _accuracy(runs):
    """Mean over seeds and items with its interval: ``{value, lower, upper}``."""
    frame = pd.concat([run.assign(seed=seed) for seed, run in enumerate(runs)], ignore_index=True)
    return mean_with_interval(frame["correct"], frame["cluster"], frame["seed"])


def _cell(found, decimals):
    if found is None:
        return {"text": "–", "interval": ""}
    value, lower, upper = (f"{found[name]:.{decimals}f}" for name in ("value", "lower", "upper"))
    return {"text": value, "interval": f"[{lower}, {upper}]", **found}


def _paths(evidence, answers, stages):
    """The slope chart: a panel for all and for reduced tokens, each arm from the one it goes on from."""
    starts = {arm: _start(arm, answers, stages) for arm in answers}
    depth = {arm: len(_line_of(arm, starts)) for arm in answers}
    panels = []
    for reduced, title in _TOKENS.items():
        mine = [arm for arm in answers if stages[arm].reduced == reduced]
        elsewhere = [starts[arm] for arm in mine if starts[arm] is not None and starts[arm] not in mine]
        shown = [*dict.fromkeys(elsewhere), *mine]
        if not mine:
            continue
        arms = [
            {
                "label": stages[arm].label + (f", {_TOKENS[stages[arm].reduced]}" if arm not in mine else ""),
                "stage": depth[arm],
                "start": shown.index(starts[arm]) if starts[arm] in shown else None,
                "values": [float(run["correct"].mean()) for run in answers[arm]],
            }
            for arm in shown
        ]
        panels.append({"title": title, "arms": arms})
    names = [_TRAININGS[min(at, len(_TRAININGS) - 1)] for at in range(max(depth.values()) + 1)]
    said = "; ".join(
        f"{arm['label']} {np.mean(arm['values']):.2f}" + (f" ({panel['title']})" if len(panels) > 1 else "") for panel in panels for arm in panel["arms"]
    )
    evidence.figure(
        "slope",
        {"panels": panels, "stages": names, "y_label": "accuracy"},
        title="The student before and after training",
        caption="Mean over all tasks. Thin lines: one seed of training each; bold: their mean. A line starts at the student that training went on from.",
        alt=f"Slope chart of accuracy: {said}.",
    )


def _start(arm, answers, stages):
    """The arm it goes on from: with its own tokens, where there is such a one."""
    named = [other for other in answers if stages[other].label == stages[arm].start]
    return next((other for other in named if stages[other].reduced == stages[arm].reduced), named[0] if named else None)


def _line_of(arm, starts):
    """The arms before this one, back to a student before training."""
    line, at = [], starts[arm]
    while at is not None:
        if at == arm or at in line:
            raise ValueError(f"arm {arm!r} goes on from itself: {' from '.join([arm, *line, at])}")
        line.append(at)
        at = starts[at]
    return line


_CONTRAST = ("arm", "against", "task", "difference", "lower", "upper", "confidence", "seeds", "items")


def ablations(evidence, contrasts: pd.DataFrame) -> None:
    """``distill-ablations.csv`` and the differences over all tasks, each with its interval, against zero.

    Parameters
    ----------
    contrasts : DataFrame
        ``arm, against, task, difference, lower, upper, confidence, seeds, items``; rows of task ``"all"`` are drawn.
    """
    _require(contrasts, _CONTRAST, "contrasts")
    whole = contrasts[contrasts["task"] == ALL]
    if whole.empty:
        raise ValueError(f"contrasts need a row of task {ALL!r} for what is drawn")
    evidence.table("distill-ablations.csv", contrasts[list(_CONTRAST)])
    rows = [
        {"label": f"{row.arm} against {row.against}", "value": float(row.difference), "lower": _known(row.lower), "upper": _known(row.upper)}
        for row in whole.itertuples()
    ]
    confidences = listing([f"{100 * level:.3g} %" for level in sorted(set(whole["confidence"]))])
    evidence.figure(
        "forest",
        {"rows": rows, "reference": 0.0, "x_label": "difference of accuracy, all tasks"},
        title="What makes the difference",
        caption=f"First arm minus second, {_span(whole['items'])} items, {_span(whole['seeds'])} seeds, {confidences} intervals. "
        "Hollow: the interval holds 0. Task by task in distill-ablations.csv.",
        alt="Differences of accuracy: " + "; ".join(f"{row['label']} {row['value']:+.3f}" for row in rows) + ".",
    )


_COSTS = (
    "arm", "label", "reduced", "steps", "images", "tokens", "supervised_tokens", "training_flops", "seconds", "answering_flops", "sampling_flops",
    "ranking_flops", "accuracy", "lower", "upper", "inference_flops",
)  # fmt: skip
_MAKING = {"answering_flops": "the teacher's answers", "sampling_flops": "samples of a student", "ranking_flops": "the teacher's ranking of them"}


def costs(evidence, table: pd.DataFrame) -> None:
    """``distill-costs.csv`` and accuracy over the operations spent on training and on answering.

    Parameters
    ----------
    table : DataFrame
        One row an arm: ``arm, label, reduced, steps, images, tokens, supervised_tokens, training_flops`` (of all its stages; 0 before training),
        ``seconds`` (of training), ``answering_flops, sampling_flops, ranking_flops`` (of making the data of all its stages: the teacher's answers,
        samples of a student, the teacher's ranking of them; not part of ``training_flops``), ``accuracy, lower, upper, inference_flops`` (of a
        prompt).
    """
    _require(table, _COSTS, "costs")
    evidence.table("distill-costs.csv", table[list(_COSTS)])
    points = [
        {
            "label": row.label,
            "reduced": bool(row.reduced),
            "training": _known(row.training_flops) or 0.0,
            "inference": _known(row.inference_flops) or 0.0,
            "value": float(row.accuracy),
            "lower": _known(row.lower),
            "upper": _known(row.upper),
            "tip": f"{row.label}, {_TOKENS[bool(row.reduced)]}: {number(float(row.accuracy))} for {with_unit(row.training_flops, 'FLOP')} of training, "
            f"{with_unit(row.inference_flops, 'FLOP')} a prompt{_making(row)}",
        }
        for row in table.itertuples()
    ]
    reduced = " Filled: all visual tokens; hollow: reduced ones, in training and in answering." if table["reduced"].any() else ""
    untrained = " Dashed lines: not trained." if (table["training_flops"] == 0).any() else ""
    evidence.figure(
        "quality_per_flop",
        {"points": points},
        title="Quality for operations",
        caption=f"Accuracy over the floating-point operations of all training so far (left) and of one prompt (right), with 95 % intervals.{reduced}{untrained} "
        f"{_not_counted(table)}",
        alt="Accuracy over operations: " + "; ".join(point["tip"] for point in points) + ".",
    )


def _making(row):
    """What making an arm's data took, for a tip."""
    took = sum(getattr(row, name) for name in _MAKING)
    return f", {with_unit(took, 'FLOP')} to make its data" if took else ""


def _not_counted(table):
    """What the operations of training leave out, and how much at most that came to for an arm."""
    took = [f"{said} {with_unit(most, 'FLOP')}" for name, said in _MAKING.items() if (most := float(table[name].max())) > 0]
    found = f" (for an arm, at most: {listing(took)}; see distill-costs.csv)" if took else ""
    return (
        "Training counts the language model, in a preference stage with its reference, on-policy with the student's answers and the teacher's reading of them. "
        f"It does not count making the data{found}, image encoders, what the choice of layers or of a token recipe took, nor, with reduced tokens, the training "
        "of the student with all tokens that pairs of answers are drawn from."
    )


_TEACHER = "teacher"
_MODEL_COSTS = ("model", "quantity", "unit", "value", "of_reference", "lower", "upper")


def student_against_teacher(evidence, table: pd.DataFrame) -> None:
    """``student-against-teacher.csv`` and a small table: what using a student costs beside its teacher.

    ``table``: what `vlm_core.distill.costs.model_costs` gives with the reference ``"teacher"``.
    """
    _require(table, _MODEL_COSTS, "model costs")
    models = list(dict.fromkeys(table["model"]))
    if _TEACHER not in models or len(models) < 2:
        raise ValueError(f"model costs need {_TEACHER!r} and a student beside it, got {', '.join(map(repr, models))}")
    evidence.table("student-against-teacher.csv", table[list(_MODEL_COSTS)])
    found = {(row.model, row.quantity): row for row in table.itertuples()}
    pupils = [model for model in models if model != _TEACHER]
    rows = []
    for quantity, unit in dict(zip(table["quantity"], table["unit"], strict=True)).items():
        cells = [_plain(with_unit(float(found[model, quantity].value), unit)) for model in (_TEACHER, *pupils)]
        for pupil in pupils:
            row = found[pupil, quantity]
            ends = [_known(row.lower), _known(row.upper)]
            interval = f"[{number(ends[0])}, {number(ends[1])}]" if None not in ends else ""
            cells.append({"text": number(_known(row.of_reference)), "interval": interval})
        rows.append({"label": quantity, "cells": cells})
    evidence.figure(
        "table",
        {"columns": ["", _TEACHER, *pupils, *(f"{pupil} / {_TEACHER}" for pupil in pupils)], "rows": rows},
        title="Using the student, beside its teacher",
        caption="Of the whole model, image encoder included; operations and cache of the language model, for one prompt. Times are medians of rounds in which all "
        "models answer the same prompts; in brackets the middle half of the rounds' ratios.",
        alt="Costs of each model: "
        + "; ".join(f"{row['label']} " + ", ".join(cell["text"] for cell in row["cells"]) for row in rows)
        + ".",
    )


def _plain(text):
    return {"text": text, "interval": ""}


def errors(
    evidence, before: pd.DataFrame, after: Sequence[pd.DataFrame], pictures: Callable[[str], object], per_task: int = 2
) -> None:
    """``distill-errors.csv`` (how many, by task), ``distill-changed-items.csv`` (which), items gained and lost, and some of them as pictures.

    An item is gained when it was wrong before and is right for most seeds after, lost when it was right and is wrong for most.

    Parameters
    ----------
    before : DataFrame
        As `vlm_core.evaluate` gives it.
    after : sequence of DataFrame
        One a seed, of the same items.
    pictures : callable
        Item id → PIL image.
    per_task : int
        Pictures of gained, and of lost, items of each task; those whose ids hash lowest, so that no eye has chosen them.
    """
    if not after:
        raise ValueError("errors need at least one frame of answers after training")
    items = before.set_index("item")
    runs = [frame.set_index("item") for frame in after]
    for seed, run in enumerate(runs):
        if set(run.index) != set(items.index):
            raise ValueError(f"the answers of seed {seed} are not of the items answered before training")
    right = np.mean([run["correct"].reindex(items.index).astype(float) for run in runs], axis=0)
    was = items["correct"].astype(bool).to_numpy()
    change = np.where(~was & (right > 0.5), "gained", np.where(was & (right < 0.5), "lost", ""))
    rows = []
    for task, mine in [*((task, (items["task"] == task).to_numpy()) for task in dict.fromkeys(items["task"])), (ALL, np.ones(len(items), bool))]:
        gained, lost = (int((change[mine] == name).sum()) for name in ("gained", "lost"))
        rows.append({"task": task, "gained": gained, "lost": lost, "net": gained - lost, "items": int(mine.sum())})
    evidence.table("distill-errors.csv", pd.DataFrame(rows))
    evidence.table("distill-changed-items.csv", _changed(items, runs, change))
    drawn = [{"label": row["task"], **{name: row[name] for name in ("gained", "lost", "items")}} for row in rows if row["task"] != ALL]
    whole = rows[-1]
    evidence.figure(
        "gained_lost",
        {"rows": drawn},
        title="Items gained and lost",
        caption=f"Gained: wrong before training, right for most of {plural(len(runs), 'seed')} after; lost: the other way round. "
        f"Of {whole['items']} items, {whole['gained']} gained and {whole['lost']} lost; each by name in distill-changed-items.csv.",
        alt="Items by task: " + "; ".join(f"{row['label']} {row['gained']} gained, {row['lost']} lost of {row['items']}" for row in drawn) + ".",
    )
    groups = []
    for row in drawn:
        chosen = [
            (item, name)
            for name in ("gained", "lost")
            for item in sorted(items.index[(items["task"] == row["label"]).to_numpy() & (change == name)], key=_hashed)[:per_task]
        ]
        if chosen:
            groups.append({"name": row["label"], "cases": [_case(items.loc[item], item, name, runs, pictures(item)) for item, name in chosen]})
    if groups:
        count = sum(len(group["cases"]) for group in groups)
        evidence.figure(
            "cases",
            {"groups": groups},
            title="Some of the items gained and lost",
            caption=f"For each task at most {per_task} gained and {per_task} lost, chosen by the hash of the item's id. After: what each seed says, "
            "with the number of seeds where they differ.",
            alt=f"Pictures of {plural(count, 'item')} with question, right answer, and what the student said before and after training.",
        )


def _changed(items, runs, change):
    """A row an item gained or lost: ``item, task, change, answer, before, after``, what each seed says parted by bars."""
    rows = [
        (item, row["task"], how, row["answer"], row["output"], " | ".join(str(run.loc[item, "output"]) for run in runs))
        for (item, row), how in zip(items.iterrows(), change, strict=True)
        if how
    ]
    return pd.DataFrame(rows, columns=["item", "task", "change", "answer", "before", "after"])


def _hashed(item):
    return hashlib.sha256(str(item).encode()).hexdigest()


def _case(row, item, name, runs, image):
    said = Counter(str(run.loc[item, "output"]) for run in runs).most_common()
    small = thumbnail(image, PICTURE_PIXELS)
    return {
        "item": str(item),
        "change": name,
        "image": png(small),
        "width": small.width,
        "height": small.height,
        "prompt": row["prompt"],
        "answer": row["answer"],
        "before": str(row["output"]),
        "after": said[0][0] if len(said) == 1 else ", ".join(f"{answer} ({times})" for answer, times in said),
    }


def _require(table, columns, name):
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        raise ValueError(f"{name} need {f'a column {missing[0]!r}' if missing else 'at least one row'}: columns are {', '.join(columns)}")


def _known(value):
    """A number, or None where there is none."""
    return None if value is None or not np.isfinite(value) else float(value)


def _span(values):
    low, high = int(min(values)), int(max(values))
    return str(low) if low == high else f"{low} to {high}"
