"""The residual stream patched and steered."""

from __future__ import annotations

import torch

from vlm_core.interventions import GaussianNoise, KnockOut, Patch, Steer, ZeroHeads
from vlm_core.subjects.activations import capture_activations
from vlm_core.subjects.embed import capture
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import batch_of, close, logits_of, logits_under, subject_of


@conforms("patch")
def test_patch(name):
    """The clean run's activations undo a corruption upstream of them, at every site; noise does not."""
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    with torch.inference_mode():
        (sequence,) = capture(subject, batch.inputs)
    clean = capture_activations(subject, sequence, ("residual", "attention", "mlp", "head"))
    layer = subject.anatomy.image_layers[-1]
    knock = KnockOut("text", "image", (layer,))
    noise = Patch("mlp", (layer,), GaussianNoise(3.0, seed=1))
    corrupted = {
        (ZeroHeads([(1, 0), (1, 1)]),): Patch("residual", (2,), clean),
        (knock,): Patch("attention", (layer,), clean),
        (knock, ZeroHeads(())): Patch("head", (layer,), clean),
        (noise,): Patch("mlp", (layer,), clean),
    }
    for corruption, patch in corrupted.items():
        assert not torch.allclose(logits_under(subject, corruption, batch), plain, atol=1e-2)
        close(logits_under(subject, (*corruption, patch), batch), plain, patch.site)


@conforms("steer")
def test_steer(name):
    """Against a hook that adds the direction to what enters a decoder layer."""
    subject, batch = subject_of(name), batch_of(name)
    direction, layer = torch.randn(subject.anatomy.hidden_size, generator=torch.Generator().manual_seed(0)), 2

    def add(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = hidden.clone()
        hidden[:, -2:] += 2.0 * direction
        return (hidden, *args[1:]), kwargs

    handle = subject.anatomy.layers[layer].register_forward_pre_hook(add, with_kwargs=True)
    try:
        expected = logits_of(subject.model, batch)
    finally:
        handle.remove()
    close(logits_under(subject, Steer(layer, direction, 2.0, positions=(-2, -1)), batch), expected)
    assert not torch.allclose(expected, logits_of(subject.model, batch))
