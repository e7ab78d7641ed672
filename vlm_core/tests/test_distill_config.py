"""A distillation's declaration: files say what they say, and everything wrong is one sentence with its place."""

from __future__ import annotations

import json

import pytest
import yaml

from vlm_core.distill.config import SFT, DistillConfig, OnPolicy, Pairs, Preference, Where
from vlm_core.distill.lora import Lora
from vlm_core.sources import CheckpointAt, Items

LEAST = {
    "teacher": {"path": "big"},
    "student": {"path": "small"},
    "data": {"factory": "probes:build"},
    "evaluation": {"test": {"path": "org/set", "split": "validation"}},
    "stages": [{"kind": "sft", "steps": 10}],
    "out": "distilled",
}
TOML = """
out = "distilled"
leaked = "drop"
seed = 3
[teacher]
path = "big"
revision = "main"
[student]
path = "small"
[data]
factory = "probes:build"
arguments = { split = "train", tasks = ["color"] }
limit = 20
[answers]
kind = "grounded"
where = { box = "boxes", rows = 4, columns = 4 }
[evaluation.test]
path = "org/set"
columns = { image = "picture", prompt = "question", answer = "label" }
[[stages]]
kind = "sft"
steps = 10
lora = { layers = [0, 2], rank = 4 }
[[stages]]
kind = "preference"
name = "dpo"
steps = 5
learning_rate = 1e-4
image_term = 1
recipe = "token-recipe.json"
pairs = { source = "rubric", samples = 6 }
[[stages]]
kind = "on_policy"
steps = 5
divergence = 0.5
"""


def least(**changes):
    return DistillConfig.from_dict({**LEAST, **changes})


def test_toml_and_yaml_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    config = DistillConfig.from_file(tmp_path / "a.toml")
    assert config.student == CheckpointAt("small") and config.seed == 3 and config.leaked == "drop"
    assert config.data == Items(factory="probes:build", arguments={"split": "train", "tasks": ["color"]}, limit=20)
    assert config.answers.where == Where(box="boxes", rows=4, columns=4)
    assert config.evaluation["test"].columns.image == "picture"
    assert config.stages == (
        SFT(10, lora=Lora(layers=(0, 2), rank=4)),
        Preference(5, learning_rate=1e-4, name="dpo", image_term=1.0, recipe="token-recipe.json", pairs=Pairs("rubric", samples=6)),
        OnPolicy(5, divergence=0.5),
    )
    assert [stage.kind for stage in config.stages] == ["sft", "preference", "on_policy"]
    assert [stage.name for stage in config.stages] == ["sft", "dpo", "on_policy"]
    assert config.stages[0].budget.batch_size == 16 and config.stages[1].budget.learning_rate == 1e-4
    content = json.loads(json.dumps(config.to_dict()))
    assert DistillConfig.from_dict(content) == config
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    assert DistillConfig.from_file(tmp_path / "a.yaml") == config


def test_what_is_left_away_has_a_default():
    config = least()
    assert config.stages == (SFT(10),) and config.answers.kind == "plain" and config.leaked == "refuse" and config.seed == 0


