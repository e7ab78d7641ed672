"""The head report: numbers against the sweep and the attention map, sentences that say no more than was measured, families with tiles."""

from __future__ import annotations

import json
import re
from copy import deepcopy

import numpy as np
import pytest
from PIL import Image

from vlm_core import FullAttention, ReplaceImageKV, Subject, attention_heatmap, image_kv_means, observe, sweep
from vlm_core.families.layout import coverage, object_tokens
from vlm_core.heads.attribution import HeadAttribution
from vlm_core.heads.description import describe_head
from vlm_core.heads.features import FEATURES, HeadFeatures
from vlm_core.heads.report import HEAT_PIXELS, LOOKS, _evidence, choose_examples, head_report
from vlm_core.heads.taxonomy import NO_EFFECT, PathEffects, Taxonomy
from vlm_core.stats import interval, interval_each
from vlm_core.subjects.embed import encode_items
from vlm_core.tables import wide
from vlm_core.tests.family_processors import PROCESSORS
from vlm_core.tests.tiny import make_items

CHOSEN = [(1, 2), (0, 3), (2, 0)]  # by the attribution made up below, the first one first


def corner(item) -> np.ndarray:
    """The asked object: the upper left quarter of every image."""
    mask = np.zeros((16, 16), dtype=bool)
    mask[:8, :8] = True
    return mask


def known_of(subject, items):
    """Made-up tables: an attribution that ranks ``CHOSEN`` first, features and categories."""
    shape, n = (subject.anatomy.n_layers, subject.anatomy.n_heads), len(items)
    rng = np.random.default_rng(0)
    per_item = rng.normal(0, 0.01, (n, *shape))
    for rank, cell in enumerate(CHOSEN):
        per_item[:, *cell] += 3 - rank
    names, scenes, tasks = (tuple(str(item[key]) for item in items) for key in ("id", "scene_id", "task"))
    category = np.full(shape, NO_EFFECT, dtype=object)
    category[1, 2] = "cross-modal grounding"
    return (
        HeadAttribution(per_item, names, scenes, "margin", 10, np.tile([1.0, 0.17, 0.2], (len(names), 1))),
        HeadFeatures(rng.random((n, *shape, len(FEATURES))), tuple(FEATURES), names, scenes, tasks),
        Taxonomy(category, np.full(shape, 0.9), PathEffects({}, {}), 0.01),
    )


@pytest.fixture(scope="module")
def reported(subject):
    items = make_items(12)
    means = image_kv_means(subject, items)
    report = head_report(subject, items, means, *known_of(subject, items), masks=corner, most=3)
    return items, means, report


def test_heads_are_those_that_attribution_ranks_first_with_intervals_over_scenes(subject, reported):
    items, _, report = reported
    assert [(entry["layer"], entry["head"]) for entry in report.heads] == CHOSEN
    first = report.heads[0]
    assert (first["name"], first["category"], first["confidence"], first["depth"]) == ("1.2", "cross-modal grounding", 0.9, 1.5 / 3)
    ranked, features, _ = known_of(subject, items)
    for name, per_item in (("attribution", ranked.per_item), ("entropy", features.per_item[..., features.names.index("entropy")])):
        value, lower, upper = (bound[1, 2] for bound in interval_each(per_item, ranked.clusters))
        found = first["attribution"] if name == "attribution" else first["features"][name]
        assert found == pytest.approx({"value": value, "lower": lower, "upper": upper})
        *_, upper_of_items = interval_each(per_item, ranked.items)
        assert upper != pytest.approx(upper_of_items[1, 2])
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()


def test_the_map_has_every_head_with_its_attribution_and_category(subject, reported):
    items, _, report = reported
    ranked, _, taxonomy = known_of(subject, items)
    assert [(one["layer"], one["head"]) for one in report.map] == list(np.ndindex(taxonomy.category.shape))
    assert [one["attribution"] for one in report.map] == pytest.approx(ranked.coefficients.ravel().tolist())
    assert [one["category"] for one in report.map] == taxonomy.category.ravel().tolist()
    assert all(one["name"] == f"{one['layer']}.{one['head']}" and one["evidence"] for one in report.map)


def test_effects_are_what_one_head_without_the_image_loses(subject, reported):
    items, means, report = reported
    scenes, tasks = [item["scene_id"] for item in items], np.array([item["task"] for item in items])
    for entry in report.heads:
        head = (entry["layer"], entry["head"])
        table = sweep(subject, items, {"full": None, "cut": ReplaceImageKV([head], means, queries="text")}, metrics=("correct", "margin"))
        margin, correct = (
            np.subtract(*(wide(table, metric)[name] for name in ("full", "cut"))).to_numpy() for metric in ("margin", "correct")
        )
        expected = interval_each(margin, scenes)
        assert list(entry["effect"]["margin"].values()) == pytest.approx([float(one) for one in expected], abs=1e-6)
        found = interval(correct, scenes)
        assert list(entry["effect"]["accuracy"].values()) == pytest.approx([found.estimate, found.lower, found.upper])
        assert set(entry["by_task"]) == {"color", "shape"}
        assert entry["by_task"]["shape"]["margin"]["value"] == pytest.approx(margin[tasks == "shape"].mean(), abs=1e-6)


