"""Every answer is derivable from the scene: each task's question is answered again, from its words, by an independent reader."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import probes
from probes.tasks.question import NUMBERS, plural

SINGULAR = {plural(s): s for s in probes.scene.SHAPES}


def read(prompt, scene):
    """Answer a prompt by looking at the scene, in the prompt's own words; shares no code with the tasks."""
    objects = [(o.shape, o.color, o.row, o.column) for o in scene.objects]

    def only(word):
        found = [o for o in objects if word in o[:2]]
        assert len(found) == 1, f"'{prompt}' must name one object"
        return found[0]

    if "dot" in prompt:
        return scene.detail.color
    if m := re.fullmatch(r"what color is the (\w+) \?", prompt):
        return only(m[1])[1]
    if m := re.fullmatch(r"what shape is the (\w+) object \?", prompt):
        return only(m[1])[0]
    if m := re.fullmatch(r"how many (\w+) are there \?", prompt):
        return NUMBERS[sum(o[0] == SINGULAR[m[1]] for o in objects) - 1]
    if m := re.fullmatch(r"is the (\w+) left or right of the (\w+) \?", prompt):
        return "left" if only(m[1])[3] < only(m[2])[3] else "right"
    if m := re.fullmatch(r"is the (\w+) above or below the (\w+) \?", prompt):
        return "above" if only(m[1])[2] < only(m[2])[2] else "below"
    if m := re.fullmatch(r"is there a (\w+) (\w+) and a (\w+) (\w+) \?", prompt):
        there = {(color, shape) for shape, color, *_ in objects}
        found = [(m[1], m[2]) in there, (m[3], m[4]) in there]
        return "yes" if all(found) else "no" if not any(found) else "half true"
    if m := re.fullmatch(r"where is the (\w+) \?", prompt):
        _, _, row, column = only(m[1])
        return ("top" if row < 2 else "bottom") + (" left" if column < 2 else " right")
    if m := re.fullmatch(r"what is at row (\w+) column (\w+) \?", prompt):
        return next(o[0] for o in objects if (o[2], o[3]) == (NUMBERS.index(m[1]), NUMBERS.index(m[2])))
    if prompt == "describe the image .":
        words = [f"the {s} is {c} at row {NUMBERS[r]} column {NUMBERS[k]}" for s, c, r, k in sorted(objects, key=lambda o: (o[2], o[3]))]
        return " ; ".join(words)
    raise AssertionError(f"no reader for '{prompt}'")


@pytest.mark.parametrize("task", probes.TASKS)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_answers_follow_from_the_scene_and_partners_swap_them(task, seed):
    rng = np.random.default_rng(seed)
    scene = probes.sample_scene(rng)
    question = probes.TASKS[task].ask(scene, rng)
    if question is None:
        return
    assert read(question.prompt, scene) == question.answer
    assert read(question.prompt, question.partner) == question.partner_answer != question.answer
    assert question.answer in question.candidates and len(set(question.candidates)) == len(question.candidates)
    assert question.paraphrase != question.prompt
    if task != "caption":
        assert question.partner_answer in question.candidates
    changed = [a.id for a, b in zip(scene.objects, question.partner.objects) if a != b]
    assert changed or scene.detail != question.partner.detail
    assert scene.background == question.partner.background and scene.seed == question.partner.seed


@pytest.mark.parametrize("task", probes.TASKS)
def test_every_task_can_be_asked_of_many_scenes(task):
    asked = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        asked += probes.TASKS[task].ask(probes.sample_scene(rng), rng) is not None
    assert asked > 40
