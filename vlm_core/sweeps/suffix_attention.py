"""Attention of the tokens after the last image token to a prefix that is stored once.

``SuffixAttention``   what is active while the rows of a shared pass run

Per key/value head, the queries of all rows (and of all query heads of the group) are one matrix; one product with the prefix keys, one
softmax over prefix and own suffix together, one product with the prefix values. Where a head's image keys and values are replaced by one
mean, its image part has a closed form: ``n`` equal scores ``c`` weigh as one score ``c + log n``, with the mean value. The mean stands behind the
prefix as one more key, closed to all but the replaced heads, to which the image is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_core.sweeps.layers import KeysKnown
from vlm_core.sweeps.sharing import SuffixRow, compile_rows
from vlm_core.sweeps.trunk import Recording, Stem, Trunk

__all__ = ["SuffixAttention"]

_EVERY_SUFFIX_TOKEN = frozenset(("all", "text", "question"))


@dataclass(frozen=True, eq=False)
class _Replaced:
    """Means that replaced heads attend to in place of the image.

    ``keys``, ``values`` ``[kv head, column, head_dim]``; added to scores, 0 or minus infinity: ``image`` ``[kv head, row, group, query or 1, 1]`` to
    those of the image tokens; ``columns`` ``[kv head, row, group, query or 1, column]`` to those of the means, there the weight of the image.
    """

    keys: torch.Tensor
    values: torch.Tensor
    image: torch.Tensor
    columns: torch.Tensor


class SuffixAttention:
    """The active run of a shared pass.

    Parameters
    ----------
    rows : sequence of SuffixRow
        Those of one trunk side by side.

    Attributes
    ----------
    collecting : bool
        Whether the next attention only takes its keys and values, and stops its layer by ``KeysKnown``.
    """

    decoding = False

    def __init__(self, anatomy, recording: Recording, rows: Sequence[SuffixRow]) -> None:
        self.anatomy = anatomy
        self.recording = recording
        self.rows = rows
        self.n_suffix = max(row.stem.n_suffix for row in rows)
        self._segments = _segments(rows)
        self._plan = compile_rows(rows, anatomy)
        self._queries: torch.Tensor | None = None
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.collecting = False
        self._blocked: dict[tuple, tuple] = {}
        self._query_masks: dict[tuple, torch.Tensor | None] = {}

    def narrow(self, reads: torch.Tensor) -> None:
        """From here on only suffix tokens ``reads`` ``[row, read]`` are queries, to the keys and values collected last."""
        self.collecting, self._queries = False, reads

    # -- what the seam calls ----------------------------------------------------------------------------------------

    def attention_layer(self, module) -> int | None:
        """Layer of an attention module of this run's language model, else None."""
        return self.anatomy.attention_layers.get(module)

    def decoder_layer(self, module) -> None:
        """Decoder layers are called one by one: there is nothing to do before one."""
        return None

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """Attention of the suffix queries to prefix and suffix, with this run's interventions."""
        if self.collecting:
            self._kept = key, value
            raise KeysKnown
        if self._kept is not None:
            key, value = self._kept
        n_rows, n_heads, n_queries, head_dim = query.shape
        plan = self._plan.get(layer)
        scaling = kwargs.get("scaling")
        scaling = head_dim**-0.5 if scaling is None else scaling
        output = query.new_empty(n_rows, n_queries, n_heads, value.shape[-1])
        for trunk, start, stop in self._segments:
            stop = min(stop, n_rows)
            if start < stop:
                self._attend_segment(
                    layer, plan, trunk, slice(start, stop), query, key, value, scaling, kwargs.get("softcap"), output
                )
        for group, chosen, means in plan.mean if plan else ():
            output = torch.where(self._where(group, chosen, n_rows, output), means.to(output), output)
        for group, chosen in plan.zero if plan else ():
            output = output.masked_fill(self._where(group, chosen, n_rows, output), 0.0)
        return output, None

    # -- attention --------------------------------------------------------------------------------------------------

    def _attend_segment(self, layer, plan, trunk: Trunk, rows: slice, query, key, value, scaling, softcap, output) -> None:
        prefix_key, prefix_value = trunk.keys[layer], trunk.values[layer]
        precise = query.dtype if query.dtype in (torch.float32, torch.float64) else torch.float32
        n = rows.stop - rows.start
        n_kv, n_prefix, head_dim = prefix_key.shape
        n_queries, n_own = query.shape[2], key.shape[2]
        groups = query.shape[1] // n_kv
        blocked_prefix, blocked_own, n_seen = self._masks(layer, plan, trunk, rows, query.device)
        replaced = self._replaced(plan, trunk, rows, n_kv, n_seen, query.device, precise)
        prefix_key, prefix_value = prefix_key.to(precise), prefix_value.to(precise)
        n_stored = n_prefix
        if replaced is not None:
            prefix_key, prefix_value = torch.cat([prefix_key, replaced.keys], dim=1), torch.cat([prefix_value, replaced.values], dim=1)
            n_stored = prefix_key.shape[1]
        folded = torch.empty(n_kv, n, groups, n_queries, head_dim, dtype=precise, device=query.device)
        torch.mul(query[rows].unflatten(1, (n_kv, groups)).transpose(0, 1), scaling, out=folded)
        scores = torch.empty(n_kv, n, groups, n_queries, n_stored + n_own, dtype=precise, device=query.device)
        flat = scores.view(n_kv, n * groups * n_queries, n_stored + n_own)
        torch.bmm(folded.view(n_kv, -1, head_dim), prefix_key.transpose(1, 2), out=flat[..., :n_stored])
        own_key = key[rows].transpose(0, 1).to(precise).reshape(n_kv * n, n_own, head_dim)
        own = torch.bmm(folded.view(n_kv * n, groups * n_queries, head_dim), own_key.transpose(1, 2))
        scores[..., n_stored:] = own.view(n_kv, n, groups, n_queries, n_own)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores[..., n_stored:].masked_fill_(blocked_own[None, :, None], -torch.inf)
        if blocked_prefix is not None:
            scores[..., :n_prefix].masked_fill_(blocked_prefix[None, :, None], -torch.inf)
        if replaced is not None:
            scores[..., trunk.n_other : n_prefix].add_(replaced.image)
            scores[..., n_prefix:n_stored].add_(replaced.columns)
        weights = torch.softmax(flat, dim=-1)
        result = torch.bmm(weights[..., :n_stored], prefix_value)
        own_value = value[rows].transpose(0, 1).to(precise).reshape(n_kv * n, n_own, -1)
        own_weights = weights.view_as(scores)[..., n_stored:].reshape(n_kv * n, groups * n_queries, n_own)
        result = result.view(n_kv * n, groups * n_queries, -1).baddbmm_(own_weights, own_value).view(n_kv, n, groups, n_queries, -1)
        output[rows].unflatten(2, (n_kv, groups)).copy_(result.permute(1, 3, 0, 2, 4))

    def _replaced(self, plan, trunk: Trunk, rows: slice, n_kv: int, n_seen, device: torch.device, dtype: torch.dtype) -> _Replaced | None:
        """What replaced heads of some rows attend to in place of the image; None where there are none."""
        # Asked on the CPU, where the plan is: a GPU would have to be waited for.
        replacing = [part for part in (plan.image_kv if plan else ()) if bool(part[1][rows].any())]
        if not replacing or not trunk.n_image:
            return None
        weight = torch.tensor(math.log(trunk.n_image), dtype=dtype, device=device) if n_seen is None else n_seen.to(dtype).log()[None, :, None]
        closed, columns, keys, values = None, [], [], []
        for group, chosen, mean_key, mean_value in replacing:
            groups = chosen.shape[1] // n_kv
            where = chosen[rows].to(device).view(-1, n_kv, groups).transpose(0, 1)[..., None]
            asking = self._suffix_group(group)
            if asking is not None:
                where = where & asking.to(device)[rows][None, :, None]
            # A row may name a head twice, with one source: its mean is there once.
            where, closed = (where, where) if closed is None else (where & ~closed, closed | where)
            score = torch.where(where, weight, -torch.inf)
            for number in range(groups):
                # One column a query head that shares these keys, closed to the others.
                own = torch.full_like(score, -torch.inf)
                own[:, :, number] = score[:, :, number]
                columns.append(own)
                keys.append(mean_key[number::groups, None].to(device, dtype))
                values.append(mean_value[number::groups, None].to(device, dtype))
        image = torch.zeros(closed.shape, dtype=dtype, device=device).masked_fill_(closed, -torch.inf)
        stacked = (torch.cat(means, dim=1) for means in (keys, values))
        return _Replaced(*stacked, image[..., None], torch.stack(torch.broadcast_tensors(*columns), dim=-1))

    def _masks(self, layer, plan, trunk: Trunk, rows: slice, device: torch.device):
        """Blocked prefix columns (None for none), suffix columns ``[row or 1, query, column]``, and how many image tokens are seen."""
        recording = self.recording
        knocks = [] if plan is None else [knock for knock in plan.knocks if bool(knock[2][rows].any())]
        own, prefix = recording.suffix_mask(layer, trunk), recording.prefix_mask(layer, trunk)
        signature = tuple((queries, keys, id(chosen)) for queries, keys, chosen in knocks)
        key = (id(own), id(prefix), trunk.number, rows.start, rows.stop, signature, self._queries is None, device)
        if key not in self._blocked:
            masks = self._compute_masks(trunk, rows, own, prefix, knocks)
            self._blocked[key] = tuple(None if mask is None else mask.to(device) for mask in masks)
        return self._blocked[key]

    def _compute_masks(self, trunk: Trunk, rows: slice, own, prefix, knocks):
        n, device = self.n_suffix, trunk.order.device
        blocked_own = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)[None]
        if own is not None:
            size = min(n, own.shape[0])
            blocked_own[0, :size, :size] = ~own[:size, :size].to(device)
        blocked = None
        if prefix is not None:
            blocked = torch.zeros(1, n, trunk.n_prefix, dtype=torch.bool, device=device)
            size = min(n, prefix.shape[0])
            blocked[0, :size] = ~prefix[:size].to(device)
        branched = self._branched(rows)
        if branched:
            n_rows = rows.stop - rows.start
            causal, blocked_own = blocked_own[0], blocked_own.expand(n_rows, n, n).clone()
            before, blocked = blocked, None if blocked is None else blocked.expand(n_rows, -1, -1).clone()
            for stem, numbers in branched.items():
                size, at = stem.n_suffix, stem.positions(device) - trunk.n_prefix
                unseen = ~stem.branches.seen(stem.n_prompt - trunk.n_prefix, device)
                blocked_own[numbers, :size, :size] = causal[at][:, at] | unseen
                if blocked is not None:
                    blocked[numbers, :size] = before[0, at]
        if knocks:
            n_rows = rows.stop - rows.start
            blocked_own = blocked_own.expand(n_rows, n, n).clone()
            none = torch.zeros(1, n, trunk.n_prefix, dtype=torch.bool, device=device)
            blocked = (none if blocked is None else blocked).expand(n_rows, -1, -1).clone()
            itself = torch.eye(n, dtype=torch.bool, device=device)
            for queries, keys, chosen in knocks:
                for row in chosen[rows].nonzero()[:, 0].tolist():
                    stem = self.rows[rows.start + row].stem
                    size = stem.n_suffix
                    asking = stem.members(queries)[trunk.n_prefix :]
                    seen = stem.members(keys)
                    blocked[row, :size] |= asking[:, None] & seen[: trunk.n_prefix][trunk.order]
                    blocked_own[row, :size, :size] |= asking[:, None] & seen[trunk.n_prefix :] & ~itself[:size, :size]
        if self._queries is not None:
            index = self._queries[rows][..., None]
            blocked_own = torch.take_along_dim(blocked_own.expand(index.shape[0], -1, -1), index, dim=1)
            blocked = None if blocked is None else torch.take_along_dim(blocked.expand(index.shape[0], -1, -1), index, dim=1)
        n_seen = None if blocked is None else (~blocked[..., trunk.n_other :]).sum(-1).to(torch.float32)
        return blocked, blocked_own, n_seen

    def _branched(self, rows: slice) -> dict[Stem, list[int]]:
        """Stems with several answers among ``rows``, and which of these are theirs."""
        found: dict[Stem, list[int]] = {}
        for number, row in enumerate(self.rows[rows]):
            if row.stem.branches is not None:
                found.setdefault(row.stem, []).append(number)
        return found

    def _suffix_group(self, group: str) -> torch.Tensor | None:
        """Suffix queries that belong to a group, ``[row, query]``; None for all."""
        if group in _EVERY_SUFFIX_TOKEN:
            return None
        key = (group, self._queries is None)
        if key not in self._query_masks:
            members = [row.stem.members(group)[row.stem.trunk.n_prefix :] for row in self.rows]
            padded = pad_sequence(members, batch_first=True)
            self._query_masks[key] = padded if self._queries is None else padded.gather(1, self._queries)
        return self._query_masks[key]

    def _where(self, group: str, chosen: torch.Tensor, n_rows: int, output: torch.Tensor) -> torch.Tensor:
        queries = self._suffix_group(group)
        heads = chosen[:n_rows, None, :, None].to(output.device)
        return heads if queries is None else heads & queries[:n_rows, :, None, None].to(output.device)


def _segments(rows: Sequence[SuffixRow]) -> list[tuple[Trunk, int, int]]:
    segments: list[tuple[Trunk, int, int]] = []
    for number, row in enumerate(rows):
        if segments and segments[-1][0] is row.stem.trunk:
            segments[-1] = (row.stem.trunk, segments[-1][1], number + 1)
        else:
            segments.append((row.stem.trunk, number, number + 1))
    return segments
