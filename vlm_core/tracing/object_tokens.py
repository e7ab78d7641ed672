"""What an answer loses when an object's image tokens become the mean one (Neo et al., ICLR 2025), against tokens that are no object's.

``item_layouts(subject, items)``          where the image tokens of every item's prompt lie
``object_groups(layouts, items, masks)``  token groups from objects' pixels, for ``observe(groups=...)`` and ``sweep(groups=...)``
``replace_object_tokens(...)``            answers under replaced object tokens with rings, and as many random, high-norm and gradient tokens
``ObjectTokens``                          whether they were right, item by item
``smallest_ring(...)``                    the ring with which the object is gone
``embedding_norms(subject, items)``       lengths of image tokens' embeddings; ``high_norm_level(...)`` from where on one stands out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vlm_core.errors import NotMeasurable
from vlm_core.families.layout import Layout, image_layouts, object_tokens
from vlm_core.interventions import ReplaceTokens, Vector
from vlm_core.items import item_field, take
from vlm_core.observation.gradients import IntegratedGradients
from vlm_core.observation.observing import observe, observed, prepare
from vlm_core.observation.outputs import HiddenStates
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import Masks, mask_of

__all__ = [
    "CONTROLS",
    "ObjectTokens",
    "embedding_norms",
    "high_norm_level",
    "item_layouts",
    "object_groups",
    "replace_object_tokens",
    "smallest_ring",
]

CONTROLS = {
    "random": "as many tokens drawn from those outside the object",
    "high-norm": "as many tokens with the highest norms outside the object, register tokens first",
    "gradients": "as many tokens with the highest integrated gradients, the object's own among them",
}
REGISTER_SD = 2.0
"""A register token's norm exceeds the mean over all image tokens by more than so many standard deviations (Neo et al. 2025)."""


def item_layouts(subject: Subject, items: Sequence, batch: int = 32) -> list[Layout]:
    """One ``Layout`` an item. Nothing of the model runs.

    Raises
    ------
    NotMeasurable
        Where image tokens lie outside the token sequence or have no place on the image.
    """
    family, layouts = subject.anatomy.family, []
    for start in range(0, len(items), batch):
        some = take(items, range(start, min(start + batch, len(items))))
        prepared = subject.encode_items(some, padding_side="right")
        shown = [item_field(item, "image") for item in some]
        sizes = [[(one.height, one.width) for one in (each if isinstance(each, list | tuple) else [each])] for each in shown]
        layouts += image_layouts(family, subject.model.config, subject.processor, prepared.inputs, sizes)
    for layout in layouts[:1]:
        if layout.where != "sequence":
            raise NotMeasurable(
                f"model_type '{family.model_type}': its image tokens lie outside the token sequence, so an object's are no token group"
            )
        if layout.reason:
            raise NotMeasurable(layout.reason)
    return layouts


def object_groups(layouts: Sequence[Layout], items: Sequence, masks: Mapping[str, Masks], rings: int = 0) -> Callable:
    """Token groups from pixels: ``groups(item, prompt)`` gives the tokens that show any part of each mask.

    Parameters
    ----------
    layouts : one an item
    masks : mapping of group name to (callable or mapping of item ids)
        Bool ``[height, width]`` each.
    rings : {0, 1, 2}
        Rings of neighbours that count too.
    """
    of = {
        str(item_field(item, "id")): (layout, {name: object_tokens(layout, mask_of(one, item), rings=rings) for name, one in masks.items()})
        for item, layout in zip(items, layouts, strict=True)
    }

    def groups(item, prompt):
        layout, chosen = of[str(item_field(item, "id"))]
        return {name: layout.in_sequence(members, len(prompt)) for name, members in chosen.items()}

    return groups


