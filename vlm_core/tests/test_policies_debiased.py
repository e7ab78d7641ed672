"""Attention without rotary positions, and the policy that reads it."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from vlm_core import DropTokens, FullAttention, Subject
from vlm_core.errors import NotMeasurable
from vlm_core.interventions.policy import Seen
from vlm_core.observation.observing import observe_encoded
from vlm_core.reduction import Debiased, FastV
from vlm_core.subjects.embed import capture
from vlm_core.tests.conformance.models import batch_of, close, logits_under, subject_of
from vlm_core.tests.conformance.test_rows import run_on_paths
from vlm_core.tests.family_models import TINY
from vlm_core.tests.policy_states import N_PREAMBLE, attention_of, same_tokens, seen_of
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.test_policies import kept
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items, tiny_subject

FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "paligemma2", "gemma3", "aya_vision", "idefics3")


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize(("n", "keep"), [(5, 2), (12, 5), (33, 8), (64, 16)])
def test_it_is_its_definition(n, keep, uniform):
    seen = seen_of(n, seed=3)
    received = [0.0] * n
    for head in range(4):
        attention = attention_of(seen.unrotated, head, seen.stream.shape[0] - 1)
        for one in range(n):
            received[one] += attention[N_PREAMBLE + one]
    spread = round(uniform * keep)
    chosen = [int((number + 0.5) * n / spread) for number in range(spread)]
    for one in sorted(range(n), key=lambda one: -received[one]):
        if len(chosen) < keep and one not in chosen:
            chosen.append(one)
    assert Debiased(uniform).choose(seen, keep).kept.tolist() == sorted(chosen)


def test_by_hand():
    """Eight tokens, the later the more attended to: two of four evenly spaced (2 and 6), and the two best of the others."""
    numbers = torch.arange(8)
    seen = Seen(1, torch.zeros(8, 4), numbers, numbers[:0], numbers, 8)
    seen.once(("attention", "last", None, False), lambda: torch.arange(8.0)[None])
    assert Debiased(0.5).choose(seen, 4).kept.tolist() == [2, 5, 6, 7]
    assert Debiased(0.0).choose(seen, 4).kept.tolist() == [4, 5, 6, 7]
    assert Debiased(1.0).choose(seen, 4).kept.tolist() == [1, 3, 5, 7]
    assert seen.attention("last", rotary=False).tolist() == [list(range(8))]  # what others read of it stays


def test_attention_follows_tokens_to_other_places_evenly_spaced_ones_do_not():
    assert all(same_tokens(Debiased(0.0), 24, 8, seed) for seed in range(5))
    assert not all(same_tokens(Debiased(0.5), 24, 8, seed) for seed in range(5))


def test_settings_that_are_none_are_refused():
    for uniform in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="uniform"):
            Debiased(uniform)
    with pytest.raises(ValueError, match="use layer >= 1"):
        DropTokens(0, 0.5, Debiased())


# -- in a model -------------------------------------------------------------------------------------------------------


def flat_attention(subject, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """Attention of the last token of a prompt ``[token, hidden]`` by the explicit weights of a layer, no positions; averaged over heads."""
    anatomy, module = subject.anatomy, subject.anatomy.layers[layer]
    with torch.inference_mode():
        x = module.input_layernorm(stream)
        q, k = (proj(x).unflatten(1, (-1, anatomy.head_dim)).transpose(0, 1) for proj in (module.self_attn.q_proj, module.self_attn.k_proj))
        k = k.repeat_interleave(anatomy.kv_groups, 0)
        return (q[:, -1:] @ k.transpose(1, 2) * anatomy.head_dim**-0.5).softmax(-1)[:, 0].mean(0)


@contextmanager
def entering(subject, layer: int):
    """What enters a layer in the passes of this context."""
    found: list[torch.Tensor] = []
    handle = subject.anatomy.layers[layer].register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"attention": "eager"}], ids=["plain", "shared keys", "eager"])
@pytest.mark.parametrize("earlier", [(), (DropTokens(1, 0.7),)], ids=["at once", "after a drop"])
def test_it_keeps_what_explicit_weights_without_rotation_say(options, earlier):
    """In padded batches, and where tokens left before the layer that is read: its attention is of what is left."""
    subject, items = tiny_subject(**options), make_items(4)
    batch = subject.encode_items(items)
    with entering(subject, 1) as found, subject.intervene((*earlier, DropTokens(2, 6 / N_IMAGE, Debiased(0.0))), batch) as run:
        logits(subject, batch)
        chosen = [kept(run, batch, row) for row in range(4)]
    with subject.intervene(earlier or None, batch) as run:
        logits(subject, batch)
        before, there = [kept_of(run, batch, row) for row in range(4)], run.tokens.valid
    image = run.tokens.image
    for row in range(4):
        received = flat_attention(subject, 1, found[0][row][there[row]])[image[row][there[row]]]
        best = received.argsort(descending=True)[:6].sort().values.tolist()
        assert chosen[row] == [before[row][one] for one in best]


def kept_of(run, batch, row):
    """As ``kept``, where perhaps nothing left."""
    return list(range(N_IMAGE)) if run.tokens.index is None else kept(run, batch, row)


def test_rotary_positions_matter():
    """With them other tokens stay: what is read is not the attention itself."""
    subject = tiny_subject()
    batch = subject.encode_items(make_items(6))
    chosen = []
    for policy in (FastV(), Debiased(0.0)):
        with subject.intervene(DropTokens(2, 0.5, policy), batch) as run:
            logits(subject, batch)
            chosen.append([kept(run, batch, row) for row in range(6)])
    assert chosen[0] != chosen[1]


def test_a_dropped_position_leaves_the_question_as_it_was(subject):
    """The pass itself goes on with rotated queries and keys: keeping the same tokens by another policy gives the same numbers."""
    batch = subject.encode_items(make_items(3))
    with subject.intervene(DropTokens(1, 0.5, Debiased(1.0)), batch):
        found = logits(subject, batch)
    with subject.intervene(DropTokens(1, 0.5, "stride"), batch):
        assert torch.equal(found, logits(subject, batch))


def test_gradients_pass_by(subject):
    """What is asked beside a pass takes no part in it, and keeps nothing for a way back."""
    kept_for_a_way_back = []

    class Reads:
        reads_unrotated = True
        reads_hidden = False

        def attention(self, view):
            kept_for_a_way_back.append(view.unrotated.query.requires_grad)

    batch = subject.encode_items(make_items(2))
    weight = subject.anatomy.layers[0].self_attn.q_proj.weight
    found = []
    for policy in (Debiased(1.0), "stride"):
        with subject.intervene(DropTokens(1, 0.5, policy), batch, observers=[Reads()]):
            loss = subject.model(**batch.inputs).logits[:, -1].logsumexp(-1).sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert len(kept_for_a_way_back) == 6 and not any(kept_for_a_way_back)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_their_attention_without_rotation(name):
    """The first layer, against a model whose rotary embedding turns nothing."""
    subject = Subject(TINY[name].model(), name=name)
    batch = batch_of(name)
    n = int(batch.image.sum())
    keep = max(1, n // 2)
    with subject.intervene(DropTokens(1, keep / n, Debiased(0.0)), batch) as run, torch.inference_mode():
        subject.model(**batch.inputs)
        places = run.tokens.index[0][run.tokens.image[0] & run.tokens.valid[0]].tolist()

    def still(module, args, output):
        return torch.ones_like(output[0]), torch.zeros_like(output[1])

    turning = [module for module in subject.anatomy.language_model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    assert turning
    handles = [module.register_forward_hook(still) for module in turning]
    try:
        with torch.inference_mode():
            (encoded,) = capture(subject, batch.inputs)
            (found,) = observe_encoded(subject, [{"id": "0"}], [encoded], [FullAttention()]).values
    finally:
        for handle in handles:
            handle.remove()
    received = found[""][0, 0, :, -1].mean(0)
    image = batch.image[0].nonzero()[:, 0]
    assert places == image[received[image].argsort(descending=True)[:keep].sort().values].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_families_resume_where_it_looks(name):
    """The row engine against the whole model: rows that share what comes before, and start where the policy reads."""
    rows = [DropTokens(2, 0.5, Debiased()), DropTokens(2, 0.25, Debiased()), DropTokens(3, 0.5, Debiased(0.0)), DropTokens(3, 0.5, FastV())]
    seen, paths = run_on_paths(name, rows)
    batch = batch_of(name)
    for row, intervention in enumerate(rows):
        close(seen[row], logits_under(subject_of(name), intervention, batch)[0, -1], str(intervention))
    if name in ("llava", "qwen2_vl"):
        assert paths == {"resume"}


@pytest.mark.parametrize("name", ["blip2_opt"])
def test_where_nothing_is_rotated_it_is_refused(name):
    subject, batch = Subject(TINY[name].model(), name=name), batch_of(name)
    with pytest.raises(NotMeasurable, match=r"layer 1 has no rotary positions that could be left out: .* such as FastV\(\)"):
        with subject.intervene(DropTokens(2, 0.5, Debiased()), batch), torch.inference_mode():
            subject.model(**batch.inputs)
    with torch.inference_mode():
        subject.model(**batch.inputs)


def test_a_look_beside_an_observer_changes_nothing(subject):
    """A policy and an observer that both read unrotated attention get the same."""
    items = make_items(3)

    class Reads:
        reads_unrotated = True
        reads_hidden = False

        def attention(self, view):
            return view.unrotated.probabilities(view.tokens.last[:, None])[:, :, 0].mean(1)

    batch = subject.encode_items(items)
    with subject.intervene(None, batch, observers=[Reads()]) as run:
        logits(subject, batch)
    flat = run.record(0, 0).numpy()
    with subject.intervene(DropTokens(1, 0.3, Debiased(0.0)), batch, observers=[Reads()]) as run:
        logits(subject, batch)
    np.testing.assert_allclose(run.record(0, 0).numpy(), flat, atol=1e-6)
    for row in range(3):
        best = flat[row][batch.image[row].numpy()].argsort()[::-1][:5]
        assert kept(run, batch, row) == sorted(best.tolist())
