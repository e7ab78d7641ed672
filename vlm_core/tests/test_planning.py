"""The cost model: sizes without weights against the model itself, counted work against torch's counter, scaling by hand."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_core import DropTokens, KnockOut, ZeroHeads, load_vlm, plan, sweep
from vlm_core.planning.counting import Counting, Work, driver_of
from vlm_core.planning.sizes import Sizes, sizes_of
from vlm_core.planning.workload import Check, Workload, factor, read_workload, write_workload
from vlm_core.subjects.resolution import own_resolution
from vlm_core.tests.family_processors import save
from vlm_core.tests.tiny import make_items, tiny_subject

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "fixtures" / "embedded" / "vlm"
PROMPTS = ("what color is the star ?", "is there a yellow cross and a purple circle ?")


@pytest.fixture(scope="module")
def sizes():
    return sizes_of(EMBEDDED, PROMPTS, (64, 64))


@contextmanager
def counted():
    """Torch's counter; the plain kernel, whose products it knows."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield counter


def linear_flops(counter):
    """What torch has counted of linear maps and convolutions; products of queries and keys are other operators."""
    counts = counter.get_flop_counts()["Global"]
    return sum(
        flops for operator, flops in counts.items() if any(name in str(operator) for name in ("aten.mm", "aten.addmm", "convolution"))
    )


def test_sizes_are_those_of_the_loaded_model(sizes):
    subject = load_vlm(EMBEDDED, check=False)
    assert sizes.parameters == sum(weight.numel() for weight in subject.model.parameters())
    items = [{**item, "prompt": prompt} for item, prompt in zip(make_items(2, size=64), PROMPTS, strict=True)]
    batch = subject.encode_items(items)
    assert sizes.image_tokens == batch.image.sum(1).double().mean() == 64
    assert sizes.prompt_tokens == batch.valid.sum(1).double().mean()
    with torch.inference_mode(), counted() as counter:
        one = subject.encode_items(items[:1])
        cache = subject.model(**one.inputs, logits_to_keep=1, use_cache=True).past_key_values
    alone = sizes_of(EMBEDDED, PROMPTS[:1], (64, 64))
    assert alone.prefill_flops + alone.image_flops == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert alone.cache_bytes(4) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_sizes_of_other_families_follow_their_own_processors(tmp_path, name):
    save(tmp_path, name)
    found = sizes_of(tmp_path, PROMPTS[:1], (48, 32))
    subject = load_vlm(tmp_path, check=False)
    (item,) = make_items(1, size=48)
    item = {**item, "image": item["image"].crop((0, 0, 48, 32)), "prompt": PROMPTS[0]}
    batch = subject.encode_items([item])
    assert (found.image_tokens, found.prompt_tokens) == (int(batch.image.sum()), int(batch.valid.sum()))
    assert found.parameters == sum(weight.numel() for weight in subject.model.parameters())
    with torch.inference_mode(), counted() as counter:
        subject.model(**batch.inputs, logits_to_keep=1)
    assert factor(found.prefill_flops + found.image_flops, counter.get_total_flops()) < 1.1


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pictures_are_as_large_as_the_suite_draws_them(tmp_path, name):
    """What keeps the size of a picture is shown more than the embedded subject looks at."""
    save(tmp_path, name)
    side = own_resolution(load_vlm(tmp_path, check=False))
    found = sizes_of(tmp_path, PROMPTS[:1])
    assert found.image_size == (side, side) and found == sizes_of(tmp_path, PROMPTS[:1], (side, side))
    assert Sizes.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert name != "qwen2_vl" or found.prompt_tokens > sizes_of(tmp_path, PROMPTS[:1], (64, 64)).prompt_tokens


def test_a_weightless_folder_is_enough(tmp_path, sizes):
    for file in EMBEDDED.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert dataclasses.replace(sizes_of(tmp_path, PROMPTS, (64, 64)), name="vlm") == sizes


def test_counted_work_is_what_torch_counts():
    subject = tiny_subject(layers=3)
    table = {"full": None, "knocked": KnockOut("question", "image", layers=(1, 2)), "dropped": DropTokens(1, 0.5)}
    table |= {str(head): ZeroHeads([head]) for head in subject.heads}
    with Counting(lambda one: True) as counting, counted() as counter:
        counting.know(subject)
        counting.part = "H1"
        sweep(subject, make_items(3), table)
    assert counting.uncounted == 0
    total = sum(one.flops for one in counting.work)
    assert total == pytest.approx(linear_flops(counter), rel=1e-6)
    by_driver = {
        driver: sum(one.flops for one in counting.work if one.driver == driver and one.kind == "layers") for driver in ("fixed", "heads")
    }
    assert by_driver["heads"] / sum(by_driver.values()) == pytest.approx(len(subject.heads) / len(table), rel=1e-6)
    assert {one.part for one in counting.work} == {"H1"} and {one.kind for one in counting.work} == {"layers", "head", "image"}


