"""Models that ``torch.compile`` made: nothing that is done to them or seen in them is left out."""

from __future__ import annotations

import threading

import pytest
import torch

from vlm_core import (
    AttentionMass,
    DropTokens,
    HeadOutputs,
    HiddenStates,
    KnockOut,
    LogitLens,
    MeanHeads,
    MergeTokens,
    Patch,
    RedirectHeads,
    ReplaceImageKV,
    ReplaceTokens,
    ResampleHeads,
    RotaryBias,
    Steer,
    Subject,
    SubjectError,
    ZeroHeads,
    capture_activations,
    observe,
    sweep,
)
from vlm_core.interventions import HeadDirections, HeadMeans, Vector
from vlm_core.seam.eagerly import eagerly
from vlm_core.tests.tiny import make_items, normal, tiny_llava, tiny_subject

SITES = ("residual", "attention", "mlp", "head")


class Sites:
    """What is at every site of every layer."""

    def __init__(self):
        self.seen = {}

    def site(self, site, layer, output, tokens):
        self.seen[site, layer] = output.clone()


@pytest.fixture(scope="module")
def plans(subject, means):
    items = make_items(3)
    source = capture_activations(subject, items[1], SITES, range(3))
    units = torch.nn.functional.normalize(normal(3, 4, 8), dim=-1)
    return {
        **{f"patch {site}": Patch(site, (1,), source, "last") for site in SITES},
        "resample": ResampleHeads([(1, 0)], source, "last"),
        "zero": ZeroHeads([(1, 2)]),
        "mean": MeanHeads([(1, 2)], HeadMeans(normal(3, 4, 8))),
        "redirect": RedirectHeads([(1, 2)], HeadDirections(units)),
        "image KV": ReplaceImageKV([(1, 2)], means),
        "knock-out": KnockOut("last", "image", (1,)),
        "steer": Steer(1, normal(32)),
        "replace": ReplaceTokens(Vector(normal(32)), "image"),
        "drop": DropTokens(1, 0.5),
        "merge": MergeTokens(1, 0.5),
    }


@pytest.fixture(scope="module")
def few():
    return make_items(3)


def compiled_model(subject):
    return torch.compile(subject.model, backend="eager")


def compiled_in_place(subject):
    anatomy = subject.anatomy
    for module in (*anatomy.layers, *anatomy.attentions, *anatomy.mlps, anatomy.norm):
        module.compile(backend="eager")
    return subject.model


def compiled_forwards(subject):
    for module in subject.anatomy.mlps:
        module.forward = torch.compile(module.forward, backend="eager")
    return subject.model


@pytest.fixture(scope="module", params=[compiled_model, compiled_in_place, compiled_forwards])
def compiled(request):
    """A subject, its compiled model, and logits of the model that has run so before anything was done to it."""
    torch._dynamo.reset()
    subject = tiny_subject()
    model = request.param(subject)
    yield subject, model, logits(model, subject.encode_items(make_items(3)))
    torch._dynamo.reset()


def logits(model, batch):
    # Embeddings from outside the graph: the vision tower would take long to trace.
    embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
    with torch.inference_mode():
        return model(inputs_embeds=embeds.detach(), attention_mask=batch.inputs["attention_mask"]).logits


def test_everything_done_to_a_compiled_model_is_done(compiled, subject, few, plans):
    own, model, plain = compiled
    batch = own.encode_items(few)
    for name, plan in plans.items():
        with subject.intervene(plan, batch):
            expected = logits(subject.model, batch)
        with own.intervene(plan, batch):
            seen = logits(model, batch)
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert seen.shape != plain.shape or not torch.allclose(seen, plain, atol=1e-3), f"{name} did nothing"


def test_everything_seen_in_a_compiled_model_is_seen(compiled, subject, few):
    own, model, _ = compiled
    batch, sites, expected = own.encode_items(few), Sites(), Sites()
    with subject.intervene(None, batch, observers=[expected]):
        logits(subject.model, batch)
    with own.intervene(None, batch, observers=[sites]):
        logits(model, batch)
    assert sites.seen.keys() == expected.seen.keys() >= {(site, layer) for site in SITES for layer in range(3)}
    assert all(torch.allclose(sites.seen[place], expected.seen[place], atol=1e-5) for place in sites.seen)
    for observer in (AttentionMass(), HeadOutputs(), HiddenStates(), RotaryBias()):
        torch.testing.assert_close(*(torch.as_tensor(observe(one, few, observer)) for one in (own, subject)), equal_nan=True)
    lens = [observe(one, few, LogitLens())["logprob"] for one in (own, subject)]
    torch.testing.assert_close(*map(torch.as_tensor, lens))


def test_sweeps_of_a_compiled_model(compiled, subject, few, plans):
    chosen = {name: plans[name] for name in ("zero", "patch mlp", "drop")}
    values = [sweep(one, few, chosen)["value"].to_numpy() for one in (compiled[0], subject)]
    assert abs(values[0] - values[1]).max() < 1e-5


def test_what_is_compiled_is_used_again_after_the_last_run_in_any_thread(few):
    torch._dynamo.reset()
    passes = []

    def counting(graph, example_inputs):
        def run(*inputs):
            passes.append(1)
            return graph(*inputs)

        return run

    subject = tiny_subject()
    subject.anatomy.mlps[1].compile(backend=counting)
    batch, begun, over = subject.encode_items(few), threading.Event(), threading.Event()

    def elsewhere():
        with subject.intervene(ZeroHeads([(0, 0)]), batch):
            begun.set()
            over.wait(10)

    def used():
        passes.clear()
        logits(subject.model, batch)
        return bool(passes)

    assert used()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    begun.wait(10)
    with subject.intervene((), batch), subject.intervene(None, batch):
        assert not used()
    assert not used()
    over.set()
    thread.join()
    assert used()
    with subject.intervene(None, batch):
        assert used()
    with pytest.raises(ValueError, match="outside this model"), subject.intervene(ZeroHeads([(9, 0)]), batch):
        pass
    assert used()
    torch._dynamo.reset()


def test_a_model_that_was_compiled_before_it_became_a_subject(subject, few, plans):
    torch._dynamo.reset()
    model, processor = tiny_llava()
    model = torch.compile(model, backend="eager")
    batch = subject.encode_items(few)
    logits(model, batch)
    own = Subject(model, processor)
    for name in ("patch mlp", "patch head", "drop"):
        with subject.intervene(plans[name], batch):
            expected = logits(subject.model, batch)
        with own.intervene(plans[name], batch):
            assert torch.allclose(logits(own.model, batch), expected, atol=1e-5)
    torch._dynamo.reset()


def test_a_run_inside_a_compiled_function_is_refused():
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def work(numbers):
        with eagerly:
            return numbers + 1

    with pytest.raises(SubjectError, match="cannot begin inside a function that torch.compile made"):
        work(torch.ones(3))
    torch._dynamo.reset()
