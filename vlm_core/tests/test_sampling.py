"""Sampled answers: each token against the model's own distribution without a cache, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_core import evaluate
from vlm_core.evaluation import greedy_answers
from vlm_core.items import item_number
from vlm_core.sampling import _Draw, sample_answers
from vlm_core.tests.family_models import AFTER, TINY
from vlm_core.tests.tiny import make_items, tiny_subject

END = 2
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
IMAGES = [60, 61, 62, 63]  # without the cache, an image token that was said would be taken for an image


def followed(uniform, temperature, distribution, end=END):
    """Tokens of one sample, told by the numbers ``uniform [token]`` from ``distribution(tokens so far)`` (logits)."""
    said = []
    for number in uniform:
        cumulated = (distribution(said).double() / temperature).softmax(0).cumsum(0)
        said.append(int((cumulated <= number * cumulated[-1]).sum()))
        if said[-1] == end:
            break
    return said


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_drawn_from_its_own_distribution(name):
    tiny = TINY[name]
    model = tiny.model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    # Under M-RoPE positions count on from another number where there are more images.
    counts, texts = (1, 2 if name in MROPE else 1, 1), (AFTER, AFTER[:3], (*AFTER[1:], 30))
    inputs = tiny.prompts(counts, texts, side="left")
    uniform = np.random.default_rng(0).random((3, 3, 3))
    uniform[1, :, 0] = uniform[1, 0, 0]  # these part after their first token only
    draw = _Draw(uniform, temperature=4.0)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=IMAGES, custom_generate=draw)

    def logits(prompt, said):
        single = tiny.prompts(counts[prompt : prompt + 1], (texts[prompt] + tuple(said),), start=sum(counts[:prompt]))
        if said and "token_type_ids" in single:
            single["token_type_ids"][0, -len(said) :] = 1  # what was said is no prefix that all see
        with torch.inference_mode():
            return model(**single).logits[0, -1].index_fill(0, torch.tensor(IMAGES), -torch.inf)

    for prompt in range(3):
        for sample in range(3):
            expected = followed(uniform[prompt, sample], 4.0, lambda said, prompt=prompt: logits(prompt, said))
            assert draw.said[prompt * 3 + sample] == expected, (prompt, sample)
    assert len({tuple(said) for said in draw.said[:3]}) > 1


def test_a_sample_that_ends_is_cut_there_and_the_others_go_on(subject):
    items = make_items(6)
    model, tokenizer = subject.model, subject.tokenizer
    n = 40
    uniform = np.stack([np.random.default_rng((3, item_number(item))).random((n, 4)) for item in items])
    draw = _Draw(uniform, temperature=6.0)
    batch = subject.encode_items(items)
    with torch.inference_mode(), subject.intervene(None, batch):
        model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, custom_generate=draw)
    ended = [said for said in draw.said if said[-1] == END and len(said) < 4]
    assert ended and any(len(said) == 4 for said in draw.said) and all(END not in said[:-1] for said in draw.said)
    texts = [text.strip() for text in tokenizer.batch_decode(draw.said, skip_special_tokens=True)]
    drawn = sample_answers(subject, items, n, temperature=6.0, seed=3, max_new_tokens=4)
    assert [one for said in drawn for one in said] == texts


def test_draws_have_the_models_frequencies(subject):
    (item,) = make_items(1)
    batch = subject.encode_items([item])
    with torch.inference_mode(), subject.intervene(None, batch):
        expected = (subject.model(**batch.inputs).logits[0, -1].double() / 2.0).softmax(0).numpy()
    (said,) = sample_answers(subject, [item], 20_000, temperature=2.0, max_new_tokens=1)
    seen = np.array([said.count(subject.tokenizer.decode([token], skip_special_tokens=True)) for token in range(len(expected))]) / len(said)
    special = set(subject.tokenizer.all_special_ids)  # these all decode to nothing
    words = [token for token in range(len(expected)) if token not in special]
    spread = np.sqrt(expected * (1 - expected) / len(said))
    assert (np.abs(seen - expected)[words] <= 5 * spread[words]).all()
    assert expected[words].max() > 20 * spread.max()


def test_an_items_draws_follow_from_the_seed_and_its_id_alone(subject):
    items = make_items(7)
    drawn = sample_answers(subject, items, 5, temperature=3.0, seed=1, batch_rows=3)
    assert drawn == sample_answers(subject, items, 5, temperature=3.0, seed=1, batch_rows=7)
    assert [said[:2] for said in drawn] == sample_answers(subject, items, 2, temperature=3.0, seed=1)
    assert drawn[2:4] == sample_answers(subject, items[2:4], 5, temperature=3.0, seed=1)
    assert drawn != sample_answers(subject, items, 5, temperature=3.0, seed=2)
    renamed = [{**item, "id": f"other {item['id']}"} for item in items]
    assert drawn != sample_answers(subject, renamed, 5, temperature=3.0, seed=1)


def test_the_coldest_samples_are_the_greedy_answers(subject):
    items = make_items(9)
    cold = sample_answers(subject, items, 2, temperature=1e-4)
    greedy = evaluate(subject, items, mode="greedy")["output"].tolist()
    assert cold == [(answer, answer) for answer in greedy] and len(set(greedy)) > 1


def test_a_prompt_runs_once_however_many_samples_are_drawn(subject):
    lengths = []
    hook = subject.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        sample_answers(subject, make_items(4), 50, temperature=5.0, max_new_tokens=3)
    finally:
        hook.remove()
    assert lengths[0][0] == 4 and [length for _, length in lengths[1:]] == [1, 1]
    assert all(rows <= 4 * 50 for rows, _ in lengths)


def test_a_colder_model_needs_fewer_rows(subject):
    def rows(temperature):
        seen = []
        hook = subject.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
        )
        try:
            sample_answers(subject, make_items(4), 50, temperature=temperature, max_new_tokens=2)
        finally:
            hook.remove()
        return seen[1]

    assert rows(1e-3) <= 4 < rows(5.0) < 4 * 50


def test_greedy_answers_need_no_known_answer_and_keep_their_order(subject):
    items = make_items(9)
    asked = [{name: item[name] for name in ("id", "image", "prompt")} for item in items]
    expected = [greedy_answers(subject, [item])[0] for item in asked]
    assert greedy_answers(subject, asked, batch_rows=4) == expected
    assert evaluate(subject, items, mode="greedy")["output"].tolist() == expected and len(set(expected)) > 1


def test_a_picture_passes_the_tower_once():
    subject = tiny_subject()
    items = make_items(8)
    for item in items:
        item["image"] = items[0]["image"] if item["scene_id"] in ("scene-0", "scene-1") else items[-1]["image"]
    seen = []
    hook = subject.model.model.vision_tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["inputs_embeds"]).shape[0]), with_kwargs=True
    )
    try:
        greedy_answers(subject, items, batch_rows=3)
        sample_answers(subject, items, 2, batch_rows=3)
    finally:
        hook.remove()
    assert sum(seen) == 2 * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 2.5}, "n must be"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"batch_rows": 0}, "batch_rows must be"),
        ({"items": "red"}, "items must be a sequence"),
        ({"items": [{"id": "a", "prompt": "what ?"}]}, "has no field 'image'"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(options, words, subject):
    arguments = {"items": make_items(1), "n": 2, **options}
    with pytest.raises(ValueError, match=words):
        sample_answers(subject, arguments.pop("items"), arguments.pop("n"), **arguments)