def test_training_counts_the_way_back():
    subject = tiny_subject(layers=2)
    batch = subject.encode_items(make_items(2))
    with Counting(lambda one: False) as counting, counted() as counter:
        counting.know(subject)
        subject.model(**batch.inputs).logits.sum().backward()
    trained = sum(one.flops for one in counting.work)
    assert {one.model for one in counting.work} == {"other"} and all(one.training for one in counting.work if one.kind == "layers")
    # The way back needs no gradient of what enters the tower; that is all that the factor of three overstates.
    assert linear_flops(counter) <= trained < 1.15 * linear_flops(counter)


def test_counting_leaves_nothing_behind():
    from torch.nn.modules import module

    from vlm_core.subjects.subject import Subject
    from vlm_core.sweeps import recorded
    from vlm_core.sweeps import sweep as sweeps

    before = (Subject.__init__, sweeps._measure, recorded.forward_shared, dict(module._global_forward_hooks))
    with pytest.raises(ValueError, match="stop"), Counting(lambda one: True):
        assert Subject.__init__ is not before[0]
        raise ValueError("stop")
    assert (Subject.__init__, sweeps._measure, recorded.forward_shared, dict(module._global_forward_hooks)) == before


def test_what_rows_follow():
    anatomy = tiny_subject(layers=4).anatomy
    heads = {f"head {head}": ZeroHeads([head]) for head in anatomy.heads}
    layers = {f"layer {layer}": DropTokens(layer, 0.5) for layer in range(4)}
    tokens = {f"token {token}": DropTokens(1, 0.0, tokens=(token,)) for token in range(3, 12)}
    fixed = {"full": None, "two": ZeroHeads(anatomy.heads[:2]), "window": KnockOut("question", "image", layers=(1, 2))}
    found = driver_of({**heads, **layers, **tokens, **fixed}, anatomy, n_image=9)
    assert {label: found[label] for label in fixed} == dict.fromkeys(fixed, "fixed")
    assert {kind: set(found[label] for label in some) for kind, some in (("heads", heads), ("layers", layers), ("tokens", tokens))} == {
        "heads": {"heads"}, "layers": {"layers"}, "tokens": {"tokens"},
    }  # fmt: skip
    assert set(driver_of(dict(list(heads.items())[:3]), anatomy, n_image=9).values()) == {"fixed"}


def workload(sizes, *work):
    return Workload("smoke", {}, sizes, PROMPTS, work, {"H1": 10.0, "H3": 2.0}, {"H1": 1, "H3": 1}, {})


@pytest.mark.parametrize(
    ("driver", "tokens", "change", "grows"),
    [
        ("fixed", "whole", {"layers": 12}, 2.0),
        ("layers", "whole", {"layers": 12}, 4.0),
        ("heads", "whole", {"heads": 16, "head_dim": 8}, 2.0),
        ("heads", "tail", {"layers": 12, "heads": 16, "head_dim": 8}, 8.0),
        ("tokens", "one", {"image_tokens": 640.0}, 10.0),
        ("fixed", "tail", {"tail_tokens": 2.0}, None),
    ],
)
def test_work_grows_as_it_follows_from_sizes(sizes, driver, tokens, change, grows):
    one = workload(sizes, Work("H1", "subject", "layers", tokens, driver, False, 1e9))
    other = dataclasses.replace(sizes, **change)
    grows = other.tail_tokens / sizes.tail_tokens if grows is None else grows
    assert one.flops(other)["H1"] / one.flops(sizes)["H1"] == pytest.approx(grows)


def test_longer_prompts_and_wider_layers_cost_what_the_formula_says(sizes):
    one = workload(
        sizes, Work("H1", "subject", "layers", "whole", "fixed", False, 2 * sizes.layers * sizes.layer_weights * sizes.prompt_tokens)
    )
    head = 2 * sizes.head_weights
    # One whole prompt: prefill_flops has the mean of squares where this has the square of the mean.
    assert one.flops(sizes)["H1"] == pytest.approx(sizes.prefill_flops - head, rel=0.01)
    other = dataclasses.replace(sizes, layer_weights=3 * sizes.layer_weights, prompt_tokens=5 * sizes.prompt_tokens)
    by_hand = other.layers * (2 * other.prompt_tokens * other.layer_weights + 4 * other.width * other.prompt_tokens**2)
    assert one.flops(other)["H1"] == pytest.approx(by_hand)


def test_work_is_so_many_prompts_and_tokens(sizes):
    token = 2 * sizes.layers * sizes.layer_weights
    one = workload(
        sizes,
        Work("H1", "subject", "layers", "whole", "heads", False, 10 * token * sizes.prompt_tokens),
        Work("H1", "subject", "layers", "tail", "fixed", False, 20 * token * sizes.tail_tokens),
        Work("H1", "subject", "layers", "one", "fixed", False, 30 * token),
        Work("H3", "subject", "layers", "whole", "fixed", True, 3 * 5 * token * sizes.prompt_tokens),
        Work("H3", "other", "layers", "whole", "fixed", True, 1e12),
        Work("H3", "subject", "image", "whole", "fixed", False, 1e12),
    )
    assert one.passes(sizes) == pytest.approx({"whole": 10, "tail": 20, "one": 30, "gradients": 5})
    bigger = dataclasses.replace(sizes, heads=16, head_dim=8, layer_weights=9 * sizes.layer_weights)
    assert one.passes(bigger) == pytest.approx({"whole": 20, "tail": 20, "one": 30, "gradients": 5})


