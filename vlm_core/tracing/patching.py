"""Activation patching: where the answer's information is, layer by layer, place by place, and head by head in each place.

``activation_patching(subject, items, ...)``   both directions under one corruption of the image
``Patching``                                   logit differences, and shares of the clean run's advantage that places hold
``contrasting(subject, items)``                the items whose answer and counterfactual differ in their first token, scored by these

*Denoising* puts activations of the clean run into the corrupted one: what brings the answer back is sufficient. *Noising* puts activations
of the corrupted run into the clean one: what destroys the answer is necessary. The image is corrupted by Gaussian noise on its embeddings,
or is the counterfactual picture of the item, in which one attribute is swapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_core.errors import NotMeasurable
from vlm_core.families.anatomy import HeadId
from vlm_core.interventions import Activations, GaussianNoise, Patch, ReplaceTokens
from vlm_core.items import item_field, require_distinct, take
from vlm_core.subjects.activations import capture_activations
from vlm_core.subjects.embed import encode_items
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tracing.places import Masks, Places, mask_of, token_places
from vlm_core.tracing.shares import pooled_share, pooled_shares

__all__ = ["DIRECTIONS", "PAIRED", "PLACES", "Patching", "activation_patching", "contrasting"]

DIRECTIONS = ("sufficient", "necessary")
PLACES = ("object", "background", "image", "context", "last", "all")
PAIRED = "paired image"
_BYTES = 2**28  # activations held at once


@dataclass(frozen=True, eq=False)
class Patching:
    """Log-probability of the answer above that of its counterfactual, in nats, in every run.

    Attributes
    ----------
    items, clusters, tasks : tuple of str
    layers : tuple of int
        The residual stream that enters each of these was patched; ``n_layers`` is what enters the final norm.
    n_layers : int
        Of the model.
    places : tuple of str
        ``object`` and ``background`` image tokens, both together (``image``), all text but the last token (``context``), the ``last``
        token, ``all`` tokens.
    clean, corrupted, itself : ndarray ``[item]``
        Untouched; with the corrupted image; that with its own activations put into it, which changes nothing where patching is done right.
    denoised, noised : ndarray ``[item, layer, place]``
    head_places : tuple of str
        Where outputs of single heads were patched; empty where none were.
    heads_denoised, heads_noised : ndarray ``[item, layer, head, place]`` or None
        Outputs of single heads in these places.
    """

    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    places: tuple[str, ...]
    n_layers: int
    clean: np.ndarray
    corrupted: np.ndarray
    itself: np.ndarray
    denoised: np.ndarray
    noised: np.ndarray
    head_places: tuple[str, ...] = ()
    heads_denoised: np.ndarray | None = None
    heads_noised: np.ndarray | None = None

    @property
    def gap(self) -> np.ndarray:
        """What the corruption costs, ``[item]``."""
        return self.clean - self.corrupted

    def moved(self, direction: str, what: str = "places") -> np.ndarray:
        """What a patch moves in nats, ``[item, layer, place]`` or, for ``what="heads"``, ``[item, layer, head, place]``.

        Back from the corrupted run (``sufficient``) or away from the clean one (``necessary``).
        """
        if direction not in DIRECTIONS or what not in ("places", "heads"):
            raise ValueError(f"no patching {direction!r} of {what!r}: directions are {', '.join(DIRECTIONS)}, of 'places' or 'heads'")
        patched = {
            ("sufficient", "places"): self.denoised, ("necessary", "places"): self.noised,
            ("sufficient", "heads"): self.heads_denoised, ("necessary", "heads"): self.heads_noised,
        }[direction, what]  # fmt: skip
        if patched is None:
            raise ValueError("heads were not patched: call activation_patching(..., heads=('all',))")
        start = self.corrupted if direction == "sufficient" else self.clean
        moved = patched - start.reshape(-1, *[1] * (patched.ndim - 1))
        return moved if direction == "sufficient" else -moved

    def share(self, direction: str, what: str = "places") -> np.ndarray:
        """The normalised logit difference over all items, ``[layer, place]`` or ``[layer, head, place]``: 1 where a patch moves all of the gap.

        Denoising gives the published one (1 = clean, 0 = corrupted); noising gives 1 minus it.
        """
        return pooled_share(self.moved(direction, what), self.gap)

    def shares(self, direction: str, what: str = "places") -> Callable[[np.ndarray], np.ndarray]:
        """``share`` for weights of clusters: ``[draw, cluster]`` to ``share`` of every draw."""
        return pooled_shares(self.moved(direction, what), self.gap, self.clusters)

    def lead(self, place: str, over: str, direction: str, half: str) -> Callable[[np.ndarray], np.ndarray]:
        """Share held by one place minus that held by another, averaged over half of the inner layers, ``[draw, cluster] -> [draw]``.

        A ratio of sums over items, for `vlm_core.stats.estimate_statistic`; 1 where the first place holds all and the other nothing. [ours]

        Parameters
        ----------
        place, over : str
            Of ``places``.
        direction : {"sufficient", "necessary"}
        half : {"first", "second"}
            Of the layers between the first one and the final norm; a layer in the middle counts to neither.

        Raises
        ------
        ValueError
            With fewer than two inner layers: where a stream enters the first layer or the final norm its places hold all or nothing.
        """
        inner = [number for number, layer in enumerate(self.layers) if 0 < layer < self.n_layers]
        size = len(inner) // 2
        if not size:
            raise ValueError(f"halves of the depth need two layers between the first and the final norm, patched were {self.layers}")
        if half not in ("first", "second"):
            raise ValueError(f"no half {half!r} of the depth: 'first' or 'second'")
        chosen = inner[:size] if half == "first" else inner[-size:]
        moved = self.moved(direction)[:, chosen]
        ahead = moved[:, :, self.places.index(place)] - moved[:, :, self.places.index(over)]
        return pooled_shares(ahead.mean(1), self.gap, self.clusters)


def contrasting(subject: Subject, items: Sequence) -> list[dict]:
    """The items whose answer and ``partner_answer`` differ in their first token, scored by these two tokens alone.

    A longer answer would be read at tokens that no patch reaches. Items are dropped where the two begin alike ("top left", "top right"),
    where the counterfactual picture has another size, or a first token means nothing alone to the tokenizer.
    """
    kept = []
    for item in take(items, range(len(items))):
        openings = [_opening(subject, item_field(item, name)) for name in ("answer", "partner_answer")]
        same_size = item_field(item, "image").size == item_field(item, "partner_image").size
        if None not in openings and openings[0] != openings[1] and same_size:
            names = ("id", "scene_id", "task", "image", "prompt", "partner_image")
            fields = dict(item) if isinstance(item, Mapping) else {name: item_field(item, name) for name in names}
            kept.append({**fields, "answer": openings[0], "partner_answer": openings[1], "candidates": openings})
    return kept


def activation_patching(
    subject: Subject,
    items: Sequence,
    corruption: str | GaussianNoise = PAIRED,
    *,
    masks: Masks,
    layers: Iterable[int] | None = None,
    heads: Iterable[str] = (),
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """Denoising and noising by layer and place, and by head and place.

    Parameters
    ----------
    items : sequence of items
        From `contrasting`: the answer and its counterfactual are the candidates.
    corruption : ``"paired image"`` or GaussianNoise
        The item's ``partner_image``, or noise added to the image's embeddings (``GaussianNoise(3 * token_spread(subject, items))``).
    masks : callable or mapping
        The object in each item's image. Under the paired image the pixels in which the two pictures differ count to it as well: what is
        moved is an object in both places. [ours]
    layers : iterable of int, optional
        Default: all that a stream enters, the final norm (``n_layers``) included.
    heads : iterable of str
        Also patch the output of every single head in each of these places (of ``PLACES``).
    store, progress
        See ``vlm_core.sweep``; progress counts rows of runs.

    Returns
    -------
    Patching

    Raises
    ------
    NotMeasurable
        Where there are no items.
    ValueError
        For a place that there is none of, or where a picture's image tokens are other tokens than its counterfactual's.

    References
    ----------
    Vig et al. 2020, arXiv:2004.12265; Meng et al. 2022, arXiv:2202.05262 (noise of three standard deviations); Zhang & Nanda 2024,
    arXiv:2309.16042 (normalised logit difference, both directions). The places and the pooling over items (`pooled_share`) are ours.
    """
    items = take(items, range(len(items)))
    require_distinct(items)
    if not items:
        raise NotMeasurable("there are no items to patch: an answer must be told from its counterfactual by its first token, see contrasting(subject, items)")
    paired = not isinstance(corruption, GaussianNoise)
    if paired and corruption != PAIRED:
        raise ValueError(f"corruption is {corruption!r}: expected '{PAIRED}' or GaussianNoise")
    n_layers, n_heads = subject.anatomy.n_layers, subject.anatomy.n_heads
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    for place in heads:
        if place not in PLACES:
            raise ValueError(f"heads are to be patched in the place {place!r}: expected some of {', '.join(PLACES)}")
    layers = tuple(range(n_layers + 1)) if layers is None else tuple(sorted({int(layer) for layer in layers}))
    places = token_places(subject, items, _WithDifference(masks) if paired else masks)
    rows = _Rows(subject, corruption, paired, layers, heads, places)
    pieces, total, done = [], rows.per_item * len(items), 0
    for start, stop in _chunks(subject, places, len(items), bool(heads)):
        pieces.append(rows.measure(items[start:stop], store))
        done += rows.per_item * (stop - start)
        if progress is not None:
            progress(done, total)
    found = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    by_place, by_head = (len(items), len(layers), len(PLACES)), (len(items), n_layers, n_heads, len(heads))
    return Patching(
        tuple(str(item_field(item, "id")) for item in items),
        tuple(str(item_field(item, "scene_id")) for item in items),
        tuple(str(item_field(item, "task")) for item in items),
        layers,
        PLACES,
        n_layers,
        **{name: found[name] for name in ("clean", "corrupted", "itself")},
        **{name: found[name].reshape(by_place) if layers else np.zeros(by_place) for name in ("denoised", "noised")},
        head_places=heads,
        **{name: found[name].reshape(by_head) for name in ("heads_denoised", "heads_noised") if heads},
    )


class _Rows:
    """The runs of one item, and their logit differences."""

    def __init__(self, subject: Subject, corruption, paired: bool, layers: tuple[int, ...], heads: tuple[str, ...], places: Places) -> None:
        self.subject, self.corruption, self.paired, self.layers, self.places = subject, corruption, paired, layers, places
        self.heads = [(HeadId(*head), place) for head in subject.heads for place in heads]
        self.per_item = 3 + 2 * (len(layers) * len(PLACES) + len(self.heads))

    def measure(self, items: list, store) -> dict[str, np.ndarray]:
        """Logit differences of some items, ``[item, run]`` or ``[item]`` by name."""
        partners = [_partner(item) for item in items] if self.paired else []
        if partners:
            self._require_alike(items, partners)
        table: dict[str, Any] = {"untouched": None}
        assignments: list[tuple[int, str]] = []
        order: list[tuple[str, int]] = []
        for number, item in enumerate(items):
            corrupt = len(items) + number if self.paired else number
            noise = () if self.paired else (ReplaceTokens(self.corruption),)
            clean = self._captured(item, self._groups(item))
            corrupted = self._captured(partners[number] if self.paired else item, self._groups(item), noise or None)
            untouched = [("clean", number, None), ("corrupted", corrupt, noise or None)]
            itself = [("itself", corrupt, (*noise, Patch("residual", self.layers, corrupted, "all")))]
            denoised = [("denoised", corrupt, (*self._corrupted_from(one, corrupted), one)) for one in self._patches(clean)]
            noised = [("noised", number, one) for one in self._patches(corrupted)]
            denoised += [("heads_denoised", corrupt, (*self._corrupted_from(one, corrupted), one)) for one in self._head_patches(clean)]
            noised += [("heads_noised", number, one) for one in self._head_patches(corrupted)]
            for row, (name, where, intervention) in enumerate([*untouched, *itself, *denoised, *noised]):
                label = "untouched" if intervention is None else f"{number}/{row}"
                table.setdefault(label, intervention)
                assignments.append((where, label))
                order.append((name, number))
        every = [*items, *partners]
        named = {str(item_field(one, "id")): self._groups(items[number % len(items)]) for number, one in enumerate(every)}
        values = self._differences(every, named, table, assignments, store)
        found: dict[str, list[list[float]]] = {}
        for (name, number), value in zip(order, values, strict=True):
            found.setdefault(name, [[] for _ in items])[number].append(value)
        return {name: np.array(rows)[:, 0] if name in ("clean", "corrupted", "itself") else np.array(rows) for name, rows in found.items()}

    def _differences(self, items: list, named: dict, table, assignments, store) -> np.ndarray:
        """First candidate's log-probability above the second's, in the order of ``assignments``."""
        metrics = ("candidate 0", "candidate 1")
        measured = sweep(self.subject, items, table, metrics=metrics, assignments=assignments, store=store, groups=Places(named))
        difference = measured["value"].to_numpy(float).reshape(-1, 2) @ [1.0, -1.0]
        # a sweep's rows come item by item, in the order in which each item's were asked for
        by_item = np.argsort([item for item, _ in assignments], kind="stable")
        values = np.empty(len(assignments))
        values[by_item] = difference
        return values

    def _captured(self, item, groups, intervention=None) -> Activations:
        wanted = {"groups": groups, "intervention": intervention}
        # Under noise, a head's patch starts from the stream that enters its layer.
        streams = {*self.layers, *(head.layer for head, _ in self.heads if not self.paired)}
        taken = [capture_activations(self.subject, item, "residual", streams, **wanted)]
        if self.heads:
            taken.append(capture_activations(self.subject, item, "head", **wanted))
        values = {place: tensor for one in taken for place, tensor in one.values.items()}
        return Activations(values, taken[0].image, taken[0].groups)

    def _corrupted_from(self, patch: Patch, corrupted: Activations) -> tuple[Patch, ...]:
        """What makes a run a corrupted one where it is patched: nothing for another picture; noise need not pass all layers again."""
        return () if self.paired else (Patch("residual", patch.layers, corrupted, "all"),)

    def _patches(self, source: Activations) -> list[Patch]:
        return [Patch("residual", (layer,), source, place) for layer in self.layers for place in PLACES]

    def _head_patches(self, source: Activations) -> list[Patch]:
        return [Patch("head", (), source, place, (head,)) for head, place in self.heads]

    def _groups(self, item) -> dict[str, np.ndarray]:
        named = self.places(item)
        return {name: named[name] for name in ("object", "background", "context")}

    def _require_alike(self, items: list, partners: list) -> None:
        pairs = zip(items, encode_items(self.subject, items), encode_items(self.subject, partners), strict=True)
        for item, clean, corrupted in pairs:
            if not torch.equal(clean.image, corrupted.image):
                raise ValueError(
                    f"item {item_field(item, 'id')!r}: its picture and the counterfactual one are not the same tokens of the prompt: "
                    f"give pictures of one size"
                )


def _partner(item) -> dict:
    fields = {name: item_field(item, name) for name in ("scene_id", "task", "prompt", "answer", "candidates")}
    return {**fields, "id": f"{item_field(item, 'id')}/partner", "image": item_field(item, "partner_image")}


def _opening(subject: Subject, text: str) -> str | None:
    """The text of an answer's first token; None where it does not stand alone."""
    first = subject.continuation(text)[:1]
    opening = subject.tokenizer.decode(list(first)).strip()
    return opening if opening and tuple(subject.continuation(opening)) == tuple(first) else None


class _WithDifference:
    """The object of an item and the pixels in which its two pictures differ, bool ``[height, width]``."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def __call__(self, item) -> np.ndarray:
        first, second = (np.asarray(item_field(item, name).convert("RGB")) for name in ("image", "partner_image"))
        shown = np.asarray(mask_of(self.masks, item), dtype=bool)
        if not first.shape[:2] == second.shape[:2] == shown.shape:
            sizes = f"{first.shape[:2]}, {second.shape[:2]} and {shown.shape}"
            raise ValueError(
                f"item {item_field(item, 'id')!r}: its picture, the counterfactual one and the mask have sizes {sizes}: give one size"
            )
        return shown | (first != second).any(2)


def _chunks(subject: Subject, places: Places, n_items: int, heads: bool) -> list[tuple[int, int]]:
    """Runs of items whose activations fit into memory together."""
    anatomy = subject.anatomy
    tokens = max(len(groups["context"]) for groups in places.named.values())
    width = anatomy.embedding.weight.shape[1] * (anatomy.n_layers + 1) + heads * anatomy.n_layers * anatomy.n_heads * anatomy.head_dim
    size = max(1, _BYTES // (8 * tokens * width))
    return [(start, min(start + size, n_items)) for start in range(0, n_items, size)]
