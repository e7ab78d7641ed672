"""Loading a subject, and the sentence for everything that keeps it from being measured."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from vlm_core import (
    AttentionMass,
    DirectLogits,
    HeadGradients,
    LogitLens,
    Subject,
    SubjectError,
    ZeroHeads,
    load_vlm,
    observe,
    precheck_subject,
    sweep,
)
from vlm_core.placement import home
from vlm_core.seam.seam import _before_layer
from vlm_core.subjects.checkpoint import inspect_checkpoint
from vlm_core.subjects.fingerprint import weights_digest
from vlm_core.tests.oracles import logits
from vlm_core.tests.tiny import CHAT_TEMPLATE, make_items, tiny_llava, tiny_subject


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-vlm"
    model, processor = tiny_llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))


def test_a_saved_checkpoint_loads_and_gives_the_same_numbers(saved, subject):
    loaded = load_vlm(saved)
    items = make_items(3)
    interventions = [None, ZeroHeads([(1, 1)])]
    assert sweep(loaded, items, interventions).equals(sweep(subject, items, interventions))
    assert loaded.name == "tiny-vlm"
    assert loaded.model.config.text_config._attn_implementation == "vlm_core"


def test_a_subject_with_the_seam_saves_a_checkpoint_that_loads(tmp_path):
    subject = tiny_subject()
    subject.model.save_pretrained(tmp_path)
    subject.processor.save_pretrained(tmp_path)
    assert load_vlm(tmp_path).heads == subject.heads


def test_identity_names_the_weights(saved, tmp_path):
    identity = load_vlm(saved).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["family"] == "llava"
    assert (identity["n_layers"], identity["n_heads"], identity["dtype"]) == (3, 4, "float32")
    assert identity["weights"] == inspect_checkpoint(saved).sha256()
    model, processor = tiny_llava(seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_vlm(tmp_path).identity()["weights"] != identity["weights"]
    assert Subject(model, processor).identity()["weights"] != tiny_subject().identity()["weights"]


def test_half_precision_checkpoints_compute_in_float32_on_a_cpu(tmp_path):
    model, processor = tiny_llava()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).dtype == "bfloat16"
    assert load_vlm(tmp_path, device="cpu").model.dtype == torch.float32
    assert load_vlm(tmp_path, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_unknown_path_is_not_found(tmp_path):
    for path in (tmp_path / "nowhere", "no spaces/in ids"):
        with pytest.raises(SubjectError, match="was not found: it is no local directory"):
            precheck_subject(path)


def test_an_empty_directory_has_no_config(tmp_path):
    with pytest.raises(SubjectError, match=r"a directory without config\.json"):
        precheck_subject(tmp_path)


def test_a_broken_config_is_named(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(SubjectError, match=r"unreadable config\.json"):
        precheck_subject(copy)


def test_a_text_only_checkpoint_is_named(copy):
    edit_config(copy, model_type="llama", vision_config=None)
    with pytest.raises(SubjectError, match=r"text-only checkpoint \(model_type 'llama'"):
        load_vlm(copy)


def test_an_undeclared_family_is_named(copy):
    edit_config(copy, model_type="chameleon")
    with pytest.raises(SubjectError, match="model_type 'chameleon', which is not declared"):
        precheck_subject(copy)


def corrupt_truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_empty(file):
    file.write_bytes(b"\0\0")


def corrupt_header_length(file):
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])


def corrupt_header(file):
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 20 + data[28:])


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_truncated, "where its header announces"),
        (corrupt_empty, "too few for a safetensors header"),
        (corrupt_header_length, "longer than the file"),
        (corrupt_header, "unreadable header"),
    ],
)
def test_corrupted_weights_are_named(copy, corrupt, message):
    corrupt(copy / "model.safetensors")
    with pytest.raises(SubjectError, match=rf"is corrupted: model\.safetensors.*{message}"):
        precheck_subject(copy)


def test_a_missing_shard_is_named(copy):
    names = list(load_file(copy / "model.safetensors"))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(SubjectError, match=r"lacks 1 of 2 weight files \(first: model-00002-of-00002"):
        precheck_subject(copy)


def test_weights_without_safetensors_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(SubjectError, match="no safetensors weights"):
        precheck_subject(copy)


def test_missing_tensors_are_named(copy):
    weights = load_file(copy / "model.safetensors")
    dropped = next(name for name in weights if "q_proj" in name and "language_model" in name)
    save_file({name: value for name, value in weights.items() if name != dropped}, copy / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(SubjectError, match=r"lacks 1 tensor.*q_proj"):
        load_vlm(copy)


def test_too_little_memory_is_told_before_loading(monkeypatch, saved):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(SubjectError, match=r"needs about .* MiB on cpu .* 0\.05 M parameters as float32.* only 0\.0 MiB are free"):
        load_vlm(saved, device="cpu")


def test_precheck_does_not_import_torch(saved):
    code = (
        "import sys; from vlm_core import precheck_subject; "
        f"precheck_subject({str(saved)!r}); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_chat_template_decides_the_text():
    subject = tiny_subject()
    assert subject.render("what is ?") == "USER : <image> what is ? ASSISTANT :"
    assert subject.render("what is ?", "red") == "USER : <image> what is ? ASSISTANT : red"
    assert tiny_subject(chat_template=None).render("what is ?", "red") == "<image> what is ? red"


def test_a_template_that_writes_the_first_token_gets_no_second_one():
    subject = tiny_subject(chat_template="<s>" + CHAT_TEMPLATE)
    subject.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", subject.tokenizer.bos_token_id)]
    )
    ids = subject.encode_items(make_items(1)).inputs["input_ids"][0].tolist()
    assert ids.count(subject.tokenizer.bos_token_id) == 1
    plain = tiny_subject()
    plain.tokenizer.backend_tokenizer.post_processor = subject.tokenizer.backend_tokenizer.post_processor
    assert plain.encode_items(make_items(1)).inputs["input_ids"][0].tolist() == ids


def test_grey_images_and_tokenizers_without_padding_are_taken():
    subject = tiny_subject()
    subject.processor.image_processor.do_convert_rgb = False
    subject.tokenizer.pad_token = None
    items = [{**item, "image": item["image"].convert("L")} for item in make_items(2)]
    batch = subject.encode_items(items)
    assert batch.inputs["pixel_values"].shape[:2] == (2, 3)
    assert batch.inputs["input_ids"][0][~batch.valid[0]].tolist() in ([], [subject.tokenizer.eos_token_id] * 3)
    assert not bool(batch.valid.all())


def test_the_image_grid_is_read_off_the_encoded_image(subject):
    # One CLS token beside 4 x 4 patches is no grid; the patches alone are.
    item = make_items(1)[0]
    assert subject.layout(item["image"]).shape is None
    plain = tiny_subject()
    plain.processor.num_additional_image_tokens = 0
    assert plain.layout(item["image"]).shape == (4, 4)


def test_a_prompt_without_image_token_is_refused():
    subject = tiny_subject(chat_template=CHAT_TEMPLATE.replace("<image>", "the"))
    with pytest.raises((SubjectError, ValueError), match="image"):
        subject.encode_items(make_items(1))


def test_a_copy_of_the_model_is_not_touched_by_the_original(subject):
    import copy as copying

    clone = copying.deepcopy(subject.model)
    batch = subject.encode_items(make_items(2))
    with torch.inference_mode():
        expected = clone(**batch.inputs).logits
        with subject.intervene(ZeroHeads(subject.heads), batch):
            assert torch.equal(clone(**batch.inputs).logits, expected)
    other = Subject(clone, subject.processor)
    with torch.inference_mode(), other.intervene(ZeroHeads(subject.heads), batch):
        assert not torch.equal(clone(**batch.inputs).logits, expected)
    for layer in other.anatomy.layers:
        assert list(layer._forward_pre_hooks.values()).count(_before_layer) == 1


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_a_model_spread_by_a_device_map_gives_the_same_numbers(saved, subject):
    spread = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.layers.2": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded = load_vlm(saved, device_map=spread)
    assert loaded.model.model.language_model.layers[1].mlp.gate_proj.weight.device.type == "meta"
    items, rows = make_items(3), [None, ZeroHeads([(1, 0)]), ZeroHeads([(0, 1)], queries="question")]
    pd.testing.assert_frame_equal(sweep(loaded, items, rows), sweep(subject, items, rows), rtol=1e-5, atol=1e-5)


OFFLOADED = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "disk",
    "model.language_model.layers": "disk",
    "model.language_model.norm": "disk",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_what_reads_weights_finds_them_where_they_are_kept(saved, subject):
    """Weights on disk between uses: the lens, direct logits, gradients and digests read them all the same."""
    loaded, items = load_vlm(saved, device_map=OFFLOADED), make_items(3)
    text = loaded.model.model.language_model
    away = [loaded.model.lm_head, text.norm, text.embed_tokens, *(layer.self_attn.o_proj for layer in text.layers)]
    assert all(module.weight.is_meta for module in away)
    assert loaded.device == subject.device == home(loaded.model.lm_head) == torch.device("cpu")
    lens = LogitLens(words="candidates", entropy=True, full=True)
    asked = [lens, DirectLogits("candidates"), HeadGradients(), AttentionMass()]
    for seen, expected in zip(observe(loaded, items, asked), observe(subject, items, asked), strict=True):
        for name in expected if isinstance(expected, dict) else [...]:
            np.testing.assert_allclose(seen[name], expected[name], rtol=1e-5, atol=1e-5)
    plain = load_vlm(saved)
    assert loaded.fingerprint[:3] == plain.fingerprint[:3] and len({weights_digest(one.model) for one in (loaded, plain, subject)}) == 1
    batch = loaded.encode_items(items)
    with loaded.intervene(ZeroHeads([(1, 0)]), batch, observers=[AttentionMass()]) as run:
        seen = logits(loaded, batch)
    with subject.intervene(ZeroHeads([(1, 0)]), batch):
        torch.testing.assert_close(seen, logits(subject, batch))
    assert len(run.records[0]) == 3 and all(module.weight.is_meta for module in away)


def test_a_device_and_a_device_map_are_one_too_many(saved):
    with pytest.raises(ValueError, match="device 'cpu' and device_map 'auto' were both given"):
        load_vlm(saved, device="cpu", device_map="auto")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float99"}, "dtype 'float99' is none that a model computes in: use 'auto' .* or one of float32, bfloat16"),
        ({"dtype": "nn"}, "dtype 'nn' is none that a model computes in"),
        ({"dtype": "int8"}, "dtype 'int8' is none that a model computes in"),
        ({"dtype": torch.int64}, "dtype torch.int64 is none that a model computes in"),
        ({"dtype": None}, "dtype None is none that a model computes in"),
        ({"device": "tpu"}, "device 'tpu' is none that torch knows: use 'auto' or 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: use 'auto' or 'cpu'"),
        ({"device": "meta"}, "device 'meta' is not there"),
        ({"device": 3}, r"device must be a name or a torch.device, got 3 \(int\)"),
        ({"device": None}, "device must be a name or a torch.device, got None"),
    ],
)
def test_a_dtype_and_a_device_that_are_not_there(saved, monkeypatch, options, words):
    monkeypatch.setattr("vlm_core.subjects.load.inspect_checkpoint", lambda *_: pytest.fail("the checkpoint was read first"))
    with pytest.raises(ValueError, match=words):
        load_vlm(saved, **options)


def test_a_gpu_beyond_those_there_are(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device 'cuda:2' is not there: use 'auto' or 'cpu' or 'cuda:0' or 'cuda:1'$"):
        load_vlm(saved, device="cuda:2")


def test_a_device_that_this_machine_lacks(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not there: use 'auto' or 'cpu'$"):
        load_vlm(saved, device="cuda")
    assert load_vlm(saved, device=torch.device("cpu"), dtype="float64", check=False).model.dtype == torch.float64


@pytest.mark.parametrize(("path", "words"), [(None, "got None"), (3, r"got 3 \(int\)"), ("", "got ''"), (__file__, "is a file: point to the folder")])
def test_what_names_no_checkpoint(path, words):
    for call in (precheck_subject, load_vlm):
        with pytest.raises(SubjectError, match=words):
            call(path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"[1]", "has an unreadable config.json .*no table of settings"),
        ("config.json", b'{"vision_config": {}, "text_config": 3}', "has an unreadable config.json"),
        ("config.json", b"\xff\xfe\x01", "has an unreadable config.json"),
        ("model.safetensors.index.json", b"{bad", "is corrupted: model.safetensors.index.json does not say which file"),
        ("model.safetensors.index.json", b"{}", "is corrupted: model.safetensors.index.json does not say which file"),
        ("model.safetensors", struct.pack("<Q", 7) + b'{"a":1}', "is corrupted: model.safetensors has an unreadable header"),
    ],
)
def test_files_of_a_checkpoint_that_say_nothing(copy, file, content, words):
    (copy / file).write_bytes(content)
    with pytest.raises(SubjectError, match=words) as refused:
        precheck_subject(copy)
    assert "\n" not in str(refused.value)


def test_what_transformers_says_is_one_line(copy):
    text = json.loads((copy / "config.json").read_text())["text_config"]
    edit_config(copy, text_config={**text, "hidden_size": "x"})
    with pytest.raises(SubjectError, match="could not be loaded by transformers: .*'hidden_size'.*got str") as refused:
        load_vlm(copy)
    assert "\n" not in str(refused.value)
