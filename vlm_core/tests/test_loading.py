"""What of a checkpoint is pinned, where it goes, in how many bits, and whether it fits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig

from vlm_core import DirectLogits, Subject, SubjectError, ZeroHeads, load_vlm, observe, sweep
from vlm_core.evaluation import greedy_answers
from vlm_core.reduction.costs import prefill_flops, prompt_lengths
from vlm_core.reduction.gate import marks
from vlm_core.subjects import footprint as memory
from vlm_core.subjects.checkpoint import inspect_checkpoint
from vlm_core.subjects.footprint import Footprint, require_room
from vlm_core.subjects.load import require_loadable
from vlm_core.tests.oracles import logits
from vlm_core.tests.tiny import make_items, tiny_llava

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-vlm"
    model, processor = tiny_llava(hidden=64)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A cache of the Hub with two commits of ``org/tiny``, ``main`` the second; the Hub itself cannot be reached."""
    root = tmp_path / "hub" / "models--org--tiny"
    for commit in COMMITS:
        shutil.copytree(saved, root / "snapshots" / commit)
    config = root / "snapshots" / COMMITS[0] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"first": True}))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMITS[1])
    (root / "refs" / "v1").write_text(COMMITS[0])
    import huggingface_hub.constants
    import transformers.utils.hub

    for module in (huggingface_hub.constants, transformers.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(root.parent))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    return root


# -- the revision -----------------------------------------------------------------------------------------------------


def test_a_revision_is_the_commit_that_it_stands_for(hub):
    for asked, commit in ((None, COMMITS[1]), ("main", COMMITS[1]), ("v1", COMMITS[0]), (COMMITS[0], COMMITS[0])):
        found = inspect_checkpoint("org/tiny", asked)
        assert (found.commit, found.revision, found.name) == (commit, asked, "tiny")
    first, second = (load_vlm("org/tiny", revision=revision, check=False) for revision in ("v1", None))
    assert (first.identity()["revision"], second.identity()["revision"]) == COMMITS
    assert first.model.config.first and not hasattr(second.model.config, "first")
    assert first.identity()["weights"] == second.identity()["weights"] and first.identity()["content"] != second.identity()["content"]


def test_every_file_is_of_the_commit_that_was_looked_up(hub, monkeypatch):
    """A branch that moves while a subject loads does not mix two commits."""
    import transformers

    seen = []
    for cls in (transformers.AutoModelForImageTextToText, transformers.AutoProcessor, transformers.AutoConfig):
        own = cls.from_pretrained.__func__

        def recorded(kind, *args, _own=own, **options):
            seen.append((options.get("revision"), options.get("trust_remote_code")))
            return _own(kind, *args, **options)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(recorded))
    load_vlm("org/tiny", check=False)
    assert len(seen) >= 2 and set(seen) == {(COMMITS[1], False)}


def test_a_directory_is_known_by_its_content(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    one = load_vlm(copy, check=False).identity()
    assert one["revision"] is None and one["content"] == inspect_checkpoint(saved).content()
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "user"))
    assert inspect_checkpoint(copy).content() != one["content"] and inspect_checkpoint(copy).sha256() == one["weights"]


def test_the_hub_tells_the_size_before_anything_is_downloaded(saved, monkeypatch):
    import huggingface_hub

    told = SimpleNamespace(sha=COMMITS[0], safetensors=SimpleNamespace(total=7_000_000_000))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, source, **options: told)
    bare = saved.parent / "bare"
    bare.mkdir(exist_ok=True)
    shutil.copy(saved / "config.json", bare)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, file, revision: str(bare / file))
    found = inspect_checkpoint("org/large")
    assert (found.n_parameters, found.commit, found.sha256()) == (7_000_000_000, COMMITS[0], None)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
    with pytest.raises(SubjectError, match=r"'large' needs about 28\.\d GiB on cpu .* 7\.00 G parameters as float32.* only 1\.0 GiB are free"):
        load_vlm("org/large", device="cpu")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_footprint_is_that_of_weights_and_one_prompt(saved):
    checkpoint, (model, processor) = inspect_checkpoint(saved), tiny_llava(hidden=64)
    found = Footprint.of(checkpoint, torch.float32, processor=processor)
    assert found.n_parameters == sum(one.numel() for one in model.parameters())
    assert found.weights == int(4 * found.n_parameters * 1.1)
    batch = Subject(model, processor).encode([Image.new("RGB", memory.PICTURE)], ["?"])
    tokens = int(batch.valid.sum()) + 64
    assert (found.n_tokens, found.n_image) == (tokens, int(batch.image.sum()))
    # Two of keys and values, 3 layers, 4 heads of 16; inside a layer 12 times the width and 4 times the inner one; the logits; the pixels.
    decoder = tokens * 4 * (2 * 3 * 64 + 12 * 64 + 4 * 128) + 4 * model.config.text_config.vocab_size
    assert found.prompt == decoder + 4 * batch.inputs["pixel_values"].numel()
    half = Footprint.of(checkpoint, torch.bfloat16, processor=processor)
    assert abs(2 * half.weights - found.weights) <= 1 and half.prompt < found.prompt
    assert half.weights > Footprint.of(checkpoint, torch.bfloat16, "8bit").weights > Footprint.of(checkpoint, torch.bfloat16, "4bit").weights


