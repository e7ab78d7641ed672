"""Image tokens dropped, merged and replaced."""

from __future__ import annotations

import torch

from vlm_core.interventions import DropTokens, KnockOut, MergeTokens, ReplaceTokens
from vlm_core.tests.conformance.by_hand import merged_by_hooks
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import Grab, batch_of, close, logits_of, logits_under, subject_of


@conforms(
    "drop", "drop", lambda subject, batch: logits_under(subject, DropTokens(2, 0.0), batch)
)
def test_drop(name):
    """Without image tokens from a layer on, text is as if it could not see them, on a shorter sequence."""
    subject, batch = subject_of(name), batch_of(name)
    grab, layer = Grab(), 2
    seen = logits_under(subject, DropTokens(layer, 0.0), batch, [grab])
    cut = logits_under(subject, KnockOut("text", "image", tuple(range(layer, subject.anatomy.n_layers))), batch)
    close(seen[:, -1], cut[:, -1])
    n, n_image = batch.image.shape[1], int(batch.image.sum())
    lengths = [grab.views[index].key.shape[2] for index in range(subject.anatomy.n_layers)]
    assert lengths == [n, n, n - n_image, n - n_image]


@conforms(
    "replace tokens",
    "replace_tokens",
    lambda subject, batch: logits_under(subject, ReplaceTokens(torch.zeros(subject.anatomy.hidden_size)), batch),
)
def test_replace_tokens(name):
    """Against a hook that overwrites the image tokens in what enters the first layer."""
    subject, batch = subject_of(name), batch_of(name)
    token = torch.randn(subject.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))

    def overwrite(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return (torch.where(batch.image[:, :, None], token, hidden), *args[1:]), kwargs

    handle = subject.anatomy.layers[0].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        expected = logits_of(subject.model, batch)
    finally:
        handle.remove()
    close(logits_under(subject, ReplaceTokens(token), batch), expected)
    assert not torch.allclose(expected, logits_of(subject.model, batch))


@conforms("merge", "merge", lambda subject, batch: logits_under(subject, MergeTokens(2, 0.5), batch))
def test_merge(name):
    """Against the plain eager model on a sequence that hooks make shorter; keeping all is the identity."""
    subject, batch, layer = subject_of(name), batch_of(name), 2
    plain = logits_of(subject.model, batch)
    n, n_image = batch.image.shape[1], int(batch.image.sum())
    for keep in (0.5, 0.25):
        for proportional in (True, False):
            grab = Grab()
            seen = logits_under(subject, MergeTokens(layer, keep, proportional=proportional), batch, [grab])
            left = max(1, round(keep * n_image))
            assert [grab.views[index].key.shape[2] for index in range(4)] == [n, n, n - n_image + left, n - n_image + left]
            close(seen, merged_by_hooks(name, layer, left, proportional, batch), f"{keep}, {proportional}")
            assert not torch.allclose(seen[:, -1], plain[:, -1])
    assert torch.equal(logits_under(subject, MergeTokens(layer, 1.0), batch), plain)
