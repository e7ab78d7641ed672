"""Linear probes: what can be read off the features of heads.

``held_out``          a ridge probe's held-out answers, and those of the same probe trained on shuffled labels: `Probe`
``tell_categories``   categories of heads, from their features
``groundedness``      head features of answers that rest on their image and of answers that cannot: `Groundedness`
``tell_grounded``     which of the two an answer is, from the features of heads

A probe's accuracy means nothing by itself: rows of one class may be most, and many features fit anything. So it is balanced over classes,
scored on what the probe did not see, and compared with probes whose training labels were shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from vlm_core.evaluation import evaluate
from vlm_core.heads.features import HeadFeatures, head_features
from vlm_core.heads.taxonomy import NO_EFFECT
from vlm_core.items import SCORED, item_field, take
from vlm_core.observation.sinks import Sinks, find_sinks
from vlm_core.stats import monte_carlo_p
from vlm_core.subjects.subject import Subject

__all__ = ["Groundedness", "Probe", "groundedness", "held_out", "tell_categories", "tell_grounded"]

SWAPS = 4  # other images that an item's answer is tried under, to find one that loses it
FEWEST = 4  # heads of a category that is asked for: fewer are too few to learn from and to be asked about

_PENALTIES = np.logspace(-3, 3, 13)  # per feature, of standardised features


@dataclass(frozen=True, eq=False)
class Probe:
    """Held-out answers of a probe and of its control.

    Attributes
    ----------
    correct : float ndarray ``[row]``
        1 where the probe names the row's class; NaN in rows that were not asked.
    control : float ndarray ``[row]``
        Share of probes trained on shuffled labels that do.
    weights : float ndarray ``[row]``
        What a row counts so that every class counts as much: mean 1 over the rows asked.
    control_accuracy : ndarray ``[shuffle]``
        Balanced accuracy of each control probe.
    classes : tuple
    """

    correct: np.ndarray
    control: np.ndarray
    weights: np.ndarray
    control_accuracy: np.ndarray
    classes: tuple

    @property
    def accuracy(self) -> float:
        """Balanced accuracy: the mean over classes of the share of rows that are told right."""
        asked = np.isfinite(self.correct)
        return float((self.weights * self.correct)[asked].mean()) if asked.any() else float("nan")

    @property
    def gain(self) -> np.ndarray:
        """Per row asked: what it adds to balanced accuracy above the control; the mean is the probe's gain."""
        asked = np.isfinite(self.correct)
        return (self.weights * (self.correct - self.control))[asked]

    @property
    def p_value(self) -> float | None:
        """Of the accuracy against those of the control probes; None where nothing was asked."""
        # sums in another order differ in the last digits: a control probe that does as well is one that does as well
        return monte_carlo_p(self.accuracy - 1e-9, self.control_accuracy) if self.correct.size else None


def held_out(
    features: ArrayLike,
    labels: Sequence,
    folds: ArrayLike,
    *,
    asked: Sequence | None = None,
    within: ArrayLike | None = None,
    shuffles: int = 200,
    seed: int = 0,
) -> Probe:
    """Predict the class of every row with a linear probe that was fitted to the other folds.

    The probe is a linear discriminant for classes of equal frequency, made by ridge regression on the classes' indicators; the penalty is
    chosen on the rows fitted to, by leaving one out. Control probes differ in one thing: the labels they are fitted to are shuffled.

    Parameters
    ----------
    features : ``[row, feature]``
        NaNs stand at their column's mean.
    labels : ``[row]``
    folds : ``[row]``
        Rows of one fold (a scene, a split) are never on both sides.
    asked : sequence of folds, optional
        Folds whose rows are predicted; default all.
    within : ``[row]``, optional
        Labels are shuffled among rows of one group (the two conditions of one item); default among all.
    shuffles : int

    Returns
    -------
    Probe

    Raises
    ------
    ValueError
        If there is one class, one fold, or a class is missing from what some probe is fitted to.

    References
    ----------
    Hewitt & Liang 2019, arXiv:1909.03368 (control tasks); Hastie, Buja & Tibshirani 1995, Ann. Statist. 23:73-102 (penalised discriminants
    by regression); Hastie, Tibshirani & Friedman 2009, eq. 7.64 (leaving one out).
    """
    features, folds = np.asarray(features, dtype=float), np.asarray(folds)
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    n = len(features)
    if features.ndim != 2 or codes.shape != (n,) or folds.shape != (n,):
        raise ValueError(
            f"a probe needs features [row, feature] and a label and fold of each row, not {features.shape}, {codes.shape}, {folds.shape}"
        )
    if classes.size < 2:
        raise ValueError(f"a probe needs two classes to tell apart: all rows are {classes.tolist()[0] if classes.size else 'missing'!r}")
    rng = np.random.default_rng(seed)
    drawn = np.stack([codes, *(_shuffled(codes, within, rng) for _ in range(shuffles))])
    named = np.full((len(drawn), n), -1)
    for fold in np.unique(folds) if asked is None else asked:
        test = folds == fold
        if not test.any() or test.all():
            raise ValueError(
                f"fold {str(fold)!r} holds {'every' if test.any() else 'no'} row: a probe needs rows to fit and rows to predict"
            )
        fitted = drawn[:, ~test]
        if np.setdiff1d(np.arange(classes.size), fitted[0]).size:
            missing = classes[np.setdiff1d(np.arange(classes.size), fitted[0])[0]]
            raise ValueError(f"class {str(missing)!r} is in fold {str(fold)!r} alone: a probe cannot learn it from the others")
        train, tested = _standardised(features[~test], features[test])
        named[:, test] = _predicted(train, fitted, tested, classes.size)
    seen = named[0] >= 0
    right = (named == codes).astype(float)
    weights = np.zeros(n)
    counts = np.bincount(codes[seen], minlength=classes.size)
    weights[seen] = seen.sum() / (np.count_nonzero(counts) * counts[codes[seen]])
    control = right[1:]
    missing = np.where(seen, 0.0, np.nan)
    return Probe(right[0] + missing, control.mean(0) + missing, weights, (control * weights)[:, seen].mean(1), tuple(classes.tolist()))


