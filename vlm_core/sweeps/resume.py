"""Rows that touch all positions, but only from some layer on: they resume from the residual stream that enters it.

``forward_resumed(...)``     run rows from the layer on that the first of them touches
``spares_last_layer(...)``   whether a row lets the last layer be cut short

In the last layer only the tokens that are read go on after keys and values are known, where no row does anything within it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_core.interventions import DropTokens, Intervention, KnockOut, MergeTokens, Patch, ReplaceTokens, Row, Steer, parts
from vlm_core.seam.masks import additive
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import batch_groups
from vlm_core.subjects.rows import places, read_hidden
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.layers import KeysKnown, call_layer, outside_inference
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
    gradients: bool = False,
) -> torch.Tensor:
    """Run rows ``(stems[trunk[r]], interventions[r])`` from layer ``start`` on; see ``vlm_core.subjects.rows.forward_rows`` for the arguments.

    Parameters
    ----------
    gradients : bool
        Whether what comes back has slopes with respect to what an intervention computes.

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
    # What a policy computes in a pass with gradients belongs to that pass.
    seen = None if gradients else [stem.seen for stem in stems]
    run = Run(
        anatomy, program, image, valid, np.asarray(trunk), [stem.item for stem in stems], left=False, groups=groups, visual=visual, seen=seen
    )
    numbers = np.array([stem.trunk.number for stem in stems])
    last = anatomy.n_layers - 1
    spare = start <= last and all(spares_last_layer(row, anatomy.n_layers) for row in interventions)
    chosen: dict = {}

    def call(layer: int, entering: torch.Tensor) -> torch.Tensor:
        kwargs = recording.layer_kwargs(layer, numbers, steps[None], chosen, mask=True)
        return call_layer(anatomy.layers[layer], entering, outside_inference(kwargs) if gradients else kwargs)

    with torch.enable_grad() if gradients else torch.inference_mode(), active(run):
        for layer in range(start, last if spare else anatomy.n_layers):
            hidden = call(layer, hidden)
        if not spare:
            return read_hidden(run, anatomy.norm(hidden), wanted)
        keys = _LastLayer(run)
        with active(keys):
            try:
                call(last, hidden)
            except KeysKnown:
                pass
            return _read_last_layer(keys, recording, numbers[np.asarray(trunk)], wanted)


def spares_last_layer(intervention: Row, n_layers: int) -> bool:
    """Whether a row does nothing in the last layer, nor after it: what is done before the layer is entered is no matter."""
    return not any(_acts_within(part, n_layers - 1) for part in parts(intervention))


def _acts_within(part: Intervention, last: int) -> bool:
    if isinstance(part, DropTokens | MergeTokens | ReplaceTokens):
        return False
    if isinstance(part, Steer):
        return part.layer > last
    if isinstance(part, Patch) and part.site == "residual":
        return any(layer > last for layer in part.layers)
    if isinstance(part, Patch | KnockOut):
        return last in part.layers
    return any(head.layer == last for head in part.heads)


class _LastLayer:
    """The active run of a last layer in which only a few queries go on after keys and values are known.

    Parameters
    ----------
    run : Run
        Active in all layers before; what it does to what enters the last one is done.

    Attributes
    ----------
    entered : Tensor ``[element, token, hidden]``
    """

    decoding = False

    def __init__(self, run: Run) -> None:
        self.run = run
        self._layer = run.anatomy.n_layers - 1
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        self._at: torch.Tensor | None = None

    def attention_layer(self, module) -> int | None:
        """The last layer, for its attention."""
        return self._layer if module is self.run.anatomy.attentions[-1] else None

    def decoder_layer(self, module) -> int | None:
        """The last layer is entered once, with all tokens."""
        return self.run.decoder_layer(module) if self._kept is None else None

    def enter_layer(self, layer: int, args: tuple, kwargs: dict):
        """What the run before does here."""
        changed = self.run.enter_layer(layer, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        self.entered = args[0] if args else kwargs["hidden_states"]
        return changed

    def narrow(self, at: torch.Tensor) -> None:
        """From here on only tokens ``at`` ``[element, read]`` are queries."""
        self._at = at

    def attend(self, layer, original, module, query, key, value, mask, *args, **kwargs):
        """First the keys and values of all tokens, then the attention of the queries that are read."""
        if self._kept is None:
            self._kept = key, value, mask
            raise KeysKnown
        key, value, mask = self._kept
        at = self._at[:, None, :, None].to(key.device)
        if mask is None:
            mask = torch.arange(key.shape[2], device=at.device) <= at
        else:
            mask = torch.take_along_dim(mask.expand(at.shape[0], -1, -1, -1), at, dim=2)
        weights = self.run.key_weights(layer, key.shape[2], key.device)
        if weights is not None:
            mask = additive(mask, query.dtype) + weights[:, None, None, :].to(query.dtype)
        return original(module, query, key, value, mask, *args, **kwargs)


def _read_last_layer(keys: _LastLayer, recording: Recording, numbers: np.ndarray, wanted: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """The rest of the last layer and the final norm, for the tokens that are read; ``numbers`` ``[row]`` are the rows' trunks."""
    run, hidden = keys.run, keys.entered
    anatomy, last, n = run.anatomy, run.anatomy.n_layers - 1, hidden.shape[0]
    elements, columns = (one.cpu().numpy() for one in places(run, wanted, hidden.device))
    width = np.bincount(elements, minlength=n).max()
    at, positions = (np.zeros((n, width), dtype=np.int64) for _ in range(2))
    place = np.zeros(len(elements), dtype=np.int64)
    filled = np.zeros(n, dtype=np.int64)
    for read, (element, column, position) in enumerate(zip(elements, columns, wanted[1], strict=True)):
        place[read] = filled[element]
        at[element, filled[element] :], positions[element, filled[element] :] = column, position
        filled[element] += 1
    trunk_of = np.zeros(n, dtype=np.int64)
    trunk_of[run.elements_at[last]] = numbers
    read_at = torch.as_tensor(at, device=hidden.device)
    keys.narrow(read_at)
    few = torch.take_along_dim(hidden, read_at[..., None], dim=1)
    kwargs = recording.layer_kwargs(last, trunk_of, torch.as_tensor(positions, device=hidden.device), {}, mask=False)
    output = anatomy.norm(call_layer(anatomy.layers[last], few, kwargs))
    return output[torch.as_tensor(elements, device=output.device), torch.as_tensor(place, device=output.device)]
