"""From images and prompts to what the language model receives, once per item.

``encode_items(subject, items)``   processor, vision tower and projector; the call to the language model is captured
``Encoded.extended(...)``          the same prompt with answer tokens appended
``batch_sequences(...)``           right-padded inputs for a batch of sequences; ``batch_groups`` their token groups

Whatever a family does to merge image and text happens in its own code: the model runs until just before its language
model, and the embeddings, positions and per-token inputs found there are kept per item without padding. Sequences are
right-padded later. Under a causal mask no real token sees that padding, so no padding mask is needed and attention
keeps its fast causal path. Where the image stays outside the sequence (Mllama), its states and masks are kept beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vlm_core.errors import SubjectError
from vlm_core.interventions.policy import Visual
from vlm_core.items import item_field
from vlm_core.seam.seam import Captured, active, capturing, current_run
from vlm_core.subjects.remembering import prepared, prompt_key
from vlm_core.subjects.visual import visuals

if TYPE_CHECKING:
    from vlm_core.subjects.subject import Subject

__all__ = ["CrossStates", "Encoded", "batch_groups", "batch_sequences", "capture", "encode_items"]


@dataclass(frozen=True, eq=False)
class CrossStates:
    """The image of one prompt where it stays outside the token sequence.

    ``states`` ``[image token, hidden]``; ``mask`` ``[token, image token]``, additive; ``rows`` ``[token]``, 0 where a
    token precedes every image.
    """

    states: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt as the language model receives it.

    Parameters
    ----------
    ids : LongTensor ``[token]``
    embeds : Tensor ``[token, hidden]``
        Text embeddings with the image features merged in.
    image : BoolTensor ``[token]``
        Image tokens, of all images of the prompt.
    positions : LongTensor ``[axis, token]`` or None
        Explicit position ids (3 axes under M-RoPE); None where the model counts from 0.
    types : dict of str to LongTensor ``[token]``
        Per-token inputs of families that build their own masks.
    deepstack : tuple of Tensor ``[image token, hidden]``
        Visual features added again after the first layers (Qwen3-VL), else empty.
    n_prompt : int
        Tokens of the prompt; later ones belong to the answer.
    groups : dict of str to BoolTensor ``[token]``
        Token groups of this prompt beyond the usual ones ("object", "background").
    cross : CrossStates or None
        The image, where cross-attention layers read it (Mllama).
    visual : Visual or None
        What is known of the image tokens outside the decoder, where it was asked for.
    """

    ids: torch.Tensor
    embeds: torch.Tensor
    image: torch.Tensor
    positions: torch.Tensor | None
    types: dict[str, torch.Tensor]
    deepstack: tuple[torch.Tensor, ...]
    n_prompt: int
    groups: dict[str, torch.Tensor] = field(default_factory=dict)
    cross: CrossStates | None = None
    visual: Visual | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def extended(self, subject: Subject, tokens: Sequence[int]) -> Encoded:
        """The same with answer tokens appended (causal text tokens, positions counted on)."""
        if not tokens:
            return self
        n = len(tokens)
        ids = torch.tensor(tokens, device=self.ids.device)
        embeds = subject.anatomy.embedding(ids[None])[0].to(self.embeds.dtype)
        positions = self.positions
        if positions is not None:
            after = positions.max() + 1 + torch.arange(n, device=positions.device)
            positions = torch.cat([positions, after.expand(positions.shape[0], n)], dim=1)
        causal = dict(subject.anatomy.family.token_types)
        cross = self.cross
        if cross is not None:
            # An answer sees of the image what the last prompt token sees.
            mask, rows = (torch.cat([part, part[-1:].expand(n, *part.shape[1:])]) for part in (cross.mask, cross.rows))
            cross = replace(cross, mask=mask, rows=rows)
        return replace(
            self,
            ids=torch.cat([self.ids, ids]),
            embeds=torch.cat([self.embeds, embeds]),
            image=pad(self.image, (0, n)),
            positions=positions,
            types={name: pad(value, (0, n), value=causal[name]) for name, value in self.types.items()},
            groups={
                name: pad(members, (0, n), value=name == "answer")
                for name, members in {"answer": torch.zeros_like(self.image), **self.groups}.items()
            },
            cross=cross,
        )


