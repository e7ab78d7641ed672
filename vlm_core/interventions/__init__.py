"""What can be done to a forward pass, as small frozen declarations.

``ZeroHeads``, ``MeanHeads``, ``ResampleHeads``    the output of heads becomes zero, its mean, or another run's
``RedirectHeads``      the output of heads keeps its length and gets another direction
``ReplaceImageKV``     image keys and values of a head become their mean (HeAr, Kim et al. 2509.17588) or another image's
``KnockOut``           attention edges from one token group to another are cut
``Patch``              activations become another run's (denoising, noising), or get Gaussian noise
``Steer``              a direction is added to the residual stream
``ReplaceTokens``      tokens are replaced in embedding space (Neo et al.)
``DropTokens``         image tokens leave the sequence from a layer on (FastV and its baselines)
``MergeTokens``        image tokens are merged into their like from a layer on (ToMe)

A row's intervention is ``None``, one of these, or a tuple of them applied together. Each compares and hashes by its
``digest``, the same in every process; ``vlm_core.interventions.stored`` writes them to JSON and back. Nothing here touches a model:
``vlm_core.seam.plan`` compiles the declarations of a whole batch into tensors and ``vlm_core.seam.run`` applies them.

Order of a tuple
----------------
What a row's parts do follows the forward pass, not their place in the tuple. On entering a layer: ``ReplaceTokens``
(first layer only), then ``DropTokens`` or ``MergeTokens``, then ``Patch("residual")``, then ``Steer``. Inside the attention:
``ReplaceImageKV``, then ``KnockOut``, then the heads' outputs: ``MeanHeads``, then ``RedirectHeads``, then ``ResampleHeads`` and ``Patch("head")``, then
``ZeroHeads``. Then ``Patch("attention")``, then ``Patch("mlp")``. Within one kind, of two that overlap the later in the
tuple holds, directions of ``Steer`` add up, and two means (or two directions) for one head are refused.

Positions
---------
``queries`` and ``positions`` restrict an intervention to tokens: a group name (see ``vlm_core.seam.views.GROUPS``, or a group that the
batch names), or a tuple of positions in the prompt, padding not counted, negative from the prompt's end. In groups, generated
tokens count as ``text`` and ``question``, and each as ``last`` while it is the newest.
"""

from __future__ import annotations

from vlm_core.interventions.declaration import Positions, Touch
from vlm_core.interventions.heads import KnockOut, MeanHeads, RedirectHeads, ReplaceImageKV, ResampleHeads, ZeroHeads
from vlm_core.interventions.sources import Activations, GaussianNoise, HeadDirections, HeadMeans, ImageKV, ImageKVMeans, Vector
from vlm_core.interventions.stream import Patch, ReplaceTokens, Steer
from vlm_core.interventions.tokens import DropTokens, MergeTokens

__all__ = [
    "Activations",
    "DropTokens",
    "GaussianNoise",
    "HeadDirections",
    "HeadMeans",
    "ImageKV",
    "ImageKVMeans",
    "Intervention",
    "KnockOut",
    "MeanHeads",
    "MergeTokens",
    "Patch",
    "Positions",
    "RedirectHeads",
    "ReplaceImageKV",
    "ReplaceTokens",
    "ResampleHeads",
    "Row",
    "Steer",
    "Touch",
    "Vector",
    "ZeroHeads",
    "describe",
    "parts",
    "require_row",
    "touches",
]

Intervention = (
    ZeroHeads
    | MeanHeads
    | RedirectHeads
    | ResampleHeads
    | ReplaceImageKV
    | KnockOut
    | Patch
    | Steer
    | ReplaceTokens
    | DropTokens
    | MergeTokens
)


Row = Intervention | tuple[Intervention, ...] | None
"""What is done to one row of a batch."""


def require_row(row: Row, name: str = "a row") -> None:
    """Refuse what is neither ``None`` nor an intervention nor a flat tuple of them.

    Parameters
    ----------
    name : str
        What the error calls it.

    Raises
    ------
    TypeError
    """
    for part in row if isinstance(row, tuple) else () if row is None else (row,):
        if not isinstance(part, Intervention):
            found = f"the class {part.__name__}" if isinstance(part, type) else f"{part!r:.60} ({type(part).__name__})"
            within = "a tuple with " if isinstance(row, tuple) else ""
            raise TypeError(
                f"{name} must be None, an intervention such as ZeroHeads([(0, 1)]) or a flat tuple of interventions applied together, "
                f"got {within}{found}"
            )


def parts(intervention: Row) -> tuple[Intervention, ...]:
    """The interventions of one row as a tuple."""
    if intervention is None:
        return ()
    return intervention if isinstance(intervention, tuple) else (intervention,)


def describe(intervention: Row) -> str:
    """A label for what is done to a row: ``"none"``, one label, or labels joined by ``" + "``."""
    require_row(intervention)
    if intervention is None:
        return "none"
    return " + ".join(part.describe() for part in parts(intervention)) or "none"


def touches(intervention: Row, n_layers: int, contiguous: bool = True) -> Touch:
    """Where a row's interventions begin to matter, all taken together; see ``Touch``."""
    require_row(intervention)
    all_touches = [part.touches(n_layers, contiguous) for part in parts(intervention)]
    scopes = {touch.scope for touch in all_touches if touch.layer < n_layers}
    return Touch(min((touch.layer for touch in all_touches), default=n_layers), "all" if "all" in scopes else "question")
