"""Rows that touch all positions, but only from some layer on: they resume from the residual stream that enters it.

``forward_resumed(...)``     run rows from the layer on that the first of them touches
``spares_last_layer(...)``   whether a row lets the last layer be cut short

In the last layer only the tokens that are read go on after keys and values are known, where no row does anything there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_core.interventions import KnockOut, MeanHeads, ReplaceImageKV, Row, ZeroHeads, parts
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import batch_groups
from vlm_core.subjects.rows import read_hidden
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.layers import KeysKnown, call_layer
from vlm_core.sweeps.trunk import Recording, Stem

__all__ = ["forward_resumed", "spares_last_layer"]


def forward_resumed(
    subject: Subject,
    recording: Recording,
    stems: Sequence[Stem],
    trunk: np.ndarray,
    interventions: Sequence[Row],
    start: int,
    wanted: tuple[np.ndarray, np.ndarray],
) -> torch.Tensor:
    """Run rows ``(stems[trunk[r]], interventions[r])`` from layer ``start`` on; see ``vlm_core.subjects.rows.forward_rows`` for the arguments.

    Returns
    -------
    Tensor ``[n, hidden]``
        After the final norm, at the wanted positions.
    """
    anatomy = subject.anatomy
    lengths = [len(stem.sequence) for stem in stems]
    image = pad_sequence([stem.sequence.image for stem in stems], batch_first=True)
    steps = torch.arange(max(lengths), device=image.device)
    valid = steps < torch.tensor(lengths, device=image.device)[:, None]
    hidden = pad_sequence([stem.hidden(start) for stem in stems], batch_first=True)
    program = Program.compile(interventions, anatomy.n_layers, anatomy.n_heads, hidden.device, hidden.dtype)
    groups = batch_groups([stem.sequence for stem in stems])
    visual = [stem.sequence.visual for stem in stems]
    run = Run(anatomy, program, image, valid, np.asarray(trunk), [stem.item for stem in stems], left=False, groups=groups, visual=visual)
    numbers = np.array([stem.trunk.number for stem in stems])
    chosen: dict = {}
    last = anatomy.n_layers - 1
    spare = start < last and all(spares_last_layer(row, anatomy.n_layers) for row in interventions)
    with torch.inference_mode(), active(run):
        for layer in range(start, last if spare else anatomy.n_layers):
            hidden = call_layer(anatomy.layers[layer], hidden, recording.layer_kwargs(layer, numbers, steps[None], chosen, mask=True))
        if not spare:
            return read_hidden(run, anatomy.norm(hidden), wanted)
        rows, positions = wanted
        elements = run.elements_at[last - 1]
        return _read_last_layer(anatomy, recording, hidden, numbers[np.asarray(trunk)], elements, elements[rows], positions)


def spares_last_layer(intervention: Row, n_layers: int) -> bool:
    """Whether a row does nothing in the last layer and leaves the sequence as long as it is."""
    last = n_layers - 1
    for part in parts(intervention):
        if isinstance(part, KnockOut):
            acts = last in part.layers
        else:
            acts = not isinstance(part, ZeroHeads | MeanHeads | ReplaceImageKV) or any(head.layer == last for head in part.heads)
        if acts:
            return False
    return True


class _LastLayer:
    """The active run of a last layer in which only a few queries go on after keys and values are known."""

    decoding = False

    def __init__(self, anatomy, positions: torch.Tensor) -> None:
        self._attention = anatomy.attentions[-1]
        self._layer = anatomy.n_layers - 1
        self._positions = positions
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def attention_layer(self, module) -> int | None:
        """The last layer, for its attention."""
        return self._layer if module is self._attention else None

    def decoder_layer(self, module) -> None:
        """Nothing is done before a layer."""
        return None

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """First the keys and values of all tokens, then the attention of the queries that are read."""
        if self._kept is None:
            self._kept = key, value, mask
            raise KeysKnown
        key, value, mask = self._kept
        at = self._positions[:, None, :, None].to(key.device)
        if mask is None:
            mask = torch.arange(key.shape[2], device=at.device) <= at
        else:
            mask = torch.take_along_dim(mask.expand(at.shape[0], -1, -1, -1), at, dim=2)
        return original(module, query, key, value, mask, *args, **kwargs)


def _read_last_layer(anatomy, recording: Recording, hidden, numbers, elements, wanted_elements, positions) -> torch.Tensor:
    """The last layer and the final norm, for the tokens that are read: keys and values of all, the rest for these."""
    last, n = anatomy.n_layers - 1, hidden.shape[0]
    counts = np.bincount(wanted_elements, minlength=n)
    at = np.zeros((n, counts.max()), dtype=np.int64)
    place = np.zeros(len(positions), dtype=np.int64)
    filled = np.zeros(n, dtype=np.int64)
    for read, (element, position) in enumerate(zip(wanted_elements, positions, strict=True)):
        place[read] = filled[element]
        at[element, filled[element] :] = position
        filled[element] += 1
    trunk_of = np.zeros(n, dtype=np.int64)
    trunk_of[elements] = numbers
    read_at = torch.as_tensor(at, device=hidden.device)
    run = _LastLayer(anatomy, read_at)
    every = torch.arange(hidden.shape[1], device=hidden.device)[None]
    with active(run):
        try:
            call_layer(anatomy.layers[last], hidden, recording.layer_kwargs(last, trunk_of, every, {}, mask=True))
        except KeysKnown:
            pass
        few = torch.take_along_dim(hidden, read_at[..., None], dim=1)
        output = call_layer(anatomy.layers[last], few, recording.layer_kwargs(last, trunk_of, read_at, {}, mask=False))
        output = anatomy.norm(output)
    return output[torch.as_tensor(wanted_elements, device=output.device), torch.as_tensor(place, device=output.device)]
