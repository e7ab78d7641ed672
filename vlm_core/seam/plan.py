"""Compile what is to be done to each row of a batch into tensors.

``Program.compile`` turns one intervention per row into, per layer, boolean masks ``[row, head]`` and lists of drops, knock-outs
and edits. ``Program.first`` is the first layer that each row touches: up to there a row is its item's unmodified
trunk, which is what lets the row engine compute it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from vlm_core.interventions import (
    Activations,
    DropTokens,
    GaussianNoise,
    HeadDirections,
    HeadMeans,
    ImageKV,
    ImageKVMeans,
    Intervention,
    KnockOut,
    MeanHeads,
    MergeTokens,
    Patch,
    Positions,
    RedirectHeads,
    ReplaceImageKV,
    ReplaceTokens,
    ResampleHeads,
    Row,
    Steer,
    Touch,
    Vector,
    ZeroHeads,
    describe,
    parts,
    touches,
)
from vlm_core.interventions.policy import Policy
from vlm_core.seam.views import GROUPS

__all__ = ["Program", "Replacement", "forget", "parts", "place_of", "require_fit", "require_possible", "require_width", "source_of"]

Means = HeadMeans | HeadDirections | ImageKVMeans | ImageKV
Edit = Patch | Steer | ReplaceTokens
EMBEDDING = "embedding"
"""The site of ``ReplaceTokens``: what enters the first layer, before anything else is done to it."""


@dataclass(frozen=True)
class _Effect:
    """One row's interventions, resolved on a model with ``n_layers`` and ``n_heads``."""

    zero: dict[Positions, np.ndarray]
    mean: dict[Positions, tuple[np.ndarray, Means]]
    direction: dict[Positions, tuple[np.ndarray, Means]]
    image_kv: dict[Positions, tuple[np.ndarray, Means]]
    image_kv_tokens: dict[Positions, tuple[np.ndarray, Means]]
    shortenings: tuple[DropTokens | MergeTokens, ...]
    knocks: tuple[KnockOut, ...]
    edits: tuple[tuple[str, int, Edit], ...]
    touch: Touch
    positions: frozenset[Positions]
    needs: frozenset[tuple[str, int | None]]
    on_image: Intervention | None


def _head_mask(heads: tuple, n_layers: int, n_heads: int) -> np.ndarray:
    mask = np.zeros((n_layers, n_heads), dtype=bool)
    if heads:
        index = np.asarray(heads)
        mask[index[:, 0], index[:, 1]] = True
    return mask


def _require_places(part: Intervention, n_layers: int, n_heads: int) -> None:
    """Refuse a layer or head that a model of these sizes does not have."""
    if not isinstance(part, Intervention):
        raise TypeError(f"not an intervention: {part!r}")
    entering = isinstance(part, Steer) or (isinstance(part, Patch) and part.site == "residual")
    layers = (part.layer,) if isinstance(part, DropTokens | MergeTokens | Steer) else getattr(part, "layers", ())
    # Declarations keep layers, and heads by their layers, in order.
    if layers and not (layers[0] >= 0 and layers[-1] < n_layers + entering):
        wrong = layers[0] if layers[0] < 0 else layers[-1]
        after = f" ({n_layers} is what enters the final norm)" if entering else ""
        raise ValueError(
            f"{part.describe()} names layer {wrong}, a layer outside this model's {n_layers} layers: they count from 0 to "
            f"{n_layers - 1 + entering}{after}"
        )
    for one in (*getattr(part, "heads", ()), *getattr(getattr(part, "policy", None), "heads", ())):
        layer, head = (layers[0] if layers else 0, one) if isinstance(part, KnockOut) else one
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            shown = f"head {head}" if isinstance(part, KnockOut) else f"head L{layer}.H{head}"
            raise ValueError(
                f"{part.describe()} names {shown}, which lies outside this model's {n_layers} layers x {n_heads} heads: layers count from 0 "
                f"to {n_layers - 1}, heads from 0 to {n_heads - 1}"
            )


