"""What the image tokens beside an object tell about it.

``without_object(subject, items, ...)``   answers when text cannot see an object's tokens, with the own background and with another scene's
``Background``                            whether they were right, item by item
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vlm_core.errors import NotMeasurable
from vlm_core.interventions import KnockOut, ReplaceTokens, Vector
from vlm_core.items import item_field, take
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.features import prompts_of
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import Masks, Places, token_places

__all__ = ["CONDITIONS", "Background", "without_object"]

CONDITIONS = {
    "full": "nothing done",
    "own background": "text cannot see the object's tokens",
    "other background": "the same, the image being another scene's",
    "own background, ring": "text cannot see the object's tokens and one ring around them",
    "other background, ring": "the same, the image being another scene's",
    "own background, input": "the object's tokens become the mean visual token before the first layer",
    "other background, input": "the same, the image being another scene's",
    "own object": "text cannot see the background's tokens",
    "as many others": "text cannot see as many random background tokens as the object has",
    "nothing": "text cannot see the image",
}
_VARIANTS = ("", "ring", "input")


@dataclass(frozen=True, eq=False)
class Background:
    """Whether answers were right, under every condition.

    Attributes
    ----------
    correct : DataFrame
        One row an item, indexed by its id; ``cluster``, ``task`` and one column for each of ``CONDITIONS``.
    donors : dict of str to str
        Item id to that of the item whose image lent the other background.
    """

    correct: pd.DataFrame
    donors: dict[str, str]

    @property
    def clusters(self) -> np.ndarray:
        """Scene of every item."""
        return self.correct["cluster"].to_numpy()

    def gain(self, variant: str = "") -> np.ndarray:
        """Right with the own background rather than another scene's, the object being out of sight in both, ``[item]``.

        ``variant``: ``""``, ``"ring"`` (a ring around the object is too), or ``"input"`` (the object is gone before the first layer, so
        that no layer can have carried it into the background: what is left came with the image's features).
        """
        if variant not in _VARIANTS:
            raise ValueError(f"no variant {variant!r}: choose from {', '.join(map(repr, _VARIANTS))}")
        rest = f", {variant}" if variant else ""
        return (self.correct[f"own background{rest}"] - self.correct[f"other background{rest}"]).to_numpy()

    def beyond_nothing(self) -> np.ndarray:
        """Right with the own background rather than without any image token, the object being out of sight in both, ``[item]``.

        Another scene's image may mislead, so that an own background which tells nothing still beats it (``gain``); it does not beat this.
        """
        return (self.correct["own background"] - self.correct["nothing"]).to_numpy()

    def object_worth(self) -> np.ndarray:
        """What losing sight of the object costs beyond losing sight of as many others, ``[item]``."""
        return (self.correct["as many others"] - self.correct["own background"]).to_numpy()


def without_object(
    subject: Subject,
    items: Sequence,
    masks: Masks,
    mean: Vector,
    *,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Background:
    """Hide an object's tokens from the text and see what the others still tell.

    Parameters
    ----------
    masks : callable or mapping
        The object in each item's image.
    mean : Vector
        ``vlm_core.mean_token`` of other items.
    seed : int
        Draws the donors and the random tokens.
    store, progress
        See ``vlm_core.sweep``.

    Returns
    -------
    Background
        Of the items that have an object and a donor: an item of another scene and the same task, its image tokens at the same places.

    Raises
    ------
    NotMeasurable
        Where no item has both.

    Notes
    -----
    That cutting the background off costs accuracy does not show that it holds information: tokens that only receive attention are missed
    too. With the object out of sight in both runs, an own background that answers better than another scene's can only do so by what it
    tells: about the scene, or about the object, carried there by the vision tower or by the layers.
    The design is ours; the observation is Kim et al. 2025, arXiv:2509.17588, the mean token Neo et al., ICLR 2025. Under the variant
    "input", visual features that a family adds again in later layers (Qwen3-VL) are not replaced.
    """
    items = take(items, range(len(items)))
    places, ringed = (token_places(subject, items, masks, rings=rings) for rings in (0, 1))
    rng = np.random.default_rng(seed)
    placed = [item for item in items if places.has(item, "object", "background")]
    donors = _donors(placed, [one.image.numpy() for one in prompts_of(subject, placed)] if placed else [], rng)
    kept = [item for item in placed if str(item_field(item, "id")) in donors]
    if not kept:
        raise NotMeasurable("no item has an object in its image and another scene's image of the same size and task to lend a background")
    lent = [_lent(item, donors[str(item_field(item, "id"))]) for item in kept]
    named = {}
    for item, other in zip(kept, lent, strict=True):
        groups, around = places(item), ringed(item)
        own = {name: groups[name] for name in ("object", "background")}
        own |= {"around": around["object"], "others": _as_many(groups, rng)}
        named |= {str(item_field(one, "id")): own for one in (item, other)}
    every = range(subject.anatomy.n_layers)
    rows = {
        "full": None,
        "own background": KnockOut("question", "object", every),
        "own background, ring": KnockOut("question", "around", every),
        "own background, input": ReplaceTokens(mean, "object"),
        "own object": KnockOut("question", "background", every),
        "as many others": KnockOut("question", "others", every),
        "nothing": KnockOut("question", "image", every),
    }
    rows |= {name.replace("own", "other"): row for name, row in rows.items() if name.startswith("own background")}
    other = [name for name in rows if name.startswith("other ")]
    assignments = [(number, name) for number in range(len(kept)) for name in rows if name not in other]
    assignments += [(len(kept) + number, name) for number in range(len(kept)) for name in other]
    table = sweep(
        subject, [*kept, *lent], rows, metrics=("correct",), assignments=assignments, groups=Places(named), store=store, progress=progress
    )
    found = wide(table)
    correct = found.iloc[: len(kept)].copy()
    correct[other] = found[other].iloc[len(kept) :].to_numpy()
    return Background(correct[["cluster", "task", *CONDITIONS]], {name: str(item_field(donor, "id")) for name, donor in donors.items()})


def _donors(items: list, image: list[np.ndarray], rng: np.random.Generator) -> dict:
    """For every item one of another scene and the same task whose image tokens stand where its own do."""
    found = {}
    for item, own in zip(items, image, strict=True):
        scene, task = item_field(item, "scene_id"), item_field(item, "task")
        fitting = [
            other
            for other, theirs in zip(items, image, strict=True)
            if item_field(other, "scene_id") != scene
            and item_field(other, "task") == task
            and np.array_equal(np.flatnonzero(own), np.flatnonzero(theirs))
        ]
        if fitting:
            found[str(item_field(item, "id"))] = fitting[int(rng.integers(len(fitting)))]
    return found


def _lent(item, donor) -> dict:
    """The item, asked about another scene's image."""
    fields = dict(item) if isinstance(item, Mapping) else {
        name: item_field(item, name) for name in ("scene_id", "task", "prompt", "answer", "candidates")
    }  # fmt: skip
    return {**fields, "id": f"{item_field(item, 'id')}/lent", "image": item_field(donor, "image")}


def _as_many(groups: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """As many random background tokens as the object has (all of them, if fewer)."""
    others = np.flatnonzero(groups["background"])
    chosen = np.zeros_like(groups["object"])
    chosen[rng.choice(others, min(len(others), int(groups["object"].sum())), replace=False)] = True
    return chosen
