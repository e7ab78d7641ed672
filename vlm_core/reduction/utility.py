"""What image tokens are worth to an answer: its margin without each of them, and without whole groups.

``marginal_utility(subject, items, layer, objects)``   measured by dropping tokens from a layer on
``MarginalUtility``                                    token by token and group by group; the share of tokens that do next to nothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vlm_core.interventions import DropTokens
from vlm_core.interventions.numeric import integer
from vlm_core.items import SCORED, item_field, item_number, require_items, take
from vlm_core.reduction.image_groups import ImageGroups, image_groups, in_prompt
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.features import prompts_of
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide
from vlm_core.tracing.places import Masks

__all__ = ["MarginalUtility", "marginal_utility"]


@dataclass(frozen=True, eq=False)
class MarginalUtility:
    """What answers lose without image tokens, in units of the margin: log-probability of the answer minus that of the best other candidate.

    Attributes
    ----------
    layer : int
        From which on tokens are gone.
    tokens : DataFrame
        One row a token that was left out alone: ``item, cluster, task, token`` (counted among the prompt's image tokens), ``full`` (the
        margin with all tokens), ``loss`` (that minus the margin without the token).
    groups : DataFrame
        One row an item and group that has tokens: ``item, cluster, task, group, n_tokens, full, loss``, ``random`` (the loss of as many
        random image tokens, mean over draws; of ``all`` itself).
    """

    layer: int
    tokens: pd.DataFrame
    groups: pd.DataFrame

    def inert(self, share: float = 0.05) -> pd.DataFrame:
        """Tokens whose removal changes the margin by less than ``share`` of its size, as a share of an item's tokens.

        Returns
        -------
        DataFrame
            ``item, cluster, task, share``, one row an item: an effect with its clusters for `vlm_core.stats`. An item whose margin is 0 has
            no such tokens.

        Raises
        ------
        ValueError
            For a share that is not above 0.
        """
        if not share > 0.0:
            raise ValueError(f"the share of the margin must be above 0, got {share!r}")
        little = self.tokens["loss"].abs() < share * self.tokens["full"].abs()
        little = little.astype(float).where(self.tokens["loss"].notna() & self.tokens["full"].notna())
        keys = ["item", "cluster", "task"]
        return self.tokens[keys].assign(share=little).groupby(keys, sort=False, as_index=False)["share"].mean()


def marginal_utility(
    subject: Subject,
    items: Sequence,
    layer: int,
    objects: Masks | None = None,
    *,
    groups: ImageGroups | None = None,
    most_tokens: int | None = None,
    draws: int = 4,
    seed: int = 0,
    batch_rows: int | None = None,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> MarginalUtility:
    """Leave image tokens out from a layer on, one at a time and group by group.

    Parameters
    ----------
    items : sequence of items
    layer : int
        First layer that does not see them.
    objects : callable or mapping of item ids, optional
        The object in each item's image, bool ``[height, width]``, for the groups ``object``, ``boundary`` and ``background``.
    groups : ImageGroups, optional
        Of these items, where they are known already. Default: ``image_groups(subject, items, objects)``.
    most_tokens : int, optional
        Tokens left out one at a time per item, drawn at random where there are more. Default: all; 0 for groups alone.
    draws : int
        Random sets of tokens as large as each group, of any of the item's image tokens, the group's own among them: a background of most
        tokens has no others to compare with.
    seed : int
        Of what is drawn, with the item.
    batch_rows, store, progress
        See ``vlm_core.sweep``.

    Returns
    -------
    MarginalUtility

    Raises
    ------
    ValueError
        Without items, with both objects and groups, for a layer that there is not, or counts below 0.
    NotMeasurable
        See ``image_groups``.

    Notes
    -----
    A row an item and token: 64 tokens of a hundred items are 6400 rows of a sweep. A sum of single losses is no group's loss: tokens that
    stand in for each other lose nothing one at a time.
    """
    if objects is not None and groups is not None:
        raise ValueError("pass objects or the groups made of them, not both")
    require_items(items, SCORED)
    draws = integer(draws, "draws", least=0)
    most_tokens = None if most_tokens is None else integer(most_tokens, "most_tokens", least=0)
    items = take(items, range(len(items)))
    groups = image_groups(subject, items, objects) if groups is None else groups
    drawn: dict[str, dict[str, np.ndarray]] = {}
    rows: dict[str, DropTokens | None] = {"full": None, "all": DropTokens(layer, 0.0)}
    assignments, singles, sets = [], [], []
    for index, (item, prompt) in enumerate(zip(items, prompts_of(subject, items), strict=True)):
        name, rng = str(item_field(item, "id")), np.random.default_rng((seed, item_number(item)))
        positions = np.flatnonzero(prompt.image.numpy())
        order = rng.permutation(len(positions))
        assignments.append((index, "full"))
        for token in sorted(order[:most_tokens].tolist()):
            label = f"position {positions[token]}"
            rows[label] = DropTokens(layer, 0.0, tokens=(int(positions[token]),))
            assignments.append((index, label))
            singles.append((name, label, token))
        drawn[name] = {}
        for group, members in groups.of(item).items():
            n = int(members.sum())
            if not n:
                continue
            labels = [] if group == "all" else [f"random/{draw}, {group}" for draw in range(draws)]
            for label in labels:
                drawn[name][label] = np.isin(np.arange(len(members)), rng.permutation(len(members))[:n])
            rows |= {label: DropTokens(layer, 0.0, tokens=label) for label in (group, *labels) if label not in rows}
            assignments += [(index, label) for label in (group, *labels)]
            sets.append((name, group, n, labels))

    sets_of_tokens = [label for label, row in rows.items() if row is not None and isinstance(row.tokens, str) and row.tokens != "image"]

    def named(item, prompt) -> dict[str, np.ndarray]:
        own = drawn[str(item_field(item, "id"))]
        found = groups(item, prompt) | {label: in_prompt(members, prompt) for label, members in own.items()}
        nobody = np.zeros(len(prompt), dtype=bool)
        return {label: found.get(label, nobody) for label in sets_of_tokens}

    table = sweep(
        subject, items, rows, metrics=("margin",), assignments=assignments, groups=named, batch_rows=batch_rows, store=store,
        progress=progress,
    )  # fmt: skip
    found = wide(table, "margin")
    losses = found.drop(columns=["cluster", "task", "full"]).rsub(found["full"], axis=0)
    about = {name: {"item": name, **found.loc[name, ["cluster", "task"]]} for name in found.index}
    tokens, whole = [], []
    for name, label, token in singles:
        tokens.append(about[name] | {"token": token, "full": found.at[name, "full"], "loss": losses.at[name, label]})
    for name, group, n, labels in sets:
        random = losses.loc[name, [group] if group == "all" else labels].mean()
        own = {"group": group, "n_tokens": n, "full": found.at[name, "full"], "loss": losses.at[name, group], "random": random}
        whole.append(about[name] | own)
    columns = ["item", "cluster", "task"]
    return MarginalUtility(
        rows["all"].layer,
        pd.DataFrame(tokens, columns=[*columns, "token", "full", "loss"]),
        pd.DataFrame(whole, columns=[*columns, "group", "n_tokens", "full", "loss", "random"]),
    )
