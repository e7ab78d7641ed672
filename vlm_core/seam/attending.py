"""What a program does inside one attention.

``AttentionEdits``    image keys and values, knock-outs, the weight of merged tokens, and the heads' outputs, in that order
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from vlm_core.interventions import Positions
from vlm_core.seam.masks import additive, blind, block, causal_mask
from vlm_core.seam.plan import Program, Replacement
from vlm_core.seam.positions import Positioned
from vlm_core.seam.views import Tokens

__all__ = ["AttentionEdits", "Axes"]


class _Ungrouped:
    """An attention module seen as if every query head had its own key/value head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)


@dataclass(frozen=True, eq=False)
class Axes:
    """The tokens behind the queries and keys of one attention.

    Parameters
    ----------
    tokens : Tokens
        Of the prompt at this layer, on the attention's own device.
    length : int
        Tokens of the prompt and generated ones at this layer. Keys are the last of them: a sliding cache forgets the first.
    crossed : bool
        Whether the keys are the image's and lie outside the sequence.
    """

    where: Positioned
    tokens: Tokens
    length: int
    n_queries: int
    n_keys: int
    crossed: bool = False

    def queries(self, positions: Positions) -> torch.Tensor:
        """Members among the queries, ``[element, query]``."""
        return self.where.members(self.tokens, positions, self.length)[:, self.length - self.n_queries :]

    def keys(self, positions: Positions) -> torch.Tensor:
        """Members among the keys, ``[element, key]``."""
        if self.crossed:
            belongs = positions in ("image", "all")
            return torch.full(
                (self.tokens.valid.shape[0], self.n_keys), belongs, dtype=torch.bool, device=self.tokens.valid.device
            )
        return self.where.members(self.tokens, positions, self.length)[:, self.length - self.n_keys :]

    @cached_property
    def elsewhere(self) -> torch.Tensor:
        """Whether query and key are different tokens, ``[query, key]``."""
        device = self.tokens.valid.device
        if self.crossed:
            return torch.ones(self.n_queries, self.n_keys, dtype=torch.bool, device=device)
        queries = torch.arange(self.n_queries, device=device) + self.n_keys - self.n_queries
        return queries[:, None] != torch.arange(self.n_keys, device=device)

    @property
    def default_mask(self) -> torch.Tensor:
        """What no mask stands for, ``[1, 1, query, key]`` boolean."""
        mask = causal_mask(self.n_queries, self.n_keys, self.tokens.valid.device)
        return torch.ones_like(mask) if self.crossed else mask

    def ordinals(self) -> torch.Tensor:
        """Which image token of its prompt each key is, ``[element, key]``; 0 at other keys."""
        if self.crossed:
            return torch.arange(self.n_keys, device=self.tokens.valid.device).expand(self.tokens.valid.shape[0], -1)
        image = self.where.tokens.image.to(self.tokens.valid.device)
        if self.tokens.source is not None:
            image = image[self.tokens.source]
        numbers = (image.long().cumsum(1) - 1).clamp(min=0)
        numbers = numbers.gather(1, self.where.original(self.tokens).expand(numbers.shape[0], -1))
        return nn.functional.pad(numbers, (0, self.length - numbers.shape[1]))[:, self.length - self.n_keys :]