STAGE = {"kind": "sft", "steps": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techer": {}}, "there is no setting 'techer': it takes teacher, student, data, evaluation, stages, out"),
        ({"teacher": {}}, "teacher: it is either a checkpoint .* or recorded"),
        ({"teacher": {"path": "a", "recorded": "b"}}, "teacher: it is either a checkpoint .* or recorded"),
        ({"teacher": {"recorded": "b", "revision": "main"}}, "teacher: recorded answers have no revision"),
        ({"teacher": "big"}, "teacher: it must be a table with path, revision, recorded, got 'big'"),
        ({"student": {"revision": "main"}}, "student: it lacks the setting 'path': it takes path, revision"),
        ({"data": {}}, 'data: items come from factory = "module:function" or from path'),
        ({"data": {"path": "a", "limit": 0}}, "data: limit must be 1 or more, got 0"),
        ({"data": {"path": "a", "columns": {"img": "x"}}}, "data: columns: there is no setting 'img': it takes image, prompt, answer"),
        ({"evaluation": {}}, "evaluation names no set"),
        ({"evaluation": {"a": {"path": 3}}}, "evaluation.a: path must be a text, got 3"),
        ({"stages": []}, "stages is empty: a distillation needs at least one, of kind sft, preference, on_policy"),
        ({"stages": [{"kind": "dpo", "steps": 1}]}, "stages\\[0\\]: there is no kind 'dpo': choose from sft, preference, on_policy"),
        ({"stages": [{"kind": "sft"}]}, "stages\\[0\\]: it lacks the setting 'steps'"),
        ({"stages": [{**STAGE, "beta": 0.1}]}, "stages\\[0\\]: there is no setting 'beta': it takes kind, steps, batch_size"),
        ({"stages": [{**STAGE, "steps": 0}]}, "stages\\[0\\]: steps must be 1 or more"),
        ({"stages": [{**STAGE, "learning_rate": 0}]}, "stages\\[0\\]: learning_rate must be above 0"),
        ({"stages": [{**STAGE, "learning_rate": "1e-3"}]}, "stages\\[0\\]: learning_rate must be a number, got the text '1e-3'"),
        ({"stages": [{**STAGE, "name": "a/b"}]}, "stages\\[0\\]: 'a/b' cannot name a stage"),
        ({"stages": [STAGE, STAGE]}, "stages\\[1\\]: the name 'sft' is taken"),
        ({"stages": [{**STAGE, "name": "before"}]}, "stages\\[0\\]: the name 'before' is taken"),
        ({"stages": [{"kind": "preference", "steps": 1, "beta": 0}]}, "stages\\[0\\]: beta must be above 0"),
        ({"stages": [{"kind": "preference", "steps": 1, "image_term": -1}]}, "stages\\[0\\]: image_term is a weight, 0 or more"),
        (
            {"stages": [{"kind": "preference", "steps": 1, "pairs": {"source": "votes"}}]},
            "stages\\[0\\]: pairs: source must be one of ranked, against-student, rubric, got 'votes'",
        ),
        ({"stages": [{"kind": "on_policy", "steps": 1, "divergence": 2}]}, "stages\\[0\\]: divergence goes from 0"),
        (
            {"stages": [{"kind": "on_policy", "steps": 1}], "teacher": {"recorded": "a.jsonl"}},
            "stages\\[0\\]: on_policy needs the teacher's probabilities",
        ),
        (
            {"stages": [{"kind": "preference", "steps": 1}], "teacher": {"recorded": "a.jsonl"}},
            "stages\\[0\\]: a recorded teacher cannot rank what the student says",
        ),
        ({"answers": {"kind": "loud"}}, "answers: kind must be one of plain, grounded, self-consistent, got 'loud'"),
        ({"answers": {"kind": "grounded"}}, "answers: where .* is what grounded answers need"),
        ({"answers": {"where": {"box": "boxes"}}}, "answers: where .* is what grounded answers need, and others do not take"),
        ({"answers": {"kind": "grounded", "where": {}}}, "answers: where: one of box, question and function .*, got none of them"),
        ({"answers": {"samples": 1}}, "answers: samples must be 2 or more"),
        ({"filters": {"shortest": 5, "longest": 4}}, "filters: shortest is 5 words and longest 4: no answer is left"),
        ({"filters": {"agreement": 1.5}}, "filters: agreement must be a share above 0 and at most 1"),
        ({"filters": {"agreement": 0.5}}, "filters.agreement is a share of samples that agree, but answers are plain"),
        ({"leaked": "keep"}, "leaked must be one of refuse, drop, got 'keep'"),
        ({"costs": {"rounds": -1}}, "costs: rounds must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"out": ""}, "out is empty"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_place(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        least(**changes)
    assert "\n" not in str(caught.value)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**LEAST, **changes}))
    with pytest.raises(ValueError, match=f"^plan.yaml: {message}"):
        DistillConfig.from_file(tmp_path / "plan.yaml")


@pytest.mark.parametrize("missing", LEAST)
def test_nothing_that_is_needed_may_be_missing(missing):
    with pytest.raises(ValueError, match=f"it lacks the setting '{missing}'"):
        DistillConfig.from_dict({name: value for name, value in LEAST.items() if name != missing})


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tiny", 'factory is \'tiny\': name a function as "module:function"'),
        ("no_such_module:make", "factory is 'no_such_module:make', which cannot be imported"),
        ("vlm_core.tests.tiny:make", "the module vlm_core.tests.tiny has no function 'make'"),
    ],
)
def test_a_function_that_is_none(factory, message):
    with pytest.raises(ValueError, match=message):
        Items(factory=factory).called()


def test_a_function_by_its_name():
    from vlm_core.tests.tiny import make_items

    assert Items(factory="vlm_core.tests.tiny:make_items").called() is make_items
