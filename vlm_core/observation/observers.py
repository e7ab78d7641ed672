"""What can be read inside a forward pass, as small frozen declarations, reduced inside the layer.

``AttentionMass``      share of attention per head on token groups
``AttentionEntropy``   how widely a head spreads, over all keys or within a group
``ImageAttention``     attention on every image token
``MaskIoU``            overlap of the binarised attention with an object's mask (Head Impact)
``TopTokens``          the most attended tokens and their weights
``FullAttention``      the whole map: the one observer that keeps ``head x query x key``, for who asks for it by name
``HeadOutputs``        per-head outputs before the output projection, or their norms
``HiddenStates``       the residual stream
``At``                 any of them in some layers and heads only

``vlm_core.observation.observing.observe`` runs them. Sinks are in ``vlm_core.observation.sinks``, what needs the unembedding in
``vlm_core.observation.lens``.

An observer has ``attention(view)`` or ``layer(view)``, which returns a tensor (or a dict of them) with one entry per
element, or None for "not this layer". ``axes`` names what follows item and layer, for observers small enough to be rows
of a table; ``ragged`` names the axes (counted from the end) that are as long as a token group is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm_core.interventions.numeric import integer, integers
from vlm_core.seam.views import AttentionView, LayerView, Tokens

__all__ = [
    "At",
    "AttentionEntropy",
    "AttentionMass",
    "FullAttention",
    "HeadOutputs",
    "HiddenStates",
    "ImageAttention",
    "MaskIoU",
    "TopTokens",
]

_HEAD = ("head", None)


def freeze(observer: Any, *names: str) -> None:
    # Lists (from a file) become tuples, so that declarations stay hashable.
    for name in names:
        value = getattr(observer, name)
        if isinstance(value, list | range):
            object.__setattr__(observer, name, tuple(value))


def freeze_groups(observer: Any, name: str) -> None:
    # A bare name is one group, not its letters.
    value = getattr(observer, name)
    object.__setattr__(observer, name, (value,) if isinstance(value, str) else tuple(value))


def freeze_numbers(observer: Any, *names: str) -> None:
    """Layers, heads or positions as tuples of ints; None and group names as they are."""
    for name in names:
        value = getattr(observer, name)
        if value is not None and not isinstance(value, str):
            what = f"{name} of {type(observer).__name__}"
            object.__setattr__(observer, name, integers(value, what, f"each of {what}"))
        elif isinstance(value, str) and name != "positions":
            raise ValueError(f"{name} of {type(observer).__name__} must be integers, got {value!r}: pass a tuple of ints")


def require_layers(observer: Any, subject: Any) -> None:
    """Refuse a layer that the model does not have; layer ``n_layers`` is what enters the final norm."""
    n_layers = subject.anatomy.n_layers
    outside = [layer for layer in observer.layers or () if not 0 <= layer <= n_layers]
    if outside:
        raise ValueError(
            f"{type(observer).__name__} saw nothing of layer {outside[0]}: this model has {n_layers} layers, counted from 0, "
            f"and {n_layers} is what enters the final norm"
        )


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

    queries: str = "last"
    groups: tuple[str, ...] = ("image", "text", "last", "bos")

    def __post_init__(self) -> None:
        freeze_groups(self, "groups")

    @property
    def axes(self) -> tuple:
        """Head and group."""
        return (_HEAD, ("group", self.groups))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, group]`` of one layer."""
        def stacked() -> torch.Tensor:
            return torch.stack([view.keys_of(group) for group in self.groups], dim=2).float()

        key = ("keys", self.groups, view.crossed, view.key.shape[2])
        return view.mean(self.queries) @ view.tokens.kept(key, stacked)


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

    queries: str = "last"
    over: tuple[str, ...] = ("all", "image")

    def __post_init__(self) -> None:
        freeze_groups(self, "over")

    @property
    def axes(self) -> tuple:
        """Head and group."""
        return (_HEAD, ("group", self.over))

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
class ImageAttention:
    """Attention on every image token, averaged over a group of queries: ``[item, layer, head, image token]``.

    Rows with fewer image tokens than the widest of their batch are padded with NaN.
    """

    queries: str = "last"

    @property
    def ragged(self) -> dict[int, str]:
        """The last axis is as long as there are image tokens."""
        return {-1: "image"}

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, image token]`` of one layer."""
        attention, present = _on_image(view, self.queries)
        return attention.masked_fill(~present[:, None], torch.nan)


def _on_image(view: AttentionView, queries: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean attention ``[element, head, image token]`` and which of the tokens are real ``[element, image token]``."""
    mean = view.mean(queries)
    if view.crossed:
        return mean, view.keys_of("image")
    where, present = view.tokens.members("image")
    return torch.take_along_dim(mean, where[:, None], dim=2), present


