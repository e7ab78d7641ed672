"""Does the seam tell the truth on this model? The cheap part of the conformance suite, run at load time, loudly.

1. *no-op*: with the seam and an empty plan, logits are bit-identical to the model with its original attention
2. *attention*: what every head gives to the keys it sees sums to 1
3. *zero head*: zeroing one head equals an ``o_proj`` pre-hook that zeroes its slice, and changes the logits
4. *image keys*: replacing a head's image keys and values touches no other position and no other head
5. *knock-out of nothing*: cutting no edge is the identity
6. *causality*: changing the last token leaves all earlier logits alone (as an answer token, where a prompt sees itself both ways)
7. *readout*: the row engine's logits equal the model's own
8. *restored*: after all of it the model is what it was
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vlm_core.errors import SubjectError
from vlm_core.interventions import ImageKVMeans, KnockOut, ReplaceImageKV, ZeroHeads
from vlm_core.seam.seam import ATTENTION_NAMES
from vlm_core.seam.views import AttentionView
from vlm_core.subjects.batch import Batch
from vlm_core.subjects.embed import capture
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.subjects.subject import Subject, require_subject

__all__ = ["selfcheck"]


class _Views:
    """Keeps the attention of some layers as the seam saw it."""

    def __init__(self, *layers: int) -> None:
        self.layers = layers
        self.seen: dict[int, AttentionView] = {}

    def attention(self, view: AttentionView) -> None:
        if view.layer in self.layers:
            self.seen[view.layer] = view


def selfcheck(subject: Subject, batch: Batch | None = None) -> None:
    """Check the seam on ``subject`` (a dozen forward passes of one short prompt).

    Parameters
    ----------
    batch : Batch, optional
        Inputs to check with (one unpadded prompt); by default a noise image with a short question.

    Raises
    ------
    SubjectError
        Naming the check that failed and by how much.
    """
    require_subject(subject)
    batch = _probe(subject) if batch is None else batch
    layer = subject.anatomy.image_layers[-1]
    with torch.inference_mode():
        plain = _without_seam(subject, batch)
        views = _Views(layer)
        _check_noop(subject, batch, plain, views)
        _check_attention(subject, views.seen[layer])
        _check_zero_head(subject, batch, plain)
        _check_image_keys(subject, batch, views.seen[layer])
        _check_knock_out(subject, batch, plain)
        _check_causality(subject, batch)
        _check_readout(subject, batch, plain)
        if not torch.equal(_logits(subject, batch.inputs), plain):
            raise _fail(subject, "restored", "after the checks the model computes other logits than before")


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


def _check_noop(subject: Subject, batch: Batch, plain: torch.Tensor, views: _Views) -> None:
    if subject.model.config.get_text_config()._attn_implementation not in ATTENTION_NAMES.values():
        raise _fail(subject, "no-op", "the seam is not on the language model any more")
    with subject.intervene(None, batch, observers=[views]):
        seen = _logits(subject, batch.inputs)
    if not torch.equal(seen, plain):
        gap = (seen - plain).abs().max().item()
        raise _fail(subject, "no-op", f"an empty plan changes the logits by {gap:.2g}, expected exactly 0")
    if not views.seen:
        raise _fail(subject, "no-op", f"attention never passed the seam in layer {views.layers[0]}")


def _check_attention(subject: Subject, view: AttentionView) -> None:
    mass = view.probabilities(view.tokens.last[:, None]) @ view.keys_of("all").float()[:, None, :, None]
    gap = (mass - 1.0).abs().max().item()
    if not gap < 1e-3:
        raise _fail(subject, "attention", f"in layer {view.layer} the attention of a head sums to 1 only within {gap:.2g}")


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


def _check_image_keys(subject: Subject, batch: Batch, before: AttentionView) -> None:
    anatomy, layer, head = subject.anatomy, before.layer, 0
    zeros = torch.zeros(anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    views = _Views(layer)
    with subject.intervene(ReplaceImageKV([(layer, head)], ImageKVMeans(zeros, zeros)), batch, observers=[views]):
        _logits(subject, batch.inputs)
    after, image = views.seen[layer], before.keys_of("image")
    for name, old, new in (("keys", before.key, after.key), ("values", before.value, after.value)):
        changed = (new != old.repeat_interleave(new.shape[1] // old.shape[1], dim=1)).any(-1)
        if not bool(changed[:, head][image].all()):
            raise _fail(subject, "image keys", f"not all image {name} of head L{layer}.H{head} are replaced")
        changed[:, head] &= ~image
        if bool(changed.any()):
            raise _fail(subject, "image keys", f"replacing those of head L{layer}.H{head} changes {name} elsewhere")


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
    (sequence, *_) = capture(subject, dict(batch.inputs))
    hidden, _ = forward_rows(
        subject, [sequence], np.array([0]), [None], [0], (np.array([0]), np.array([sequence.n_prompt - 1]))
    )
    own = plain[0, -1].float()
    gap = (read_logits(subject, hidden)[0] - own).abs().max().item()
    if gap > _tolerance(plain):
        raise _fail(subject, "readout", f"the row engine's logits differ from the model's own by {gap:.2g}")


def _tolerance(logits: torch.Tensor) -> float:
    # Different kernels (with and without an explicit mask) round differently: by up to a thousand ulp in float32, and never by more than a
    # tenth of the largest logit, which in half precision is the tighter bound.
    return min(1024 * torch.finfo(logits.dtype).eps, 0.1) * max(1.0, logits.abs().max().item())