# Few: an entry holds its sources' tensors. A batch names the same rows many times, a sweep in batch after batch.
@lru_cache(maxsize=512)
def _effect(row: Row, n_layers: int, n_heads: int) -> _Effect:
    zero: dict[Positions, np.ndarray] = {}
    replaced: dict[str, dict] = {"mean": {}, "direction": {}, "image_kv": {}, "image_kv_tokens": {}}
    shortenings: list[DropTokens | MergeTokens] = []
    knocks: list[KnockOut] = []
    edits: list[tuple[str, int, Edit]] = []
    for part in parts(row):
        _require_places(part, n_layers, n_heads)
        if isinstance(part, DropTokens | MergeTokens):
            if part.keep < 1.0:
                shortenings.append(part)
        elif isinstance(part, KnockOut):
            if part.layers:
                knocks.append(part)
        elif isinstance(part, Patch):
            edits.extend((part.site, layer, part) for layer in part.layers)
        elif isinstance(part, Steer):
            edits.append(("residual", part.layer, part))
        elif isinstance(part, ReplaceTokens):
            edits.append((EMBEDDING, 0, part))
        elif isinstance(part, ZeroHeads):
            mask = _head_mask(part.heads, n_layers, n_heads)
            zero[part.queries] = zero.get(part.queries, False) | mask
        elif isinstance(part, ResampleHeads):
            patch = Patch("head", (), part.source, part.queries, part.heads)
            edits.extend(("head", layer, patch) for layer in patch.layers)
        else:
            mask = _head_mask(part.heads, n_layers, n_heads)
            kinds = {MeanHeads: ["mean"], RedirectHeads: ["direction"]}.get(type(part), ["image_kv", "image_kv_tokens"])
            source = _brought(part)
            chosen = kinds[-1] if isinstance(source, ImageKV) else kinds[0]
            _refuse_overlap(part, source, mask, [pair for name in kinds for pair in replaced[name].values()])
            before = replaced[chosen].get(part.queries)
            replaced[chosen][part.queries] = (mask, source) if before is None else _joined(before, (mask, source))
    layers = [part.layer for part in shortenings]
    if len(set(layers)) != len(layers):
        raise ValueError(f"{describe(row)}: a row drops or merges tokens at most once per layer")
    # A direction is added to what a patch left.
    edits.sort(key=lambda edit: isinstance(edit[2], Steer))
    return _Effect(
        zero={positions: mask for positions, mask in zero.items() if mask.any()},
        **{kind: {key: pair for key, pair in pairs.items() if pair[0].any()} for kind, pairs in replaced.items()},
        shortenings=tuple(shortenings),
        knocks=tuple(knocks),
        edits=tuple(edits),
        touch=touches(row, n_layers),
        positions=_positions(row),
        needs=_row_needs(row),
        on_image=next((part for part in parts(row) if _is_on_image(part, n_layers)), None),
    )


def _positions(row: Row) -> frozenset[Positions]:
    return frozenset(group for part in parts(row) for group in _named_groups(part))


def _row_needs(row: Row) -> frozenset[tuple[str, int | None]]:
    return frozenset(need for part in parts(row) for need in _needs(part))


def demands(row: Row, n_layers: int, n_heads: int) -> tuple[frozenset[tuple[str, int | None]], frozenset[Positions]]:
    """What a row asks of a family and of its prompt: ``needs`` and ``positions`` of a ``Program``, without compiling one.

    Raises
    ------
    ValueError
        As ``Program.compile`` does for the row.
    """
    if isinstance(row, tuple):
        effect = _effect(row, n_layers, n_heads)
        return effect.needs, effect.positions
    for part in parts(row):
        _require_places(part, n_layers, n_heads)
    return _row_needs(row), _positions(row)


def _named_groups(part: Intervention) -> list[Positions]:
    return [getattr(part, name) for name in ("queries", "keys", "positions", "tokens") if hasattr(part, name)]


def _is_on_image(part: Intervention, n_layers: int) -> bool:
    """Whether a part does something, and nothing without image tokens."""
    of_image = isinstance(part, ReplaceImageKV | DropTokens | MergeTokens) or "image" in _named_groups(part)
    return of_image and part.touches(n_layers).layer < n_layers


