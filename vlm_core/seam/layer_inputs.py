"""What a decoder layer is called with beside the residual stream, when rows have branched off or sequences got shorter.

``LayerInputs``            rotary embeddings, positions and masks for the elements and tokens that are left
``counted_positions(...)`` positions that leave padding on the left out
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vlm_core.families.anatomy import Anatomy
from vlm_core.seam.masks import causal_mask, select, select_mask, windowed
from vlm_core.seam.views import Tokens

__all__ = ["LayerInputs", "counted_positions"]

CROSSED = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")


class LayerInputs:
    """Per-token inputs, cut once for all layers that share them."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._selected: dict[int, tuple] = {}

    def forget(self) -> None:
        """The tokens changed: what was cut for earlier ones is of no use any more."""
        self._selected.clear()

    def select(self, kwargs: dict, tokens: Tokens) -> dict:
        """The arguments of a layer of the prompt's pass."""
        kwargs = dict(kwargs)
        if isinstance(kwargs.get("position_embeddings"), tuple):
            kwargs["position_embeddings"] = tuple(
                self._once(tensor, lambda t: select(t, tokens.on(t.device), -2)) for tensor in kwargs["position_embeddings"]
            )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._once(kwargs["position_ids"], lambda t: select(t, tokens.on(t.device), -1))
        for name in CROSSED:
            if isinstance(kwargs.get(name), torch.Tensor) and tokens.source is not None:
                kwargs[name] = self._once(kwargs[name], lambda t: t[tokens.source.to(t.device)])
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = self._once(mask, lambda t: select_mask(t, tokens.on(t.device)))
        elif tokens.left and tokens.index is not None and not bool(tokens.valid.all()):
            kwargs["attention_mask"] = self._once(tokens.valid, _causal)
        return kwargs

    def _once(self, tensor: torch.Tensor, transform):
        if id(tensor) not in self._selected:
            # The input is kept beside the result so that its id stays its own.
            self._selected[id(tensor)] = (tensor, transform(tensor))
        return self._selected[id(tensor)][1]

    def decoding_mask(
        self, layer: int, tokens: Tokens, hidden: torch.Tensor, kwargs: dict, n_prompt: int, generated: int
    ) -> torch.Tensor | None:
        """What a generated token sees of a sequence that got shorter: the model's own mask has another length.

        Parameters
        ----------
        tokens : Tokens
            Of the prompt at this layer.
        n_prompt, generated : int
            Tokens of the incoming batch, and generated ones, the newest included.
        """
        if hidden.shape[1] > 1:
            raise ValueError("shortened sequences generate one token at a time: turn assisted decoding off")
        kind = self.anatomy.layer_types[layer]
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"DropTokens and MergeTokens cannot generate through layer {layer} ({kind}): its cache has no fixed window; "
                f"score candidates instead"
            )
        tokens = tokens.on(hidden.device)
        cached = kwargs["past_key_values"].layers[layer]
        length = tokens.valid.shape[1] + generated
        n_keys = min(cached.keys.shape[2] + 1, length)
        allowed = tokens.extended(length).valid[:, -n_keys:]
        if kind == "sliding_attention":
            # The cache holds the last tokens that are left, the window counts the positions that they had.
            newer = torch.arange(generated, device=hidden.device) + n_prompt
            columns = torch.cat([tokens.index, newer.expand(tokens.index.shape[0], -1)], dim=1)[:, -n_keys:]
            allowed = windowed(allowed, columns, cached.sliding_window)
        if bool(allowed.all()):
            return None
        allowed = allowed[:, None, None, :]
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype == torch.bool:
            return allowed
        blocked = torch.zeros(allowed.shape, dtype=mask.dtype, device=allowed.device)
        return blocked.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def counted_positions(kwargs: dict, valid: torch.Tensor, past: int, generated: int) -> torch.Tensor | None:
    """Position ids that leave padding on the left out, as ``generate`` counts them; None where they are explicit already.

    A plain forward counts such padding. Relative to one another tokens stay where they are; relative to replaced keys, which are
    rotated already, they would not.

    Parameters
    ----------
    kwargs : dict
        What the language model is called with.
    valid : BoolTensor ``[sequence, token]``
        Of the incoming batch.
    past, generated : int
        Tokens in the cache, and generated ones, the newest included.
    """
    inputs, positions, offset = kwargs.get("inputs_embeds"), kwargs.get("position_ids"), 0
    n = (kwargs["input_ids"] if inputs is None else inputs).shape[1]
    if positions is not None:
        steps = torch.arange(n, device=positions.device)
        if positions.ndim != 2 or positions.shape[0] > 1 or not torch.equal(positions[0] - positions[0, :1], steps):
            return None
        offset = int(positions[0, 0]) - past
    counted = pad(valid, (0, generated), value=True).long().cumsum(1) - 1
    return counted.clamp(min=0)[:, -n:] + offset


def _causal(valid: torch.Tensor) -> torch.Tensor:
    return causal_mask(valid.shape[1], valid.shape[1], valid.device) & valid[:, None, None, :]
