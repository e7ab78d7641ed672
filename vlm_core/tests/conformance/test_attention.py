"""What heads look at, what they cannot see, and what they see instead."""

from __future__ import annotations

import torch

from vlm_core import AttentionMass, HiddenStates
from vlm_core.interventions import KnockOut, ReplaceImageKV
from vlm_core.tests.conformance.by_hand import masked_by_hooks
from vlm_core.tests.conformance.claims import conforms
from vlm_core.tests.conformance.models import (
    TOLERANCE,
    Grab,
    batch_of,
    close,
    inner,
    logits_of,
    logits_under,
    plain_model,
    some_means,
    subject_of,
)
from vlm_core.tests.family_models import AFTER


@conforms("mass")
def test_attention_mass(name):
    """With the attention that the model has, and with eager: one prompt and a padded pair, of one query, of some and of all."""
    eager, groups = subject_of(name, "eager"), ("image", "text", "question")
    observers = [AttentionMass(queries, groups=groups) for queries in ("last", "text", "question", "all")]
    for batch in (batch_of(name), batch_of(name, counts=(1, 1), after=(AFTER, AFTER[:2]), side="left")):
        with torch.inference_mode():
            maps = inner(eager.model(**batch.inputs, use_cache=False, output_attentions=True)).attentions
        assert len(maps) == eager.anatomy.n_layers
        for subject in (eager, subject_of(name)):
            with torch.inference_mode(), subject.intervene(None, batch, observers=observers) as run:
                subject.model(**batch.inputs, use_cache=False)
            for layer, probabilities in enumerate(maps):
                crossed = layer in subject.anatomy.cross_layers
                for number, observer in enumerate(observers):
                    seen = run.record(number, layer)
                    for prompt, members in enumerate(batch.tokens.group(observer.queries)):
                        mean = probabilities[prompt, :, members].mean(1)
                        on = [mean.sum(-1) * (group == "image") for group in groups] if crossed else [
                            mean[:, batch.tokens.group(group)[prompt]].sum(-1) for group in groups
                        ]  # fmt: skip
                        torch.testing.assert_close(seen[prompt], torch.stack(on, dim=-1), rtol=0.0, atol=TOLERANCE)
                        torch.testing.assert_close(seen[prompt, :, :2].sum(-1), torch.ones(len(mean)), rtol=0.0, atol=1e-4)


@conforms("knock-out")
def test_knock_out(name):
    """Against the plain eager model whose own masks lose the edges (and, where no key is left, whose output is zero)."""
    subject, batch = subject_of(name), batch_of(name)
    anatomy = subject.anatomy
    layers = anatomy.image_layers[-2:]
    for queries in ("text", "last"):
        seen = logits_under(subject, KnockOut(queries, "image", layers), batch)
        members = ~batch.image[0] if queries == "text" else torch.arange(batch.image.shape[1]) == batch.image.shape[1] - 1
        close(seen, masked_by_hooks(plain_model(name, "eager"), anatomy, layers, members, batch), f"{queries} -> image")
        assert not torch.allclose(seen, logits_of(subject.model, batch))


@conforms("nothing out")
def test_knock_out_nothing(name):
    subject, batch = subject_of(name), batch_of(name)
    plain = logits_of(subject.model, batch)
    every_layer = tuple(range(subject.anatomy.n_layers))
    # No edge is cut, yet the mask is built in full: a token never loses its attention to itself.
    close(logits_under(subject, KnockOut("last", "last", every_layer), batch), plain)
    assert torch.equal(logits_under(subject, KnockOut("last", "image", ()), batch), plain)


@conforms("image KV")
def test_image_kv(name):
    subject, batch = subject_of(name), batch_of(name)
    anatomy = subject.anatomy
    layer = anatomy.image_layers[-1]
    head, means = 2, some_means(anatomy)
    before, after = Grab(), Grab()
    plain = logits_under(subject, None, batch, [before])
    seen = logits_under(subject, ReplaceImageKV([(layer, head)], means), batch, [after])
    old, new = before.views[layer], after.views[layer]
    groups = anatomy.n_heads // old.key.shape[1]
    image = torch.ones(old.key.shape[2], dtype=bool) if layer in anatomy.cross_layers else batch.image[0]
    for kept, changed, mean in ((old.key, new.key, means.keys), (old.value, new.value, means.values)):
        kept = kept.repeat_interleave(groups, dim=1)
        others = torch.arange(anatomy.n_heads) != head
        assert torch.equal(changed[:, others], kept[:, others])
        assert torch.equal(changed[:, head, ~image], kept[:, head, ~image])
        assert torch.equal(changed[0, head, image], mean[layer, head].expand(int(image.sum()), -1))
    assert torch.equal(new.output[:, :, others], old.output[:, :, others])
    assert not torch.allclose(seen[:, -1], plain[:, -1])
    streams, layers_after, one = {}, range(layer + 1, anatomy.n_layers + 1), batch.image.shape[1] - 3
    for_one = ReplaceImageKV([(layer, head)], means, queries=(one,))
    for key, plan in (("plain", None), ("one", for_one), ("all", ReplaceImageKV([(layer, head)], means))):
        states = HiddenStates(positions="all")
        with torch.inference_mode(), subject.intervene(plan, batch, observers=[states]) as run:
            subject.model(**batch.inputs, use_cache=False)
        streams[key] = [run.record(0, at)[0] for at in range(anatomy.n_layers + 1)]
    for at in range(layer + 1):
        assert torch.equal(streams["all"][at], streams["plain"][at]) and torch.equal(streams["one"][at], streams["plain"][at])
    # Right behind the layer nothing has moved on yet, whoever sees whom.
    touched = (streams["one"][layer + 1] != streams["plain"][layer + 1]).any(-1)
    assert touched.nonzero().tolist() == [[one]]
    first = int(batch.image[0].int().argmax())
    before_image = [torch.equal(streams["all"][at][:first], streams["plain"][at][:first]) for at in layers_after]
    if anatomy.family.causal_prompt and anatomy.family.image_in_sequence:
        assert all(before_image)
        return None
    if not anatomy.family.causal_prompt:
        assert not torch.allclose(streams["all"][layer + 1][0], streams["plain"][layer + 1][0])
        return "yes: no text stands before the image, and its prompt sees itself both ways: what is replaced reaches every position of it"
    # A cross-attention layer gives text that comes before the image the mean of all image values.
    assert not any(before_image)
    return "yes: text before the image too looks at it, at every key alike (its cross-attention has no row without keys), and so changes"