def _vectors(source: Means) -> tuple[torch.Tensor, ...]:
    return (source.values,) if isinstance(source, HeadMeans | HeadDirections) else (source.keys, source.values)


def _brought(part: Intervention) -> Means:
    """The vectors per head that a part puts in place of a head's own."""
    return part.directions if isinstance(part, RedirectHeads) else part.means


def _image_layers(part: Intervention) -> tuple[int, ...]:
    """Layers in which image keys must lie."""
    if isinstance(part, ReplaceImageKV):
        return tuple(dict.fromkeys(head.layer for head in part.heads))
    return part.layers if isinstance(part, KnockOut) and part.keys == "image" else ()


def _needs(part: Intervention) -> list[tuple[str, int | None]]:
    """Capabilities, each with a layer in which image keys must lie, or None."""
    return [(part.capability, None), *((part.capability, layer) for layer in _image_layers(part))]


def _refuse_overlap(part: Intervention, source: Means, mask: np.ndarray, pairs: list[tuple[np.ndarray, Means]]) -> None:
    for other, means in pairs:
        if means != source and (other & mask).any():
            layer, head = np.argwhere(other & mask)[0].tolist()
            raise ValueError(
                f"a row gives a head at most one {type(part).__name__}: L{layer}.H{head} gets {means.digest} and "
                f"{source.digest}"
            )


def _joined(one: tuple[np.ndarray, Means], other: tuple[np.ndarray, Means]) -> tuple[np.ndarray, Means]:
    (mask, means), (more, others) = one, other
    if means == others:
        return mask | more, means
    chosen = torch.from_numpy(more)
    tensors = {}
    for name, tensor in vars(means).items():
        if isinstance(tensor, torch.Tensor):
            if tensor.shape != getattr(others, name).shape:
                raise ValueError(
                    f"the means {means.digest} and {others.digest} have shapes {tuple(tensor.shape)} and "
                    f"{tuple(getattr(others, name).shape)}: compute them on the same subject"
                )
            where = chosen.to(tensor.device).view(*chosen.shape, *[1] * (tensor.ndim - 2))
            tensors[name] = torch.where(where, getattr(others, name).to(tensor.device), tensor)
    return mask | more, replace(means, **tensors)


