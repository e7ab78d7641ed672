"""Gradients of what the model is about to answer.

``HeadGradients``         with respect to a gate on every head's output: gradient x gate, the cheap rival of ablation
``ImageGradients``        with respect to the embeddings of the image tokens
``IntegratedGradients``   the same integrated from a baseline image, one attribution per image token
``final_hidden(...)``, ``next_logits(...)``   the pass that they are of

They are observers with passes of their own (``measure``), so ``observe`` and a recording take them like any other. The
forward pass is the model's own under a ``Run`` whose heads have gates; nothing is re-implemented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_core.errors import SubjectError
from vlm_core.families.anatomy import Anatomy
from vlm_core.interventions.numeric import integer
from vlm_core.items import item_field, item_number
from vlm_core.observation.lens import target_tokens
from vlm_core.seam.plan import Program
from vlm_core.seam.run import Run
from vlm_core.seam.seam import active
from vlm_core.subjects.embed import Encoded, batch_groups, batch_sequences
from vlm_core.subjects.subject import Subject
from vlm_core.sweeps.layers import outside_inference

__all__ = ["HeadGradients", "ImageGradients", "IntegratedGradients", "final_hidden", "next_logits"]

TARGETS = ("logit", "margin")
# A pass that remembers everything for its way back takes several times the memory of one that does not.
_TOKENS_AT_ONCE = 4096


class _GatedRun(Run):
    """A run in which every head's output is multiplied by ``gates`` ``[row, layer, head]``."""

    alert = True

    gates: torch.Tensor

    def attend(self, layer, *args, **kwargs):
        output, weights = super().attend(layer, *args, **kwargs)
        gates = self.gates[self.tokens.rows, layer].to(output.device, output.dtype)
        return output * gates[:, None, :, None], weights


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got '{target}'")


def _targets(subject: Subject, items: Sequence, target: str) -> torch.Tensor:
    """Tokens ``[item, target]``: the answer's, then for margins those of its rivals (-1 where there are fewer)."""
    answers = target_tokens(subject, items, "answer")
    if target == "logit":
        return answers
    rivals = []
    for item, answer in zip(items, answers[:, 0].tolist(), strict=True):
        right = item_field(item, "answer")
        others = [one for one in item_field(item, "candidates") if one != right]
        tokens = [subject.continuation(one)[0] for one in others]
        if not tokens:
            raise ValueError(f"item {item_field(item, 'id')!r} has no wrong candidate: a margin needs one")
        if answer in tokens:
            raise ValueError(
                f"item {item_field(item, 'id')!r}: answer {right!r} and {others[tokens.index(answer)]!r} start with the "
                f"same token, a margin at the first token cannot tell them apart: use target 'logit'"
            )
        rivals.append(torch.tensor(tokens))
    padded = torch.nn.utils.rnn.pad_sequence(rivals, batch_first=True, padding_value=-1)
    return torch.cat([answers, padded], dim=1)


