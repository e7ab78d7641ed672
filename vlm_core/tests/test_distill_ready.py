"""What is done once for a set is what TRL and the vision tower would do for every batch."""

from __future__ import annotations

import re

import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlm_core import Subject
from vlm_core.distill import Budget, instruction_set, sft
from vlm_core.distill import ready as ready_module
from vlm_core.distill.ready import encoded_by, encoded_conversations, features_once, ready_rows, sharing
from vlm_core.sweeps import features as features_module
from vlm_core.sweeps.features import vision_tower
from vlm_core.tests.distill_students import TEMPLATE, preferences
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items, tiny_llava

UNTEMPLATED = {"paligemma", "instructblip", "blip-2"}  # no conversations, so nothing that TRL's conversational sets could be rendered with
NOT_ONCE = {("aya_vision", "sft"), ("mllama", "sft"), ("mllama", "preference")}  # TRL's collator makes their batches


def batches_equal(rows, collate, data, collator, chosen):
    ours, theirs = collate([rows[i] for i in chosen]), collator([data[i] for i in chosen])
    assert ours.keys() == theirs.keys()
    real = theirs["attention_mask"] != 0
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        pair = (ours[name][real], tensor[real]) if name == "input_ids" else (ours[name], tensor)
        assert torch.equal(*pair), name


def taught(n=12):
    items = make_items(n)
    return instruction_set(items, [f"dark {item['answer']}" if i % 3 == 0 else item["answer"] for i, item in enumerate(items)])


def test_batches_of_rows_encoded_once_are_those_of_trls_collator():
    _, processor = tiny_llava(chat_template=TEMPLATE)
    data, collator = taught(13), DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    rows, collate, encoded = ready_rows(data, collator, encoded_conversations(collator))
    assert encoded and len(rows) == len(data)
    for chosen in ([0, 6, 2], [6], [5, 4, 3, 2, 1, 0]):
        batches_equal(rows, collate, data, collator, chosen)


def test_batches_of_preferences_encoded_once_are_those_of_trls_collator():
    _, processor = tiny_llava(chat_template=TEMPLATE)
    data, collator = preferences(8), DataCollatorForVisionPreference(processor)
    rows, collate, encoded = ready_rows(data, collator, encoded_by(collator))
    assert encoded
    for chosen in ([0, 6, 2], [6], [5, 4, 3, 2, 1, 0]):
        batches_equal(rows, collate, data, collator, chosen)


def test_rows_that_cannot_be_encoded_alone_are_left_to_trls_collator():
    _, processor = tiny_llava(chat_template=TEMPLATE)
    data, collator = taught(), DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    own = encoded_conversations(collator)

    def wrong(rows):
        return [({**one, "labels": one["labels"].clone().fill_(-100)},) for (one,) in own(rows)]

    def misshapen(rows):
        return [({**one, "pixel_values": one["pixel_values"][..., : 4 + i]},) for i, (one,) in enumerate(own(rows))]

    for encode in (wrong, misshapen):
        assert ready_rows(data, collator, encode) == (data, collator, False)


@pytest.mark.parametrize("name", sorted(set(PROCESSORS) - UNTEMPLATED))
def test_every_familys_batches_are_those_of_trls_collator(name):
    """Encoded once where a family's fields can be put together, else made by the collator every time."""
    processor, _ = PROCESSORS[name]()
    image = re.search(r"'image' %}(.*?){%", processor.chat_template).group(1)
    processor.chat_template = TEMPLATE.replace("<image> ", image)
    sets = (
        (preferences(5), DataCollatorForVisionPreference(processor), encoded_by, "preference"),
        (taught(10), DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True), encoded_conversations, "sft"),
    )
    for data, collator, encoding, kind in sets:
        rows, collate, encoded = ready_rows(data, collator, encoding(collator))
        assert encoded == ((name, kind) not in NOT_ONCE)
        if encoded:
            batches_equal(rows, collate, data, collator, [3, 1, 4])
        else:
            assert rows is data and collate is collator


def test_features_of_pictures_are_the_towers_whatever_came_with_them():
    subject = Subject(*tiny_llava())
    tower, calls = vision_tower(subject), []
    pixels = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        plain = tower(pixels, output_hidden_states=True).hidden_states[-1]
        alone = torch.cat([tower(one[None], output_hidden_states=True).hidden_states[-1] for one in pixels])
        handle = tower.embeddings.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        with features_once(subject):
            for chosen in ([0, 1], [1, 2, 0], [3, 3, 2]):
                torch.testing.assert_close(tower(pixels[chosen], output_hidden_states=True).hidden_states[-1], plain[chosen])
                assert torch.equal(tower(pixels[chosen], output_hidden_states=True).hidden_states[-1], alone[chosen])
        handle.remove()
    assert calls == [1, 1, 1, 1]


# -- several trainings in one process ---------------------------------------------------------------------------------


def test_trainings_that_share_encode_a_set_once_and_give_the_same_students(tmp_path, monkeypatch):
    student, data = tmp_path / "student", taught()
    for part in tiny_llava(layers=2, chat_template=TEMPLATE):
        part.save_pretrained(student)
    encoded, passed = [], []
    encode, recall = ready_module._encoded_rows, features_module._recall

    def counting(rows, collator, how):
        encoded.append(len(rows))
        return encode(rows, collator, how)

    def watching(original, *rest):
        def tower(*args, **kwargs):
            passed.append(1)
            return original(*args, **kwargs)

        return recall(tower, *rest)

    monkeypatch.setattr(ready_module, "_encoded_rows", counting)
    monkeypatch.setattr(features_module, "_recall", watching)
    budget = Budget(3, 2, 1e-3)
    alone = [sft(student, data, budget, tmp_path / f"alone-{seed}", seed=seed) for seed in (0, 1)]
    one_by_one = len(encoded), len(passed)
    with sharing(2**26):
        encoded.clear(), passed.clear()
        together = [sft(student, data, budget, tmp_path / f"together-{seed}", seed=seed) for seed in (0, 1)]
        other = data.select(range(len(data) - 1))
        sft(student, other, budget, tmp_path / "other")
    assert one_by_one[0] == 2 and len(encoded) == 2 and encoded[1] == len(other)
    assert 0 < len(passed) < one_by_one[1]
    for one, two in zip(alone, together, strict=True):
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    encoded.clear()
    sft(student, data, budget, tmp_path / "after")
    assert len(encoded) == 1  # nothing is kept beyond the context
