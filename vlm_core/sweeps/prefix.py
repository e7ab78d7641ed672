"""Rows that share their prompt's prefix, stored once.

``forward_shared(...)``    rows that leave the prefix untouched: only the tokens after the last image token run
``grow_stems(...)``        a stem per answer prefix of every trunk
``why_not_shared(...)``    why an intervention cannot share the prefix, or None

In a shared pass the prefix keys and values of a prompt exist once. Per key/value head, the queries of all rows (and of all query heads of
the group) are one matrix; one product with the prefix keys, one softmax over prefix and own suffix together, one product with the prefix
values. Where a head's image keys and values are replaced by one mean, its image part has a closed form: ``n`` equal scores ``c`` weigh as
one score ``c + log n``, with the mean value. In the last layer only the tokens that are read go on after keys and values are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_core.interventions import ImageKVMeans, KnockOut, MeanHeads, ReplaceImageKV, Row, ZeroHeads, parts, touches
from vlm_core.seam.plan import Program, require_fit
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.trunk import Recording, Stem, Trunk, enter_first_layer

__all__ = ["KeysKnown", "SuffixRow", "call_layer", "entry_layer", "forward_shared", "grow_stems", "why_not_shared"]

_EVERY_SUFFIX_TOKEN = frozenset(("all", "text", "question"))
_SHAREABLE = (ZeroHeads, MeanHeads, ReplaceImageKV, KnockOut)


def why_not_shared(intervention: Row, n_layers: int, contiguous: bool = True) -> str | None:
    """Why the rows of an intervention cannot share their prompt's prefix; None where they can.

    Parameters
    ----------
    contiguous : bool
        Whether the prompt's image tokens lie side by side.
    """
    for part in parts(intervention):
        touch = part.touches(n_layers, contiguous)
        # What the last layer does to image tokens is read by no one.
        if touch.scope != "question" and touch.layer < n_layers - 1:
            return f"{type(part).__name__} changes tokens up to the last image token"
        if touch.layer < n_layers and not isinstance(part, _SHAREABLE):
            return f"{type(part).__name__} has no form that shares the prefix"
        if isinstance(part, ReplaceImageKV) and not isinstance(part.means, ImageKVMeans):
            return "image keys and values that differ from token to token have no closed form"
        if isinstance(part, KnockOut) and part.heads:
            return "a knock-out in single heads has no form that shares the prefix"
    return None


@dataclass(frozen=True, eq=False)
class SuffixRow:
    """One row of a shared pass.

    Parameters
    ----------
    stem : Stem
    intervention : Intervention, tuple of them or None
    reads : tuple of int
        Positions (in the whole sequence, after the last image token) whose final hidden state is wanted.
    """

    stem: Stem
    intervention: Row
    reads: tuple[int, ...]


class KeysKnown(Exception):
    """Raised inside the last layer once its keys and values are known."""


@dataclass(eq=False)
class _Layer:
    """What is done in one layer to the rows of a batch (``[row, head]`` masks and the like)."""

    zero: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    mean: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    image_kv: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    knocks: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)


class PrefixRun:
    """The active run of a shared pass: attention of suffix tokens to a prefix that is stored once."""

    decoding = False

    def __init__(self, anatomy, recording: Recording, rows: Sequence[SuffixRow]) -> None:
        self.anatomy = anatomy
        self.recording = recording
        self.rows = rows
        self.n_suffix = max(row.stem.n_suffix for row in rows)
        self._segments = _segments(rows)
        self._plan = _compile(rows, anatomy)
        self._queries: torch.Tensor | None = None
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._collecting = False
        self._blocked: dict[tuple, tuple] = {}
        self._query_masks: dict[tuple, torch.Tensor | None] = {}

    # -- what the seam calls ----------------------------------------------------------------------------------------

    def attention_layer(self, module) -> int | None:
        """Layer of an attention module of this run's language model, else None."""
        return self.anatomy.attention_layers.get(module)

    def decoder_layer(self, module) -> None:
        """Decoder layers are called one by one: there is nothing to do before one."""
        return None

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """Attention of the suffix queries to prefix and suffix, with this run's interventions."""
        if self._collecting:
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
        folded = torch.empty(n_kv, n, groups, n_queries, head_dim, dtype=precise, device=query.device)
        torch.mul(query[rows].unflatten(1, (n_kv, groups)).transpose(0, 1), scaling, out=folded)
        scores = torch.empty(n_kv, n, groups, n_queries, n_prefix + n_own, dtype=precise, device=query.device)
        flat = scores.view(n_kv, n * groups * n_queries, n_prefix + n_own)
        torch.bmm(folded.view(n_kv, -1, head_dim), prefix_key.to(precise).transpose(1, 2), out=flat[..., :n_prefix])
        own_key = key[rows].transpose(0, 1).to(precise).reshape(n_kv * n, n_own, head_dim)
        own = torch.bmm(folded.view(n_kv * n, groups * n_queries, head_dim), own_key.transpose(1, 2))
        scores[..., n_prefix:] = own.view(n_kv, n, groups, n_queries, n_own)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        blocked_prefix, blocked_own, n_seen = self._masks(layer, plan, trunk, rows, query.device)
        scores[..., n_prefix:].masked_fill_(blocked_own[None, :, None], -torch.inf)
        if blocked_prefix is not None:
            scores[..., :n_prefix].masked_fill_(blocked_prefix[None, :, None], -torch.inf)
        replaced = [] if plan is None else [self._replace(part, trunk, rows, folded, scores, n_seen, softcap) for part in plan.image_kv]
        weights = torch.softmax(flat, dim=-1)
        whole = weights.view_as(scores)
        taken = [(where, _take_column(whole, where, trunk.n_other, chosen), values) for where, chosen, values in filter(None, replaced)]
        result = torch.bmm(weights[..., :n_prefix], prefix_value.to(precise))
        own_value = value[rows].transpose(0, 1).to(precise).reshape(n_kv * n, n_own, -1)
        own_weights = whole[..., n_prefix:].reshape(n_kv * n, groups * n_queries, n_own)
        result = result.view(n_kv * n, groups * n_queries, -1).baddbmm_(own_weights, own_value).view(n_kv, n, groups, n_queries, -1)
        for (kv, row, group), weight, values in taken:
            result[kv, row, group] += weight[..., None] * values[:, None]
        output[rows].unflatten(2, (n_kv, groups)).copy_(result.permute(1, 3, 0, 2, 4))

    def _replace(self, part, trunk: Trunk, rows: slice, folded, scores, n_seen, softcap):
        """Give replaced heads one image column ``c + log n``; what is needed to give it the mean value afterwards."""
        group, chosen, mean_key, mean_value = part
        # Found on the CPU, where the plan is: a GPU would have to be waited for.
        row, head = (index.to(folded.device) for index in chosen[rows].nonzero(as_tuple=True))
        if not len(row) or not trunk.n_image:
            return None
        groups = folded.shape[2]
        where = head // groups, row, head % groups
        score = (folded[where] * mean_key.to(folded)[head][:, None]).sum(-1)
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        score = score + (math.log(trunk.n_image) if n_seen is None else n_seen[row if n_seen.shape[0] > 1 else 0].log())
        image = slice(trunk.n_other, trunk.n_prefix)
        new = torch.full((*score.shape, trunk.n_image), -torch.inf, dtype=score.dtype, device=score.device)
        new[..., 0] = score
        queries = self._suffix_group(group)
        if queries is not None:
            queries = queries.to(row.device)[rows][row]
            new = torch.where(queries[..., None], new, scores[..., image][where])
        scores[..., image][where] = new
        return where, queries, mean_value.to(folded)[head]

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

    # -- layers -----------------------------------------------------------------------------------------------------

    def forward(self, firsts: np.ndarray, reads: torch.Tensor | None, keep: dict[int, torch.Tensor] | None = None) -> torch.Tensor | None:
        """Run the layers; rows are in order of the layer that they enter at, ``firsts`` ``[row]``.

        Returns
        -------
        Tensor ``[row, read, hidden]``
            After the final norm, at suffix tokens ``reads`` ``[row, read]``.
        """
        anatomy, last = self.anatomy, self.anatomy.n_layers - 1
        prefix = np.array([row.stem.trunk.n_prefix for row in self.rows])
        numbers = np.array([row.stem.trunk.number for row in self.rows])
        steps = torch.arange(self.n_suffix, device=self.rows[0].stem.trunk.order.device)
        positions = torch.as_tensor(prefix, device=steps.device)[:, None] + steps
        alike = len(set(numbers.tolist())) == 1
        hidden, chosen, entered = None, {}, 0
        for layer in range(int(firsts[0]), anatomy.n_layers):
            n = int(np.searchsorted(firsts, layer, side="right"))
            if n > entered:
                new = _entering(self.rows[entered:n], layer, self.n_suffix)
                hidden = new if hidden is None else torch.cat([hidden, new.to(hidden.device)])
                entered, chosen = n, {}
            if keep is not None:
                keep[layer] = hidden
                if layer == last:
                    return None
            cut = slice(0, 1) if alike else slice(0, n)
            kwargs = self.recording.layer_kwargs(layer, numbers[cut], positions[cut], chosen, mask=False)
            if layer < last:
                hidden = call_layer(anatomy.layers[layer], hidden, kwargs)
        self._collecting = True
        try:
            call_layer(anatomy.layers[last], hidden, kwargs)
        except KeysKnown:
            pass
        self._collecting, self._queries = False, reads
        kwargs = self.recording.layer_kwargs(last, numbers, positions.gather(1, reads), {}, mask=False)
        hidden = torch.take_along_dim(hidden, reads[..., None].to(hidden.device), dim=1)
        return anatomy.norm(call_layer(anatomy.layers[last], hidden, kwargs))