def capture(subject: Subject, inputs: dict[str, torch.Tensor]) -> list[Encoded]:
    """Run everything before the language model on right-padded processor outputs; one ``Encoded`` per sequence.

    Raises
    ------
    SubjectError
        Where the model never calls the language model that its family names.
    ValueError
        Where a sequence is not padded on the right.
    """
    if current_run() is not None:
        raise RuntimeError("items cannot be encoded inside an active run: encode first, then intervene")
    with capturing():
        try:
            subject.anatomy.base(**inputs, use_cache=False)
        except Captured as stopped:
            received = stopped.inputs
        else:
            raise SubjectError(
                f"subject '{subject.name}' never called its language model: its Family in vlm_core/families/family.py names "
                f"the wrong module."
            )
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    lengths = valid.sum(1).tolist()
    image = ids == subject.anatomy.image_token_id
    positions = received.get("position_ids")
    if positions is not None:
        positions = positions.reshape(-1, *positions.shape[-2:]).expand(-1, ids.shape[0], -1)
    deepstack = received.get("deepstack_visual_embeds") or ()
    n_image = image.sum(1).tolist()
    deepstack = [torch.split(features, n_image) for features in deepstack]
    embeds = _merged(subject, received, ids)
    encoded = []
    for row, n in enumerate(lengths):
        if not bool(valid[row, :n].all()):
            raise ValueError("capture needs right-padded inputs")
        encoded.append(
            Encoded(
                ids=ids[row, :n],
                embeds=embeds[row, :n].clone(),
                image=image[row, :n],
                positions=None if positions is None else positions[:, row, :n].clone(),
                types={name: inputs[name][row, :n] for name, _ in subject.anatomy.family.token_types if name in inputs},
                deepstack=tuple(features[row] for features in deepstack),
                n_prompt=n,
                cross=_crossed(received, row, n_image, n),
            )
        )
    return encoded


def _merged(subject: Subject, received: dict, ids: torch.Tensor) -> torch.Tensor:
    embeds = received.get("inputs_embeds")
    return subject.anatomy.embedding(ids).detach() if embeds is None else embeds.detach()


def _crossed(received: dict, row: int, n_images: list[int], n: int) -> CrossStates | None:
    states = received.get("cross_attention_states")
    if states is None:
        return None
    mask, rows = received["cross_attention_mask"], received["full_text_row_masked_out_mask"]
    states = states.reshape(len(n_images), -1, states.shape[-1])
    # Only its own images: tokens before the first one weigh all keys alike, those of padding images too.
    own = states.shape[1] // max(n_images) * n_images[row]
    return CrossStates(
        states=states[row, :own].detach().clone(),
        mask=mask[row, 0, :n, :own].clone(),
        rows=rows[row, 0, :n, 0].clone(),
    )


def encode_items(
    subject: Subject, items: Sequence, images: Sequence | None = None, batch: int = 32, reads: Collection[str] = ()
) -> list[Encoded]:
    """Encode items (or the items' prompts with other ``images``) in batches of ``batch`` images.

    Where the subject remembers prompts (``vlm_core.subjects.remembering``), those that it knows are not encoded again.

    Parameters
    ----------
    reads : collection of str
        What must be known of image tokens outside the decoder (``vlm_core.subjects.visual.asked_outside``); default nothing.

    Raises
    ------
    SubjectError
        Where a prompt came out of the processor without image tokens.
    """
    pictures = [item_field(item, "image") for item in items] if images is None else images
    prompts = [item_field(item, "prompt") for item in items]
    known = subject.known_prompts
    if known is None:
        return _encode(subject, pictures, prompts, batch, reads)
    state, keys = subject.weights_state(), [prompt_key(*one, reads) for one in zip(pictures, prompts, strict=True)]
    encoded = dict(zip(keys, known.find(state, keys), strict=True))
    missing = list({key: number for number, key in enumerate(keys) if encoded[key] is None}.values())
    found = _encode(subject, [pictures[number] for number in missing], [prompts[number] for number in missing], batch, reads)
    for number, one in zip(missing, found, strict=True):
        encoded[keys[number]] = one
        known.learn(state, keys[number], one)
    return [encoded[key] for key in keys]


