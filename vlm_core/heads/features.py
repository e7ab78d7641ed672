"""What is to be seen of every head without changing it: one row a head.

``head_features``   attention mass by token group, entropy, position, sinks and output norm of every head, item by item
``HeadFeatures``    the measured features; ``table()`` gives one row a head with means and intervals
``FEATURES``        what each feature is, in a sentence
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from vlm_core.items import item_field, take
from vlm_core.observation.attention import AttentionEntropy, AttentionMass
from vlm_core.observation.observing import observe
from vlm_core.observation.outputs import HeadOutputs
from vlm_core.observation.position import RelativeDistance, RotaryBias
from vlm_core.observation.sinks import SinkMass, Sinks
from vlm_core.stats import interval_each
from vlm_core.subjects.subject import Subject

__all__ = ["FEATURES", "HeadFeatures", "delimiters", "head_features"]

SPLITS = 20  # random ways to part scenes in halves, averaged over

FEATURES = {
    "answer_to_image": "attention mass of the prompt's last token, from which the answer is read, on image keys",
    "text_to_image": "attention mass of the text after the image on image keys",
    "text_to_text": "attention mass of the text after the image on text keys",
    "image_to_image": "attention mass of image tokens on image keys",
    "image_to_text": "attention mass of image tokens on text keys; in a causal order this is the text before the image alone",
    "image_to_question": "attention mass of image tokens on the text after them: 0 in a causal order, not in one read both ways",
    "text_to_bos": "attention mass of the text after the image on the first token",
    "text_to_sinks": "attention mass of the text after the image on attention sinks, found on this model",
    "text_to_special": "attention mass of the text after the image on special tokens and delimiters (tokens without a letter or digit)",
    "entropy": "entropy of the attention of the text after the image, nats",
    "image_entropy": "the same within the image keys, renormalised, nats",
    "distance": "mean distance from the text after the image to what it attends to, 0 itself to 1 the first token",
    "previous_token": "attention mass of the text after the image on the token right before",
    "rotary_bias": "share of the attention of the text after the image that rotary positions move to other keys",
    "image_without_rotary": "attention mass of the text after the image on image keys, all tokens at one position",
    "output_norm": "mean length of the head's output before the output projection, over all tokens",
}


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """Features of every head, item by item.

    Attributes
    ----------
    per_item : ndarray ``[item, layer, head, feature]``
        NaN where a feature does not exist (image keys in a layer that has none).
    names : tuple of str
        The features, keys of ``FEATURES``.
    items, clusters, tasks : tuple of str
        Id, scene and task of each item.
    """

    per_item: np.ndarray
    names: tuple[str, ...]
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def means(self) -> np.ndarray:
        """Mean over the items that have the feature, ``[layer, head, feature]``."""
        known = np.isfinite(self.per_item)
        with np.errstate(invalid="ignore"):
            return np.where(known, self.per_item, 0.0).sum(0) / known.sum(0)

    def of(self, task: str) -> HeadFeatures:
        """The features on the items of one task.

        Raises
        ------
        ValueError
            If there is none.
        """
        rows = [row for row, one in enumerate(self.tasks) if one == task]
        if not rows:
            raise ValueError(f"there are no items of task '{task}': these are of {', '.join(dict.fromkeys(self.tasks))}")
        pick = tuple(tuple(names[row] for row in rows) for names in (self.items, self.clusters, self.tasks))
        return HeadFeatures(self.per_item[rows], self.names, *pick)

    def matrix(self) -> np.ndarray:
        """Means as ``[head, feature]``, heads in (layer, head) order, standardised; without those missing or the same in all."""
        rows = self.means.reshape(-1, len(self.names))
        rows = rows[:, np.isfinite(rows).all(0)]
        rows = rows[:, np.ptp(rows, axis=0) > 1e-9]
        return (rows - rows.mean(0)) / rows.std(0)

    def agreement(self, seed: int = 0) -> dict[str, float]:
        """Spearman's rank correlation over heads of each feature between two halves of the scenes, mean over ``SPLITS`` ways to part them.

        NaN where a feature is the same in all heads, or exists in fewer than three of them.
        """
        found = []
        for one in scene_halves(self.clusters, seed):
            mine = np.array([scene in one for scene in self.clusters])
            found.append(_correlations(*(replace(self, per_item=self.per_item[rows]).means for rows in (mine, ~mine))))
        means = np.mean(found, axis=0) if found else np.full(len(self.names), np.nan)
        return dict(zip(self.names, means.tolist(), strict=True))

    def agreement_with(self, other: HeadFeatures) -> dict[str, float]:
        """Spearman's rank correlation over heads of each feature with another measurement (the questions in other words) on the same items.

        NaN as in ``agreement``.

        Raises
        ------
        ValueError
            If the other one has an item that is none of these, or other features or heads.
        """
        row_of = {name: row for row, name in enumerate(self.items)}
        for name in other.items:
            if name not in row_of:
                raise ValueError(f"the item '{name}' is none of the {len(self.items)} that these features are of: measure both on the same items")
        if self.names != other.names or self.per_item.shape[1:] != other.per_item.shape[1:]:
            raise ValueError("features of other heads, or other features, cannot be compared with these: measure both with head_features on one subject")
        same = replace(self, per_item=self.per_item[[row_of[name] for name in other.items]])
        return dict(zip(self.names, _correlations(same.means, other.means), strict=True))

    def table(self, more: Mapping[str, ArrayLike | tuple[ArrayLike, Sequence]] | None = None, confidence: float = 0.95) -> pd.DataFrame:
        """One row a head: ``layer, head``, then each feature's mean with its interval (``x, x_lower, x_upper``).

        Parameters
        ----------
        more : mapping of column to map of scores, optional
            What else is known of heads (attribution, ablation, Head Impact, localisation): ``[layer, head]``, one column; or a pair of
            ``[item, layer, head]`` and the cluster of each item, with interval.
        confidence : float
            Two-sided, of cluster intervals; none (NaN) where a feature does not vary.

        Raises
        ------
        ValueError
            If what is handed in is no map of these heads.
        """
        shape = self.per_item.shape[1:3]
        layers, heads = np.indices(shape)
        columns = {"layer": layers.ravel(), "head": heads.ravel()}
        measured = interval_each(self.per_item, self.clusters, confidence)
        for k, name in enumerate(self.names):
            columns |= _columns(name, [bound[..., k] for bound in measured])
        for name, scores in (more or {}).items():
            if isinstance(scores, tuple):
                values, clusters = np.asarray(scores[0], dtype=float), scores[1]
                _require_map(name, values.shape[1:], shape)
                columns |= _columns(name, interval_each(values, clusters, confidence))
            else:
                scores = np.asarray(scores)
                _require_map(name, scores.shape, shape)
                columns[name] = scores.ravel()
        return pd.DataFrame(columns)


def scene_halves(clusters: Iterable[str], seed: int = 0) -> list[set[str]]:
    """``SPLITS`` random halves of the scenes, the other half being the rest; none of a single scene."""
    scenes, rng = np.unique(list(clusters)), np.random.default_rng(seed)
    return [set(rng.permutation(scenes)[: scenes.size // 2].tolist()) for _ in range(SPLITS)] if scenes.size > 1 else []


def _correlations(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Of each feature between two maps ``[layer, head, feature]``, over the heads that have it in both."""
    halves = [means.reshape(-1, means.shape[-1]) for means in (one, other)]
    known = np.isfinite(halves).all(0)
    return [_rank_correlation(*(half[known[:, k], k] for half in halves)) for k in range(known.shape[1])]


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    if one.size < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)