def _take_column(weights: torch.Tensor, where: tuple, column: int, queries: torch.Tensor | None) -> torch.Tensor:
    # The one image column that stands for all of them: its weight goes to the mean value, not to the first image token's.
    taken = weights[..., column][where]
    weights[..., column][where] = 0.0 if queries is None else taken.masked_fill(queries, 0.0)
    return taken if queries is None else taken.masked_fill(~queries, 0.0)


def call_layer(layer, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """What a decoder layer, called by itself, gives to the next."""
    output = layer(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _entering(rows: Sequence[SuffixRow], layer: int, length: int) -> torch.Tensor:
    if all(row.stem is rows[0].stem for row in rows) and rows[0].stem.n_suffix == length:
        return rows[0].stem.suffix[layer].expand(len(rows), -1, -1)
    padded = pad_sequence([row.stem.suffix[layer] for row in rows], batch_first=True)
    return torch.nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))


def _segments(rows: Sequence[SuffixRow]) -> list[tuple[Trunk, int, int]]:
    segments: list[tuple[Trunk, int, int]] = []
    for number, row in enumerate(rows):
        if segments and segments[-1][0] is row.stem.trunk:
            segments[-1] = (row.stem.trunk, segments[-1][1], number + 1)
        else:
            segments.append((row.stem.trunk, number, number + 1))
    return segments


