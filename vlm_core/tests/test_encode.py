"""From images and prompts through real processors: every family, any number of images, answers and their labels."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_core import Subject, SubjectError, selfcheck
from vlm_core.subjects.embed import Encoded, batch_groups, encode_items
from vlm_core.subjects.rows import forward_rows, read_logits
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import tiny_subject

PROMPTS = ["what color is in the image ?", "what is the color of the big circle ?"]


@cache
def subject_of(name: str) -> Subject:
    processor, model = PROCESSORS[name]()
    with torch.no_grad():
        # Cross-attention enters through gates that start at zero.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_gate"):
                parameter.fill_(0.5)
    return Subject(model, processor, name=name)


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def takes_several(name: str) -> bool:
    return subject_of(name).anatomy.family.max_images is None


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_selfcheck_passes_on_a_prompt_of_its_own(name):
    selfcheck(subject_of(name))


@pytest.mark.parametrize("name", PROCESSORS)
def test_prompts_of_one_batch_are_measured_as_each_alone(name):
    subject = subject_of(name)
    images = [[picture(0), picture(1)], picture(2)] if takes_several(name) else [picture(0), picture(2)]
    items = [{"image": image, "prompt": prompt} for image, prompt in zip(images, PROMPTS, strict=True)]
    sequences = encode_items(subject, items)
    last = np.array([len(sequence) - 1 for sequence in sequences])
    hidden, _ = forward_rows(subject, sequences, np.arange(2), [None, None], [0, 1], (np.arange(2), last))
    seen = read_logits(subject, hidden)
    for row, item in enumerate(items):
        batch = subject.encode([item["image"]], [item["prompt"]])
        with torch.inference_mode():
            expected = subject.model(**batch.inputs, use_cache=False).logits[0, -1]
        torch.testing.assert_close(seen[row], expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", PROCESSORS)
def test_several_images_take_that_many_places(name):
    subject = subject_of(name)
    images = [picture(0), picture(1)]
    if not takes_several(name):
        with pytest.raises(SubjectError, match="takes 1 image per prompt, got 2 for 'what color"):
            subject.encode([images], PROMPTS[:1])
        return
    one, two = (int(subject.encode([shown], PROMPTS[:1]).image.sum()) for shown in (images[:1], images))
    assert two == 2 * one
    changed = subject.encode([[images[0], picture(5)]], PROMPTS[:1])
    same = subject.encode([images], PROMPTS[:1])
    with torch.inference_mode():
        seen, other = (subject.model(**batch.inputs, use_cache=False).logits[0, -1] for batch in (same, changed))
    assert not torch.allclose(seen, other)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_labels_lie_on_the_answers(name, side):
    subject = subject_of(name)
    answers = ["red", "dark blue"]
    batch = subject.encode([picture(0), picture(1)], PROMPTS, answers, padding_side=side)
    for row, answer in enumerate(answers):
        assert tuple(batch.labels[row][batch.labels[row] != -100].tolist()) == subject.continuation(answer)
    assert "labels" not in batch.inputs
    # The answer follows what a prompt alone gives.
    prompt = subject.encode([picture(0)], PROMPTS[:1])
    ids = batch.inputs["input_ids"][0][batch.valid[0] & (batch.labels[0] == -100)]
    assert torch.equal(ids[: int(prompt.valid.sum())], prompt.inputs["input_ids"][0][prompt.valid[0]])


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_prompt_does_not_see_its_answer(name):
    subject = subject_of(name)
    answered = subject.encode([picture(0)], PROMPTS[:1], ["dark blue"], padding_side="right")
    prompt = subject.encode([picture(0)], PROMPTS[:1])
    start = int((answered.labels[0] != -100).int().argmax())
    with torch.inference_mode():
        seen, expected = (subject.model(**batch.inputs, use_cache=False).logits[0] for batch in (answered, prompt))
    torch.testing.assert_close(seen[start - 1], expected[-1], rtol=1e-3, atol=2e-3)


def test_several_images_without_a_chat_template():
    subject = tiny_subject(chat_template=None)
    one, two = (int(subject.encode([images], PROMPTS[:1]).image.sum()) for images in ([picture(0)], [picture(0), picture(1)]))
    assert two == 2 * one > 0


def test_an_answer_that_the_processor_takes_apart_begins_with_its_first_letter():
    """PaliGemma's processor ends the prompt with a line break; no space stands before the answer."""
    subject = subject_of("paligemma")
    assert subject.wording.lead() == ""
    assert subject.render("what ?", "red") == subject.render("what ?") + "\nred"
    assert subject_of("llava").render("what ?", "red").endswith(" red")


def test_bad_input_is_one_sentence():
    subject = subject_of("llava")
    with pytest.raises(SubjectError, match="has no image tokens in the prompt 'why'"):
        subject.encode([[]], ["why"])
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        subject.encode([picture(0)], PROMPTS)
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        subject.encode([picture(0), picture(1)], PROMPTS, ["red"])


def test_groups_are_padded_with_the_prompts():
    def encoded(n: int, **groups: list[bool]) -> Encoded:
        return Encoded(
            ids=torch.arange(n), embeds=torch.zeros(n, 4), image=torch.zeros(n, dtype=torch.bool), positions=None, types={},
            deepstack=(), n_prompt=n, groups={name: torch.tensor(members) for name, members in groups.items()},
        )

    groups = batch_groups([encoded(2, object=[True, False]), encoded(3, background=[False, True, True])])
    assert groups["object"].tolist() == [[True, False, False], [False, False, False]]
    assert groups["background"].tolist() == [[False, False, False], [False, True, True]]
    subject = subject_of("llava")
    (sequence,) = encode_items(subject, [{"image": picture(0), "prompt": PROMPTS[0]}])
    sequence.groups["object"] = sequence.image
    longer = sequence.extended(subject, (5, 6))
    assert longer.groups["object"].sum() == sequence.image.sum() and len(longer.groups["object"]) == len(longer)
