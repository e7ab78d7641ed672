"""Ways to take heads away, and what each costs: top heads of a ranking against random ones, over numbers of heads.

``removals``        zero, mean, image keys and values, another image's outputs, and a direction of the same length that means nothing
``ablation_grid``   correctness per item under every removal, set of heads and number of heads
``grid_table``      the same as accuracies with intervals

All of them act on the tokens after the image only (image keys and values: on all text): what grounds the answer. The tokens of the image go on
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from vlm_core.families.anatomy import HeadId
from vlm_core.heads.draws import assign_draws, layer_free, layer_matched
from vlm_core.interventions import (
    HeadDirections,
    HeadMeans,
    ImageKVMeans,
    Intervention,
    MeanHeads,
    RedirectHeads,
    ReplaceImageKV,
    ResampleHeads,
    ZeroHeads,
)
from vlm_core.items import item_field
from vlm_core.stats import interval
from vlm_core.subjects.activations import capture_activations
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep

__all__ = ["MODES", "ablation_grid", "grid_table", "removals"]

MODES = ("image-KV", "zero", "mean", "resample", "placebo")
TARGETS = ("top", "layer-matched", "random")

Removal = Callable[[int, Sequence[HeadId]], Intervention]
"""What is done to some heads for one item: ``removal(number of the item, heads)``."""


def removals(
    subject: Subject, items: Sequence, image_means: ImageKVMeans, head_means: HeadMeans, modes: Sequence[str] = MODES, seed: int = 0
) -> dict[str, Removal]:
    """The ways to take heads away, by name.

    ``image-KV``
        Image keys and values become their mean over images and places, as text sees them: the head goes on working and cannot tell what is
        in this image, nor where.
    ``zero``, ``mean``
        The head's output becomes zero, or its mean.
    ``resample``
        The head's output becomes what it is for the same question about another scene's image (the next item's of another scene).
    ``placebo``
        The head's output keeps its length and gets a random direction: as much is written as before, and it means nothing. What the head
        said is gone, as it is with ``zero``, so this tells how much of a cost lies in how much is written; it cannot tell heads that carry
        the answer from heads that bear no disturbance, and no claim rests on it (`vlm_core.heads.placebo` can, and one does).

    Parameters
    ----------
    modes : sequence of str
        Which of them; ``resample`` runs every item once more.

    Raises
    ------
    ValueError
        For an unknown mode, or for ``resample`` where all items are of one scene.
    """
    anatomy = subject.anatomy
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"unknown mode {unknown[0]!r}: choose from {', '.join(MODES)}")
    found: dict[str, Removal] = {}
    if "image-KV" in modes:
        found["image-KV"] = lambda number, heads: ReplaceImageKV(tuple(heads), image_means, queries="text")
    if "zero" in modes:
        found["zero"] = lambda number, heads: ZeroHeads(tuple(heads), "question")
    if "mean" in modes:
        found["mean"] = lambda number, heads: MeanHeads(tuple(heads), head_means, "question")
    if "resample" in modes:
        sources = [capture_activations(subject, item, "head") for item in _with_other_images(items)]
        found["resample"] = lambda number, heads: ResampleHeads(tuple(heads), sources[number], "question")
    if "placebo" in modes:
        directions = HeadDirections.random(anatomy.n_layers, anatomy.n_heads, anatomy.head_dim, seed)
        found["placebo"] = lambda number, heads: RedirectHeads(tuple(heads), directions, "question")
    return found


def _with_other_images(items: Sequence) -> list[dict]:
    """Every item with the image of the next item that is of another scene."""
    scenes, changed = [item_field(item, "scene_id") for item in items], []
    for number, item in enumerate(items):
        others = (place % len(items) for place in range(number + 1, number + len(items)))
        other = next((place for place in others if scenes[place] != scenes[number]), None)
        if other is None:
            raise ValueError("all items are of one scene: resampling needs the image of another")
        fields = {name: item_field(item, name) for name in ("id", "scene_id", "task", "prompt", "answer", "candidates")}
        changed.append({**fields, "image": item_field(items[other], "image")})
    return changed


def ablation_grid(
    subject: Subject,
    items: Sequence,
    ranking: Sequence[HeadId],
    removals: Mapping[str, Removal],
    cells: Sequence[tuple[str, int]],
    *,
    top_only: Collection[tuple[str, int]] = (),
    draws: int = 24,
    draws_per_item: int = 2,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> pd.DataFrame:
    """Correctness with heads taken away in several ways: the top ones, random ones of the same layers, random ones of any layer.

    Parameters
    ----------
    ranking : sequence of HeadId
        The first ones first.
    removals : mapping of mode to callable
        From ``removals``, for these very items.
    cells : sequence of (mode, number of heads)
        What is measured.
    top_only : collection of (mode, number of heads)
        Cells in which no random heads are taken away: a fifth of the runs, where two of either kind are run on each item.
    draws : int
        Random sets of heads for each number and kind; all modes take away the same ones.
    draws_per_item : int
        How many of them each item is run on.

    Returns
    -------
    DataFrame
        ``item, cluster, task, mode, target, heads, correct``: one row an item and cell, random sets averaged. ``target`` is ``top``,
        ``layer-matched`` (left out where the top heads fill their layers) or ``random``; mode ``none`` with 0 heads is the untouched subject.

    Raises
    ------
    ValueError
        For a cell of an unknown mode, of none or all of the heads, or one in ``top_only`` alone.
    """
    n_heads = len(subject.image_heads)
    for mode, count in cells:
        if mode not in removals:
            raise ValueError(f"cell ({mode!r}, {count}): there is no such removal, only {', '.join(removals)}")
        if not 0 < count < n_heads:
            raise ValueError(f"cell ({mode!r}, {count}): expected a number of heads from 1 to {n_heads - 1}")
    table, assignments, about = {"none": None}, [(number, "none") for number in range(len(items))], {"none": ("none", "top", 0)}
    stray = [cell for cell in top_only if cell not in cells]
    if stray:
        raise ValueError(f"top_only names the cell {stray[0]!r}, which is not measured")
    for count in dict.fromkeys(count for _, count in cells):
        sets, plan = _sets(subject, ranking[:count], len(items), draws, draws_per_item, seed)
        for mode in (mode for mode, number in cells if number == count):
            for number, name in plan:
                if name != "top" and (mode, count) in top_only:
                    continue
                label = f"{mode}/{count}/{name}/{number}"
                table[label] = removals[mode](number, sets[name])
                assignments.append((number, label))
                about[label] = (mode, name.split("/")[0], count)
    measured = sweep(subject, items, table, metrics=("correct",), assignments=assignments, store=store, progress=progress)
    columns = pd.DataFrame([about[label] for label in measured["intervention"]], columns=["mode", "target", "heads"])
    rows = pd.concat([measured[["item", "cluster", "task"]].reset_index(drop=True), columns, measured["value"].rename("correct")], axis=1)
    return rows.groupby(["item", "cluster", "task", "mode", "target", "heads"], sort=False, as_index=False)["correct"].mean()


def _sets(subject: Subject, top: Sequence[HeadId], n_items: int, draws: int, per_item: int, seed: int):
    """Sets of heads by name, and which item is run on which: ``[(item number, name)]``."""
    sets: dict[str, Sequence[HeadId]] = {"top": top}
    plan = [(number, "top") for number in range(n_items)]
    for kind, draw in (("layer-matched", layer_matched), ("random", layer_free)):
        if kind == "layer-matched" and _fills_layers(subject, top):
            continue
        drawn = {f"{kind}/{i}": heads for i, heads in enumerate(draw(top, subject, draws, seed))}
        sets |= drawn
        each = min(n_items, -(-n_items * per_item // draws))
        plan += assign_draws(list(drawn), n_items, each, seed)
    return sets, plan


def _fills_layers(subject: Subject, heads: Sequence[HeadId]) -> bool:
    layers = [layer for layer, _ in heads]
    return all(layers.count(layer) == subject.anatomy.n_heads for layer in set(layers))


def grid_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every cell with its 95 % cluster interval, and what it costs against the untouched subject, task by task.

    Parameters
    ----------
    rows : DataFrame
        From ``ablation_grid``; several tasks may be stacked.

    Returns
    -------
    DataFrame
        ``task, mode, target, heads, items, accuracy, lower, upper, drop``.
    """
    out = []
    full = rows[rows["mode"] == "none"].groupby("task")["correct"].mean()
    for (task, mode, target, heads), cell in rows.groupby(["task", "mode", "target", "heads"], sort=False):
        found = interval(cell["correct"], cell["cluster"], bounds=(0.0, 1.0))
        out.append(
            {
                "task": task, "mode": mode, "target": target, "heads": int(heads), "items": len(cell), "accuracy": found.estimate,
                "lower": found.lower, "upper": found.upper, "drop": float(full[task]) - found.estimate,
            }
        )  # fmt: skip
    return pd.DataFrame(out)