def test_looks_follow_from_the_whole_attention_map(subject, reported):
    items, _, report = reported
    whole, encoded = observe(subject, items, FullAttention()), encode_items(subject, items)
    layout = subject.layout(items[0]["image"], items[0]["prompt"])
    cover, on_object = coverage(layout, corner(None)), object_tokens(layout, corner(None))
    for entry in report.heads:
        found = {name: [] for name in LOOKS}
        for one, prompt in zip(whole, encoded, strict=True):
            last = one[entry["layer"], entry["head"], len(prompt) - 1, : len(prompt)]
            image = last[prompt.image.numpy()]
            words = subject.tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
            special = last[[word in ("<s>", "<unk>", "?", ":") for word in words]].sum()
            share, high = image / image.sum(), image > image.mean()
            found["answer_to_image"].append(image.sum())
            found["answer_to_special"].append(special)
            found["answer_to_words"].append(1 - image.sum() - special)
            found["object_share"].append(share @ cover)
            found["even_share"].append(cover.mean())
            found["object_gain"].append(share @ cover - cover.mean())
            found["iou"].append((high & on_object).sum() / (high | on_object).sum())
        for name, values in found.items():
            assert entry["features"][name]["value"] == pytest.approx(np.mean(values), abs=1e-5), name
        assert sum(part["share"] for part in entry["attends"]) == pytest.approx(1, abs=1e-5)
        shares = {part["on"]: part["share"] for part in entry["attends"]}
        image, share = (entry["features"][name]["value"] for name in ("answer_to_image", "object_share"))
        assert shares["the asked object"] == pytest.approx(image * share) and list(shares.values()) == sorted(shares.values(), reverse=True)
        assert sum(entry["kinds"].values()) == pytest.approx(1) and set(entry["kinds"]) == {"cls", "patch"}


def test_heatmaps_are_those_of_the_first_items_answered_right(subject, reported):
    items, _, report = reported
    correct = wide(sweep(subject, items, {"full": None}, metrics=("correct",)), "correct")["full"].to_numpy()
    expected = choose_examples([i["task"] for i in items], [i["scene_id"] for i in items], correct, 4)
    names = [items[index]["id"] for index in expected]
    assert names and [one["id"] for one in report.examples] == names
    assert np.asarray(report.examples[0]["mask"]).tolist() == corner(None).astype(int).tolist()
    for entry in report.heads:
        assert list(entry["heat"]) == sorted(names, key=lambda name: [i["id"] for i in items].index(name))
        for name, heat in entry["heat"].items():
            item = next(item for item in items if item["id"] == name)
            drawn = attention_heatmap(subject, item, [(entry["layer"], entry["head"])], (16, 16))
            np.testing.assert_allclose(np.array(heat["values"], float), drawn, rtol=6e-3, equal_nan=True)


def test_examples_are_the_first_right_ones_of_every_task_in_scenes_of_their_own():
    tasks = ["a", "a", "a", "b", "b", "c"]
    assert choose_examples(tasks, list("uvwxyz"), [0, 1, 1, 1, 1, 0], 4) == [1, 3, 2, 4]
    assert choose_examples(tasks, list("uvwvyz"), [0, 1, 1, 1, 1, 1], 3) == [1, 4, 5]  # b's first shows a's scene again
    assert choose_examples(tasks, ["s"] * 6, [0, 1, 1, 1, 1, 1], 4) == [1, 3, 5, 2]
    assert choose_examples(tasks, list("uvwxyz"), [0, np.nan, 0, 0, 0, 0], 4) == []


# -- the sentence -----------------------------------------------------------------------------------------------------


def measured(value, lower=None, upper=None):
    return {"value": value, "lower": lower, "upper": upper}


def entry_of(**changes):
    entry = {
        "name": "1.3",
        "category": "cross-modal grounding",
        "confidence": 0.93,
        "effect": {"margin": measured(1.234, 0.9, 1.51), "accuracy": measured(0.031, 0.012, 0.0502)},
        "features": {
            "answer_to_image": measured(0.62, 0.6, 0.64),
            "object_share": measured(0.41, 0.4, 0.42),
            "even_share": measured(0.11, 0.1, 0.12),
            "object_gain": measured(0.3, 0.29, 0.31),
        },
    }
    return deepcopy({**entry, **changes})


