"""The placebo of an ablation: the same heads disturbed as much as the ablation changes them, in a direction that means nothing.

``disturb_as_much``    one intervention an item
``placebo_losses``     what the removal costs and what the disturbance does, item by item
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from vlm_core.families.anatomy import HeadId
from vlm_core.interventions import Activations, Intervention, ResampleHeads
from vlm_core.observation.observing import observed
from vlm_core.subjects.activations import AtSite
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.sweep import sweep
from vlm_core.tables import wide

__all__ = ["disturb_as_much", "placebo_losses"]


def disturb_as_much(
    subject: Subject, items: Sequence, heads: Sequence[HeadId], removal: Intervention, seed: int = 0
) -> list[ResampleHeads]:
    """For every item, ``heads`` with their own outputs and something random added, as long at every token as what a removal changes there.

    What heads say is still there, unlike under a removal; and nothing else tells the two apart, not the heads, the tokens, or how far outputs
    are moved. If this costs as much as the removal, the subject cannot bear any disturbance of these heads, and what the removal costs says
    nothing of what was removed. (A head's output *turned* into a random direction of its own length, ``RedirectHeads``, cannot say this:
    it takes away what the head says, as setting it to zero does, and costs as much where heads carry the answer as where they are fragile.)

    Parameters
    ----------
    heads : sequence of (layer, head)
    removal : intervention
        What is done to these heads otherwise.
    seed : int
        Directions are drawn evenly from the sphere: one for every item and head, the same at all its tokens.

    Returns
    -------
    list of ResampleHeads
        At the tokens after the image; what removes the image changes no others.

    Raises
    ------
    ValueError
        Without heads.

    References
    ----------
    [ours]
    """
    if not heads:
        raise ValueError("a placebo needs heads to disturb")
    layers = sorted({layer for layer, _ in heads})
    keeps = [AtSite("head", frozenset(layers))]
    runs = zip(observed(subject, items, keeps), observed(subject, items, keeps, removal), strict=True)
    found = []
    for untouched, removed in runs:
        for before, after, prompt in zip(untouched.values[0][""], removed.values[0][""], untouched.encoded, strict=True):
            rng = np.random.default_rng([seed, len(found)])
            values = {}
            for place, layer in enumerate(untouched.layers[0]):
                own = before[place, : len(prompt)].float()
                length = (after[place, : len(prompt)].float() - own).norm(dim=-1, keepdim=True)
                drawn = torch.from_numpy(rng.standard_normal(own.shape[1:]).astype(np.float32))
                values["head", layer] = own + length * drawn / drawn.norm(dim=-1, keepdim=True)
            found.append(ResampleHeads(tuple(heads), Activations(values, prompt.image.cpu()), "question"))
    return found


def placebo_losses(
    subject: Subject,
    items: Sequence,
    heads: Sequence[HeadId],
    removal: Intervention,
    metric: str = "margin",
    *,
    seed: int = 0,
    measure: Callable | None = None,
) -> pd.DataFrame:
    """What a removal costs every item, and what disturbing the same heads as much does.

    Parameters
    ----------
    heads, removal, seed
        Of ``disturb_as_much``.
    metric : str
        Of ``vlm_core.sweep``: what is lost.
    measure : callable, optional
        Called like ``sweep(items, interventions, metrics=..., assignments=...)`` in place of `vlm_core.sweep` on the subject.

    Returns
    -------
    DataFrame
        ``cluster, removed, disturbed`` by item: the untouched value less the value under either.
    """
    disturbed = {f"disturbed/{number}": one for number, one in enumerate(disturb_as_much(subject, items, heads, removal, seed))}
    plan = [(number, label) for number in range(len(items)) for label in ("full", "removed", f"disturbed/{number}")]
    measure = measure or partial(sweep, subject)
    table = measure(items, {"full": None, "removed": removal, **disturbed}, metrics=(metric,), assignments=plan)
    values = wide(table.assign(intervention=table["intervention"].str.split("/").str[0]), metric)
    return pd.DataFrame({"cluster": values["cluster"], **{name: values["full"] - values[name] for name in ("removed", "disturbed")}})