def _columns(name: str, measured: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {label: one.ravel() for label, one in zip((name, f"{name}_lower", f"{name}_upper"), measured, strict=True)}


def _require_map(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if tuple(found) != tuple(shape):
        raise ValueError(f"'{name}' has shape {tuple(found)}: expected one number for each of {shape[0]} layers x {shape[1]} heads")


def delimiters(subject: Subject):
    """Token groups with one more, ``special``: special tokens and delimiters, which carry no content of their own.

    Returns
    -------
    callable
        ``groups`` of ``observe`` and ``sweep``: from (item, prompt) to ``{"special": [token]}``. Image tokens are not among them; nor
        are pieces of a character, which say nothing alone.
    """
    special = set(subject.tokenizer.all_special_ids)
    known: dict[int, bool] = {}

    def carries_nothing(token: int) -> bool:
        if token not in known:
            text = subject.tokenizer.decode([token])
            known[token] = token in special or not any(one.isalnum() or one == "\N{REPLACEMENT CHARACTER}" for one in text)
        return known[token]

    def groups(item, prompt) -> dict[str, np.ndarray]:
        ids, image = np.asarray(prompt.ids.tolist()), np.asarray(prompt.image.tolist(), dtype=bool)
        return {"special": np.array([carries_nothing(int(token)) for token in ids]) & ~image}

    return groups


def head_features(subject: Subject, items: Sequence, *, sinks: Sinks | None = None, batch_rows: int | None = None) -> HeadFeatures:
    """Measure ``FEATURES`` of every head.

    Parameters
    ----------
    items : sequence of items
    sinks : Sinks, optional
        From ``find_sinks``. Default: found on the first items.
    batch_rows : int, optional
        Items per forward pass at most.

    Returns
    -------
    HeadFeatures

    Notes
    -----
    [ours] The list of features; each one's observer says what it follows.
    """
    items = take(items, range(len(items)))
    observers = [
        AttentionMass("last", ("image",)),
        AttentionMass("question", ("image", "text", "bos", "special")),
        AttentionMass("image", ("image", "text", "question")),
        SinkMass("question", sinks),
        AttentionEntropy("question", ("all", "image")),
        RelativeDistance("question"),
        RotaryBias("question"),
        HeadOutputs("norm"),
    ]
    answer, text, image, sink, entropy, place, rotary, norm = observe(
        subject, items, observers, batch_rows=batch_rows, groups=delimiters(subject)
    )
    found = {
        "answer_to_image": answer[..., 0],
        "text_to_image": text[..., 0],
        "text_to_text": text[..., 1],
        "image_to_image": image[..., 0],
        "image_to_text": image[..., 1],
        "image_to_question": image[..., 2],
        "text_to_bos": text[..., 2],
        "text_to_sinks": sink[..., 0],
        "text_to_special": text[..., 3],
        "entropy": entropy[..., 0],
        "image_entropy": entropy[..., 1],
        "distance": place[..., 0],
        "previous_token": place[..., 1],
        "rotary_bias": rotary[..., 0],
        "image_without_rotary": rotary[..., 1],
        "output_norm": norm,
    }
    fields = (tuple(str(item_field(item, name)) for item in items) for name in ("id", "scene_id", "task"))
    return HeadFeatures(np.stack([found[name] for name in FEATURES], axis=-1), tuple(FEATURES), *fields)