@dataclass(frozen=True)
class MaskIoU:
    """Overlap of a head's binarised image attention with an object's mask: ``[item, layer, head, threshold]``.

    Attention is averaged over the queries first, then compared with a threshold of its own head and item.
    Intersection over union counts image tokens; NaN where the mask is empty, and in layers whose image lies outside the
    sequence, where a token group cannot be an object (Mllama), or where a prompt has none of the queries.

    Parameters
    ----------
    mask : str
        Named token group; its image tokens are the object.
    queries : str
        A token group: whose attention (the answer's tokens in Head Impact, the last prompt token here).
    thresholds : tuple of str or float
        ``"mean"`` over image tokens (Head Impact), ``"half"`` of the largest, or a quantile between 0 and 1.

    Notes
    -----
    Sergeev & Kotelnikov 2025, arXiv:2511.23375: Head Impact is the mean of the ``"mean"`` column over a set. The other
    thresholds show how much the ranking of heads owes to that choice.
    """

    mask: str = "object"
    queries: str = "last"
    thresholds: tuple[str | float, ...] = ("mean", "half", 0.75, 0.9)

    def __post_init__(self) -> None:
        freeze(self, "thresholds")
        for threshold in self.thresholds:
            if threshold not in ("mean", "half") and not (isinstance(threshold, float) and 0.0 < threshold < 1.0):
                raise ValueError(f"a threshold is 'mean', 'half' or a quantile between 0 and 1, got {threshold!r}")

    @property
    def axes(self) -> tuple:
        """Head and threshold."""
        return (_HEAD, ("threshold", tuple(map(str, self.thresholds))))

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, threshold]`` of one layer."""
        attention, present = _on_image(view, self.queries)
        if view.crossed:
            return attention.new_full((*attention.shape[:2], len(self.thresholds)), torch.nan)
        where, _ = view.tokens.members("image")
        mask = (view.tokens.group(self.mask).gather(1, where) & present)[:, None]
        known = attention.masked_fill(~present[:, None], torch.nan)
        scores = []
        for threshold in self.thresholds:
            if threshold == "mean":
                level = known.nanmean(2, keepdim=True)
            elif threshold == "half":
                level = known.nan_to_num(0.0).amax(2, keepdim=True) / 2
            else:
                level = known.nanquantile(threshold, dim=2, keepdim=True)
            high = (known > level) & present[:, None]
            scores.append((high & mask).sum(2) / (high | mask).sum(2).float())
        defined = mask.any(2) & view.tokens.members(self.queries)[1].any(1, keepdim=True)
        return torch.stack(scores, dim=2).masked_fill(~defined[:, :, None], torch.nan)


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

    k: int = 5
    queries: str = "last"
    among: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", integer(self.k, "k", least=1))

    def attention(self, view: AttentionView) -> dict[str, torch.Tensor]:
        """``index`` and ``weight`` ``[element, head, k]`` of one layer."""
        mean = view.mean(self.queries)
        among = view.keys_of(self.among)[:, None].expand_as(mean)
        weight, index = mean.masked_fill(~among, -1.0).topk(min(self.k, mean.shape[2]), dim=2)
        missing = weight < 0
        if view.tokens.index is not None and not view.crossed:
            index = torch.take_along_dim(view.tokens.index[:, None], index, dim=2)
        if not view.crossed:
            index = index - view.tokens.kept(("first column",), lambda: _first(view.tokens))[:, None, None]
        short = (0, self.k - index.shape[2])
        return {
            "index": torch.nn.functional.pad(index.masked_fill(missing, -1), short, value=-1).int(),
            "weight": torch.nn.functional.pad(weight.masked_fill(missing, torch.nan), short, value=torch.nan),
        }


def _first(tokens: Tokens) -> torch.Tensor:
    """Column of each prompt's first token that is still there in the incoming batch, ``[element]``: what padding lies left of it."""
    column = tokens.valid.int().argmax(1)
    return column if tokens.index is None else tokens.index.gather(1, column[:, None])[:, 0]