@dataclass(frozen=True, eq=False)
class ObjectTokens:
    """Whether answers were right when image tokens became the mean one.

    Attributes
    ----------
    correct : DataFrame
        One row an item, indexed by its id; ``cluster``, ``task``, ``full``, ``object, ring 0``, ... and ``random, ring 0``, ... (the mean over
        draws), ``high-norm, ring 0``, ``gradients, ring 0`` where asked for; NaN for items that a condition was not measured on.
    tokens : DataFrame
        How many tokens each condition replaces, a row an item and a column a condition; NaN for items that it was not measured on.
    registers : float
        Mean number of register tokens in an image: those whose norm stands out (``REGISTER_SD``).
    registers_taken : dict of int to float
        Ring to the share of the tokens of ``high-norm`` that are register tokens.
    """

    correct: pd.DataFrame
    tokens: pd.DataFrame
    registers: float
    registers_taken: dict[int, float]

    @property
    def clusters(self) -> np.ndarray:
        """Scene of every item."""
        return self.correct["cluster"].to_numpy()

    @property
    def replaced(self) -> dict[str, float]:
        """Condition to the mean number of tokens it replaces, over the items it was measured on."""
        return self.tokens.mean().fillna(0.0).to_dict()

    def drop(self, condition: str) -> np.ndarray:
        """Right without replacement minus right under a condition, ``[item]``; NaN for items that it was not measured on."""
        return (self.correct["full"] - self.correct[condition]).to_numpy(float)

    def relative_drop(self, condition: str) -> float:
        """Share of the accuracy that a condition costs on the items it was measured on; 0 where there is none to lose."""
        lost = self.drop(condition)
        whole = float(self.correct["full"].to_numpy(float)[np.isfinite(lost)].sum())
        return float(np.nansum(lost)) / whole if whole > 0 else 0.0


def smallest_ring(measured: ObjectTokens, rings: Sequence[int] = (0, 1, 2), least: float = 0.70, otherwise: int = 1) -> int:
    """The smallest ring with which replacing the object costs more than ``least`` of the accuracy; ``otherwise`` where none does.

    To be asked of discovery items.
    """
    return next((ring for ring in sorted(rings) if measured.relative_drop(f"object, ring {ring}") > least), otherwise)