def test_students_and_towers_cost_what_they_cost(sizes):
    student = Work("H3", "other", "layers", "whole", "fixed", True, 5e9)
    tower = Work("H1", "subject", "image", "whole", "fixed", False, 1e9)
    other = dataclasses.replace(sizes, layers=60, image_flops=7 * sizes.image_flops)
    found = workload(sizes, student, tower)
    assert found.flops(other) == {"H3": 5e9, "H1": 7e9}
    assert found.cpu_seconds(other) == {"H3": 2.0, "H1": 70.0}
    assert Workload.from_dict(found.as_dict()) == found


def test_parts_that_are_counted_later_stand_beside_the_others(sizes):
    first = Work("H1", "subject", "layers", "whole", "fixed", False, 1e9)
    second = Work("H3", "other", "layers", "whole", "fixed", True, 2e9)
    both = workload(sizes, first, second)
    again = workload(sizes, dataclasses.replace(second, flops=3e9))
    again = dataclasses.replace(again, seconds={"H3": 4.0}, claims={"H3": 5}, made={"date": "later"})
    found = again.beside(both)
    assert found.flops(sizes) == {"H1": both.flops(sizes)["H1"], "H3": 3e9}
    assert found.seconds == {"H1": 10.0, "H3": 4.0} and found.claims == {"H1": 1, "H3": 5} and found.made["earlier"] == both.made
    with pytest.raises(ValueError, match="is of other amounts or another subject"):
        again.beside(dataclasses.replace(both, sizes={"items": 3}))


@pytest.fixture
def stored(tmp_path, sizes):
    """A file of counted work: one prompt's prefill for each of a thousand rows, checked against a run that took a quarter more."""
    flops = 1000 * 2 * sizes.layers * sizes.layer_weights * sizes.prompt_tokens
    one = workload(sizes, Work("H1", "subject", "layers", "whole", "fixed", False, flops))
    one = dataclasses.replace(one, seconds={"H1": 36.0}, made={"date": "2026-01-01", "commit": "abcdef0123456789"})
    other = dataclasses.replace(sizes, name="other", layers=3)
    check = Check(other, {"H1": 1.25 * one.flops(other)["H1"]}, {"H1": 0.5 * one.cpu_seconds(other)["H1"]}, "2026-01-02")
    file = tmp_path / "workload.json"
    write_workload(file, dataclasses.replace(one, checks=(check,)))
    return file


def test_the_command_says_operations_memory_hours_and_how_wrong_it_was(stored, sizes, capsys):
    arguments = [str(EMBEDDED), "smoke", "--workload", str(stored), "--benchmark", "500:2", "--batch", "10", "--element-bytes", "4"]
    assert plan.main([*arguments, "--device", "A100-80GB", "--flops-per-second", "1e9"]) == 0
    said = capsys.readouterr().out
    suite = read_workload(stored, "smoke").flops(sizes)["H1"]
    tokens = sizes.layers * (2 * sizes.layer_weights + 4 * sizes.width * sizes.prompt_tokens) + 2 * sizes.head_weights
    benchmark = 500 * (sizes.prefill_flops + sizes.image_flops + 2 * tokens)
    assert f"H1           {suite / 1e9:.2f} GFLOP" in said and f"benchmark    {benchmark / 1e9:.2f} GFLOP" in said
    assert "0.01 core-hours here" in said  # 36 seconds, as counted
    assert f"{float(f'{(suite + benchmark) / 1e9 / 3600:.2g}'):g} GPU-hours" in said and "A100-80GB" in said and "H200" not in said
    assert "as many operations as 1 000 whole prompts, 0 tails" in said
    assert "operations within a factor of 1.25, core-hours within 2.00" in said and "(other)" in said
    weights = 4 * sizes.parameters / 2**30
    assert f"weights {weights:.2f} GiB" in said and "at 30% of the vendor's dense 16-bit peak, assumed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "smoke"], "subject '<SOME_TOKEN>' has no configuration of a vision-language model"),
        ([str(EMBEDDED), "nightly"], "the work of profile 'nightly' was not counted, that of smoke was: python -m fixtures.workload"),
        ([str(EMBEDDED), "smoke", "--benchmark", "many"], "--benchmark is a number of prompts"),
        ([str(EMBEDDED), "smoke", "--utilisation", "3"], "--utilisation is a share above 0 and at most 1, got 3.0"),
        ([str(EMBEDDED), "smoke", "--flops-per-second", "0"], "--flops-per-second must be above 0, got 0.0"),
        ([str(EMBEDDED), "smoke", "--workload", "nowhere.json"], "there is no counted work at nowhere.json"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(stored, arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SOME_TOKEN", "nowhere/at/all")
    assert plan.main(["--workload", str(stored), *arguments]) == 2
    assert message in capsys.readouterr().err