def _shuffled(codes: np.ndarray, within: ArrayLike | None, rng: np.random.Generator) -> np.ndarray:
    if within is None:
        return rng.permutation(codes)
    # Rows sorted by group, then at random: the labels in the first order, put down in the second.
    groups = np.unique(np.asarray(within), return_inverse=True)[1].ravel()
    found = np.empty_like(codes)
    found[np.lexsort((rng.random(codes.size), groups))] = codes[np.argsort(groups, kind="stable")]
    return found


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(train)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, train, 0.0).sum(0) / count
    spread = np.sqrt(np.where(known, np.square(train - mean), 0.0).sum(0) / count)
    use = spread > 1e-9
    return tuple(np.where(np.isfinite(rows), (rows - mean) / np.where(use, spread, 1.0), 0.0)[:, use] for rows in (train, test))


def _predicted(train: np.ndarray, codes: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """Class of each test row by probes fitted to every set of labels: ``[set, row]`` from codes ``[set, train row]``."""
    if not train.shape[1]:
        return np.zeros((len(codes), len(test)), dtype=int)
    left, values, right = np.linalg.svd(train, full_matrices=False)
    members = (codes[:, :, None] == np.arange(n_classes)).astype(float)  # [set, row, class]
    target = members - members.mean(1, keepdims=True)
    projected = np.einsum("nr,snc->src", left, target)
    penalties = _PENALTIES * train.shape[1]
    chosen = penalties[_left_out_loss(left, values, target, projected, penalties).argmin(0)]
    shrink = values / (np.square(values) + chosen[:, None])  # [set, direction]
    coefficients = projected * shrink[:, :, None]
    return _nearest_class(
        np.einsum("nr,src->snc", left * values, coefficients), np.einsum("tr,src->stc", test @ right.T, coefficients), members
    )


def _left_out_loss(left, values, target, projected, penalties) -> np.ndarray:
    """Mean squared error of each row's target, predicted from the others: ``[penalty, set]``."""
    losses = []
    for penalty in penalties:
        shrink = np.square(values) / (np.square(values) + penalty)
        leverage = np.square(left) @ shrink + 1 / len(left)
        fitted = np.einsum("nr,src->snc", left * shrink, projected)
        losses.append(np.square((target - fitted) / np.maximum(1 - leverage, 1e-6)[None, :, None]).mean((1, 2)))
    return np.stack(losses)


def _nearest_class(fitted: np.ndarray, scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Class whose fitted scores lie nearest to each row's, in units of their spread within classes: ``[set, row]``."""
    counts = members.sum(1)[:, :, None]
    centres = np.einsum("snc,snk->sck", members, fitted) / counts
    apart = fitted - np.einsum("snc,sck->snk", members, centres)
    spread = np.einsum("snk,snl->skl", apart, apart) / fitted.shape[1]
    # class scores sum to 0: one direction has no spread, and a trace of the others' keeps it from being divided by
    trace = np.trace(spread, axis1=1, axis2=2)[:, None, None]
    spread = spread + (1e-9 * trace + 1e-300) * np.eye(spread.shape[1])
    weight = np.linalg.solve(spread, np.swapaxes(centres, 1, 2))  # [set, score, class]
    offset = 0.5 * np.einsum("sck,skc->sc", centres, weight)
    return (np.einsum("stk,skc->stc", scores, weight) - offset[:, None]).argmax(2)


def tell_categories(
    features: ArrayLike, category: ArrayLike, *, folds: int = 6, shuffles: int = 200, seed: int = 0
) -> tuple[Probe, np.ndarray, str]:
    """Probe the category of heads from their features, on layers that the probe was not fitted to.

    Features and categories both follow depth, so that a probe which knows nothing but a head's layer does well. Three things keep that
    from counting: features are taken around the mean of their layer, whole layers are left out, and the control probes' labels are shuffled
    among the heads of each layer; and the gain is to be resampled by layer. What is estimated is how much better the heads of a layer that was
    not seen are told apart by what sets them off from one another than they would be were their categories dealt out anew in every layer: zero
    where categories depend on the layer alone. (Around no mean, control probes learn from layers with different mixes of categories what
    they are meant not to know.)

    Parameters
    ----------
    features : ``[head, feature]``
        Of other items than those that the categories come from.
    category : ``[layer, head]``
        Categories of fewer than four heads, or found in layers of one fold only, are not asked for.
    folds : int
        Layers are dealt out to so many folds in turn: with six layers, each is left out alone.

    Returns
    -------
    probe : Probe
        Empty where nothing can be asked.
    heads : int ndarray
        The heads that were asked, in order.
    missing : str
        Why nothing was asked, or "": at least two categories with an effect are needed, since "no measurable effect" against one other
        tells heads that matter from those that do not, not kinds of work apart.

    Raises
    ------
    ValueError
        If the category is no map, or of other heads than the features.
    """
    features, category = np.asarray(features, dtype=float), np.asarray(category)
    if category.ndim != 2 or category.size != len(features):
        raise ValueError(f"categories have shape {category.shape}: expected [layer, head] of the {len(features)} heads that have features")
    layers, names = np.indices(category.shape)[0].ravel(), category.ravel()
    dealt = layers % folds
    asked = [
        name for name in np.unique(names) if (names == name).sum() >= FEWEST and np.unique(dealt[names == name]).size > 1
    ]  # fmt: skip
    if sum(name != NO_EFFECT for name in asked) < 2:
        said = ", ".join(f"{name} ({(names == name).sum()})" for name in np.unique(names))
        missing = f"telling categories of heads apart needs two with an effect, each of {FEWEST} heads or more in several layers; there are {said}"
        return _NOTHING, np.zeros(0, dtype=int), missing
    heads = np.flatnonzero(np.isin(names, asked))
    by_layer = features.reshape(*category.shape, -1)
    around = (by_layer - by_layer.mean(1, keepdims=True)).reshape(features.shape)
    told = held_out(around[heads], names[heads], dealt[heads], within=layers[heads], shuffles=shuffles, seed=seed)
    return told, heads, ""


def tell_grounded(learnt: Groundedness, asked: Groundedness, *, shuffles: int = 200, seed: int = 0) -> Probe:
    """Probe whether answers are grounded: fitted to the items of one split, asked about those of another.

    The control shuffles which of an item's two conditions is called grounded.

    Returns
    -------
    Probe
        One row for each of ``asked``, in order; empty where either split has no grounded answer.

    Raises
    ------
    ValueError
        If the two share a scene.
    """
    shared = set(learnt.clusters) & set(asked.clusters)
    if shared:
        raise ValueError(
            f"the two splits share {len(shared)} scenes, such as {sorted(shared)[0]}: a probe would be asked about what it has seen"
        )
    if not len(learnt.items) or not len(asked.items):
        return _NOTHING
    sizes = len(learnt.items), len(asked.items)
    pairs = np.concatenate([np.char.add(f"{split}/", np.array(one.items)) for split, one in enumerate((learnt, asked))])
    probe = held_out(
        np.concatenate([learnt.features, asked.features]), np.concatenate([learnt.grounded, asked.grounded]), np.repeat([0, 1], sizes),
        asked=[1], within=pairs, shuffles=shuffles, seed=seed,
    )  # fmt: skip
    rows = slice(sizes[0], None)
    return Probe(probe.correct[rows], probe.control[rows], probe.weights[rows], probe.control_accuracy, probe.classes)


_NOTHING = Probe(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0), ())


@dataclass(frozen=True, eq=False)
class Groundedness:
    """Head features of grounded and of ungrounded answers, two rows an item.

    Attributes
    ----------
    features : ndarray ``[row, layer × head × feature]``
    grounded : bool ndarray ``[row]``
    items, clusters : tuple of str
        Item and scene of each row.
    asked : int
        Items that there were; ``len(items) / 2`` of them gave a pair.
    """

    features: np.ndarray
    grounded: np.ndarray
    items: tuple[str, ...]
    clusters: tuple[str, ...]
    asked: int


def groundedness(subject: Subject, items: Sequence, *, known: HeadFeatures | None = None, sinks: Sinks | None = None) -> Groundedness:
    """Head features while the subject answers with the item's image, and with another scene's.

    An item's answer is *grounded* where it is right with the item's own image and lost with another scene's: it is right because of what is
    seen. The same item under the other image is the ungrounded condition: what the question asks for is not what the image shows.
    The other images are those of the items kept, each of them shown once more, to another item of its task. So both conditions hold exactly
    the same images and the same prompts, task by task: neither tells them apart, only whether they belong together. Left out are items that are
    not right with their own image, and those that no such exchange can hold: under ``SWAPS`` other images their answer is never lost, or
    their image never loses another item's.

    Parameters
    ----------
    items : sequence of items
    known : HeadFeatures, optional
        `head_features` of these items, so that only the other condition is measured.
    sinks : Sinks, optional

    Returns
    -------
    Groundedness
        Without a row where no item's answer changes so.

    Notes
    -----
    [ours] METHODS asks for groundedness of an answer without saying how it is labelled. Where the other image happens to show what is asked
    for, the subject answers about that image: such pairs are left out. Images swapped among all items, right or wrong, would give the probe
    those that the subject fails on as a sign of ungroundedness.
    """
    items = take(items, range(len(items)))
    sinks = sinks or find_sinks(subject, items[:32])
    known = head_features(subject, items, sinks=sinks) if known is None else known
    right = np.flatnonzero(evaluate(subject, items)["correct"].to_numpy())
    rows, partners = _exchange(subject, items, right)
    own = known.per_item[rows].reshape(rows.size, int(np.prod(known.per_item.shape[1:])))
    others = [_shown(items[row], items[partner]) for row, partner in zip(rows, partners, strict=True)]
    swapped = head_features(subject, others, sinks=sinks).per_item.reshape(own.shape) if rows.size else own
    names = tuple(str(item_field(items[row], "id")) for row in rows)
    scenes = tuple(str(item_field(items[row], "scene_id")) for row in rows)
    return Groundedness(
        np.concatenate([own, swapped]),
        np.repeat([True, False], rows.size), names * 2, scenes * 2, len(items),
    )  # fmt: skip


def _shown(item, other) -> dict:
    """The item with the other's image."""
    return {**{name: item_field(item, name) for name in SCORED}, "image": item_field(other, "image")}


def _exchange(subject: Subject, items: Sequence, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many of the items ``right`` as can exchange images so that each one's answer is lost, and whose image each is shown.

    Images go round among items of a task and different scenes; every item shown another's image has its own shown to another.
    """
    groups: dict[str, list[int]] = {}
    for row in right:
        groups.setdefault(str(item_field(items[row], "task")), []).append(int(row))
    place = {row: k for k, row in enumerate(right.tolist())}
    # the most items that can exchange: an assignment in which keeping one's own image is allowed, and costs one
    cost = np.full((right.size, right.size), np.inf)
    np.fill_diagonal(cost, 1.0)
    for step in range(1, SWAPS + 1):
        pairs = [(one, group[(k + step) % len(group)]) for group in groups.values() if step < len(group) for k, one in enumerate(group)]
        pairs = [pair for pair in pairs if item_field(items[pair[0]], "scene_id") != item_field(items[pair[1]], "scene_id")]
        if pairs:
            lost = ~evaluate(subject, [_shown(items[one], items[other]) for one, other in pairs])["correct"].to_numpy()
            for one, other in (pair for pair, gone in zip(pairs, lost, strict=True) if gone):
                cost[place[one], place[other]] = 0.0
    found = linear_sum_assignment(cost)[1] if right.size else right
    moved = np.flatnonzero(found != np.arange(right.size))
    return right[moved], right[found[moved]]