def final_hidden(
    subject: Subject, sequences: Sequence[Encoded], numbers: Sequence[int], intervention=None, gates=None, images=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states ``[sequence, token, hidden]``, differentiable, and where each prompt's last token is among them, ``[sequence]``.

    Parameters
    ----------
    numbers : sequence of int, one per sequence
        Of their items.
    intervention : Row
        On all of them.
    gates : Tensor ``[sequence, layer, head]``, optional
        What every head's output is multiplied by.
    images : Tensor ``[sequence, image token, hidden]``, optional
        Embeddings of the image tokens instead of their own, for sequences with equally many.
    """
    anatomy = subject.anatomy
    inputs, image, valid = batch_sequences(subject, sequences)
    inputs = outside_inference(inputs)
    embeds = inputs["inputs_embeds"]
    if images is not None:
        inputs["inputs_embeds"] = embeds.masked_scatter(image[:, :, None], images.to(embeds.dtype))
    rows = [intervention] * len(sequences)
    program = Program.compile(rows, anatomy.n_layers, anatomy.n_heads, embeds.device, embeds.dtype)
    kind = Run if gates is None else _GatedRun
    run = kind(anatomy, program, image, valid, items=numbers, left=False, groups=batch_groups(sequences))
    if gates is not None:
        run.gates = gates
    module = anatomy.language_model if anatomy.family.enter == "language_model" else anatomy.base
    with active(run):
        hidden = module(**inputs).last_hidden_state
    return hidden, run.tokens.last.to(hidden.device)


def next_logits(anatomy: Anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits ``[..., vocabulary]`` in float32 of final hidden states ``[..., hidden]``, differentiable."""
    logits = anatomy.head(hidden).float()
    return logits if anatomy.logit_softcap is None else torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap


def _score(
    subject: Subject,
    sequences: Sequence[Encoded],
    numbers: Sequence[int],
    tokens: torch.Tensor,
    intervention=None,
    gates: torch.Tensor | None = None,
    images: torch.Tensor | None = None,
) -> torch.Tensor:
    """The target of every sequence, ``[sequence]``, differentiable in ``gates`` and ``images``.

    ``gates`` ``[sequence, layer, head]``; ``images`` ``[sequence, image token, hidden]``, for sequences with equally many.
    """
    hidden, last = final_hidden(subject, sequences, numbers, intervention, gates, images)
    logits = next_logits(subject.anatomy, hidden[torch.arange(len(sequences), device=hidden.device), last])
    tokens = tokens.to(logits.device)
    picked = logits.gather(1, tokens.clamp(min=0))
    if picked.shape[1] == 1:
        return picked[:, 0]
    return picked[:, 0] - picked[:, 1:].masked_fill(tokens[:, 1:] < 0, -torch.inf).amax(1)


def _margins(
    subject: Subject, items: Sequence, sequences: Sequence[Encoded], numbers: Sequence[int], intervention, gates: torch.Tensor
) -> torch.Tensor:
    """Summed log-probability of every item's answer above that of its best rival, as a sweep's ``margin``, ``[item]``."""
    extended, owners, reads, answers = [], [], [], []
    for number, (item, encoded) in enumerate(zip(items, sequences, strict=True)):
        answer, candidates = item_field(item, "answer"), list(item_field(item, "candidates"))
        if len(set(candidates)) < 2:
            raise ValueError(f"item {item_field(item, 'id')!r} has no wrong candidate: a margin needs one")
        tokens = [subject.continuation(one) for one in candidates]
        rows = {}
        for prefix in dict.fromkeys(one[:-1] for one in tokens):
            rows[prefix] = len(extended)
            extended.append(encoded.extended(subject, prefix))
            owners.append(number)
        reads.append([(rows[one[:-1]], one) for one in tokens])
        answers.append(candidates.index(answer))
    hidden, _ = final_hidden(subject, extended, [numbers[owner] for owner in owners], intervention, gates[owners])
    margins = []
    for answer, candidates in zip(answers, reads, strict=True):
        scores = []
        for row, tokens in candidates:
            where = torch.arange(len(extended[row]) - len(tokens), len(extended[row]), device=hidden.device)
            chances = next_logits(subject.anatomy, hidden[row, where]).log_softmax(-1)
            scores.append(chances[torch.arange(len(tokens)), list(tokens)].sum())
        scores = torch.stack(scores)
        rivals = torch.arange(len(candidates), device=scores.device) != answer
        margins.append(scores[answer] - scores[rivals].max())
    return torch.stack(margins)


def _chunks(encoded: Sequence[Encoded]) -> list[slice]:
    longest = max(map(len, encoded))
    step = max(1, _TOKENS_AT_ONCE // longest)
    return [slice(start, start + step) for start in range(0, len(encoded), step)]


def _image_tokens(subject: Subject, encoded: Encoded, item) -> torch.Tensor:
    """Embeddings of the image tokens, ``[image token, hidden]``."""
    if not bool(encoded.image.any()) or encoded.cross is not None:
        raise SubjectError(
            f"subject '{subject.name}' has no image tokens in the sequence of item {item_field(item, 'id')!r}: gradients "
            f"of image embeddings have nothing to refer to; HeadGradients need none."
        )
    return encoded.embeds.clone()[encoded.image]


def _pad_tokens(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=float("nan"))


@dataclass(frozen=True)
class HeadGradients:
    """Gradient of the target with respect to a gate on every head's output, at gate 1: ``[item, layer, head]``.

    The gate multiplies the head's output at all positions, so that this is the first-order guess of what zeroing the head
    costs (gradient x gate).

    Parameters
    ----------
    target : {"logit", "margin"}
        The logit of the answer's first token as the next one, or the summed log-probability of the whole answer above that of its strongest
        rival among the candidates (a sweep's ``margin``).
    """

    target: str = "logit"

    def __post_init__(self) -> None:
        _check_target(self.target)

    @property
    def axes(self) -> tuple:
        """Layer and head."""
        return (("layer", None), ("head", None))

    def measure(self, subject: Subject, items: Sequence, encoded: Sequence[Encoded], intervention=None) -> dict:
        """``{"": [item, layer, head]}``."""
        anatomy, found = subject.anatomy, []
        with torch.inference_mode(False), torch.enable_grad():
            for chunk in _chunks(encoded):
                gates = torch.ones(len(encoded[chunk]), anatomy.n_layers, anatomy.n_heads, device=subject.device)
                gates.requires_grad_()
                numbers = [item_number(item) for item in items[chunk]]
                if self.target == "margin":
                    score = _margins(subject, items[chunk], encoded[chunk], numbers, intervention, gates)
                else:
                    tokens = _targets(subject, items[chunk], self.target)
                    score = _score(subject, encoded[chunk], numbers, tokens, intervention, gates=gates)
                found.append(torch.autograd.grad(score.sum(), gates)[0])
        return {"": torch.cat(found)}


@dataclass(frozen=True)
class ImageGradients:
    """Gradient of the target with respect to the image tokens' embeddings: ``[item, image token, hidden]``.

    Parameters
    ----------
    target : {"logit", "margin"}
        As in ``HeadGradients``.
    """

    target: str = "logit"

    def __post_init__(self) -> None:
        _check_target(self.target)

    @property
    def ragged(self) -> dict[int, str]:
        """As many rows as image tokens."""
        return {-2: "image"}

    def measure(self, subject: Subject, items: Sequence, encoded: Sequence[Encoded], intervention=None) -> dict:
        """``{"": [item, image token, hidden]}``."""
        found = []
        with torch.inference_mode(False), torch.enable_grad():
            for item, sequence in zip(items, encoded, strict=True):
                images = _image_tokens(subject, sequence, item)[None].requires_grad_()
                tokens = _targets(subject, [item], self.target)
                score = _score(subject, [sequence], [item_number(item)], tokens, intervention, images=images)
                found.append(torch.autograd.grad(score.sum(), images)[0][0].float())
        return {"": _pad_tokens(found)}


@dataclass(frozen=True)
class IntegratedGradients:
    """Share of every image token in what the image changes about the target.

    Observed as a dict: ``attribution`` ``[item, image token]``, ``change`` ``[item]`` (target with the image minus target
    with the baseline in its place). Attributions sum to the change as ``steps`` grows (completeness).

    Parameters
    ----------
    target : {"logit", "margin"}
        As in ``HeadGradients``.
    steps : int
        Points on the straight way from the baseline to the image (midpoint rule).
    baseline : {"mean", "zero"}
        Every image token replaced by the mean one of its image, which keeps embeddings in distribution, or by zeros.

    Notes
    -----
    A norm as first thing in a layer makes tokens near zero all alike but for their direction: most of what an image changes
    then happens in the very first stretch from zeros, which no affordable number of steps resolves. ``change`` shows it.

    Sundararajan et al. 2017, arXiv:1703.01365. 50 steps and the real answer token as target in Neo et al. 2025.
    """

    target: str = "logit"
    steps: int = 50
    baseline: str = "mean"

    def __post_init__(self) -> None:
        _check_target(self.target)
        object.__setattr__(self, "steps", integer(self.steps, "steps", least=1))
        if self.baseline not in ("mean", "zero"):
            raise ValueError(f"baseline must be mean or zero, got '{self.baseline}'")

    @property
    def ragged(self) -> dict[int, str]:
        """As many attributions as image tokens."""
        return {-1: "image"}

    def measure(self, subject: Subject, items: Sequence, encoded: Sequence[Encoded], intervention=None) -> dict:
        """``attribution`` and ``change``."""
        attributions, changes = [], []
        with torch.inference_mode(False), torch.enable_grad():
            for item, sequence in zip(items, encoded, strict=True):
                whole = _image_tokens(subject, sequence, item)
                start = whole.mean(0, keepdim=True).expand_as(whole) if self.baseline == "mean" else torch.zeros_like(whole)
                tokens, number = _targets(subject, [item], self.target), item_number(item)

                def score(images, tokens=tokens, number=number, sequence=sequence):
                    n = len(images)
                    return _score(
                        subject, [sequence] * n, [number] * n, tokens.expand(n, -1), intervention, images=images
                    )

                total = torch.zeros_like(whole, dtype=torch.float32)
                way = (torch.arange(self.steps, device=whole.device) + 0.5) / self.steps
                for some in way.split(max(1, _TOKENS_AT_ONCE // len(sequence))):
                    images = (start + some[:, None, None].to(whole.dtype) * (whole - start)).requires_grad_()
                    total += torch.autograd.grad(score(images).sum(), images)[0].float().sum(0)
                attributions.append((total / self.steps * (whole - start).float()).sum(1))
                with torch.no_grad():
                    ends = torch.cat([score(whole[None]), score(start[None])])
                changes.append(ends[0] - ends[1])
        return {"attribution": _pad_tokens(attributions), "change": torch.stack(changes)}