def test_the_sentence_in_full():
    assert describe_head(entry_of()) == (
        "Head 1.3 (cross-modal grounding, in 0.93 of resamples): with its view of the image removed, the margin of the answer falls by "
        "1.23 [0.90, 1.51], and accuracy falls by 0.031 [0.012, 0.050]; the token that answers puts 0.62 of its attention through it on the "
        "image, 0.41 of that on the asked object, more than what evenly spread attention would put there (0.11)."
    )


def test_every_number_of_a_sentence_is_one_of_the_entry(reported):
    numbers = re.compile(r"(?<![\w.])-?\d+\.\d+")

    def all_of(part):
        if isinstance(part, dict):
            return [number for one in part.values() for number in all_of(one)]
        return [] if part is None or isinstance(part, str) else [float(part)]

    for entry in (*reported[2].heads, entry_of(), entry_of(effect={"margin": measured(-0.4, -0.6, -0.2), "accuracy": measured(0.0)})):
        head, _, sentence = entry["sentence"].partition(" (") if "sentence" in entry else describe_head(entry).partition(" (")
        assert head == f"Head {entry['name']}"
        known = np.abs(all_of({name: entry[name] for name in ("confidence", "effect", "features")}))
        said = [abs(float(number)) for number in numbers.findall(sentence)]
        assert len(said) >= 5
        assert all(np.abs(known - number).min() <= 0.0051 for number in said), sentence


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        (measured(0.4, 0.1, 0.7), "the margin of the answer falls by 0.40 [0.10, 0.70]"),
        (measured(-0.4, -0.7, -0.1), "the margin of the answer rises by 0.40 [0.10, 0.70]"),
        (measured(0.4, -0.1, 0.7), "no measurable effect on the margin of the answer (lost 0.40 [-0.10, 0.70])"),
        (measured(1e-7, 5e-8, 2e-7), "no measurable effect on the margin of the answer (lost 0.000 [0.000, 0.000])"),
        (measured(0.4, 0.0, 0.7), "no measurable effect on the margin of the answer (lost 0.40 [0.000, 0.70])"),
        (measured(0.4), "no measurable effect on the margin of the answer (lost 0.40, no interval)"),
        (measured(None), "no measurable effect on the margin of the answer (lost not measured)"),
    ],
)
def test_an_effect_is_said_only_where_the_interval_leaves_no_doubt(margin, words):
    said = describe_head(entry_of(effect={"margin": margin, "accuracy": measured(0.03, 0.01, 0.05)}))
    assert words in said and "accuracy falls by 0.030" in said


def test_a_head_without_any_effect_is_said_to_have_none():
    said = describe_head(entry_of(effect={"margin": measured(0.02, -0.01, 0.05), "accuracy": measured(0.0, -0.2, 0.2)}))
    assert (
        "there is no measurable effect, neither on the margin of the answer (lost 0.020 [-0.010, 0.050]) nor on accuracy (lost 0.00" in said
    )
    assert "falls" not in said and "rises" not in said


@pytest.mark.parametrize(
    ("margin", "looked", "evidence"),
    [
        (measured(0.4, 0.1, 0.7), measured(0.6, 0.5, 0.7), (True, True)),
        (measured(-0.4, -0.7, -0.1), measured(0.6, 0.5, 0.7), (True, True)),
        (measured(0.4, -0.1, 0.7), measured(0.6, 0.5, 0.7), (False, True)),
        (measured(1e-7, 5e-8, 2e-7), measured(0.6), (False, False)),
        (measured(0.4), measured(None), (False, False)),
    ],
)
def test_a_value_is_causal_evidence_only_with_an_interval_that_excludes_0(margin, looked, evidence):
    entry = {"effect": {"margin": margin}, "features": {"answer_to_image": looked}}
    assert tuple(_evidence(entry).values()) == evidence


def test_a_report_with_too_few_heads_of_both_kinds_says_so(subject, reported):
    items, means, report = reported
    assert report.about["both"] == sum(entry["evidence"]["causal"] and entry["evidence"]["diagnostic"] for entry in report.heads) <= 3
    assert report.about["shortfall"].startswith(f"{report.about['both']} of 3 heads have both kinds of evidence, fewer than 5: ")

    def lossy(items, interventions, metrics):
        table = sweep(subject, items, interventions, metrics=metrics)
        scene = table["cluster"].astype("category").cat.codes
        table.loc[(table["intervention"] != "full") & (table["metric"] == "margin"), "value"] -= 50 + scene
        return table

    lost = head_report(subject, items, means, *known_of(subject, items), most=6, measure=lossy)
    assert (lost.about["both"], lost.about["shortfall"]) == (6, "")


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (measured(0.3, 0.2, 0.4), "more than what evenly spread"),
        (measured(-0.1, -0.2, -0.05), "less than what evenly spread"),
        (measured(0.01, -0.02, 0.04), "not measurably other than what evenly spread"),
        (measured(0.3), "not measurably other than what evenly spread"),
    ],
)
def test_attention_on_the_object_is_compared_with_even_attention(gain, words):
    entry = entry_of()
    entry["features"]["object_gain"] = gain
    assert words in describe_head(entry)