def _compile(rows: Sequence[SuffixRow], anatomy) -> dict[int, _Layer]:
    plan: dict[int, _Layer] = {}
    n_rows, n_heads = len(rows), anatomy.n_heads
    masks: dict[tuple, torch.Tensor] = {}

    def mask(kind: str, layer: int, *key, width: int | None = n_heads) -> torch.Tensor:
        name = (kind, layer, *key)
        if name not in masks:
            shape = (n_rows,) if width is None else (n_rows, width)
            masks[name] = torch.zeros(shape, dtype=torch.bool)
        return masks[name]

    sources: dict[int, object] = {}
    for number, row in enumerate(rows):
        for part in parts(row.intervention):
            if isinstance(part, KnockOut):
                for layer in part.layers:
                    mask("knock", layer, part.queries, part.keys, width=None)[number] = True
                continue
            means = getattr(part, "means", None)
            if means is not None:
                require_fit(means.values.shape, anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
            sources[id(means)] = means
            for layer, head in part.heads:
                mask(type(part).__name__, layer, part.queries, id(means))[number, head] = True
    for (kind, layer, *key), chosen in masks.items():
        entry = plan.setdefault(layer, _Layer())
        if kind == "knock":
            entry.knocks.append((key[0], key[1], chosen))
            continue
        queries, source = key[0], sources[key[1]]
        if kind == "ZeroHeads":
            entry.zero.append((queries, chosen))
        elif kind == "MeanHeads":
            entry.mean.append((queries, chosen, source.values[layer]))
        else:
            entry.image_kv.append((queries, chosen, source.keys[layer], source.values[layer]))
    return plan


def grow_stems(subject: Subject, recording: Recording, sequences: Sequence[tuple[int, Encoded, int]], layers: Sequence[int]) -> list[Stem]:
    """A stem per (trunk number, sequence, item number): the suffix of each, as it enters each of ``layers``.

    A trunk with one answer prefix has recorded its suffix; where there are several, their suffixes run once over the shared prefix (from
    layer 0, so their trunk must hold all keys and values).
    """
    stems: list[Stem] = []
    grown: list[Stem] = []
    counts = np.bincount([number for number, _, _ in sequences], minlength=len(recording.trunks))
    for number, sequence, item in sequences:
        trunk = recording.trunks[number]
        stem = Stem(trunk, sequence, item=item)
        if counts[number] == 1:
            for layer in layers:
                known = trunk.hidden[layer]
                stem.suffix[layer] = known if known.shape[0] == stem.n_suffix else known[trunk.n_prefix :]
        else:
            grown.append(stem)
        stems.append(stem)
    if grown:
        for stem, entering in zip(grown, enter_first_layer(subject, [stem.sequence for stem in grown]), strict=True):
            stem.suffix[0] = entering[stem.trunk.n_prefix : len(stem.sequence)]
        rows = [SuffixRow(stem, None, ()) for stem in grown]
        kept: dict[int, torch.Tensor] = {}
        run = PrefixRun(subject.anatomy, recording, rows)
        with torch.inference_mode(), active(run):
            run.forward(np.zeros(len(rows), dtype=int), None, kept)
        for number, stem in enumerate(grown):
            for layer in layers:
                stem.suffix[layer] = kept[layer][number, : stem.n_suffix]
    recording.stems = stems
    return stems


def forward_shared(subject: Subject, recording: Recording, rows: Sequence[SuffixRow]) -> torch.Tensor:
    """Run rows that leave their prefix untouched.

    Parameters
    ----------
    rows : sequence of SuffixRow
        Their stems must hold the suffix at ``entry_layer`` of their intervention.

    Returns
    -------
    Tensor ``[n, hidden]``
        After the final norm, one per read, row by row.
    """
    anatomy = subject.anatomy
    _check(rows, anatomy)
    firsts = np.array([entry_layer(row.intervention, anatomy) for row in rows])
    numbers = np.array([row.stem.trunk.number for row in rows])
    order = np.lexsort((numbers, firsts))
    ordered = [rows[number] for number in order]
    run = PrefixRun(anatomy, recording, ordered)
    device = recording.trunks[0].order.device
    width = max(len(row.reads) for row in rows)
    reads = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(ordered):
        offsets = np.array(row.reads) - row.stem.trunk.n_prefix
        reads[number, : len(offsets)] = offsets
        reads[number, len(offsets) :] = offsets[-1]
    with torch.inference_mode(), active(run):
        hidden = run.forward(firsts[order], torch.as_tensor(reads, device=device))
    place = np.argsort(order)
    picked = [(place[number], read) for number, row in enumerate(rows) for read in range(len(row.reads))]
    index = torch.as_tensor(np.array(picked), device=hidden.device)
    return hidden[index[:, 0], index[:, 1]]


def _check(rows: Sequence[SuffixRow], anatomy) -> None:
    """Refuse what a whole run would refuse."""
    program = Program.compile([row.intervention for row in rows], anatomy.n_layers, anatomy.n_heads)
    for capability, layer in program.needs:
        anatomy.require(capability, () if layer is None else (layer,))
    for row, positions in zip(rows, program.positions, strict=True):
        for group in positions:
            row.stem.members(group)


def entry_layer(intervention, anatomy) -> int:
    """First layer that a row of a shared pass has to run."""
    return min(touches(intervention, anatomy.n_layers).layer, anatomy.n_layers - 1)
