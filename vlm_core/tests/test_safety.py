"""Nothing that a checkpoint brings is executed, and no token of the environment is written."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from vlm_core import SubjectError, load_vlm, precheck_subject
from vlm_core.secrets import hidden, secrets
from vlm_core.tests.tiny import tiny_llava

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def trap(tmp_path):
    """Where code writes when it runs."""
    return tmp_path / "executed"


class Touch:
    """Pickled: making a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(trap):
    """A file as ``torch.save`` writes it, which runs code when it is unpickled."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1), "more": Touch(trap)}, buffer)
    return buffer.getvalue()


def test_the_trap_works(trap):
    torch.load(io.BytesIO(pickled(trap)), weights_only=False)
    assert trap.exists()


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


# -- pickles ----------------------------------------------------------------------------------------------------------

PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model-00001-of-00001.bin", "vocab.pkl")


def test_pickles_beside_the_weights_are_not_opened(copy, saved, trap):
    for name in PICKLES:
        (copy / name).write_bytes(pickle.dumps(Touch(trap)) if name.endswith("pkl") else pickled(trap))
    edit(copy / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": PICKLES[4]})
    loaded, plain = load_vlm(copy), load_vlm(saved)
    assert not trap.exists() and loaded.identity()["weights"] == plain.identity()["weights"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.bin"])
def test_pickles_in_the_place_of_weights_are_refused(copy, trap, name):
    """Alone, under a safetensors name, and as what the index of safetensors names."""
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickled(trap))
    if name == "model.bin":
        edit(copy / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": name})
    with pytest.raises(SubjectError, match="has no safetensors weights|is corrupted: model"):
        load_vlm(copy)
    assert not trap.exists()


def test_from_pretrained_itself_takes_safetensors_alone(copy, trap, monkeypatch):
    """Even where what is checked before is passed over: what is on the Hub is not here to be looked at."""
    from vlm_core.subjects import checkpoint

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickled(trap))
    monkeypatch.setattr(checkpoint, "_weight_files", lambda *_, **__: ((), 1000))
    with pytest.raises(SubjectError, match="could not be loaded by transformers: .*safetensors"):
        load_vlm(copy)
    assert not trap.exists()


def test_an_adapter_that_names_another_base_is_refused(copy, trap):
    edit(copy / "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/other")
    (copy / "adapter_model.bin").write_bytes(pickled(trap))
    with pytest.raises(SubjectError, match=r"has an adapter \(adapter_config.json\).*merge_and_unload"):
        precheck_subject(copy)
    assert not trap.exists()


# -- code -------------------------------------------------------------------------------------------------------------


def code(folder, trap):
    """A file of code that says it was run, with every class that an ``auto_map`` may name."""
    names = ("Config", "Model", "Processor", "Tokenizer", "ImageProcessor")
    classes = "".join(f"class {name}:\n    def __getattr__(self, name): return None\n" for name in names)
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n{classes}")


MAPS = {
    "config.json": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"},
    "processor_config.json": {"AutoProcessor": "own.Processor"},
    "preprocessor_config.json": {"AutoImageProcessor": "own.ImageProcessor", "AutoProcessor": "own.Processor"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"], "AutoProcessor": "own.Processor"},
}


@pytest.mark.parametrize("file", MAPS)
def test_a_checkpoints_code_is_passed_over_where_transformers_has_the_class(copy, saved, trap, file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    code(copy, trap)
    edit(copy / file, auto_map=MAPS[file])
    loaded = load_vlm(copy)
    assert not trap.exists() and type(loaded.model).__module__.startswith("transformers.")
    assert type(loaded.processor).__name__ == type(load_vlm(saved, check=False).processor).__name__


def test_a_processor_of_a_checkpoints_own_is_refused_in_one_sentence(copy, trap, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    code(copy, trap)
    edit(copy / "processor_config.json", processor_class="Processor", auto_map={"AutoProcessor": "own.Processor"})
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if (copy / name).exists():
            edit(copy / name, processor_class="Processor")
    with pytest.raises(SubjectError, match=r"asks for code of its own \(an auto_map in its configuration\), which is never run"):
        load_vlm(copy)
    assert not trap.exists()


def test_a_model_of_a_checkpoints_own_is_refused(copy, trap):
    code(copy, trap)
    edit(copy / "config.json", model_type="own", auto_map=MAPS["config.json"])
    with pytest.raises(SubjectError, match="model_type 'own', which is not declared"):
        load_vlm(copy)
    assert not trap.exists()


def test_a_kernel_of_the_hub_is_refused(copy):
    for part in ({"attn_implementation": "someone/kernel"}, {"vision_config": {"attn_implementation": "someone/kernel"}}):
        edit(copy / "config.json", **part)
        with pytest.raises(SubjectError, match="asks in its config.json for the attention kernel 'someone/kernel' of the Hub"):
            precheck_subject(copy)


def test_every_call_of_from_pretrained_forbids_code():
    calls = []
    for room in ("vlm_core", "fixtures", "hypotheses", "reports", "probes"):
        for path in (ROOT / room).rglob("*.py"):
            if "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                    calls.append((path, node))
    forbidding = [
        any(one.arg is None and getattr(one.value, "id", "") in ("SAFE", "files") for one in node.keywords) for _, node in calls
    ]
    assert len(calls) >= 6 and all(forbidding), [(str(path), node.lineno) for (path, node), safe in zip(calls, forbidding, strict=True) if not safe]


# -- chat templates ---------------------------------------------------------------------------------------------------

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__['__builtins__']['open']('TRAP', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch TRAP') }}",
    "{{ (raise_exception.__globals__)['__builtins__']['open']('TRAP', 'w') }}",
    "{% set x = strftime_now.__globals__ %}{{ x['__builtins__']['open']('TRAP', 'w') }}",
    "{{ messages.append({}) }}",
    "{% include '/etc/passwd' %}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(copy, trap, template):
    (copy / "chat_template.jinja").write_text(template.replace("TRAP", str(trap)))
    with pytest.raises(SubjectError, match="has a chat template that cannot be rendered") as refused:
        load_vlm(copy)
    assert not trap.exists() and "\n" not in str(refused.value) and "root:" not in str(refused.value)


# -- tokens -----------------------------------------------------------------------------------------------------------

TOKEN = "hf_secretsecretsecret"


def test_secrets_are_known_by_the_names_of_their_variables(monkeypatch):
    for name in list(secrets().values()):
        monkeypatch.delenv(name)
    given = {"HF_TOKEN": TOKEN, "OPENAI_API_KEY": "sk-abcdefgh", "MY_PASSWORD": "long enough", "WANDB_API_KEY": TOKEN + "more"}
    given |= {"AZURE_OPENAI_KEY": "0123456789", "GITHUB_PAT": "ghp_abcdefgh"}
    other = {"TOKENIZERS_PARALLELISM": "falsefalse", "HF_HOME": "/somewhere/else", "A_TOKEN": "short", "KEYBOARD": "qwertyuiop", "A_KEY_FILE": "/a/b/c/d/e"}
    for name, value in {**given, **other}.items():
        monkeypatch.setenv(name, value)
    assert {name: value for value, name in secrets().items()} == given
    assert hidden(f"a {TOKEN}more b {TOKEN} sk-abcdefgh short falsefalse") == "a <WANDB_API_KEY> b <HF_TOKEN> <OPENAI_API_KEY> short falsefalse"


def test_what_a_library_says_of_a_token_is_not_repeated(copy, monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise OSError(f"401 for header Bearer {TOKEN}")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
    with pytest.raises(SubjectError, match="401 for header Bearer <HF_TOKEN>"):
        load_vlm(copy)