def test_nothing_is_said_of_objects_or_images_that_a_head_does_not_see():
    entry = entry_of(features={"answer_to_image": measured(0.62)})
    assert describe_head(entry).endswith("puts 0.62 of its attention through it on the image.")
    entry["features"]["answer_to_image"] = measured(None)
    assert describe_head(entry).endswith("the token that answers sees no image tokens through it.")


# -- subjects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl", "mllama", "blip-2"])
def test_families_with_tiles_rotary_grids_crossed_layers_and_learned_queries(name):
    processor, model = PROCESSORS[name]()
    subject = Subject(model, processor, name=name)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 150, 210, 3), dtype=np.uint8)
    items = [{**item, "image": Image.fromarray(one)} for item, one in zip(make_items(3), pixels, strict=True)]
    means = image_kv_means(subject, items)
    ranked, features, taxonomy = known_of_any(subject, items)
    report = head_report(
        subject, items, means, ranked, features, taxonomy, masks=lambda item: np.ones((150, 210), bool), most=4, examples=3
    )
    assert json.dumps(report.as_dict(), allow_nan=False)
    looked = [entry for entry in report.heads if entry["features"]["answer_to_image"]["value"] is not None]
    assert looked
    if name == "blip-2":
        assert "learned queries" in report.about["places"]
        assert all(not entry["heat"] and "object_share" not in entry["features"] for entry in report.heads)
        return
    assert not report.about["places"]
    for entry in looked:
        kinds = entry["kinds"]
        if kinds:  # every place of the image is the object
            placed = sum(share for kind, share in kinds.items() if kind in ("patch", "tile", "thumbnail"))
            assert entry["features"]["object_share"]["value"] == pytest.approx(placed, abs=1e-5)
        for heat in entry["heat"].values():
            grid = subject.layout(items[0]["image"], items[0]["prompt"]).shape
            assert np.array(heat["values"]).shape == ((23, HEAT_PIXELS) if name != "qwen2_vl" else grid)
    assert {"idefics3": {"tile", "thumbnail"}, "qwen2_vl": {"patch"}}.get(name, set()) <= {
        kind for entry in looked for kind in entry["kinds"]
    }
    if name == "mllama":
        assert {entry["layer"] for entry in report.heads} <= set(subject.anatomy.image_layers)
        assert "iou" not in report.heads[0]["features"]
    else:
        assert all(set(entry["heat"]) == {one["id"] for one in report.examples} for entry in report.heads)


def known_of_any(subject, items):
    shape, n = (subject.anatomy.n_layers, subject.anatomy.n_heads), len(items)
    names, scenes, tasks = (tuple(str(item[key]) for item in items) for key in ("id", "scene_id", "task"))
    return (
        HeadAttribution(np.random.default_rng(0).normal(0, 1, (n, *shape)), names, scenes, "margin", 10, np.ones((n, 3))),
        HeadFeatures(np.zeros((n, *shape, len(FEATURES))), tuple(FEATURES), names, scenes, tasks),
        Taxonomy(np.full(shape, NO_EFFECT, dtype=object), np.ones(shape), PathEffects({}, {}), 0.01),
    )


def test_without_masks_nothing_is_said_of_objects(subject):
    items = make_items(4)
    report = head_report(subject, items, image_kv_means(subject, items), *known_of(subject, items), most=1)
    (entry,) = report.heads
    assert "object_share" not in entry["features"] and "object" not in entry["sentence"]
    assert "the image" in {part["on"] for part in entry["attends"]} and all(one["mask"] is None for one in report.examples)
    assert entry["heat"] and all(heat["object"] is None for heat in entry["heat"].values())


def test_tables_of_other_heads_are_refused(subject):
    items = make_items(2)
    ranked, features, taxonomy = known_of(subject, items)
    means = image_kv_means(subject, items)
    other = HeadAttribution(np.zeros((2, 2, 4)), ranked.items, ranked.clusters, "margin", 10, ranked.squares)
    with pytest.raises(ValueError, match="the attribution describes 2 layers x 4 heads: this subject has 3 x 4"):
        head_report(subject, items, means, other, features, taxonomy)
    with pytest.raises(ValueError, match="needs items"):
        head_report(subject, [], means, ranked, features, taxonomy)
