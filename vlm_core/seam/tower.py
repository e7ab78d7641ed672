"""What the vision tower attends to, per image token.

``tower_layers(...)``    attention received and keys of each of the tower's layers, for the image tokens of each prompt
``patch_places(...)``    in which order the tower packs the patches of a view
``recording()``          whether such a pass is under way in this context

The tower's attention goes through transformers' ``AttentionInterface`` as the language model's does: for one pass it goes by a name that
records queries and keys and hands on to the original. What a layer's patches receive is summed at once, so that no map of a layer is
kept, and patches are pooled to image tokens by what the family's layout says of them (``vlm_core.families.tiling.Patches``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from vlm_core.errors import NotMeasurable
from vlm_core.families.anatomy import Anatomy
from vlm_core.families.layout import Layout
from vlm_core.families.tiling import Patches
from vlm_core.interventions.policy import KEYED, TowerLayer
from vlm_core.seam.masks import additive
from vlm_core.seam.seam import Captured, active, capturing, original_attention

__all__ = ["TOWER_NAMES", "patch_places", "recording", "tower_layers"]

TOWER_NAMES = {"sdpa": "vlm_core_tower", "eager": "vlm_core_tower_eager"}

_SCORES = 2**22
"""Attention scores that are computed at once."""


@dataclass(eq=False)
class _Recorded:
    """What one layer's patches receive, and their keys, in the order in which the tower packs them."""

    received: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] | None = field(default_factory=list)


