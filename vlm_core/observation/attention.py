"""Where heads attend, reduced inside the layer.

``AttentionMass``      share of attention per head on token groups
``AttentionEntropy``   how widely a head spreads, over all keys or within a group
``TopTokens``          the most attended tokens and their weights
``FullAttention``      the whole map: the one observer that keeps ``head x query x key``, for who asks for it by name

Attention on single image tokens is in ``vlm_core.observation.image_attention``, on sinks in ``vlm_core.observation.sinks``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.numeric import integer
from vlm_core.observation.declaring import freeze_groups, require_groups, require_images, require_names
from vlm_core.seam.views import AttentionView, Tokens

__all__ = ["AttentionEntropy", "AttentionMass", "FullAttention", "TopTokens"]


@dataclass(frozen=True)
class AttentionMass:
    """Share of attention that each head gives to token groups, averaged over a group of queries.

    Observed as ``[item, layer, head, group]``. Groups may overlap (``last`` is a text token); ``image`` and ``text``
    partition the sequence and sum to 1, as do ``image``, ``preamble`` and ``question`` where there is one image.

    Parameters
    ----------
    queries : str
        A token group (``vlm_core.seam.views.GROUPS`` or a named one): whose attention.
    groups : tuple of str
        Token groups: attention on what. A single name is one group.
    """

    reads_hidden = False

    queries: str = "last"
    groups: tuple[str, ...] = ("image", "text", "last", "bos")

    def __post_init__(self) -> None:
        require_names(self, "queries")
        freeze_groups(self, "groups")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have."""
        if tokens is not None:
            require_groups(self, tokens, self.queries, *self.groups)

    @property
    def axes(self) -> tuple:
        """Head and group."""
        return (("head", None), ("group", self.groups))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, group]`` of one layer."""
        return view.shares(self.queries, self.groups)


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of each head's attention in nats, averaged over a group of queries.

    Observed as ``[item, layer, head, group]``. Within a group the attention is renormalised to sum to 1; ``all`` is the
    plain entropy. Queries that give a group no attention at all (text before the image, in a causal order) have no
    entropy there and are left out of the mean; NaN where none is left.

    Parameters
    ----------
    queries : str
        A token group: whose attention.
    over : tuple of str
        Token groups: entropy over which keys. A single name is one group.
    """

    reads_hidden = False

    queries: str = "last"
    over: tuple[str, ...] = ("all", "image")

    def __post_init__(self) -> None:
        require_names(self, "queries")
        freeze_groups(self, "over")

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have."""
        if tokens is not None:
            require_groups(self, tokens, self.queries, *self.over)

    @property
    def axes(self) -> tuple:
        """Head and group."""
        return (("head", None), ("group", self.over))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, group]`` of one layer."""
        groups = torch.stack([view.keys_of(group) for group in self.over], dim=2).float()[:, None]
        total, count = 0.0, 0.0
        for block in view.blocks(self.queries):
            within = groups[:, :, : block.probabilities.shape[3]]
            mass = block.probabilities @ within
            # With p = P / mass: -sum p log p = (sum -P log P) / mass + log mass.
            entropy = torch.special.entr(block.probabilities) @ within / mass + mass.log()
            defined = (mass > 0) & block.real[:, None, :, None]
            total = total + entropy.masked_fill(~defined, 0.0).sum(2)
            count = count + defined.float().sum(2)
        return (total / count).clamp(min=0.0)


@dataclass(frozen=True)
class TopTokens:
    """The ``k`` most attended tokens of every head, averaged over a group of queries.

    Observed as a dict of ``index`` (positions in the prompt, before any drop; -1 where a group has fewer members) and
    ``weight`` (NaN there), each ``[item, layer, head, k]``, in falling order.

    Parameters
    ----------
    queries, among : str
        Token groups: whose attention, and which keys compete.
    """

    reads_hidden = False

    k: int = 5
    queries: str = "last"
    among: str = "all"

    def __post_init__(self) -> None:
        require_names(self, "queries", "among")
        object.__setattr__(self, "k", integer(self.k, "k", least=1))

    def require_there(self, anatomy: Anatomy, tokens: Tokens | None = None) -> None:
        """Refuse a token group that the batch does not have, or a prompt without the image tokens that are to compete."""
        if tokens is not None:
            require_groups(self, tokens, self.queries, self.among)
            if self.among == "image":
                require_images(self, tokens)

    def attention(self, view: AttentionView) -> dict[str, torch.Tensor]:
        """``index`` and ``weight`` ``[element, head, k]`` of one layer."""
        mean = view.mean(self.queries)
        among = view.keys_of(self.among)[:, None].expand_as(mean)
        weight, index = mean.masked_fill(~among, -1.0).topk(min(self.k, mean.shape[2]), dim=2)
        missing = weight < 0
        if view.tokens.index is not None and not view.crossed:
            index = torch.take_along_dim(view.tokens.index[:, None], index, dim=2)
        if not view.crossed:
            index = index - view.tokens.start[:, None, None]
        short = (0, self.k - index.shape[2])
        return {
            "index": torch.nn.functional.pad(index.masked_fill(missing, -1), short, value=-1).int(),
            "weight": torch.nn.functional.pad(weight.masked_fill(missing, torch.nan), short, value=torch.nan),
        }


@dataclass(frozen=True)
class FullAttention:
    """Every head's attention of every query on every key: ``[item, layer, head, query, key]``.

    This is what the other observers avoid: it takes layers x heads x tokens² numbers an item. Padding is NaN.
    """

    reads_hidden = False

    @property
    def ragged(self) -> dict[int, str]:
        """Both last axes are as long as the prompt."""
        return {-2: "all", -1: "all"}

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, query, key]`` of one layer."""
        valid = view.tokens.valid
        steps = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        unseen = ~(valid[:, None, :, None] & view.keys_of("all")[:, None, None, :])
        return view.probabilities(steps).masked_fill(unseen, torch.nan)
