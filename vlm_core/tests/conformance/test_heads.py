"""Heads zeroed, kept and summed, against the output projection."""

from __future__ import annotations

import torch

from vlm_core.interventions import ZeroHeads
from vlm_core.tests.conformance.by_hand import zeroed_by_hooks
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import Grab, batch_of, logits_of, logits_under, subject_of


@conforms("zero head")
def test_zero_heads(name):
    subject, batch = subject_of(name), batch_of(name)
    heads = [(0, 1), (1, 0), (1, 3), (3, 2)]
    seen = logits_under(subject, ZeroHeads(heads), batch)
    assert torch.equal(seen, zeroed_by_hooks(subject, heads, batch))
    for head in heads:
        assert not torch.equal(logits_under(subject, ZeroHeads([head]), batch), logits_of(subject.model, batch))


@conforms("gate 1")
def test_gate_one(name):
    """In a batch whose other row loses every head, a row that keeps all of them is the plain model's."""
    subject = subject_of(name)
    batch = batch_of(name, counts=(1, 1), after=((12, 13, 14),) * 2)
    plain = logits_of(subject.model, batch)
    seen = logits_under(subject, [None, ZeroHeads(subject.heads)], batch)
    assert torch.equal(seen[0], plain[0])
    assert not torch.allclose(seen[1], plain[1])


@conforms("head sum")
def test_head_contributions(name):
    subject, batch = subject_of(name), batch_of(name)
    grab, outputs, size = Grab(), {}, subject.anatomy.head_dim
    handles = [
        module.register_forward_hook(lambda module, args, output, layer=layer: outputs.__setitem__(layer, output[0]))
        for layer, module in enumerate(subject.anatomy.attentions)
    ]
    try:
        logits_under(subject, None, batch, [grab])
    finally:
        for handle in handles:
            handle.remove()
    for layer, expected in outputs.items():
        projection = subject.anatomy.output_projection(layer)
        output, weight = grab.views[layer].output, projection.weight.detach()
        parts = [
            output[:, :, head] @ weight[:, head * size : (head + 1) * size].T for head in range(subject.anatomy.n_heads)
        ]
        total = sum(parts) + (0 if projection.bias is None else projection.bias.detach())
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert sorted(outputs) == list(range(subject.anatomy.n_layers))