@dataclass(frozen=True, eq=False)
class Replacement:
    """Rows and heads to overwrite, and by what.

    ``mask`` ``{layer: [row, head]}``; ``tensors`` each ``[source, layer, head, head_dim]``, for ``Program.image_kv_tokens``
    ``[source, layer, head, image token, head_dim]``; ``source`` ``[row]``.
    """

    mask: dict[int, torch.Tensor]
    tensors: tuple[torch.Tensor, ...] = ()
    source: torch.Tensor | None = None

    def at(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The replacing vectors ``[row or 1, head, ..., head_dim]`` of ``layer`` for ``rows``."""
        if self.tensors[0].shape[0] == 1:
            return tuple(tensor[:, layer] for tensor in self.tensors)
        source = self.source[rows.to(self.source.device)]
        return tuple(tensor[source, layer] for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Program:
    """The interventions of ``n_rows`` rows, per layer.

    Parameters
    ----------
    first : int array ``[row]``
        First layer that each row touches; ``n_layers`` for none.
    touch : tuple of Touch, one per row
    zero, mean, image_kv
        What is done for all queries: ``{layer: [row, head]}``, and means.
    drops, merges : dict of layer to list, one entry per row
    knocks : dict of layer to list of (queries, keys, BoolTensor ``[row]``)
        Edges cut in all heads.
    zero_at, mean_at, image_kv_at
        The same as without ``_at``, restricted to queries: ``{queries: ...}``, never ``"all"``.
    direction : dict of queries (``"all"`` included) to Replacement
        Directions of unit length that outputs get, their own length kept.
    image_kv_tokens : dict of queries (``"all"`` included) to Replacement
        Another image's keys and values, token by token.
    head_knocks : dict of layer to list of (queries, keys, BoolTensor ``[row, head]``)
        Edges cut in some heads only.
    edits : dict of (site, layer) to list of (row, edit)
        Patches, directions and replaced tokens, in the order in which they are applied.
    positions : tuple of frozenset, one per row
        Group names and tuples of positions that the row names.
    needs : frozenset of (capability, layer or None)
        What the family must be capable of; with a layer, that image keys lie there.
    on_image : tuple of Intervention or None, one per row
        An intervention that is nothing without image tokens.
    """

    n_rows: int
    n_layers: int
    first: np.ndarray
    zero: dict[int, torch.Tensor] = field(default_factory=dict)
    mean: Replacement = field(default_factory=lambda: Replacement({}))
    image_kv: Replacement = field(default_factory=lambda: Replacement({}))
    drops: dict[int, list[DropTokens | None]] = field(default_factory=dict)
    knocks: dict[int, list[tuple[Positions, Positions, torch.Tensor]]] = field(default_factory=dict)
    touch: tuple[Touch, ...] = ()
    zero_at: dict[Positions, dict[int, torch.Tensor]] = field(default_factory=dict)
    mean_at: dict[Positions, Replacement] = field(default_factory=dict)
    direction: dict[Positions, Replacement] = field(default_factory=dict)
    image_kv_at: dict[Positions, Replacement] = field(default_factory=dict)
    image_kv_tokens: dict[Positions, Replacement] = field(default_factory=dict)
    head_knocks: dict[int, list[tuple[Positions, Positions, torch.Tensor]]] = field(default_factory=dict)
    merges: dict[int, list[MergeTokens | None]] = field(default_factory=dict)
    edits: dict[tuple[str, int], list[tuple[int, Edit]]] = field(default_factory=dict)
    positions: tuple[frozenset[Positions], ...] = ()
    needs: frozenset[tuple[str, int | None]] = frozenset()
    on_image: tuple[Intervention | None, ...] = ()

    @cached_property
    def attention_layers(self) -> frozenset[int]:
        """Layers in which keys, edges or heads' outputs are edited."""
        masks = (self.zero, *self.zero_at.values(), self.knocks, self.head_knocks, *(one.mask for one in self.replacements))
        return frozenset().union(*masks)

    @cached_property
    def idle(self) -> bool:
        """Whether nothing is done to any row, and nothing named that a batch or family may lack."""
        asked = self.needs or any(self.positions)
        return not (asked or self.attention_layers or self.drops or self.merges or self.edits)

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """Everything that puts means or another image's vectors in place."""
        restricted = (self.mean_at, self.direction, self.image_kv_at, self.image_kv_tokens)
        return self.mean, self.image_kv, *(one for kind in restricted for one in kind.values())

    @classmethod
    def compile(
        cls,
        interventions: Sequence[Row],
        n_layers: int,
        n_heads: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Program:
        """One intervention per row, resolved on a model's sizes.

        Raises
        ------
        ValueError
            Where an intervention names a head or layer that the model does not have, or two that cannot be combined.
        """
        if all(row is None for row in interventions):
            return _idle(len(interventions), n_layers)
        effects = [_effect(row, n_layers, n_heads) for row in interventions]
        n_rows = len(effects)
        shortened: dict[type, dict[int, list]] = {DropTokens: {}, MergeTokens: {}}
        knocks: dict[int, dict] = {}
        head_knocks: dict[int, dict] = {}
        edits: dict[tuple[str, int], list[tuple[int, Edit]]] = {}
        for row, effect in enumerate(effects):
            for part in effect.shortenings:
                shortened[type(part)].setdefault(part.layer, [None] * n_rows)[row] = part
            for knock in effect.knocks:
                for layer in knock.layers:
                    edges = (head_knocks if knock.heads else knocks).setdefault(layer, {})
                    shape = (n_rows, n_heads) if knock.heads else (n_rows,)
                    mask = edges.setdefault((knock.queries, knock.keys), np.zeros(shape, dtype=bool))
                    mask[(row, list(knock.heads)) if knock.heads else row] = True
            for site, layer, edit in effect.edits:
                edits.setdefault((site, layer), []).append((row, edit))

        def replacements(kind: str) -> dict[Positions, Replacement]:
            pairs = [getattr(effect, kind) for effect in effects]
            return {
                key: _replacement([one.get(key) for one in pairs], device, dtype)
                for key in dict.fromkeys(key for one in pairs for key in one)
            }

        zero = {
            key: _by_layer([effect.zero.get(key) for effect in effects], device)
            for key in dict.fromkeys(key for effect in effects for key in effect.zero)
        }
        mean, image_kv = replacements("mean"), replacements("image_kv")
        return cls(
            n_rows=n_rows,
            n_layers=n_layers,
            first=np.array([effect.touch.layer for effect in effects], dtype=np.int64),
            touch=tuple(effect.touch for effect in effects),
            zero=zero.pop("all", {}),
            zero_at=zero,
            mean=mean.pop("all", Replacement({})),
            mean_at=mean,
            direction=replacements("direction"),
            image_kv=image_kv.pop("all", Replacement({})),
            image_kv_at=image_kv,
            image_kv_tokens=replacements("image_kv_tokens"),
            drops=shortened[DropTokens],
            merges=shortened[MergeTokens],
            knocks=_edges(knocks, device),
            head_knocks=_edges(head_knocks, device),
            edits=edits,
            positions=tuple(effect.positions for effect in effects),
            needs=frozenset().union(*(effect.needs for effect in effects)),
            on_image=tuple(effect.on_image for effect in effects),
        )


def require_fit(shape: Sequence[int], n_layers: int, n_heads: int, head_dim: int, what: str = "means") -> None:
    """Refuse means (or directions, or another image's vectors) ``[layer, head, ..., head_dim]`` of another model.

    Parameters
    ----------
    what : str
        What the error calls them.

    Raises
    ------
    ValueError
    """
    if (*shape[:2], shape[-1]) != (n_layers, n_heads, head_dim):
        raise ValueError(
            f"{what} of shape {tuple(shape)} do not fit this model's {n_layers} layers x {n_heads} heads of {head_dim}: compute them on "
            f"the same subject"
        )


def place_of(site: str) -> str:
    """The site of ``SITES`` that a program's site is: embeddings are the stream that enters the first layer."""
    return "residual" if site == EMBEDDING else site


def source_of(edit: Edit | ResampleHeads) -> Activations | GaussianNoise | Vector:
    """What an edit puts in place, or adds."""
    if isinstance(edit, Steer):
        return edit.direction
    return edit.by if isinstance(edit, ReplaceTokens) else edit.source


def require_width(edit: Edit | ResampleHeads, site: str, layer: int, hidden_size: int, n_heads: int, head_dim: int) -> None:
    """Refuse an edit whose source has vectors of another width than the model has at ``site``.

    Raises
    ------
    ValueError
    """
    source, place = source_of(edit), place_of(site)
    if isinstance(source, GaussianNoise):
        return
    found = tuple(source.values.shape) if isinstance(source, Vector) else tuple(source.at(place, layer).shape[1:])
    expected = (n_heads, head_dim) if place == "head" else (hidden_size,)
    if found != expected:
        raise ValueError(
            f"{edit.describe()} brings vectors of shape {found}, this model has {expected} there: capture or compute "
            f"them on the same subject"
        )


def require_possible(row: Row, anatomy, named: bool = True) -> None:
    """Refuse a row that a model cannot carry out, before anything runs.

    Parameters
    ----------
    anatomy : Anatomy
    named : bool
        Whether the prompts may have token groups of their own beside ``vlm_core.seam.views.GROUPS``.

    Raises
    ------
    ValueError
        For a layer or head that it does not have, a capability that its family lacks, sources of another model, parts that cannot be
        combined, a token group that no prompt has.
    """
    n_layers, n_heads, head_dim, hidden_size = anatomy.n_layers, anatomy.n_heads, anatomy.head_dim, anatomy.hidden_size
    all_parts = parts(row)
    for part in all_parts:
        _require_places(part, n_layers, n_heads)
        anatomy.require(part.capability, _image_layers(part))
        if isinstance(part, MeanHeads | RedirectHeads | ReplaceImageKV):
            for tensor in _vectors(_brought(part)):
                what = "directions" if isinstance(part, RedirectHeads) else "means"
                if (*tensor.shape[:2], tensor.shape[-1]) != (n_layers, n_heads, head_dim):
                    require_fit(tensor.shape, n_layers, n_heads, head_dim, f"{what} of {part.describe()}")
        elif isinstance(part, Patch):
            for layer in part.layers:
                require_width(part, part.site, layer, hidden_size, n_heads, head_dim)
        elif isinstance(part, ResampleHeads):
            for layer in {head.layer for head in part.heads}:
                require_width(part, "head", layer, hidden_size, n_heads, head_dim)
        elif isinstance(part, Steer | ReplaceTokens):
            require_width(part, "residual", 0, hidden_size, n_heads, head_dim)
        elif isinstance(part, DropTokens) and isinstance(part.policy, Policy) and part.decides:
            part.policy.require_possible(anatomy)
        if not named:
            for group in _named_groups(part):
                if isinstance(group, str) and group not in GROUPS:
                    raise ValueError(
                        f"{part.describe()}: there is no token group '{group}' where no groups are given, a prompt knows "
                        f"{', '.join(GROUPS)}"
                    )
    # Only what gives a head vectors, or shortens the sequence, can contradict another part.
    if sum(isinstance(part, MeanHeads | RedirectHeads | ReplaceImageKV | DropTokens | MergeTokens) for part in all_parts) > 1:
        _effect(row, n_layers, n_heads)


def forget() -> None:
    """Let go of the sources that compiled interventions hold."""
    _effect.cache_clear()


@lru_cache(maxsize=256)
def _idle(n_rows: int, n_layers: int) -> Program:
    """The program of rows to which nothing is done."""
    touch = _effect(None, n_layers, 1).touch
    first = np.full(n_rows, touch.layer, dtype=np.int64)
    return Program(n_rows=n_rows, n_layers=n_layers, first=first, touch=(touch,) * n_rows, positions=(frozenset(),) * n_rows)


def _edges(cuts: dict[int, dict], device: torch.device | str) -> dict[int, list[tuple]]:
    return {
        layer: [(queries, keys, torch.from_numpy(mask).to(device)) for (queries, keys), mask in edges.items()]
        for layer, edges in cuts.items()
    }


def _by_layer(masks: list[np.ndarray | None], device: torch.device | str) -> dict[int, torch.Tensor]:
    shape = next((mask.shape for mask in masks if mask is not None), None)
    if shape is None:
        return {}
    empty = np.zeros(shape, dtype=bool)
    stacked = np.stack([empty if mask is None else mask for mask in masks])
    layers = np.flatnonzero(stacked.any(axis=(0, 2)))
    tensor = torch.from_numpy(stacked).to(device)
    return {int(layer): tensor[:, layer] for layer in layers}


def _replacement(pairs: list, device: torch.device | str, dtype: torch.dtype) -> Replacement:
    distinct = list(dict.fromkeys(pair[1] for pair in pairs if pair is not None))
    fields = [_vectors(means) for means in distinct]
    shapes = {tuple(tensor.shape) for group in fields for tensor in group}
    shape = next(pair[0].shape for pair in pairs if pair is not None)
    for found in shapes:
        if found[:2] != shape:
            raise ValueError(
                f"means of shape {found} do not fit this model's layers x heads: compute them on the same subject"
            )
    if len({found[-1] for found in shapes}) > 1:
        raise ValueError("the rows of one batch bring means of heads of different widths: compute them on the same subject")
    if len(shapes) > 1:
        raise ValueError(
            f"the rows of one batch replace image keys and values by those of images with "
            f"{' and '.join(str(found[2]) for found in sorted(shapes))} tokens: put them into batches of one size"
        )
    stacked = tuple(
        torch.stack([tensor.to(device, dtype) for tensor in group]) for group in zip(*fields, strict=True)
    )
    number = {means: index for index, means in enumerate(distinct)}
    source = torch.tensor([0 if pair is None else number[pair[1]] for pair in pairs], device=device)
    return Replacement(_by_layer([None if pair is None else pair[0] for pair in pairs], device), stacked, source)
