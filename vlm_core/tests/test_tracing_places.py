"""Token groups of prompts: against tokens read one by one, for families with one grid, tiles and M-RoPE."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_core import KnockOut, Subject, object_tokens, sweep
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import CHAT_TEMPLATE, tiny_subject
from vlm_core.tests.tracing_items import make_pairs, square
from vlm_core.tracing.places import PLACES, template_lengths, token_places

ENDS_IMAGE = {"qwen2_vl": 1, "internvl": 1, "idefics3": 1}  # tokens that close an image stand between it and the question


def subject_of(name):
    processor, model = PROCESSORS[name]()
    return Subject(model, processor, name=name)


def tokens_of(subject, item):
    batch = subject.encode_items([item])
    ids = batch.inputs["input_ids"][0][batch.valid[0]]
    return [str(token) for token in subject.tokenizer.convert_ids_to_tokens(ids)], batch.image[0][batch.valid[0]].numpy()


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(5)


def test_text_is_the_question_then_the_template(subject, pairs):
    places = token_places(subject, pairs)
    for item in pairs:
        tokens, image = tokens_of(subject, item)
        named = {name: [tokens[k] for k in np.flatnonzero(members)] for name, members in places(item).items()}
        assert named["asked"] == item["prompt"].split()
        assert named["role"] == ["ASSISTANT"] and tokens[-1] == ":"
        assert named["asking"] == named["asked"] + named["role"]
        assert named["context"] == [token for token, shown in zip(tokens[:-1], image[:-1], strict=True) if not shown]
        assert set(named) == set(PLACES) - {"object", "background"}


def test_a_template_without_words_after_the_question_has_no_role_tokens(pairs):
    bare = tiny_subject(chat_template=CHAT_TEMPLATE.replace("{% if add_generation_prompt %}ASSISTANT :{% endif %}", ""))
    assert template_lengths(bare, pairs) == (0, 0)
    (named,) = token_places(bare, pairs[:1]).named.values()
    assert not named["role"].any() and named["asked"].sum() == len(pairs[0]["prompt"].split()) - 1


def test_words_that_repeat_are_not_taken_for_the_template(subject, pairs):
    repeated = [{**pairs[0], "prompt": "what what color ? ?"}, pairs[1]]
    assert template_lengths(subject, repeated) == (0, 2)
    with pytest.raises(ValueError, match="none of the first 8 prompts has two words"):
        template_lengths(subject, [{**pairs[0], "prompt": "what"}])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "internvl", "idefics3"])
def test_image_tokens_are_the_objects_and_the_others(name, pairs):
    subject, item = subject_of(name), pairs[0]
    (groups,) = token_places(subject, [item], square).named.values()
    tokens, image = tokens_of(subject, item)
    layout = subject.layout(item["image"], item["prompt"])
    shown = layout.in_sequence(object_tokens(layout, square(item)), len(tokens))
    np.testing.assert_array_equal(groups["object"], shown)
    np.testing.assert_array_equal(groups["object"] | groups["background"], image)
    assert shown.any() and not (groups["object"] & groups["background"]).any()
    assert [tokens[k] for k in np.flatnonzero(groups["asked"])] == item["prompt"].split()
    assert [tokens[k] for k in np.flatnonzero(groups["role"])] == ["ASSISTANT"]
    assert groups["asking"].sum() == groups["asked"].sum() + 1 + ENDS_IMAGE.get(name, 0)


def test_rings_widen_the_object_and_masks_come_by_id_too(subject, pairs):
    plain, wider = (token_places(subject, pairs, square, rings=rings) for rings in (0, 1))
    named = token_places(subject, pairs, {item["id"]: square(item) for item in pairs})
    for item in pairs:
        assert not (plain(item)["object"] & ~wider(item)["object"]).any() and wider(item)["object"].sum() > plain(item)["object"].sum()
        np.testing.assert_array_equal(named(item)["object"], plain(item)["object"])
    nothing = token_places(subject, pairs, lambda item: square(item) & False)
    assert plain.has(pairs[0], "object", "background") and not nothing.has(pairs[0], "object")


def test_places_serve_a_sweep(subject, pairs):
    places = token_places(subject, pairs, square)
    by_name = sweep(subject, pairs, {"cut": KnockOut("last", "object", (0, 1))}, groups=places)
    for item in pairs:
        at = tuple(int(k) for k in np.flatnonzero(places(item)["object"]))
        alone = sweep(subject, [item], {"cut": KnockOut("last", at, (0, 1))})
        np.testing.assert_allclose(by_name[by_name["item"] == item["id"]]["value"], alone["value"], atol=1e-5)


def test_what_cannot_be_placed_is_said(subject, pairs):
    with pytest.raises(ValueError, match="there are no items to place"):
        token_places(subject, [], square)
    with pytest.raises(KeyError, match="item 'pair-1' was not placed"):
        token_places(subject, pairs[:1], square)(pairs[1])
    with pytest.raises(ValueError, match="'mllama': its image tokens lie outside the token sequence"):
        token_places(subject_of("mllama"), pairs[:1], square)
    with pytest.raises(ValueError, match="learned queries"):
        token_places(subject_of("blip-2"), pairs[:1], square)
