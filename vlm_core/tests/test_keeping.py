"""A model under a recipe: whoever calls it, it is what an intervention on the same batch is."""

from __future__ import annotations

import json

import pytest
import torch

from vlm_core import Batch, DropTokens, MergeTokens, Recipe, Subject, SubjectError, ZeroHeads, keep_tokens
from vlm_core.reduction import FastV, Pooling
from vlm_core.tests.family_models import BUILDERS
from vlm_core.tests.test_drop import N_IMAGE
from vlm_core.tests.test_seam import logits
from vlm_core.tests.tiny import make_items, tiny_subject

RECIPE = Recipe(DropTokens(1, 0.3, FastV()), n_layers=3, policy="fastv", keep=0.3, not_for=("count",), expected={"loss": 0.01})


@pytest.fixture
def own():
    """A subject of the test's own: its model gets hooks."""
    return tiny_subject()


@pytest.mark.parametrize("row", [DropTokens(1, 0.3, FastV()), DropTokens(0, 0.5, "stride"), MergeTokens(2, 0.25), DropTokens(1, 0.0)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_text_are_those_of_the_intervention_at_full_length(own, row, side):
    items = make_items(3)
    batch = own.encode([one["image"] for one in items], [one["prompt"] for one in items], padding_side=side)
    with own.intervene(row, batch) as run:
        shorter = logits(own, batch)
    with keep_tokens(own, row) as kept:
        whole = logits(own, batch)
    assert whole.shape[1] == batch.valid.shape[1]
    assert kept.image_tokens == (row.count(N_IMAGE),) * 3
    for prompt in range(3):
        for place, origin in enumerate(run.tokens.index[prompt].tolist()):
            if run.tokens.valid[prompt, place]:
                torch.testing.assert_close(whole[prompt, origin], shorter[prompt, place], rtol=1e-4, atol=1e-4)
    gone = batch.valid.clone()
    for prompt in range(3):
        gone[prompt, run.tokens.index[prompt][run.tokens.valid[prompt]]] = False
    assert int(gone.sum()) == 3 * (N_IMAGE - row.count(N_IMAGE)) and not bool(whole[gone].any())


def test_generating_is_what_the_intervention_generates(own):
    items = make_items(2)
    batch = own.encode_items(items)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    row = DropTokens(1, 0.3, FastV())
    with own.intervene(row, batch), torch.inference_mode():
        expected = own.model.generate(**batch.inputs, **options)
    with keep_tokens(own, RECIPE), torch.inference_mode():
        assert torch.equal(own.model.generate(**batch.inputs, **options), expected)
        cache = own.model(**batch.inputs, use_cache=True).past_key_values
    n = batch.valid.shape[1]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [n, *[n - N_IMAGE + row.count(N_IMAGE)] * 2]


def test_beams_of_one_prompt_lose_the_same_tokens(own):
    batch = own.encode_items(make_items(2))
    with keep_tokens(own, DropTokens(1, 0.4, "random")), torch.inference_mode():
        beams = own.model.generate(**batch.inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        greedy = own.model.generate(**batch.inputs, max_new_tokens=4, num_beams=1, do_sample=False)
    assert beams.shape[0] == greedy.shape[0] == 2


def test_the_same_prompt_loses_the_same_random_tokens_in_every_batch(own):
    items = make_items(3)
    with keep_tokens(own, DropTokens(1, 0.4, "random")):
        together = own.encode_items(items, padding_side="right")
        whole = logits(own, together)
        for number, item in enumerate(items):
            alone = logits(own, own.encode_items([item], padding_side="right"))
            torch.testing.assert_close(whole[number, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-4)


def test_a_loss_and_its_gradients_are_those_of_the_shorter_sequence(own):
    """Labels of the length that came in; gradients of a plain pass over the tokens that are left, at their old positions."""
    items = make_items(1)
    batch = own.encode([items[0]["image"]], [items[0]["prompt"]], answers=[items[0]["answer"]])
    with keep_tokens(own, DropTokens(0, 0.5, "stride")):
        out = own.model(**batch.inputs, labels=batch.labels)
        out.loss.backward()
    found = {name: p.grad.clone() for name, p in own.model.named_parameters() if p.grad is not None}
    own.model.zero_grad()
    with own.intervene(DropTokens(0, 0.5, "stride"), batch) as run:
        shorter = own.model(**batch.inputs).logits[0]
    labels = batch.labels[0][run.tokens.index[0]]
    loss = torch.nn.functional.cross_entropy(shorter[:-1], labels[1:])
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    for name, parameter in own.model.named_parameters():
        if parameter.grad is not None and name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_model_is_what_it_was_afterwards(own):
    batch = own.encode_items(make_items(2))
    plain = logits(own, batch)
    kept = keep_tokens(own, RECIPE)
    assert not torch.equal(logits(own, batch), plain)
    kept.remove()
    kept.remove()
    assert torch.equal(logits(own, batch), plain)
    with pytest.raises(RuntimeError), keep_tokens(own, RECIPE):
        raise RuntimeError
    assert torch.equal(logits(own, batch), plain)


def test_a_pass_that_fails_leaves_nothing_behind(own):
    batch = own.encode_items(make_items(2))
    plain = logits(own, batch)
    with keep_tokens(own, RECIPE):
        broken = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"][:1]}
        with pytest.raises(ValueError):
            own.model(**broken)
        assert not torch.equal(logits(own, batch), plain)
    assert torch.equal(logits(own, batch), plain)


def test_an_intervention_within_is_left_alone(own):
    batch = own.encode_items(make_items(2))
    row = ZeroHeads([(1, 2)])
    with own.intervene(row, batch):
        expected = logits(own, batch)
    with keep_tokens(own, RECIPE), own.intervene(row, batch):
        assert torch.equal(logits(own, batch), expected)


def test_text_alone_passes_through(own):
    ids = torch.tensor([[1, 9, 10, 11]])
    with torch.inference_mode():
        plain = own.model(input_ids=ids).logits
        with keep_tokens(own, RECIPE):
            assert torch.equal(own.model(input_ids=ids).logits, plain)


def test_what_cannot_be_done_is_said_in_one_sentence(own):
    batch = own.encode_items(make_items(1))
    with pytest.raises(TypeError, match="drops or merges image tokens"):
        keep_tokens(own, ZeroHeads([(0, 0)]))
    with pytest.raises(TypeError, match="must be None, an intervention"):
        keep_tokens(own, "fastv")
    with pytest.raises(ValueError, match="outside this model's 3 layers"):
        keep_tokens(own, DropTokens(7, 0.5))
    with keep_tokens(own, RECIPE), pytest.raises(SubjectError, match="input_ids"):
        own.model(inputs_embeds=own.anatomy.embedding(batch.inputs["input_ids"]))
    own.model.gradient_checkpointing_enable()
    own.model.train()
    with keep_tokens(own, RECIPE), pytest.raises(SubjectError, match="checkpoint"):
        own.model(**batch.inputs)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_that_can_drop_tokens_keeps_them_in_one_line(family):
    model, inputs = BUILDERS[family]()
    subject = Subject(model, name=family)
    layer = max(subject.anatomy.n_layers - 1, subject.anatomy.n_deepstack)
    row = DropTokens(layer, 0.5, FastV())
    if "drop" not in subject.anatomy.capabilities:
        with pytest.raises(ValueError, match="lacks 'drop'"):
            keep_tokens(subject, row)
        return
    image = inputs["input_ids"] == subject.anatomy.image_token_id
    batch = Batch(inputs, image, inputs["attention_mask"].bool())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with subject.intervene(row, batch) as run, torch.inference_mode():
        shorter = model(**inputs).logits
        expected = model.generate(**inputs, **options)
    with keep_tokens(subject, row) as kept, torch.inference_mode():
        whole = model(**inputs).logits
        torch.testing.assert_close(whole[:, run.tokens.index[0]], shorter, rtol=1e-4, atol=1e-4)
        assert whole.shape[1] == image.shape[1]
        assert kept.image_tokens == (row.count(int(image.sum())),)
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_layers_are_scaled_to_the_depth_of_the_subject(own):
    anatomy = own.anatomy
    of_six = Recipe(DropTokens(4, 0.5, FastV()), n_layers=6, policy="fastv", keep=0.5)
    assert of_six.row(anatomy) == DropTokens(2, 0.5, FastV())
    early = Recipe(DropTokens(1, 0.5, FastV()), n_layers=32, policy="fastv", keep=0.5)
    assert early.row(anatomy).layer == 1, "FastV reads a layer before"
    assert Recipe(DropTokens(0, 0.5), n_layers=32, policy="random", keep=0.5).row(anatomy).layer == 0
    stages = Recipe((DropTokens(8, 0.5), DropTokens(16, 0.25), DropTokens(24, 0.125)), n_layers=32, policy="pyramid", keep=0.125)
    assert stages.layer == 8
    with pytest.raises(ValueError, match="fall together"):
        stages.row(anatomy)


def test_a_recipe_goes_to_a_file_and_back(tmp_path):
    recipe = Recipe(
        (DropTokens(2, 0.5, FastV("all")), MergeTokens(4, 0.25)), 6, "two", 0.25, {"loss": 0.01, "lower": -0.01, "upper": 0.03}, {"cache": 0.4},
        {"count": {"loss": 0.2}}, ("count",), 0.05, {"name": "tiny"}, {"confirmation": "abc"},
    )  # fmt: skip
    recipe.save(tmp_path / "token-recipe.json")
    assert Recipe.load(tmp_path / "token-recipe.json") == recipe
    assert json.loads((tmp_path / "token-recipe.json").read_text())["policy"] == "two"


@pytest.mark.parametrize("content", ["[1]", "nonsense", "{}", '{"recipe": 9}'])
def test_what_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "recipe.json"
    with pytest.raises(ValueError, match="there is no recipe"):
        Recipe.load(path)
    path.write_text(content)
    with pytest.raises(ValueError, match="no JSON|no recipe of version"):
        Recipe.load(path)


def test_a_recipe_without_a_reduction_is_refused():
    for row in (None, ZeroHeads([(0, 0)]), ()):
        with pytest.raises(ValueError, match="needs a reduction"):
            Recipe(row, 6, "none", 1.0)
    with pytest.raises(ValueError, match="of a subject with 6 layers"):
        Recipe(DropTokens(6, 0.5), 6, "random", 0.5)


def test_what_inputs_do_not_tell_of_an_image_is_refused_in_one_sentence(own):
    """Places are read from a square image; a prompt of two holds another number of tokens."""
    items = make_items(2)
    both = own.encode([[item["image"] for item in items]], [items[0]["prompt"]])
    with keep_tokens(own, DropTokens(1, 0.5, Pooling())), pytest.raises(SubjectError, match="reads grid, which inputs alone do not tell"):
        own.model(**both.inputs)
    one = own.encode_items(items)
    with keep_tokens(own, DropTokens(1, 0.5, Pooling())) as kept, torch.inference_mode():
        by_name = own.model(**one.inputs).logits
        rest = {name: value for name, value in one.inputs.items() if name != "input_ids"}
        assert torch.equal(own.model(one.inputs["input_ids"], **rest).logits, by_name)
        assert kept.image_tokens == (round(0.5 * N_IMAGE),) * 2