def replace_object_tokens(
    subject: Subject,
    items: Sequence,
    masks: Masks,
    mean: Vector,
    *,
    rings: Sequence[int] = (0, 1, 2),
    draws: int = 0,
    high_norm: bool = False,
    gradient_items: int = 0,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> ObjectTokens:
    """Replace an object's image tokens by the mean one before the first layer, with rings of neighbours, and controls of the same number.

    Parameters
    ----------
    masks : callable or mapping of item ids
        The object's pixels, bool ``[height, width]``.
    mean : Vector
        ``vlm_core.mean_token`` of other items.
    rings : of {0, 1, 2}
        Each is measured.
    draws : int
        Random sets of tokens an item and ring; 0 for none.
    high_norm : bool
        Whether the tokens with the highest norms are replaced too.
    gradient_items : int
        Number of items (the first) on which the tokens with the highest integrated gradients (50 steps, the answer's logit) are replaced.
    seed : int
        Of the random tokens.
    store, progress
        See ``vlm_core.sweep``.

    Raises
    ------
    NotMeasurable
        Where image tokens have no place, the family cannot replace tokens, or no item shows its object.
    ValueError
        Without items.

    Notes
    -----
    Neo et al., ICLR 2025 (object tokens, mean ablation, register tokens, integrated gradients towards the answer's real first token). Random and
    high-norm tokens are taken outside the object with its ring: only so do they say that it is the *object's* tokens that matter. An item
    with fewer tokens outside than the object has is not measured with them: the numbers would not match. Register tokens are those whose
    norm stands out (``REGISTER_SD``); an image seldom has as many as the object has tokens, so that the next highest norms fill up, and the
    control is called what it is; ``registers_taken`` says how many were register tokens. Under families that add visual features again in later layers (Qwen3-VL) these
    are not replaced.
    """
    if not len(items):
        raise ValueError("there are no items whose tokens could be replaced")
    subject.anatomy.require("replace_tokens")
    items = take(items, range(len(items)))
    layouts = item_layouts(subject, items)
    shown = [
        {ring: object_tokens(layout, mask_of(masks, item), rings=ring) for ring in rings}
        for item, layout in zip(items, layouts, strict=True)
    ]
    kept = [index for index, own in enumerate(shown) if own[min(rings)].any()]
    if not kept:
        raise NotMeasurable("no item shows its object in its image tokens: nothing can be replaced")
    items, layouts, shown = ([one[index] for index in kept] for one in (items, layouts, shown))
    norms = embedding_norms(subject, items) if high_norm else [np.zeros(len(layout)) for layout in layouts]
    level = high_norm_level(norms)
    gradients = _gradients(subject, items[:gradient_items], layouts) if gradient_items else []
    named, assignments, taken = {}, [], {ring: [] for ring in rings}
    for index, (item, layout, own) in enumerate(zip(items, layouts, shown, strict=True)):
        rng = np.random.default_rng((seed, index))
        chosen = {}
        for ring, members in own.items():
            count, outside = int(members.sum()), np.flatnonzero(layout.placed() & ~members)
            chosen[f"object, ring {ring}"] = members
            if len(outside) >= count:
                for draw in range(draws):
                    chosen[f"random/{draw}, ring {ring}"] = _members(rng.permutation(outside)[:count], len(layout))
                if high_norm:
                    highest = _highest(norms[index], outside, count)
                    chosen[f"high-norm, ring {ring}"] = _members(highest, len(layout))
                    taken[ring] += (norms[index][highest] > level).tolist()
            if index < len(gradients):
                chosen[f"gradients, ring {ring}"] = _members(_highest(gradients[index], np.arange(len(layout)), count), len(layout))
        named[str(item_field(item, "id"))] = layout, chosen
        assignments += [(index, "full"), *((index, name) for name, members in chosen.items() if members.any())]
    labels = list(dict.fromkeys(label for _, label in assignments if label != "full"))
    rows = {"full": None, **{label: ReplaceTokens(mean, label) for label in labels}}

    def groups(item, prompt):
        layout, chosen = named[str(item_field(item, "id"))]
        return {name: layout.in_sequence(members, len(prompt)) for name, members in chosen.items()}

    table = sweep(subject, items, rows, metrics=("correct",), assignments=assignments, groups=groups, store=store, progress=progress)
    found = wide(table)
    correct, tokens = found[["cluster", "task", "full"]].copy(), pd.DataFrame(index=found.index)
    asked = {name for name, wanted in (("random", draws), ("high-norm", high_norm)) if wanted}
    for ring in rings:
        for name in ("object", *CONTROLS):
            columns = [label for label in labels if label.split(",")[0].split("/")[0] == name and label.endswith(f"ring {ring}")]
            if columns or name in asked:
                condition = f"{name}, ring {ring}"
                correct[condition] = found[columns].mean(axis=1) if columns else np.nan
                sizes = {item: [members.sum() for label, members in chosen.items() if label in columns] for item, (_, chosen) in named.items()}
                tokens[condition] = [float(np.mean(sizes[item])) if sizes[item] else np.nan for item in found.index]
    registers = float(np.mean([np.sum(one > level) for one in norms])) if high_norm else 0.0
    return ObjectTokens(correct, tokens, registers, {ring: float(np.mean(some)) if some else 0.0 for ring, some in taken.items()})


def _members(indices: np.ndarray, n: int) -> np.ndarray:
    members = np.zeros(n, dtype=bool)
    members[indices] = True
    return members


def _highest(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    return among[np.argsort(-values[among], kind="stable")[:count]]


def embedding_norms(subject: Subject, items: Sequence) -> list[np.ndarray]:
    """Length of every image token's embedding as it enters the first layer, ``[image token]`` an item. The embeddings are not kept."""
    norms, ready = [], prepare(subject, items, [HiddenStates(layers=(0,), positions="image tokens")])
    for some in observed(subject, items, ready):
        lengths = some.values[0][""][:, 0].norm(dim=-1).numpy()
        norms += [own[: int(one.image.sum())] for own, one in zip(lengths, some.encoded, strict=True)]
    return norms


def high_norm_level(norms: Sequence[np.ndarray]) -> float:
    """The length above which an image token stands out among all those of some items (``REGISTER_SD``)."""
    every = np.concatenate(norms)
    return float(every.mean() + REGISTER_SD * every.std())


def _gradients(subject: Subject, items: list, layouts: list[Layout]) -> list[np.ndarray]:
    shares = observe(subject, items, IntegratedGradients())["attribution"]
    return [own[: len(layout)] for own, layout in zip(shares, layouts, strict=False)]
