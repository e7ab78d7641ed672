"""Operations of asking a model for data, by formula, are those that torch counts while it is asked."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from vlm_core import Subject
from vlm_core.distill.asking import answering_flops, sampling_flops, scoring_flops
from vlm_core.evaluation import generated
from vlm_core.sampling import sampled
from vlm_core.sweeps.answers import answer_scores
from vlm_core.sweeps.features import vision_tower
from vlm_core.tests.tiny import make_items, tiny_llava

LAYERS = 12


@pytest.fixture(scope="module")
def subject():
    """A tiny model whose attention is made of plain products."""
    return Subject(*tiny_llava(layers=LAYERS, attention="eager", intermediate=96))


@pytest.fixture(scope="module")
def items():
    """Three pictures, one of them asked about twice."""
    found = make_items(4)
    found[1]["image"] = found[0]["image"]
    return found


def counted(subject, ask):
    """What ``ask`` gives, and what torch counts meanwhile outside the vision tower and the projector."""
    counter, seen = FlopCounterMode(display=False), []
    with contextlib.ExitStack() as stack:
        for eye in (vision_tower(subject), subject.model.model.multi_modal_projector):
            for register, sign in ((eye.register_forward_pre_hook, -1), (eye.register_forward_hook, 1)):
                handle = register(lambda *called, sign=sign: seen.append(sign * counter.get_total_flops()))
                stack.callback(handle.remove)
        with counter:
            found = ask()
    return found, counter.get_total_flops() - sum(seen)


def test_answers_take_their_prompt_and_every_token_but_the_last(subject, items):
    said, expected = counted(subject, lambda: generated(subject, items, batch_rows=1, max_new_tokens=5))
    assert answering_flops(subject, said) == expected
    assert {one.prompt for one in said} == {int(subject.encode_items([item]).valid.sum()) for item in items}
    together = generated(subject, items, max_new_tokens=5)
    assert answering_flops(subject, together) == expected, "padding does not count"


@pytest.mark.parametrize("temperature", [0.05, 6.0])
def test_samples_that_have_said_the_same_are_one(subject, items, temperature):
    def ask(**how):
        return sampled(subject, items, 20, temperature=temperature, seed=1, max_new_tokens=4, **how)

    drawn, expected = counted(subject, lambda: ask(batch_rows=1))
    assert sampling_flops(subject, drawn) == expected
    assert ask() == drawn
    alone = sum(20 * answering_flops(subject, generated(subject, [item], max_new_tokens=1)) for item in items)
    assert expected < alone, "a prompt runs once"


def test_samples_that_end_are_not_gone_on_from(items):
    subject = Subject(*tiny_llava(layers=2, attention="eager"))
    subject.model.generation_config.eos_token_id = list(range(2, 12))
    drawn, expected = counted(subject, lambda: sampled(subject, items, 8, temperature=9.0, max_new_tokens=4, batch_rows=1))
    lengths = {len(tokens) for one in drawn for tokens in one.tokens}
    assert sampling_flops(subject, drawn) == expected and 1 in lengths and max(lengths) > 1


def asked_about(items, answers):
    """Every item with each of these answers."""
    return zip(*itertools.product(items, answers), strict=True)


def test_scores_of_answers_to_one_question_each_take_whole_sequences(subject):
    asked, answers = asked_about(make_items(3), ["red", "blue"])
    _, expected = counted(subject, lambda: answer_scores(subject, asked, answers, batch_rows=1))
    assert scoring_flops(subject, asked, answers) == expected


def test_scores_take_a_picture_once_and_what_follows_it_for_every_answer(subject, items):
    alike = [{**item, "prompt": items[0]["prompt"]} for item in items[1:]]
    alike[0]["prompt"] = " ".join(reversed(alike[0]["prompt"].split()))  # as long, another question
    asked, answers = asked_about([items[0], *alike], ["red", "dark blue", "dark  blue", "big green", "big blue circle", ""])
    _, expected = counted(subject, lambda: answer_scores(subject, asked, answers, batch_rows=1))
    found = scoring_flops(subject, asked, answers)
    assert found * (1 - 1 / LAYERS) < expected <= found, "but for the last layer where nobody reads"
    whole = sum(scoring_flops(subject, [item], [answer]) for item, answer in zip(asked, answers, strict=True) if answer.strip())
    assert found < 0.8 * whole


def test_scores_take_whole_sequences_where_image_tokens_see_the_question(items):
    subject = Subject(*tiny_llava(layers=2, attention="eager"))
    subject.anatomy = replace(subject.anatomy, family=replace(subject.anatomy.family, causal_prompt=False))
    asked, answers = asked_about(items, ["red", "dark blue", "big green circle"])
    _, expected = counted(subject, lambda: answer_scores(subject, asked, answers, batch_rows=1))
    assert scoring_flops(subject, asked, answers) == expected


def test_nothing_asked_takes_nothing(subject):
    assert answering_flops(subject, []) == sampling_flops(subject, []) == scoring_flops(subject, [], []) == 0
    assert scoring_flops(subject, make_items(1), [" "]) == 0
