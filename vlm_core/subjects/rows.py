"""The row engine: many (sequence, intervention) rows in one pass, everything shared computed once.

``forward_rows(...)``   final hidden states at a few positions of every row
``read_hidden(...)``    those positions, wherever branches and drops have taken them; ``places(...)`` where that is
``read_logits(...)``    the unembedding, only where asked
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from vlm_core.interventions import Row, require_row
from vlm_core.interventions.numeric import integer
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded, batch_groups, batch_sequences
from vlm_core.subjects.subject import Subject, require_run, require_subject

__all__ = ["forward_rows", "places", "read_hidden", "read_logits"]


def forward_rows(
    subject: Subject,
    sequences: Sequence[Encoded],
    trunk: np.ndarray,
    interventions: Sequence[Row],
    items: Sequence[int],
    wanted: tuple[np.ndarray, np.ndarray] | None = None,
    observers: Sequence = (),
) -> tuple[torch.Tensor | None, Run]:
    """Run every row ``(sequences[trunk[r]], interventions[r])`` through the language model.

    Parameters
    ----------
    sequences : sequence of Encoded
    trunk : int array ``[row]``
        Every sequence must belong to at least one row.
    interventions : sequence, one per row
    items : sequence of int, one per sequence
        Seeds of random token choices.
    wanted : pair of int arrays ``[n]``, optional
        Rows and token positions (of the sequence before any drop) whose final hidden state is read. No row may drop or merge its own.

    Returns
    -------
    hidden : Tensor ``[n, hidden]`` or None
        After the final norm, at the wanted positions.
    run : Run
        With what the observers recorded.

    Raises
    ------
    TypeError
        For what is no subject, no sequences or no interventions.
    ValueError
        One sentence: no sequences, another number of rows or items than there should be, a sequence that is not there or has no row, a
        row or position to read that is not there; and as ``Run``.
    """
    require_subject(subject)
    require_run(observers)
    _require_sequences(sequences)
    trunk = _trunk(trunk, len(sequences), interventions)
    items = _numbers(items, len(sequences))
    if wanted is not None:
        wanted = _wanted(wanted, trunk, sequences)
    anatomy = subject.anatomy
    if sequences[0].deepstack:
        # Visual features are added outside the layers, per incoming sequence: rows cannot branch off later.
        sequences = [sequences[index] for index in trunk]
        items = [items[index] for index in trunk]
        trunk = np.arange(len(trunk))
    inputs, image, valid = batch_sequences(subject, sequences)
    embeds = inputs["inputs_embeds"]
    program = Program.compile(interventions, anatomy.n_layers, anatomy.n_heads, embeds.device, embeds.dtype)
    if sequences[0].deepstack and any(layer < len(sequences[0].deepstack) for layer in program.drops):
        raise ValueError(
            f"this family adds visual features after its first {len(sequences[0].deepstack)} layers: drop tokens "
            f"from layer {len(sequences[0].deepstack)} on"
        )
    visual = [sequence.visual for sequence in sequences]
    run = Run(anatomy, program, image, valid, trunk, items, observers, left=False, groups=batch_groups(sequences), visual=visual)
    module = anatomy.language_model if anatomy.family.enter == "language_model" else anatomy.base
    with torch.inference_mode(), active(run):
        hidden = module(**inputs).last_hidden_state
    return None if wanted is None else read_hidden(run, hidden, wanted), run


def _require_sequences(sequences: Any) -> None:
    if not isinstance(sequences, list | tuple) or not all(isinstance(one, Encoded) for one in sequences):
        raise TypeError(f"sequences must be a list of prompts as encode_items(subject, items) gives them, got {sequences!r:.60}")
    if not sequences:
        raise ValueError("there is nothing to run: pass at least one sequence")


def _trunk(trunk: Any, n_sequences: int, interventions: Any) -> np.ndarray:
    if not isinstance(interventions, list | tuple):
        raise TypeError(f"interventions must be a list with one per row, got {interventions!r:.60} ({type(interventions).__name__})")
    for row in {id(row): row for row in interventions}.values():
        require_row(row)
    found = _whole(trunk, "trunk")
    if len(found) != len(interventions):
        raise ValueError(f"trunk names the sequences of {len(found)} rows for {len(interventions)} interventions: give one per row")
    outside = found[(found < 0) | (found >= n_sequences)]
    if len(outside):
        raise ValueError(f"trunk names sequence {outside[0]} of {n_sequences}: they count from 0 to {n_sequences - 1}")
    without = np.setdiff1d(np.arange(n_sequences), found)
    if len(without):
        raise ValueError(f"sequence {without[0]} of {n_sequences} belongs to no row: leave it out, or name it in trunk")
    return found


def _numbers(items: Any, n_sequences: int) -> list[int]:
    found = [integer(item, "an item's number") for item in items] if isinstance(items, Iterable) else None
    if found is None or len(found) != n_sequences:
        got = f"{items!r:.60}" if found is None else f"{len(found)} of them"
        raise ValueError(f"items must be numbers that name the items of {n_sequences} sequences, one each, got {got}")
    return found


def _wanted(wanted: Any, trunk: np.ndarray, sequences: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(wanted, list | tuple) or len(wanted) != 2:
        raise ValueError(f"wanted must be a pair of rows and positions, got {wanted!r:.60}: write (rows, positions), both as long")
    rows, positions = _whole(wanted[0], "the rows wanted"), _whole(wanted[1], "the positions wanted")
    if len(rows) != len(positions):
        raise ValueError(f"{len(rows)} rows and {len(positions)} positions are wanted: give one position for each of the rows")
    outside = rows[(rows < 0) | (rows >= len(trunk))]
    if len(outside):
        raise ValueError(f"row {outside[0]} is wanted of {len(trunk)} rows: they count from 0 to {len(trunk) - 1}")
    lengths = np.array([len(sequence) for sequence in sequences])[trunk[rows]]
    for row, position, length in np.stack([rows, positions, lengths], axis=1)[(positions < 0) | (positions >= lengths)]:
        raise ValueError(f"position {position} of row {row} is wanted, its sequence has {length} tokens: they count from 0 to {length - 1}")
    return rows, positions


def _whole(values: Any, name: str) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or not (found.dtype.kind in "iu" or not found.size):
        raise ValueError(f"{name} must be whole numbers in one row, got {found.dtype} of shape {found.shape}: pass an int array")
    return found.astype(np.int64, copy=False)


def read_hidden(run: Run, hidden: torch.Tensor, wanted: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """Hidden states ``[n, hidden]`` at the wanted rows and positions of a finished run, whose output is ``hidden``."""
    return hidden[places(run, wanted, hidden.device)]


def places(run: Run, wanted: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements and columns ``[n]`` of the wanted rows and positions, in the layer that ``run`` has entered last.

    Raises
    ------
    ValueError
        Where a row has dropped or merged a token that is wanted.
    """
    rows, positions = wanted
    elements = torch.as_tensor(run.elements[rows], device=device)
    positions = torch.as_tensor(positions, device=device)
    if run.tokens.index is not None:
        found = run.tokens.index.to(device)[elements] == positions[:, None]
        lost = (~(found & run.tokens.valid.to(device)[elements]).any(1)).nonzero()[:, 0].tolist()
        if lost:
            raise ValueError(
                f"row {int(rows[lost[0]])} dropped or merged the token at position {int(positions[lost[0]])} that is to be read: ask for "
                f"one that it keeps, such as a text token"
            )
        positions = found.int().argmax(1)
    return elements, positions


def read_logits(subject: Subject, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits ``[n, vocabulary]`` in float32 from final hidden states ``[n, hidden]``."""
    with torch.inference_mode():
        logits = subject.anatomy.head(hidden).float()
        cap = subject.anatomy.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
