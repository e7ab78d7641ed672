"""The row engine: many (sequence, intervention) rows in one pass, everything shared computed once.

``forward_rows(...)``   final hidden states at a few positions of every row
``read_hidden(...)``    those positions, wherever branches and drops have taken them
``read_logits(...)``    the unembedding, only where asked
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlm_core.interventions import Row
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded, batch_groups, batch_sequences
from vlm_core.subjects.subject import Subject

__all__ = ["forward_rows", "read_hidden", "read_logits"]


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
        Rows and token positions (of the sequence before any drop) whose final hidden state is read. They must be text.

    Returns
    -------
    hidden : Tensor ``[n, hidden]`` or None
        After the final norm, at the wanted positions.
    run : Run
        With what the observers recorded.
    """
    anatomy = subject.anatomy
    trunk = np.asarray(trunk)
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


def read_hidden(run: Run, hidden: torch.Tensor, wanted: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    """Hidden states ``[n, hidden]`` at the wanted rows and positions of a finished run, whose output is ``hidden``."""
    rows, positions = wanted
    elements = torch.as_tensor(run.elements[rows], device=hidden.device)
    positions = torch.as_tensor(positions, device=hidden.device)
    if run.tokens.index is not None:
        positions = (run.tokens.index.to(hidden.device)[elements] == positions[:, None]).int().argmax(1)
    return hidden[elements, positions]


def read_logits(subject: Subject, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits ``[n, vocabulary]`` in float32 from final hidden states ``[n, hidden]``."""
    with torch.inference_mode():
        logits = subject.anatomy.head(hidden).float()
        cap = subject.anatomy.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
