"""Attention sinks: tokens that draw attention for what they are in the residual stream, not for what they show.

``find_sinks(...)``   a model's outlier dimensions, and from where on a token is a sink in them
``SinkMass``          share of attention per head on sinks, on image sinks and on the first token

A key is a sink where the largest ``|RMSNorm(h)_d|`` over the model's outlier dimensions exceeds a threshold, ``h`` being
the residual stream that enters the layer (visual attention sink, Kang et al. 2025, ICLR). Which dimensions these are is
a property of the weights, so it is measured on every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.observation.declaring import require_groups, require_names
from vlm_core.observation.observing import observed
from vlm_core.seam.views import AttentionView, LayerView, Tokens
from vlm_core.subjects.subject import Subject

__all__ = ["SinkMass", "Sinks", "find_sinks"]

_DISCOVERY_ITEMS = 32


@dataclass(frozen=True)
class Sinks:
    """Where a model shows its sinks.

    Parameters
    ----------
    dimensions : tuple of int
        Outlier dimensions of the residual stream; empty where it has none.
    threshold : float
        A token is a sink where it exceeds this in one of them (in units of its own root mean square).
    """

    dimensions: tuple[int, ...]
    threshold: float


def _normed(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.float()
    return (hidden * hidden.pow(2).mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()).abs()


@dataclass(frozen=True)
class _Peaks:
    """Largest ``|RMSNorm(h)_d|`` of every dimension over a prompt's tokens, ``[item, layer, hidden]``."""

    def layer(self, view: LayerView) -> torch.Tensor:
        """``[element, hidden]`` of one layer."""
        return _normed(view.hidden).masked_fill(~view.tokens.valid[:, :, None], 0.0).amax(1)


def find_sinks(
    subject: Subject, items: Sequence, ratio: float = 5.0, share: float = 0.5, batch_rows: int | None = None
) -> Sinks:
    """Find the dimensions in which a model's sinks stand out.

    A dimension is an outlier where its largest ``|RMSNorm(h)_d|`` over all tokens of the items is ``ratio`` times that of
    the median dimension, in at least ``share`` of the layers. The threshold is the smallest such level over the layers
    that show one, so that it needs no number from another model (Kang et al. use 20 on LLaMA-2).

    Returns
    -------
    Sinks
        With no dimensions, and an infinite threshold, where nothing stands out.
    """
    if not ratio > 1.0 or not 0.0 < share <= 1.0:
        raise ValueError(f"ratio must exceed 1 and share lie in (0, 1], got {ratio} and {share}")
    peaks: torch.Tensor | None = None
    for some in observed(subject, items, [_Peaks()], None, batch_rows):
        most = some.values[0][""].amax(0)
        peaks = most if peaks is None else torch.maximum(peaks, most)
    if peaks is None:
        raise ValueError("find_sinks needs at least one item")
    level = ratio * peaks.median(dim=1, keepdim=True).values
    beyond = peaks > level
    dimensions = (beyond.float().mean(0) >= share).nonzero()[:, 0].tolist()
    if not dimensions:
        return Sinks((), float("inf"))
    return Sinks(tuple(dimensions), float(level[beyond[:, dimensions].any(1)].min()))


@dataclass(frozen=True)
class SinkMass:
    """Share of attention that each head gives to sinks, averaged over a group of queries.

    Observed as ``[item, layer, head, kind]`` with the kinds ``sink`` (all sink keys), ``image sink`` (those that are image
    tokens) and ``bos`` (the first token, sink or not). ``image sink`` over image mass is the sink share of the
    visual-attention-sink paper, which calls heads eligible at image mass >= 0.2 and sink share <= 0.5.

    Parameters
    ----------
    queries : str
        A token group: whose attention.
    sinks : Sinks, optional
        From ``find_sinks``. Default: found on the first items observed.
    """

    queries: str = "last"
    sinks: Sinks | None = None

    def __post_init__(self) -> None:
        require_names(self, "queries")
        if isinstance(self.sinks, dict):
            if set(self.sinks) != {"dimensions", "threshold"}:
                raise ValueError(f"sinks of SinkMass are their dimensions and threshold, got {', '.join(map(str, self.sinks)) or 'neither'}")
            object.__setattr__(
                self, "sinks", Sinks(tuple(self.sinks["dimensions"]), float(self.sinks["threshold"]))
            )

    @property
    def axes(self) -> tuple:
        """Head and kind."""
        return (("head", None), ("kind", ("sink", "image sink", "bos")))

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a dimension that the model, or a token group that the batch does not have; in a run, also sinks not found yet."""
        outside = [d for d in self.sinks.dimensions if not 0 <= d < anatomy.hidden_size] if self.sinks else []
        if outside:
            raise ValueError(f"SinkMass: there is no dimension {outside[0]}: this model's residual stream has {anatomy.hidden_size}")
        if tokens is not None:
            if self.sinks is None:
                raise ValueError("SinkMass has no sinks yet: pass find_sinks(subject, items), or let observe() find them")
            require_groups(self, tokens, self.queries)

    def prepare(self, subject: Subject, items: Sequence) -> SinkMass:
        """The same with the subject's sinks found."""
        if self.sinks is not None:
            return self
        n = min(len(items), _DISCOVERY_ITEMS)
        return replace(self, sinks=find_sinks(subject, [items[index] for index in range(n)]))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, kind]`` of one layer."""
        mean = view.mean(self.queries)
        if self.sinks.dimensions and not view.crossed:
            peak = _normed(view.hidden)[:, :, list(self.sinks.dimensions)].amax(2)
            sink = (peak > self.sinks.threshold) & view.tokens.valid
        else:
            sink = torch.zeros((view.key.shape[0], view.key.shape[2]), dtype=torch.bool, device=view.key.device)
        kinds = torch.stack([sink, sink & view.keys_of("image"), view.keys_of("bos")], dim=2).float()
        return mean @ kinds