@dataclass(frozen=True)
class FullAttention:
    """Every head's attention of every query on every key: ``[item, layer, head, query, key]``.

    This is what the other observers avoid: it takes layers x heads x tokens² numbers an item. Padding is NaN.
    """

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


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of every head before the output projection.

    ``reduce="last"``: the vector at the last token, ``[item, layer, head, head_dim]``; ``"mean"``: its mean over all
    tokens; ``"norm"``: the mean over all tokens of its length, ``[item, layer, head]``.
    """

    reduce: str = "last"

    def __post_init__(self) -> None:
        if self.reduce not in ("last", "mean", "norm"):
            raise ValueError(f"reduce must be last, mean or norm, got '{self.reduce}'")

    @property
    def axes(self) -> tuple | None:
        """Head, for norms; vectors are no rows of a table."""
        return (_HEAD,) if self.reduce == "norm" else None

    def attention(self, view: AttentionView) -> torch.Tensor:
        """``[element, head, ...]`` of one layer."""
        if self.reduce == "last":
            return torch.take_along_dim(view.output, view.tokens.last[:, None, None, None], dim=1)[:, 0].float()
        output = view.output.float()
        weight = view.tokens.valid[:, :, None].float()
        if self.reduce == "norm":
            return (output.norm(dim=-1) * weight).sum(1) / weight.sum(1)
        return (output * weight[..., None]).sum(1) / weight[..., None].sum(1)


@dataclass(frozen=True)
class HiddenStates:
    """The residual stream that enters each layer; index ``n_layers`` is what enters the final norm.

    Parameters
    ----------
    layers : tuple of int, optional
        Default: every layer, and what enters the final norm.
    positions : str or tuple of int
        ``"last"``, ``"image"``, ``"text"`` or another token group but ``"all"``: the mean over the group's tokens,
        ``[item, layer, hidden]``, NaN where it has none. ``"all"``, ``"image tokens"``, ``"question tokens"``, ...: every token of
        the group, ``[item, layer, token, hidden]``, padded with NaN. Numbers: those valid tokens, negative ones from the end.

    Notes
    -----
    Index ``n_layers`` is *before* the final norm, unlike transformers' ``hidden_states[-1]``: a logit lens norms every
    layer alike, exactly once.
    """

    layers: tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "last"

    def __post_init__(self) -> None:
        freeze_numbers(self, "layers", "positions")

    def prepare(self, subject, items) -> HiddenStates:
        """The same; a layer that the model does not have is refused."""
        require_layers(self, subject)
        return self

    @property
    def ragged(self) -> dict[int, str]:
        """The token axis, where every token is kept."""
        each = isinstance(self.positions, str) and (self.positions == "all" or self.positions.endswith(" tokens"))
        return {-2: self.positions.removesuffix(" tokens")} if each else {}

    def layer(self, view: LayerView) -> torch.Tensor | None:
        """Hidden states of one layer, None where not asked for."""
        if self.layers is not None and view.layer not in self.layers:
            return None
        where, real = positions_of(view.tokens, self.positions)
        picked = torch.take_along_dim(view.hidden, where[:, :, None], dim=1).float()
        if self.positions == "last":
            return picked[:, 0]
        if self.ragged:
            return picked.masked_fill(~real[:, :, None], torch.nan)
        if not isinstance(self.positions, str):
            return picked
        weight = real[:, :, None].float()
        # 0 / 0 of an empty group is NaN.
        return (picked * weight).sum(1) / weight.sum(1)


def positions_of(tokens: Tokens, positions: str | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions ``[element, n]`` of a group's members (``"image tokens"`` too), or of numbered tokens; which are real.

    Raises
    ------
    ValueError
        Where a sequence has no such token.
    """
    if isinstance(positions, str):
        return tokens.members(positions.removesuffix(" tokens"))
    order, real = tokens.members("all")
    lengths = real.sum(1, keepdim=True)
    wanted = torch.tensor(positions, device=order.device).expand(order.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + lengths, wanted)
    if bool(((wanted < 0) | (wanted >= lengths)).any()):
        raise ValueError(f"positions {positions} lie outside a sequence of {int(lengths.min())} tokens")
    return order.gather(1, wanted), torch.ones_like(wanted, dtype=torch.bool)


@dataclass(frozen=True)
class At:
    """``observer`` in some ``layers`` and ``heads`` only (default: all). Heads that are not asked for cost nothing."""

    observer: Any
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        freeze_numbers(self, "layers", "heads")
        if not hasattr(self.observer, "attention"):
            raise ValueError(f"At restricts observers of attention, {type(self.observer).__name__} is none")

    @property
    def axes(self) -> tuple | None:
        """The observer's, with the heads' own numbers."""
        axes = getattr(self.observer, "axes", None)
        if axes is None or self.heads is None:
            return axes
        return tuple(("head", self.heads) if name == "head" else (name, labels) for name, labels in axes)

    @property
    def ragged(self) -> dict[int, str]:
        """The observer's."""
        return getattr(self.observer, "ragged", {})

    def prepare(self, subject, items) -> At:
        """The same, prepared on a subject; a head or layer that it does not have is refused."""
        anatomy = subject.anatomy
        for name, chosen, n in (("layer", self.layers, anatomy.n_layers), ("head", self.heads, anatomy.n_heads)):
            outside = [number for number in chosen or () if not 0 <= number < n]
            if outside:
                raise ValueError(f"there is no {name} {outside[0]}: this model has {n} {name}s, counted from 0")
        prepare = getattr(self.observer, "prepare", None)
        return self if prepare is None else At(prepare(subject, items), self.layers, self.heads)

    def attention(self, view: AttentionView) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """What the observer sees, None in other layers."""
        if self.layers is not None and view.layer not in self.layers:
            return None
        return self.observer.attention(view if self.heads is None else view.narrowed(self.heads))
