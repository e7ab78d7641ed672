"""The learned gate: its scorer by hand and in loops, what training does through the seam, and a task on which it is known what to keep."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import DropTokens, Subject, sweep
from vlm_core.interventions.policy import Choice
from vlm_core.interventions.sources import GateWeights
from vlm_core.interventions.stored import load_interventions, save_interventions
from vlm_core.observation.gradients import final_hidden, next_logits
from vlm_core.reduction import LearnedGate, Random, gate_training
from vlm_core.reduction.answering import Answered, answering, seen_by
from vlm_core.reduction.gate_training import _CLOSED, _count, _gates, train_gate
from vlm_core.subjects.embed import encode_items
from vlm_core.sweeps.trunk import Unshareable
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.planted import IMAGE_FIRST
from vlm_core.tests.policy_states import drawn_gate, same_tokens, seen_of
from vlm_core.tests.tiny import make_items, normal, tiny_llava, tiny_subject

N_COLOURED = 3


# -- the scorer -------------------------------------------------------------------------------------------------------


def slow_scores(weights, tokens, asked):
    """``gelu(token x + question q + bias) . out + direct . x`` of streams without their mean, number by number."""

    def scaled(row):
        length = math.sqrt(sum(one * one for one in row) / len(row))
        return [one / length for one in row]

    mean = [sum(column) / len(asked) for column in zip(*asked, strict=True)] if asked else None
    question = scaled(mean) if asked else [0.0] * len(tokens[0])
    centre = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
    found = []
    for row in tokens:
        x, score = scaled([one - other for one, other in zip(row, centre, strict=True)]), 0.0
        for unit in range(len(weights.bias)):
            inside = float(weights.bias[unit])
            inside += sum(float(a) * b for a, b in zip(weights.token[unit], x, strict=True))
            inside += sum(float(a) * b for a, b in zip(weights.question[unit], question, strict=True))
            score += inside * 0.5 * (1 + math.erf(inside / math.sqrt(2))) * float(weights.out[unit])
        found.append(score + sum(float(a) * b for a, b in zip(weights.direct, x, strict=True)))
    return found


@pytest.mark.parametrize(("n", "hidden", "n_question"), [(5, 4, 3), (17, 8, 1), (40, 12, 6), (6, 4, 0)])
def test_scores_are_their_formula_number_by_number(n, hidden, n_question):
    for seed in range(3):
        gate, seen = drawn_gate(hidden, seed=seed), seen_of(n, n_question, hidden, seed=seed)
        expected = slow_scores(gate.weights, seen.hidden.tolist(), seen.asked.tolist())
        assert gate.scores(seen).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        best = sorted(sorted(range(n), key=lambda i: -expected[i])[:3])
        assert gate.choose(seen, 3).kept.tolist() == best


def test_by_hand():
    """Without their mean, of length sqrt(2), tokens count by their first number; the hidden layer opens where the question has it too."""
    one = torch.tensor([[1.0, 0.0]])
    seen = seen_of(4, 2, hidden=2)
    seen.stream[seen.candidates] = torch.tensor([[7.0, 6.0], [4.0, 11.0], [1.0, 6.0], [4.0, 1.0]])
    seen.stream[seen.question] = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    direct = GateWeights(0 * one, 0 * one, torch.zeros(1), torch.zeros(1), one[0], one[:0])
    assert LearnedGate(direct).scores(seen).tolist() == pytest.approx([math.sqrt(2), 0, -math.sqrt(2), 0])
    # gelu(10 sqrt(2) (x + q) - 20) with x, q of 1 and 1, 0 and 1, -1 and 1 times sqrt(2): far above zero, and far below.
    both = GateWeights(10 * one, 10 * one, torch.tensor([-20.0]), torch.ones(1), 0 * one[0], one[:0])
    assert LearnedGate(both).scores(seen).tolist() == pytest.approx([20 * math.sqrt(2) - 20, 0, 0, 0], abs=1e-4)
    assert LearnedGate(both).choose(seen, 1).kept.tolist() == [0]


def test_the_order_of_candidates_does_not_matter():
    assert all(same_tokens(drawn_gate(8, seed=seed), 20, 7, seed) for seed in range(5))


# -- gates in training ------------------------------------------------------------------------------------------------


def test_as_many_gates_are_open_as_are_asked_for_with_the_slope_of_a_sigmoid():
    generator = torch.Generator().manual_seed(0)
    scores = normal(20).requires_grad_()
    gates = _gates(scores, 6, 0.5, generator)
    assert sorted(gates.tolist()) == pytest.approx([_CLOSED] * 14 + [1.0] * 6, rel=0.2)
    again = torch.Generator().manual_seed(0)
    noisy = scores.detach() - 0.5 * (-torch.rand(20, generator=again).log()).log()
    best = noisy.sort(descending=True).values
    soft = torch.sigmoid((noisy - (best[5] + best[6]) / 2) / 0.5)
    for number in (0, 7, 19):
        (slope,) = torch.autograd.grad(gates[number], scores, retain_graph=True)
        expected = torch.zeros(20)
        expected[number] = soft[number] * (1 - soft[number]) / 0.5
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


def test_noise_chooses_as_a_softmax_would():
    """The best of scores with Gumbel noise is one with its softmax probability."""
    generator, scores = torch.Generator().manual_seed(0), torch.tensor([0.0, 0.5, 1.0, -1.0])
    counts = sum((_gates(scores, 1, 2.0, generator) > 0.5).float() for _ in range(4000))
    expected = 4000 * (scores / 2).softmax(0)
    # One standard deviation of a count is below 32.
    assert counts.sum() == 4000 and bool(((counts - expected).abs() < 5 * 32).all())


def test_training_begins_with_half_of_the_tokens_and_ends_with_as_many_as_asked_for():
    counts = [_count(step / 60, 64, 8) for step in range(60)]
    # 32 x 4^(-1.5 x 20/60) = 16 after a third, 8 after two thirds.
    assert counts[0] == 32 and counts[20] == 16 and counts[40:] == [8] * 20
    assert counts == sorted(counts, reverse=True)
    assert [_count(done, 10, 7) for done in (0.0, 0.5)] == [7, 7] and _count(0.99, 5, 1) == 1


def test_a_look_at_prompts_runs_no_layer_after_it(subject):
    run: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, number=number: run.append(number)) for number, layer in enumerate(subject.anatomy.layers)]
    try:
        found = seen_by(subject, make_items(5), 2, frozenset({"attention"}), lambda seen: (seen.item, seen.layer), batch=2)
    finally:
        for handle in handles:
            handle.remove()
    assert [layer for _, layer in found] == [2] * 5 and len({item for item, _ in found}) == 5
    assert run == [0, 1] * 3


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_closed_gates_are_dropped_tokens(subject, layer):
    items = make_items(3)
    encoded, gate = encode_items(subject, items), drawn_gate(32)
    order = seen_by(subject, items, layer, frozenset(), lambda seen: gate.choose(seen, 6).kept)
    kept = iter(order)

    def shut(seen, count):
        assert count == 6
        gates = torch.full((len(seen),), _CLOSED)
        gates[next(kept)] = 1.0
        return Choice(torch.arange(len(seen)), sizes=gates)

    found = []
    for row, answer in ((DropTokens(layer, 6 / 17, Answered()), shut), (DropTokens(layer, 6 / 17, gate), None)):
        with answering(answer), torch.inference_mode(False), torch.no_grad():
            hidden, last = final_hidden(subject, encoded, [0, 1, 2], row)
            found.append(next_logits(subject.anatomy, hidden[torch.arange(3), last]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_slopes_come_through_the_seam():
    """Of gates before a layer, against differences of small steps in float64."""
    model, processor = tiny_llava(kv_heads=2)
    precise = Subject(model.double(), processor, name="precise")
    encoded = encode_items(precise, make_items(1))
    row = DropTokens(1, 0.5, Answered())

    def score(gates):
        with answering(lambda seen, count: Choice(torch.arange(len(seen)), sizes=gates)):
            hidden, last = final_hidden(precise, encoded, [0], row)
        return next_logits(precise.anatomy, hidden[0, last])[0, 7]

    with torch.inference_mode(False), torch.enable_grad():
        gates = torch.linspace(0.2, 1.0, 17).requires_grad_()
        (slopes,) = torch.autograd.grad(score(gates), gates)
    for number in (0, 4, 16):
        step = torch.zeros(17)
        step[number] = 2e-2
        with torch.inference_mode(False), torch.no_grad():
            expected = (score(gates + step) - score(gates - step)) / 4e-2
        assert float(slopes[number]) == pytest.approx(float(expected), rel=2e-2, abs=1e-4)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coloured():
    """A subject to which grey patches are nothing at all, and items with three coloured patches on grey.

    Patches do not see each other in its vision tower, nor where they are, and the projector turns a grey one into zeros.
    """
    model, processor = tiny_llava(chat_template=IMAGE_FIRST)
    tower = model.model.vision_tower
    with torch.no_grad():
        for layer in tower.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
        tower.embeddings.position_embedding.weight.zero_()
    subject = Subject(model, processor, name="coloured")
    draw = np.random.default_rng(0)

    def item(number):
        pixels = np.full((4, 4, 4, 4, 3), 128, dtype=np.uint8)
        places = draw.choice(16, N_COLOURED, replace=False) if number else []
        for place in places:
            pixels[place // 4, :, place % 4] = draw.integers(0, 256, 3)
        image = Image.fromarray(pixels.reshape(16, 16, 3))
        shown = {"id": f"item-{number}", "scene_id": f"scene-{number}", "task": "color", "image": image, "prompt": "what color is it ?"}
        return {**shown, "answer": "red", "candidates": ["red", "blue"], "places": sorted(int(one) + 1 for one in places)}

    grey, *items = map(item, range(61))
    encoded = encode_items(subject, [grey])[0]
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias -= encoded.embeds[encoded.image][1]
    return subject, items


def share_found(subject, items, layer, keep, policy):
    """Coloured patches among those that stay, as a share of all coloured ones."""
    chosen = seen_by(subject, items, layer, policy.reads, lambda seen: policy.choose(seen, keep).kept.tolist())
    return np.mean([len(set(kept) & set(item["places"])) / N_COLOURED for kept, item in zip(chosen, items, strict=True)])


def test_it_learns_to_keep_what_matters(coloured):
    """Three of sixteen patches and the class token matter: of four tokens chosen at random, 4 in 17 of them would stay."""
    subject, items = coloured
    train, held_out = items[:40], items[40:]
    for seed in (0, 1, 2):
        gate = train_gate(subject, train, 0, 4 / 17, steps=60, batch=4, seed=seed)
        assert share_found(subject, held_out, 0, 4, gate) > 0.8
    assert share_found(subject, held_out, 0, 4, Random()) < 0.4


def test_equal_seeds_give_equal_weights_and_the_subject_is_left_as_it_was(subject, tmp_path):
    items, before = make_items(6), subject.weights_state()
    with torch.inference_mode():
        gates = [train_gate(subject, items, 1, 0.3, steps=3, seed=seed, batch=4) for seed in (0, 0, 1)]
    assert gates[0] == gates[1] != gates[2]
    assert subject.weights_state() == before and all(one.grad is None for one in subject.model.parameters())
    row = DropTokens(1, 0.3, gates[0])
    save_interventions(tmp_path / "gate.json", row)
    assert load_interventions(tmp_path / "gate.json") == row
    assert np.isfinite(sweep(subject, items, {"gate": row}, metrics=("margin",))["value"]).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_training_from_its_layer_on_is_training_from_the_first_on(family, monkeypatch):
    """What enters the layer is the same in every step, and in the last layer only the last token matters: neither is computed again."""
    processor, model = PROCESSORS[family]()
    subject = Subject(model, processor, name=family)
    items, layer, ran = make_items(6, size=48), 2, []
    handle = subject.anatomy.layers[layer - 1].register_forward_pre_hook(lambda module, args: ran.append(torch.is_grad_enabled()))
    short = train_gate(subject, items, layer, 0.3, steps=4, batch=3)
    assert True not in ran, "no pass with gradients has run the layer before"
    monkeypatch.setattr(gate_training, "_from_the_layer_on", lambda *args: None)
    long = train_gate(subject, items, layer, 0.3, steps=4, batch=3)
    assert True in ran
    handle.remove()
    for one, other in zip(tensors(short), tensors(long), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(one, other) for one, other in zip(tensors(short), tensors(train_gate(subject, items, layer, 0.3, steps=1)), strict=True))


def test_nothing_of_inference_mode_is_part_of_a_graph():
    """The mask of a single recorded prompt is a view of one made in inference mode, which a kernel may have to keep for its way back."""
    processor, model = PROCESSORS["paligemma"]()
    subject, masks = Subject(model, processor, name="paligemma"), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
        for layer in subject.anatomy.layers
    ]
    train_gate(subject, make_items(1, size=48), 1, 0.3, steps=1, batch=1)
    for handle in handles:
        handle.remove()
    learnt = [mask for mask in masks[-2:] if mask is not None]
    assert learnt and not any(mask.is_inference() for mask in learnt)


def tensors(gate):
    return [one for one in vars(gate.weights).values() if isinstance(one, torch.Tensor)]


def test_a_gate_is_trained_where_nothing_can_be_recorded(subject, monkeypatch):
    def refuse(*args, **kwargs):
        raise Unshareable("its layers insist on a cache")

    expected = train_gate(subject, make_items(4), 1, 0.3, steps=2)
    monkeypatch.setattr(gate_training, "record_trunks", refuse)
    found = train_gate(subject, make_items(4), 1, 0.3, steps=2)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(gate_training.Budget, "of", classmethod(lambda cls, *args: cls(tokens=10, most=10, stored=10)))
    monkeypatch.setattr(gate_training, "record_trunks", lambda *args, **kwargs: pytest.fail("there is no room for it"))
    train_gate(subject, make_items(4), 1, 0.3, steps=1)


def test_another_subject_is_refused(subject):
    items = make_items(2)
    row = DropTokens(1, 0.3, train_gate(subject, items, 1, 0.3, steps=1))
    other, wide = tiny_subject(seed=3), tiny_subject(hidden=64)
    for one, sentence in ((other, "was trained on another model"), (wide, "streams of 32 numbers, this model's have 64")):
        with pytest.raises(ValueError, match=sentence), one.intervene(row, one.encode_items(items)):
            pass
        with pytest.raises(ValueError, match=sentence):
            sweep(one, items, {"gate": row}, metrics=("margin",))
    # Other layers under the same embeddings, as a fine-tuned copy has, or more of them.
    for layers in (3, 4):
        tuned = tiny_subject(seed=5, layers=layers)
        with torch.no_grad():
            tuned.anatomy.embedding.weight.copy_(subject.anatomy.embedding.weight)
        with pytest.raises(ValueError, match="was trained on another model"):
            sweep(tuned, make_items(1), {"gate": row}, metrics=("correct",))
    # The same weights in another precision are the same subject.
    model, processor = tiny_llava()
    rounded = Subject(model.bfloat16(), processor, name="rounded")
    with rounded.intervene(row, rounded.encode_items(items)):
        pass
    # Where everything stays, nothing is asked of the gate.
    with wide.intervene(DropTokens(1, 1.0, row.policy), wide.encode_items(items)):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 1.0}, "above 0 and below 1"),
        ({"keep": 0.99}, "17 image tokens"),
        ({"layer": 3}, "3"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"items": []}, "got none"),
    ],
)
def test_training_that_means_nothing_is_refused(subject, options, sentence):
    given = {"items": make_items(2), "layer": 1, "keep": 0.5, **options}
    with pytest.raises(ValueError, match=sentence):
        train_gate(subject, **given)


def test_weights_that_do_not_fit_are_refused():
    weights = drawn_gate(8).weights
    with pytest.raises(ValueError, match="must have shapes"):
        replace(weights, out=torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        replace(weights, bias=torch.full((5,), math.nan))
    with pytest.raises(ValueError, match="must be GateWeights"):
        LearnedGate("weights")