@dataclass(eq=False)
class _Recording:
    """One pass of the tower over views of so many patches each; ``led`` where a class token comes before them."""

    patches: Sequence[int]
    layers: dict[nn.Module, _Recorded] = field(default_factory=dict)
    led: bool = False

    def take(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        """Of a call with ``query`` and ``key`` ``[view, head, patch, size]``."""
        if module not in self.layers:
            if len(self.layers) >= KEYED:
                list(self.layers.values())[-KEYED].keys = None
            self.layers[module] = _Recorded()
        layer, n = self.layers[module], query.shape[2]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        self.led = led = set(self.patches) == {n - 1}
        received = _received(query[:, :, :1] if led else query, key, mask, scale)
        layer.received.append(received[:, led:].flatten())
        if layer.keys is not None:
            layer.keys.append(key[:, :, led:].transpose(1, 2).flatten(2).flatten(0, 1))


_RECORDING: ContextVar[_Recording | None] = ContextVar("vlm_core_tower", default=None)
_LOCK = Lock()


def recording() -> bool:
    """Whether a pass of the tower is under way in this context whose attention is recorded: no image may be left out of it."""
    return _RECORDING.get() is not None


def _received(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attention that each key receives, summed over queries and averaged over heads: ``[view, key]``."""
    views, heads, n_queries, _ = query.shape
    key = key.float().transpose(2, 3)
    found = torch.zeros(views, key.shape[3], device=key.device)
    rows = max(1, _SCORES // (views * heads * key.shape[3]))
    for start in range(0, n_queries, rows):
        block = slice(start, start + rows)
        scores = query[:, :, block].float() @ key * scale
        if mask is not None:
            scores = scores + additive(mask if mask.shape[2] == 1 else mask[:, :, block], scores.dtype).float()
        found += scores.softmax(3).sum(2).mean(1)
    return found


def _recording(implementation: str):
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        found = _RECORDING.get()
        if found is not None:
            scale = kwargs.get("scaling")
            with torch.no_grad():
                found.take(module, query, key, attention_mask, query.shape[3] ** -0.5 if scale is None else scale)
        return original_attention(module, implementation)(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


for _implementation, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(TOWER_NAMES[_implementation], _recording(_implementation))
    AttentionMaskInterface.register(TOWER_NAMES[_implementation], _mask)


@contextmanager
def _renamed(model: nn.Module) -> Iterator[None]:
    """The tower's attention by the names that record; the original ones are back on exit, exceptions included."""
    kind = type(model.config.vision_config)
    found = (getattr(module, "config", None) for module in model.modules())
    configs = list({id(one): one for one in (model.config.vision_config, *found) if isinstance(one, kind)}.values())
    with _LOCK:
        named = [one._attn_implementation for one in configs]
        strange = next((one for one in named if one not in TOWER_NAMES), None)
        if strange is not None:
            raise NotMeasurable(
                f"the vision tower uses attention '{strange}', whose queries and keys are not seen: load the model with "
                f"attn_implementation 'sdpa' or 'eager', or choose a policy that does not read the tower"
            )
        try:
            for one, name in zip(configs, named, strict=True):
                one._attn_implementation_internal = TOWER_NAMES[name]
            yield
        finally:
            for one, name in zip(configs, named, strict=True):
                one._attn_implementation_internal = name


def tower_layers(
    model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, torch.Tensor], layouts: Sequence[Layout]
) -> list[tuple[TowerLayer, ...]]:
    """What the vision tower's layers attend to, for each prompt.

    Parameters
    ----------
    inputs : mapping
        Processor outputs of all prompts, or what the model is called with.
    layouts : sequence of Layout, one per prompt

    Returns
    -------
    list of tuple of TowerLayer
        Per prompt every layer of the tower, first to last. A token without a place on a grid (class token, newline) receives 0 and has
        keys of 0. Where images are cut into several views, the attention within each adds up to one by itself.

    Raises
    ------
    NotMeasurable
        Where image tokens are no pooled patches (learned queries, cross-attention), where the tower leads its patches with more than a
        class token, where its attention cannot be seen, or without the images.
    """
    family = anatomy.family
    for layout in layouts:
        if len(layout) and not layout.patches:
            why = layout.reason or f"model_type '{family.model_type}': its image is not in the token sequence."
            raise NotMeasurable(
                f"what the vision tower attends to cannot be told by image token ({why.rstrip('.')}): choose a policy that does not read it"
            )
    grids = [patches for layout in layouts for patches in layout.patches]
    if not grids:
        return [()] * len(layouts)
    sizes = [prod(patches.view) for patches in grids for _ in range(prod(patches.views))]
    # Of what the model is called with: not a cache, nor how long an output should be.
    given = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if "pixel_values" not in given:
        raise NotMeasurable(
            "what the vision tower attends to is not known without the images: call the model, or generate, with pixel_values, or choose a "
            "policy that does not read the tower"
        )
    recorded = _Recording(sizes)
    token = _RECORDING.set(recorded)
    try:
        with _renamed(model), active(None), torch.no_grad(), capturing():
            anatomy.base(**given, use_cache=False)
    except Captured:
        pass
    finally:
        _RECORDING.reset(token)
    if not recorded.layers:
        raise NotMeasurable(
            f"the vision tower of model_type '{family.model_type}' does not dispatch its attention through transformers' "
            f"AttentionInterface, so that it is not seen: choose a policy that does not read the tower"
        )
    order = _order(family.patch_order, grids, model.config.vision_config)
    found: list[list[TowerLayer]] = [[] for _ in layouts]
    device = anatomy.embedding.weight.device
    pooled = [_Grid.of(layout, device) for layout in layouts]
    for one in recorded.layers.values():
        # The tower may lie on another device than the language model.
        received = torch.cat(one.received).to(device)
        if len(received) != sum(sizes):
            raise NotMeasurable(
                f"the vision tower of model_type '{family.model_type}' attends over {len(received)} tokens for images of {sum(sizes)} "
                f"patches, so that it is not known which is which: choose a policy that does not read the tower"
            )
        received = received[order]
        keys = None if one.keys is None else torch.cat(one.keys).to(device)[order]
        start = 0
        for layers, layout, own in zip(found, layouts, pooled, strict=True):
            part = slice(start, start + sum(map(_count, layout.patches)))
            layers.append(_pooled(len(layout), own, received[part], None if keys is None else keys[part], recorded.led))
            start = part.stop
    return [tuple(layers) for layers in found]


def _count(patches: Patches) -> int:
    return prod(patches.view) * prod(patches.views)


@dataclass(frozen=True, eq=False)
class _Grid:
    """Where the tokens of a grid lie and which patches of the prompt they show.

    ``at`` ``[token]`` among the image tokens, ``row`` and ``column`` in the grid; ``part`` of the prompt's patches; ``down``
    ``[row, patch]`` and ``across`` ``[column, patch]`` the share of each patch that lies under a token.
    """

    patches: Patches
    at: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    part: slice
    down: torch.Tensor
    across: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> list[_Grid]:
        """Every grid of a prompt."""
        found, start = [], 0
        for number, patches in enumerate(layout.patches):
            here = layout.grid == number
            at, row, column = (torch.as_tensor(one, device=device) for one in (here.nonzero()[0], layout.row[here], layout.column[here]))
            part = slice(start, start + _count(patches))
            shares = (_shares(patches, axis, int(place.max()) + 1).to(device) for axis, place in enumerate((row, column)))
            found.append(cls(patches, at, row, column, part, *shares))
            start = part.stop
        return found


def _pooled(n: int, grids: Sequence[_Grid], received: torch.Tensor, keys: torch.Tensor | None, led: bool) -> TowerLayer:
    """One layer's patches of one prompt, view by view in raster order, as its ``n`` image tokens."""
    got = torch.zeros(n, device=received.device)
    seen = None if keys is None else keys.new_zeros(n, keys.shape[1])
    for grid in grids:
        # A class token is one query a view; else each of its patches is one.
        canvas = _canvas(received[grid.part], grid.patches) / (1 if led else prod(grid.patches.view))
        got[grid.at] = torch.einsum("ra,cb,ab->rc", grid.down, grid.across, canvas)[grid.row, grid.column]
        if seen is not None:
            down, across = (shares / shares.sum(1, keepdim=True) for shares in (grid.down, grid.across))
            means = torch.einsum("ra,cb,abd->rcd", down, across, _canvas(keys[grid.part].float(), grid.patches))
            seen[grid.at] = means[grid.row, grid.column].to(keys.dtype)
    return TowerLayer(got, seen)


def _canvas(values: torch.Tensor, patches: Patches) -> torch.Tensor:
    """A grid's views laid side by side: ``[row of patches, column of patches, ...]``."""
    (rows, columns), (down, across), rest = patches.view, patches.views, values.shape[1:]
    return values.reshape(down, across, rows, columns, *rest).transpose(1, 2).reshape(down * rows, across * columns, *rest)


def _shares(patches: Patches, axis: int, n_tokens: int) -> torch.Tensor:
    """Share of each patch that lies under each token along an axis: ``[token, patch]``."""
    step, total = patches.step[axis], patches.view[axis] * patches.views[axis]
    start = patches.first[axis] + step * torch.arange(n_tokens, dtype=torch.float64)[:, None]
    edge = torch.arange(total, dtype=torch.float64)
    return (torch.minimum(start + step, edge + 1) - torch.maximum(start, edge)).clamp(min=0).float()


def _order(kind: str, grids: Sequence[Patches], vision_config: Any) -> torch.Tensor:
    """Where each patch, view by view in raster order, lies among those that the tower packs."""
    places, start = [], 0
    for patches in grids:
        for _ in range(prod(patches.views)):
            places.append(start + patch_places(kind, patches, vision_config))
            start += prod(patches.view)
    return torch.cat(places)


def patch_places(kind: str, patches: Patches, vision_config: Any) -> torch.Tensor:
    """Where the patches of a view, in raster order, lie among those that the tower packs, ``[patch]``.

    Parameters
    ----------
    kind : str
        ``Family.patch_order``.
    """
    rows, columns = patches.view
    raster = torch.arange(rows * columns)
    if kind == "raster":
        return raster
    row, column = raster // columns, raster % columns
    down, across = map(int, patches.step)
    keys = [row // down, column // across, row % down, column % across]
    if kind == "windows":
        side = vision_config.window_size // vision_config.patch_size // down
        keys = [keys[0] // side, keys[1] // side, keys[0] % side, keys[1] % side, *keys[2:]]
    number = torch.zeros_like(raster)
    for key in keys:
        number = number * (int(key.max()) + 1) + key
    return number.argsort().argsort()