def test_sizes_that_a_config_leaves_to_its_class_count(saved, tmp_path):
    """A config says what differs from the defaults; LLaVA-1.5's names no width."""
    processor, checkpoint = tiny_llava(hidden=64)[1], inspect_checkpoint(saved)
    silent = {**checkpoint.config["text_config"]}
    del silent["hidden_size"]
    found = Footprint.of(replace(checkpoint, config={**checkpoint.config, "text_config": silent}), torch.float32, processor=processor)
    own = Footprint.of(checkpoint, torch.float32, processor=processor)
    assert found.prompt - own.prompt == own.n_tokens * 4 * 12 * (LlamaConfig().hidden_size - 64)


def test_a_processor_that_fails_on_a_picture_is_said_to_and_no_number_given(saved):
    checkpoint, processor = inspect_checkpoint(saved), tiny_llava(hidden=64)[1]
    processor.image_processor.crop_size = None
    with pytest.warns(UserWarning, match="'tiny-vlm': what a picture of 896 x 896 pixels takes in memory is not known, for its processor fails"):
        found = Footprint.of(checkpoint, torch.float32, processor=processor)
    assert (found.prompt, found.n_tokens, found.n_image) == (0, 0, 0) and memory.rows_that_fit(found, "cpu", 32) == 32


def test_parameters_that_nobody_tells_are_counted_without_memory(saved):
    checkpoint = inspect_checkpoint(saved)
    unknown = type(checkpoint)(**{**vars(checkpoint), "n_parameters": None})
    assert Footprint.of(unknown, torch.float32) == Footprint.of(checkpoint, torch.float32)


def test_room_over_all_devices_counts_them_together(saved, monkeypatch):
    checkpoint = inspect_checkpoint(saved)
    processor = tiny_llava(hidden=64)[1]
    needed = Footprint.of(checkpoint, torch.float32, processor=processor)
    one = (needed.weights + needed.prompt) // 3 + 1
    monkeypatch.setattr(memory, "free_memory", lambda: one)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (one, one))
    assert require_room(checkpoint, "cpu", torch.float32, spread=True, processor=processor) == needed
    with pytest.raises(SubjectError, match="needs about .* on cuda:1"):
        require_room(checkpoint, "cuda:1", torch.float32, processor=processor)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SubjectError, match="needs about .* on all devices and the host together"):
        require_room(checkpoint, "cpu", torch.float32, spread=True, processor=processor)
    with pytest.raises(SubjectError, match="all devices and the host together"):
        load_vlm(saved, device_map="auto")


def test_short_memory_makes_smaller_batches_and_the_same_answers(saved, monkeypatch):
    plain, items = load_vlm(saved, check=False), make_items(5)
    room = Footprint.of(plain.checkpoint, torch.float32, processor=plain.processor)
    sizes = []
    monkeypatch.setattr(memory, "free_memory", lambda: room.weights + 6 * room.prompt)
    tight = load_vlm(saved, check=False)
    assert plain.batch_rows == 32 and 3 <= tight.batch_rows < 32
    tight.batch_rows = 2
    own = tight.encode_items
    monkeypatch.setattr(tight, "encode_items", lambda some, **options: sizes.append(len(some)) or own(some, **options))
    assert greedy_answers(tight, items, max_new_tokens=3) == greedy_answers(plain, items, max_new_tokens=3)
    assert sizes == [2, 2, 1]


# -- quantization -----------------------------------------------------------------------------------------------------


def test_quantization_without_its_package_is_one_sentence(saved, monkeypatch):
    with pytest.raises(ValueError, match="quantization '3bit' is unknown: use one of 4bit, 8bit"):
        load_vlm(saved, quantization="3bit")
    monkeypatch.setattr("vlm_core.quantization.find_spec", lambda name: None)
    for call in (lambda: load_vlm(saved, quantization="4bit"), lambda: require_loadable(quantization="8bit")):
        with pytest.raises(ValueError, match="quantization '[48]bit' needs bitsandbytes, which is not installed: pip install bitsandbytes"):
            call()


@pytest.mark.parametrize(("bits", "apart"), [("8bit", 0.05), ("4bit", 0.5)])
def test_quantized_weights_are_measured_like_others(saved, bits, apart):
    """The self-check passes, direct logits add up, costs count weights and not bytes, and the identity says so."""
    pytest.importorskip("bitsandbytes")
    plain, subject, items = load_vlm(saved), load_vlm(saved, quantization=bits), make_items(3)
    assert any(type(one).__name__.startswith("Linear") and type(one) is not nn.Linear for one in subject.model.modules())
    identity = subject.identity()
    assert identity["quantization"] == bits and plain.identity()["quantization"] is None
    assert {name: identity[name] for name in ("n_parameters", "dtype", "device")} == {
        name: plain.identity()[name] for name in ("n_parameters", "dtype", "device")
    }
    assert subject.fingerprint != plain.fingerprint
    lengths = prompt_lengths(subject, items)[0]
    assert prefill_flops(subject.anatomy, lengths) == prefill_flops(plain.anatomy, lengths)
    assert float((marks(subject.anatomy) - marks(plain.anatomy)).abs().max()) < 0.2
    rows = [None, ZeroHeads([(1, 0)])]
    seen, expected = sweep(subject, items, rows), sweep(plain, items, rows)
    assert np.corrcoef(seen["value"], expected["value"])[0, 1] > 1 - apart
    direct = observe(subject, items, DirectLogits("candidates"))
    total = direct["heads"].sum((1, 2)) + direct["mlp"].sum(1) + direct["embedding"] + direct["bias"]
    expected = [logits(subject, subject.encode_items([item]))[0, -1, [subject.continuation(one)[0] for one in item["candidates"]]] for item in items]
    np.testing.assert_allclose(total, np.stack(expected), rtol=1e-2, atol=1e-2)
    pd.testing.assert_frame_equal(sweep(subject, items, rows), seen)


