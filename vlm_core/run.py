"""One batch on its way through the layers: the state behind the seam.

``Run``    holds a compiled ``Program``, knows which token is what (``vlm_core.views.Tokens``), and is called by the seam
           before every decoder layer (``enter_layer``) and inside every attention (``attend``)

A run may start from fewer sequences than it has rows. ``trunk[row]`` then names the row's sequence, and before the
first layer that a row touches the run gathers a new batch element for it: all that precedes is computed once. Rows that
touch nothing share one element to the end; ``elements`` says where each row ended up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vlm_core.anatomy import Anatomy
from vlm_core.dropping import kept_image_tokens
from vlm_core.plan import Program
from vlm_core.views import AttentionView, LayerView, Tokens

__all__ = ["Run"]


class _Ungrouped:
    """An attention module seen as if every query head had its own key/value head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, name)


class Run:
    """A program followed through one forward pass (or one ``generate``).

    Parameters
    ----------
    anatomy : Anatomy
        Of the model the run is for; modules of other models pass through untouched.
    program : Program
        One row per batch row.
    image, valid : BoolTensor ``[sequence, token]``
        Layout of the incoming batch: image tokens, and tokens that are not padding.
    trunk : int array ``[row]``, optional
        Sequence of each row. Default: row ``i`` is sequence ``i``.
    items : sequence of int, optional
        One number per sequence that names its item, for ``DropTokens(policy="random")``.
    observers : sequence
        Objects with ``attention(view)`` or ``layer(view)``; what they return is kept per layer in ``records``.
    left : bool, optional
        Side on which rows that lost more tokens than others are filled up. Default: left, where ``generate`` needs it,
        unless the batch is padded on the right.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        program: Program,
        image: torch.Tensor,
        valid: torch.Tensor,
        trunk: np.ndarray | None = None,
        items: Sequence[int] | None = None,
        observers: Sequence = (),
        left: bool | None = None,
    ) -> None:
        n_sequences = image.shape[0]
        self.anatomy = anatomy
        self.program = program
        self.trunk = np.arange(n_sequences) if trunk is None else np.asarray(trunk)
        if len(self.trunk) != program.n_rows:
            raise ValueError(f"{program.n_rows} interventions for {len(self.trunk)} rows: give one per row")
        self.items = [0] * n_sequences if items is None else list(items)
        self.n_image = (image & valid).sum(1).tolist()
        self.observers = tuple(observers)
        self.records: dict[int, dict[int, torch.Tensor]] = {number: {} for number in range(len(self.observers))}
        self._start = (image, valid)
        self._left = bool(valid[:, -1].all()) if left is None else left
        self._attention_layers = {module: layer for layer, module in enumerate(anatomy.attentions)}
        self._decoder_layers = {module: layer for layer, module in enumerate((*anatomy.layers, anatomy.norm))}
        self._branches, self.elements_at = self._plan_branches()
        self._scored_layers = {
            layer - 1
            for layer, drops in program.drops.items()
            if any(drop is not None and drop.policy == "attention" and drop.keep > 0 for drop in drops)
        }
        self._begin()

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def attention_layer(self, module: nn.Module) -> int | None:
        """Layer of an attention module of this run's language model, else None."""
        return self._attention_layers.get(module)

    def decoder_layer(self, module: nn.Module) -> int | None:
        """Layer of a decoder layer (``n_layers`` for the final norm) of this run's model, else None."""
        return self._decoder_layers.get(module)

    @property
    def elements(self) -> np.ndarray:
        """Batch element that holds each row in the model's output, ``[row]``."""
        return self.elements_at[-1]

    def _plan_branches(self) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
        first, trunk, n_rows = self.program.first, self.trunk, self.program.n_rows
        elements, branches, elements_at = trunk, {}, []
        self._representatives: dict[int, np.ndarray] = {}
        n_elements = int(trunk.max()) + 1 if n_rows else 0
        starting = np.zeros(n_elements, dtype=np.int64)
        starting[trunk[::-1]] = np.arange(n_rows)[::-1]
        self._representatives[-1] = starting
        one_to_one = n_rows == n_elements and np.array_equal(trunk, np.arange(n_rows))
        for layer in range(self.program.n_layers):
            if not one_to_one and (first == layer).any():
                codes = np.where(first <= layer, np.arange(n_rows), n_rows + trunk)
                _, representatives, inverse = np.unique(codes, return_index=True, return_inverse=True)
                branches[layer] = elements[representatives]
                self._representatives[layer] = representatives
                elements = inverse
            elements_at.append(elements)
        return branches, [*elements_at, elements]

    def _begin(self) -> None:
        image, valid = self._start
        device = image.device
        self.decoding = False
        self.tokens = Tokens(
            image=image & valid,
            valid=valid,
            rows=torch.as_tensor(self._representatives[-1], device=device),
            left=self._left,
        )
        self._tokens_at: dict[int, Tokens] = {}
        self._scores: torch.Tensor | None = None
        self._selected: dict[int, tuple] = {}

    # -- residual stream --------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, args: tuple, kwargs: dict):
        """Branch, drop and observe before decoder layer ``layer``; None where nothing changes."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer == 0:
            cache = kwargs.get("past_key_values")
            decoding = cache is not None and cache.get_seq_length() > 0
            if not decoding:
                self._begin()
                self._check_layout(hidden)
            self.decoding = decoding
        if self.decoding:
            return self._decode_layer(layer, args, kwargs)
        before = hidden
        if layer in self._branches:
            hidden = self._branch(layer, hidden)
        if layer in self.program.drops:
            hidden = self._drop(layer, hidden)
        self._tokens_at[layer] = self.tokens
        for number, observer in enumerate(self.observers):
            if hasattr(observer, "layer"):
                record = observer.layer(LayerView(layer, hidden, self.tokens))
                if record is not None:
                    self.records[number][layer] = record
        if hidden is before and self.tokens.source is None and self.tokens.index is None:
            return None
        if layer < self.anatomy.n_layers:
            kwargs = self._select_kwargs(kwargs, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _check_layout(self, hidden: torch.Tensor) -> None:
        expected = tuple(self._start[0].shape)
        if tuple(hidden.shape[:2]) != expected:
            raise ValueError(
                f"the batch that entered the model is {tuple(hidden.shape[:2])} (sequences, tokens), the run was made "
                f"for {expected}: pass the batch that the model is called with"
            )

    def _branch(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        gather = torch.as_tensor(self._branches[layer], device=hidden.device)
        tokens = self.tokens
        self.tokens = replace(
            tokens,
            image=tokens.image[gather],
            valid=tokens.valid[gather],
            rows=torch.as_tensor(self._representatives[layer], device=hidden.device),
            source=gather if tokens.source is None else tokens.source[gather],
            index=None if tokens.index is None else tokens.index[gather],
        )
        self._selected.clear()
        if self._scores is not None:
            self._scores = self._scores[gather]
        return hidden[gather]

    def _drop(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens
        drops = [self.program.drops[layer][row] for row in tokens.rows.tolist()]
        sequences = [int(self.trunk[row]) for row in tokens.rows.tolist()]
        chosen = kept_image_tokens(
            tokens,
            drops,
            n_image=[self.n_image[sequence] for sequence in sequences],
            items=[self.items[sequence] for sequence in sequences],
            scores=self._scores,
        )
        kept = tokens.valid & (~tokens.image | chosen)
        if torch.equal(kept, tokens.valid):
            return hidden
        length = int(kept.sum(1).max())
        if tokens.left:
            order = kept.int().argsort(dim=1, stable=True)[:, kept.shape[1] - length :]
        else:
            order = (~kept).int().argsort(dim=1, stable=True)[:, :length]
        self.tokens = replace(
            tokens,
            image=(tokens.image & kept).gather(1, order),
            valid=kept.gather(1, order),
            index=order if tokens.index is None else tokens.index.gather(1, order),
        )
        self._selected.clear()
        return torch.take_along_dim(hidden, order[:, :, None], dim=1)

    # -- per-token inputs of a layer --------------------------------------------------------------------------------

    def _select_kwargs(self, kwargs: dict, hidden: torch.Tensor) -> dict:
        kwargs = dict(kwargs)
        if isinstance(kwargs.get("position_embeddings"), tuple):
            kwargs["position_embeddings"] = tuple(
                self._once(tensor, lambda t: self._select(t, -2)) for tensor in kwargs["position_embeddings"]
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._once(kwargs["position_ids"], lambda t: self._select(t, -1))
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = self._once(mask, self._select_mask)
        elif self.tokens.left and self.tokens.index is not None and not bool(self.tokens.valid.all()):
            kwargs["attention_mask"] = self._once(self.tokens.valid, self._causal_mask)
        return kwargs

    def _once(self, tensor: torch.Tensor, transform):
        if id(tensor) not in self._selected:
            # The input is kept beside the result so that its id stays its own.
            self._selected[id(tensor)] = (tensor, transform(tensor))
        return self._selected[id(tensor)][1]

    def _select(self, tensor: torch.Tensor, token_dim: int) -> torch.Tensor:
        row_dim = tensor.ndim + token_dim - 1
        token_dim = tensor.ndim + token_dim
        if self.tokens.source is not None and tensor.shape[row_dim] > 1:
            tensor = tensor.index_select(row_dim, self.tokens.source)
        index = self.tokens.index
        if index is None:
            return tensor
        if tensor.shape[row_dim] == 1:
            tensor = tensor.expand(*tensor.shape[:row_dim], index.shape[0], *tensor.shape[row_dim + 1 :])
        shape = [1] * tensor.ndim
        shape[row_dim], shape[token_dim] = index.shape
        return torch.take_along_dim(tensor, index.view(shape), dim=token_dim)

    def _select_mask(self, mask: torch.Tensor) -> torch.Tensor:
        if self.tokens.source is not None and mask.shape[0] > 1:
            mask = mask[self.tokens.source]
        index = self.tokens.index
        if index is None:
            return mask
        mask = mask.expand(index.shape[0], -1, -1, -1)
        mask = torch.take_along_dim(mask, index[:, None, :, None], dim=2)
        mask = torch.take_along_dim(mask, index[:, None, None, :], dim=3)
        return _block(mask, ~self.tokens.valid[:, None, None, :])

    def _causal_mask(self, valid: torch.Tensor) -> torch.Tensor:
        n = valid.shape[1]
        return torch.ones(n, n, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None, :]

    def _decode_layer(self, layer: int, args: tuple, kwargs: dict):
        tokens = self._tokens_at.get(layer)
        if tokens is None or tokens.index is None or layer == self.anatomy.n_layers:
            return None
        if self.anatomy.layer_types[layer] != "full_attention":
            raise ValueError(
                f"DropTokens cannot generate through layer {layer} ({self.anatomy.layer_types[layer]}): its cache "
                f"slides; score candidates instead"
            )
        mask = kwargs.get("attention_mask")
        cached = kwargs["past_key_values"].get_seq_length(layer)
        new = (args[0] if args else kwargs["hidden_states"]).shape[1]
        valid = tokens.extended(cached + new).valid
        if new > 1:
            raise ValueError("DropTokens generates one token at a time: turn assisted decoding off")
        if bool(valid.all()):
            allowed = None
        elif mask is None or mask.dtype == torch.bool:
            allowed = valid[:, None, None, :]
        else:
            blocked = ~valid[:, None, None, :]
            allowed = torch.zeros(blocked.shape, dtype=mask.dtype, device=mask.device)
            allowed = allowed.masked_fill(blocked, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": allowed}

    # -- attention --------------------------------------------------------------------------------------------------

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """The attention of ``layer`` with this run's interventions, calling the ``original`` function once."""
        program = self.program
        tokens = self._tokens_at[layer]
        if self.decoding:
            if key.shape[2] < tokens.valid.shape[1]:
                raise ValueError(
                    f"layer {layer} holds {key.shape[2]} cached keys for {tokens.valid.shape[1]} prompt tokens: "
                    f"sliding caches cannot generate under an intervention"
                )
            tokens = tokens.extended(key.shape[2])
        seen = module
        if layer in program.image_kv.mask:
            seen, key, value = self._replace_image_kv(layer, module, key, value, tokens)
        if layer in program.knocks:
            mask = self._knock_out(layer, query, key, mask, tokens)
        output, weights = original(seen, query, key, value, mask, *args, **kwargs)
        if layer in program.mean.mask:
            (means,) = program.mean.at(layer, tokens.rows)
            chosen = program.mean.mask[layer][tokens.rows]
            output = torch.where(chosen[:, None, :, None], means[:, None], output)
        if layer in program.zero:
            output = output.masked_fill(program.zero[layer][tokens.rows][:, None, :, None], 0.0)
        if self.observers or layer in self._scored_layers:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            self._observe(
                AttentionView(layer, query, key, value, output, mask, scaling, kwargs.get("softcap"), tokens)
            )
        return output, weights

    def _replace_image_kv(self, layer, module, key, value, tokens: Tokens):
        replaced = self.program.image_kv
        groups = self.anatomy.n_heads // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            module = _Ungrouped(module)
        mean_key, mean_value = replaced.at(layer, tokens.rows)
        chosen = replaced.mask[layer][tokens.rows]
        chosen = chosen[:, :, None, None] & tokens.image[:, None, :, None]
        return module, torch.where(chosen, mean_key[:, :, None], key), torch.where(
            chosen, mean_value[:, :, None], value
        )

    def _knock_out(self, layer, query, key, mask, tokens: Tokens) -> torch.Tensor:
        n_queries, n_keys = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=key.device).tril(n_keys - n_queries)
            mask = mask[None, None]
        elsewhere = torch.arange(n_queries, device=key.device)[:, None] + n_keys - n_queries != torch.arange(
            n_keys, device=key.device
        )
        for queries, keys, rows in self.program.knocks[layer]:
            members = tokens.group(queries)[:, n_keys - n_queries :]
            edges = members[:, :, None] & tokens.group(keys)[:, None, :] & elsewhere & rows[tokens.rows][:, None, None]
            mask = _block(mask, edges[:, None])
        return mask

    def _observe(self, view: AttentionView) -> None:
        if view.layer in self._scored_layers and not self.decoding:
            self._scores = view.probabilities(view.tokens.last[:, None])[:, :, 0].mean(1)
        if self.decoding:
            return
        for number, observer in enumerate(self.observers):
            if hasattr(observer, "attention"):
                record = observer.attention(view)
                if record is not None:
                    self.records[number][view.layer] = record

    def record(self, observer: int, layer: int) -> torch.Tensor:
        """What an observer kept at ``layer``, one entry per row."""
        kept = self.records[observer][layer]
        elements = self.elements_at[layer]
        if np.array_equal(elements, np.arange(kept.shape[0])):
            return kept
        return kept[torch.as_tensor(elements, device=kept.device)]


def _block(mask: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    # A boolean mask says what may be seen, an additive one what is taken away: writing False into the latter unblocks.
    if mask.dtype == torch.bool:
        return mask & ~edges
    return mask.expand(torch.broadcast_shapes(mask.shape, edges.shape)).masked_fill(
        edges, torch.finfo(mask.dtype).min
    )