def _encode(subject: Subject, pictures: Sequence, prompts: Sequence[str], batch: int, reads: Collection[str]) -> list[Encoded]:
    encoded: list[Encoded] = []
    for start in range(0, len(prompts), batch):
        some = slice(start, start + batch)
        batch_of = prepared(subject, pictures[some], prompts[some])
        with torch.inference_mode(), active(None):
            found = capture(subject, batch_of.inputs)
            if reads:
                outside = visuals(subject, batch_of.inputs, batch_of.sizes, reads)
                found = [replace(one, visual=visual) for one, visual in zip(found, outside, strict=True)]
        encoded.extend(found)
    return encoded


def batch_sequences(subject: Subject, sequences: Sequence[Encoded]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Right-pad sequences to model inputs.

    Returns
    -------
    inputs : dict
        For the module that ``Family.enter`` names.
    image, valid : BoolTensor ``[sequence, token]``
    """
    family = subject.anatomy.family
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].ids.device)
    longest = int(lengths.max())
    steps = torch.arange(longest, device=lengths.device)
    valid = steps < lengths[:, None]
    image = pad_sequence([sequence.image for sequence in sequences], batch_first=True)
    inputs: dict = {
        "inputs_embeds": pad_sequence([sequence.embeds for sequence in sequences], batch_first=True),
        "attention_mask": None,
        "use_cache": False,
    }
    if sequences[0].positions is not None:
        inputs["position_ids"] = _pad_positions(sequences, longest)
    for name, causal in family.token_types:
        if name in sequences[0].types:
            inputs[name] = pad_sequence(
                [sequence.types[name] for sequence in sequences], batch_first=True, padding_value=causal
            )
    if sequences[0].deepstack:
        inputs["visual_pos_masks"] = image
        inputs["deepstack_visual_embeds"] = [
            torch.cat(features) for features in zip(*(sequence.deepstack for sequence in sequences), strict=True)
        ]
    if sequences[0].cross is not None:
        inputs.update(_pad_cross([sequence.cross for sequence in sequences], longest))
    return inputs, image, valid


def batch_groups(sequences: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Named token groups of a batch as ``batch_sequences`` lays it out: ``{name: BoolTensor [sequence, token]}``.

    A sequence that does not know a name has no member of it.
    """
    names = sorted({name for sequence in sequences for name in sequence.groups})
    return {
        name: pad_sequence(
            [sequence.groups.get(name, torch.zeros_like(sequence.image)) for sequence in sequences], batch_first=True
        )
        for name in names
    }


def _pad_positions(sequences: Sequence[Encoded], longest: int) -> torch.Tensor:
    # Padding counts on: a jump in the positions would be taken for packed sequences.
    rows = []
    for sequence in sequences:
        positions = sequence.positions
        extra = longest - positions.shape[1]
        after = positions.max() + 1 + torch.arange(extra, device=positions.device)
        rows.append(torch.cat([positions, after.expand(positions.shape[0], extra)], dim=1))
    stacked = torch.stack(rows, dim=1)
    return stacked[0] if stacked.shape[0] == 1 else stacked


def _pad_cross(crosses: Sequence[CrossStates], longest: int) -> dict:
    most = max(cross.states.shape[0] for cross in crosses)
    blocked = torch.finfo(crosses[0].mask.dtype).min
    masks = []
    for cross in crosses:
        mask = pad(cross.mask, (0, most - cross.mask.shape[1]), value=blocked)
        # A token before every image weighs all keys alike, as the model does; padding keys stay out.
        masks.append(pad(mask, (0, 0, 0, longest - mask.shape[0])))
    return {
        "cross_attention_states": pad_sequence([cross.states for cross in crosses], batch_first=True),
        "cross_attention_mask": torch.stack(masks)[:, None],
        "full_text_row_masked_out_mask": pad_sequence(
            [cross.rows for cross in crosses], batch_first=True, padding_value=1.0
        )[:, None, :, None],
    }
