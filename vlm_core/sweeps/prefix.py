"""Rows that share their prompt's prefix, stored once.

``forward_shared(...)``    rows that leave the prefix untouched: only the tokens after the last image token run
``Sprout``                 a stem that is asked for: a prompt with one answer prefix, or with several that do not see each other
``grow_stems(...)``        the stems of sprouts

In a shared pass the prefix keys and values of a prompt exist once (``vlm_core.sweeps.suffix_attention``). A row enters at the first layer
that it touches, from the stored suffix of its stem. In the last layer only the tokens that are read go on after keys and values are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.branches import Branches
from vlm_core.sweeps.layers import KeysKnown, call_layer
from vlm_core.sweeps.sharing import SuffixRow, entry_layer, require_runnable
from vlm_core.sweeps.suffix_attention import SuffixAttention
from vlm_core.sweeps.trunk import Recording, Stem, enter_first_layer

__all__ = ["Sprout", "forward_shared", "grow_stems"]


@dataclass(frozen=True, eq=False)
class Sprout:
    """A stem that is asked for.

    Parameters
    ----------
    trunk : int
        Number of its trunk.
    sequences : tuple of Encoded
        The prompt with its answer prefix, or with each of several.
    item : int
        Seed of random token choices.
    laid_out : Encoded, optional
        With several answer prefixes, the prompt with the tokens of ``branches``.
    branches : Branches, optional
        These prefixes.
    """

    trunk: int
    sequences: tuple[Encoded, ...]
    item: int
    laid_out: Encoded | None = None
    branches: Branches | None = None

    def stem(self, recording: Recording) -> Stem:
        """The stem, of which nothing is known yet."""
        return Stem(recording.trunks[self.trunk], self.sequences[0] if self.laid_out is None else self.laid_out, item=self.item, branches=self.branches)


def grow_stems(subject: Subject, recording: Recording, sprouts: Sequence[Sprout], layers: Sequence[int]) -> list[Stem]:
    """The stem of every sprout: its suffix, as it enters each of ``layers``.

    The suffix of a trunk's only sequence is recorded with it; where there are several, their suffixes run once over the shared prefix (from
    layer 0, so their trunk must hold the keys and values of every layer before the last of ``layers``).
    """
    stems: list[Stem] = []
    grown: list[tuple[Stem, Sprout]] = []
    counts = np.bincount([sprout.trunk for sprout in sprouts], minlength=len(recording.trunks))
    for sprout in sprouts:
        stem = sprout.stem(recording)
        if counts[sprout.trunk] == 1 and sprout.branches is None:
            for layer in layers:
                known = stem.trunk.hidden[layer]
                stem.suffix[layer] = known if known.shape[0] == stem.n_suffix else known[stem.trunk.n_prefix :]
        else:
            grown.append((stem, sprout))
        stems.append(stem)
    if grown:
        entering = iter(enter_first_layer(subject, [sequence for _, sprout in grown for sequence in sprout.sequences]))
        for stem, sprout in grown:
            stem.suffix[0] = _before_layers(stem, sprout, [next(entering) for _ in sprout.sequences])
        rows = [SuffixRow(stem, None, ()) for stem, _ in grown]
        kept: dict[int, torch.Tensor] = {}
        run = SuffixAttention(subject.anatomy, recording, rows)
        with torch.inference_mode(), active(run):
            _run_layers(run, np.zeros(len(rows), dtype=int), None, kept, max(layers))
        for number, (stem, _) in enumerate(grown):
            for layer in layers:
                stem.suffix[layer] = kept[layer][number, : stem.n_suffix]
    recording.stems = stems
    return stems


def _before_layers(stem: Stem, sprout: Sprout, entering: Sequence[torch.Tensor]) -> torch.Tensor:
    """The suffix before the first layer, ``[suffix token, hidden]``, from what its sequences are there, each ``[token, hidden]``."""
    start = stem.trunk.n_prefix
    if sprout.branches is None:
        return entering[0][start : len(stem.sequence)]
    answers: dict[int, torch.Tensor] = {}
    for prefix, whole in zip(sprout.branches.prefixes, entering, strict=True):
        for length, place in enumerate(sprout.branches.places[prefix]):
            answers.setdefault(place, whole[stem.n_prompt + length])
    return torch.cat([entering[0][start : stem.n_prompt], *(answers[place][None] for place in range(len(answers)))])


def forward_shared(
    subject: Subject, recording: Recording, rows: Sequence[SuffixRow], entries: Sequence[int] | None = None
) -> torch.Tensor:
    """Run rows that leave their prefix untouched.

    Parameters
    ----------
    rows : sequence of SuffixRow
        Their stems must hold the suffix at ``entry_layer`` of their intervention.
    entries : sequence of int, optional
        That layer of each row, where it is known.

    Returns
    -------
    Tensor ``[n, hidden]``
        After the final norm, one per read, row by row.
    """
    anatomy = subject.anatomy
    require_runnable(rows, anatomy)
    firsts = np.array([entry_layer(row.intervention, anatomy) for row in rows] if entries is None else entries)
    numbers = np.array([row.stem.trunk.number for row in rows])
    order = np.lexsort((numbers, firsts))
    ordered = [rows[number] for number in order]
    run = SuffixAttention(anatomy, recording, ordered)
    device = recording.trunks[0].order.device
    width = max(len(row.reads) for row in rows)
    reads = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(ordered):
        offsets = np.array(row.reads) - row.stem.trunk.n_prefix
        reads[number, : len(offsets)] = offsets
        reads[number, len(offsets) :] = offsets[-1]
    with torch.inference_mode(), active(run):
        hidden = _run_layers(run, firsts[order], torch.as_tensor(reads, device=device))
    place = np.argsort(order)
    picked = [(place[number], read) for number, row in enumerate(rows) for read in range(len(row.reads))]
    index = torch.as_tensor(np.array(picked), device=hidden.device)
    return hidden[index[:, 0], index[:, 1]]


def _run_layers(
    run: SuffixAttention, firsts: np.ndarray, reads: torch.Tensor | None, keep: dict[int, torch.Tensor] | None = None, until: int | None = None
) -> torch.Tensor | None:
    """Run the layers on rows in order of the layer that they enter at, ``firsts`` ``[row]``.

    Parameters
    ----------
    reads : LongTensor ``[row, read]`` or None
        Suffix tokens that go on in the last layer.
    keep : dict, optional
        Filled with what enters every layer up to ``until``, which is then not run.

    Returns
    -------
    Tensor ``[row, read, hidden]`` or None
        After the final norm, at ``reads``.
    """
    anatomy, last = run.anatomy, run.anatomy.n_layers - 1
    numbers = np.array([row.stem.trunk.number for row in run.rows])
    positions, alike = _positions(run)
    hidden, chosen, entered = None, {}, 0
    for layer in range(int(firsts[0]), anatomy.n_layers):
        n = int(np.searchsorted(firsts, layer, side="right"))
        if n > entered:
            new = _entering(run.rows[entered:n], layer, run.n_suffix)
            hidden = new if hidden is None else torch.cat([hidden, new.to(hidden.device)])
            entered, chosen = n, {}
        if keep is not None:
            keep[layer] = hidden
            if layer == until:
                return None
        cut = slice(0, 1) if alike else slice(0, n)
        kwargs = run.recording.layer_kwargs(layer, numbers[cut], positions[cut], chosen, mask=False)
        if layer < last:
            hidden = call_layer(anatomy.layers[layer], hidden, kwargs)
    run.collecting = True
    try:
        call_layer(anatomy.layers[last], hidden, kwargs)
    except KeysKnown:
        pass
    run.narrow(reads)
    kwargs = run.recording.layer_kwargs(last, numbers, positions.gather(1, reads), {}, mask=False)
    hidden = torch.take_along_dim(hidden, reads[..., None].to(hidden.device), dim=1)
    return anatomy.norm(call_layer(anatomy.layers[last], hidden, kwargs))


def _positions(run: SuffixAttention) -> tuple[torch.Tensor, bool]:
    """Where the suffix tokens of each row stand in their sequences, ``[row, suffix token]``, and whether that is the same for all rows of one trunk."""
    stems = [row.stem for row in run.rows]
    device = stems[0].trunk.order.device
    prefix = torch.tensor([stem.trunk.n_prefix for stem in stems], device=device)
    positions = prefix[:, None] + torch.arange(run.n_suffix, device=device)
    branched = {stem: stem.positions(device) for stem in dict.fromkeys(stems) if stem.branches is not None}
    for number, stem in enumerate(stems):
        if stem in branched:
            positions[number, : stem.n_suffix] = branched[stem]
    alike = all(stem is stems[0] for stem in stems) if branched else len({stem.trunk.number for stem in stems}) == 1
    return positions, alike


def _entering(rows: Sequence[SuffixRow], layer: int, length: int) -> torch.Tensor:
    if all(row.stem is rows[0].stem for row in rows) and rows[0].stem.n_suffix == length:
        return rows[0].stem.suffix[layer].expand(len(rows), -1, -1)
    padded = pad_sequence([row.stem.suffix[layer] for row in rows], batch_first=True)
    return torch.nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))