class AttentionEdits:
    """The attention part of a program.

    Parameters
    ----------
    n_heads : int
        Query heads.
    """

    def __init__(self, program: Program, n_heads: int) -> None:
        self.program = program
        self.n_heads = n_heads
        self.layers = program.attention_layers

    @property
    def replaces_keys(self) -> bool:
        """Whether any image keys are replaced."""
        program = self.program
        return any(one.mask for one in (program.image_kv, *program.image_kv_at.values(), *program.image_kv_tokens.values()))

    def attend(self, layer: int, axes: Axes, original, module, query, key, value, mask, weights, *args, **kwargs):
        """The attention of ``layer``, its output edited.

        Parameters
        ----------
        weights : Tensor ``[element, key]`` or None
            Added to every score of a key (log sizes of merged tokens).

        Returns
        -------
        output, maps
            As the original's.
        key, value, mask
            As most queries saw them.
        """
        program, rows = self.program, axes.tokens.rows
        if layer in program.knocks or layer in program.head_knocks:
            mask = self._knock_out(layer, axes, mask)
        if weights is not None:
            mask = axes.default_mask if mask is None else mask
            mask = additive(mask, query.dtype) + weights[:, None, None, :].to(query.dtype)
        seen = module
        for replaced in (program.image_kv, program.image_kv_tokens.get("all")):
            if replaced is not None and layer in replaced.mask:
                seen, key, value = self._replace(replaced, layer, axes, seen, key, value)
        output, maps = original(seen, query, key, value, mask, *args, **kwargs)
        partial = [
            (positions, replaced)
            for restricted in (program.image_kv_at, program.image_kv_tokens)
            for positions, replaced in restricted.items()
            if positions != "all" and layer in replaced.mask
        ]
        for positions, replaced in partial:
            output = self._attend_partly(
                positions, replaced, layer, axes, original, seen, query, key, value, mask, output, *args, **kwargs
            )
        if axes.crossed and (layer in program.knocks or layer in program.head_knocks):
            # No key is left, not even the query's own: it sees nothing, where a softmax would look everywhere alike.
            output = output.masked_fill(blind(mask).transpose(1, 2)[..., None], 0.0)
        for positions, replaced in (("all", program.mean), *program.mean_at.items()):
            if layer in replaced.mask:
                (means,) = (tensor.to(output.device) for tensor in replaced.at(layer, rows))
                output = torch.where(self._chosen(replaced.mask, layer, axes, positions), means[:, None], output)
        for positions, replaced in program.direction.items():
            if layer in replaced.mask:
                (units,) = (tensor.to(output.device) for tensor in replaced.at(layer, rows))
                turned = units[:, None] * output.norm(dim=-1, keepdim=True)
                output = torch.where(self._chosen(replaced.mask, layer, axes, positions), turned, output)
        return output, maps, key, value, mask

    def silence(self, layer: int, axes: Axes, output: torch.Tensor) -> torch.Tensor:
        """Heads that are zeroed, after everything else that was done to them."""
        for positions, masks in (("all", self.program.zero), *self.program.zero_at.items()):
            if layer in masks:
                output = output.masked_fill(self._chosen(masks, layer, axes, positions), 0.0)
        return output

    @staticmethod
    def _chosen(masks: dict[int, torch.Tensor], layer: int, axes: Axes, positions: Positions) -> torch.Tensor:
        """``[element, query or 1, head, 1]``."""
        device, rows = axes.tokens.valid.device, axes.tokens.rows
        chosen = masks[layer].to(device)[rows][:, None, :, None]
        return chosen if positions == "all" else chosen & axes.queries(positions)[:, :, None, None]

    def _replace(self, replaced: Replacement, layer: int, axes: Axes, module, key, value):
        groups = self.n_heads // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            module = _Ungrouped(module)
        chosen = replaced.mask[layer].to(key.device)[axes.tokens.rows]
        chosen = chosen[:, :, None, None] & axes.keys("image")[:, None, :, None]
        new = [tensor.to(key.device) for tensor in replaced.at(layer, axes.tokens.rows)]
        if new[0].ndim == 4:
            ordinals = axes.ordinals()[:, None, :, None].clamp(max=new[0].shape[2] - 1)
            new = [torch.take_along_dim(tensor, ordinals, dim=2) for tensor in new]
        else:
            new = [tensor[:, :, None] for tensor in new]
        return module, torch.where(chosen, new[0], key), torch.where(chosen, new[1], value)

    def _attend_partly(
        self, positions, replaced, layer, axes, original, module, query, key, value, mask, output, *args, **kwargs
    ) -> torch.Tensor:
        """The output with some queries' attention computed again, on replaced image keys and values."""
        members = axes.queries(positions)
        any_member = members.any(0)
        if not bool(any_member.any()):
            return output
        # From the first of these queries on: they mostly are the end of the sequence.
        start = int(any_member.int().argmax())
        module, key, value = self._replace(replaced, layer, axes, module, key, value)
        if mask is None:
            mask = axes.default_mask
        again, _ = original(
            module, query[:, :, start:], key, value, mask[:, :, start:] if mask.shape[2] > 1 else mask, *args, **kwargs
        )
        heads = replaced.mask[layer].to(output.device)[axes.tokens.rows]
        chosen = members[:, start:, None, None] & heads[:, None, :, None]
        return torch.cat([output[:, :start], torch.where(chosen, again, output[:, start:])], dim=1)

    def _knock_out(self, layer: int, axes: Axes, mask: torch.Tensor | None) -> torch.Tensor:
        device, rows = axes.tokens.valid.device, axes.tokens.rows
        if mask is None:
            mask = axes.default_mask
        for cuts in (self.program.knocks, self.program.head_knocks):
            for queries, keys, chosen in cuts.get(layer, ()):
                edges = axes.queries(queries)[:, :, None] & axes.keys(keys)[:, None, :] & axes.elsewhere
                chosen = chosen.to(device)[rows]
                mask = block(mask, edges[:, None] & (chosen[:, None] if chosen.ndim == 1 else chosen)[:, :, None, None])
        return mask
