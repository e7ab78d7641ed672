"""Does the seam tell the truth on this model? Checked at load time, loudly.

1. *no-op*: with the seam and an empty plan, logits are bit-identical to the model with its original attention
2. *zero head*: zeroing one head equals an ``o_proj`` pre-hook that zeroes its slice, and changes the logits
3. *knock-out of nothing*: cutting no edge is the identity
4. *causality*: changing the last token leaves all earlier logits alone
5. *readout*: the row engine's logits equal the model's own
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vlm_core.embed import capture
from vlm_core.errors import SubjectError
from vlm_core.interventions import KnockOut, ZeroHeads
from vlm_core.rows import forward_rows, read_logits
from vlm_core.seam import ATTENTION_NAMES
from vlm_core.subject import Batch, Subject

__all__ = ["selfcheck"]


def selfcheck(subject: Subject, batch: Batch | None = None) -> None:
    """Check the seam on ``subject``.

    Parameters
    ----------
    batch : Batch, optional
        Inputs to check with (one unpadded prompt); by default a noise image with a short question.

    Raises
    ------
    SubjectError
        Naming the check that failed and by how much.
    """
    batch = _probe(subject) if batch is None else batch
    with torch.inference_mode():
        plain = _without_seam(subject, batch)
        _check_noop(subject, batch, plain)
        _check_zero_head(subject, batch, plain)
        _check_knock_out(subject, batch, plain)
        _check_causality(subject, batch)
        _check_readout(subject, batch, plain)


def _probe(subject: Subject) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return subject.encode([Image.fromarray(pixels)], ["What is in the image?"])


def _logits(subject: Subject, inputs: dict) -> torch.Tensor:
    return subject.model(**inputs, use_cache=False).logits


def _fail(subject: Subject, check: str, detail: str) -> SubjectError:
    return SubjectError(f"subject '{subject.name}' failed the self-check '{check}': {detail}.")


def _without_seam(subject: Subject, batch: Batch) -> torch.Tensor:
    text_config = subject.model.config.get_text_config()
    named = text_config._attn_implementation
    # Set on the config itself: nothing else may change between the two runs.
    text_config._attn_implementation_internal = subject.seam.original
    try:
        return _logits(subject, batch.inputs)
    finally:
        text_config._attn_implementation_internal = named


def _check_noop(subject: Subject, batch: Batch, plain: torch.Tensor) -> None:
    if subject.model.config.get_text_config()._attn_implementation not in ATTENTION_NAMES.values():
        raise _fail(subject, "no-op", "the seam is not on the language model any more")
    with subject.intervene(None, batch):
        seen = _logits(subject, batch.inputs)
    if not torch.equal(seen, plain):
        gap = (seen - plain).abs().max().item()
        raise _fail(subject, "no-op", f"an empty plan changes the logits by {gap:.2g}, expected exactly 0")


def _check_zero_head(subject: Subject, batch: Batch, plain: torch.Tensor) -> None:
    anatomy = subject.anatomy
    layer, head = anatomy.n_layers // 2, anatomy.n_heads - 1
    with subject.intervene(ZeroHeads([(layer, head)]), batch):
        seam = _logits(subject, batch.inputs)

    def zero_slice(module, args):
        hidden = args[0].clone()
        hidden[..., head * anatomy.head_dim : (head + 1) * anatomy.head_dim] = 0
        return (hidden, *args[1:])

    handle = anatomy.output_projection(layer).register_forward_pre_hook(zero_slice)
    try:
        hooked = _logits(subject, batch.inputs)
    finally:
        handle.remove()
    if not torch.equal(seam, hooked):
        gap = (seam - hooked).abs().max().item()
        raise _fail(subject, "zero head", f"it differs from an output-projection hook by {gap:.2g}, expected exactly 0")
    if torch.equal(seam, plain):
        raise _fail(subject, "zero head", f"zeroing head L{layer}.H{head} does not change the logits")


def _check_knock_out(subject: Subject, batch: Batch, plain: torch.Tensor) -> None:
    every_layer = tuple(range(subject.anatomy.n_layers))
    # A token never loses its attention to itself, so no edge is cut, yet the mask is built in full.
    with subject.intervene(KnockOut("last", "last", every_layer), batch):
        seen = _logits(subject, batch.inputs)
    gap = (seen - plain).abs().max().item()
    if gap > _tolerance(plain):
        raise _fail(subject, "knock-out of nothing", f"cutting no edge changes the logits by {gap:.2g}")


def _check_causality(subject: Subject, batch: Batch) -> None:
    inputs = dict(batch.inputs)
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1) % subject.anatomy.vocab_size
    if bool((ids[:, -1] == subject.anatomy.image_token_id).any()):
        ids[:, -1] = (ids[:, -1] + 1) % subject.anatomy.vocab_size
    types = {name: inputs[name].clone() for name, _ in subject.anatomy.family.token_types if name in inputs}
    for name, causal in subject.anatomy.family.token_types:
        if name in types:
            types[name][:, -1] = causal
    with subject.intervene(None, batch):
        before = _logits(subject, {**inputs, **types})[:, :-1]
        after = _logits(subject, {**inputs, **types, "input_ids": ids})[:, :-1]
    gap = (before - after).abs().max().item()
    if gap > _tolerance(before):
        raise _fail(subject, "causality", f"the last token changes earlier logits by {gap:.2g}: a mask is missing")


def _check_readout(subject: Subject, batch: Batch, plain: torch.Tensor) -> None:
    single = {name: value for name, value in batch.inputs.items()}
    (sequence, *_) = capture(subject, single)
    hidden, _ = forward_rows(
        subject, [sequence], np.array([0]), [None], [0], (np.array([0]), np.array([sequence.n_prompt - 1]))
    )
    own = plain[0, -1].float()
    gap = (read_logits(subject, hidden)[0] - own).abs().max().item()
    if gap > _tolerance(plain):
        raise _fail(subject, "readout", f"the row engine's logits differ from the model's own by {gap:.2g}")


def _tolerance(logits: torch.Tensor) -> float:
    # Different kernels (with and without an explicit mask) round differently: a few hundred ulp of the largest logit.
    return 1024 * torch.finfo(logits.dtype).eps * max(1.0, logits.abs().max().item())
