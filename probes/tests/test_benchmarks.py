"""Benchmarks from small Parquet files in the schema of each, made here: what is asked, what is right, and how it is had."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Features, Image, List, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as Pictures

from probes.benchmarks import BENCHMARKS, load
from probes.benchmarks.choosing import chosen, rank
from vlm_core.items import SCORED, SHOWN, require_items
from vlm_core.scoring import SCORERS, score_answer

TEXT, NUMBER, TEXTS = Value("string"), Value("int64"), List(Value("string"))
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(number: int, size: tuple[int, int] = (6, 4)) -> dict:
    """A picture of its own for each number, as a set stores it."""
    buffer = io.BytesIO()
    Pictures.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


# As the cards on the Hub and published code have them; from where, the declaration says (`verified`).
SCHEMAS = {
    "vqav2": {
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}),
        "image_id": NUMBER,
        "answer_type": TEXT,
        "question_id": NUMBER,
        "question": TEXT,
        "image": Image(),
    },
    "gqa": {
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": Value("bool"),
        "types": {"detailed": TEXT, "semantic": TEXT, "structural": TEXT},
    },
    "textvqa": {
        "image_id": TEXT,
        "question_id": Value("int32"),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": Image(),
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    },
    "ocrbench": {"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": Image()},
    "scienceqa": {
        "image": Image(),
        "question": TEXT,
        "choices": TEXTS,
        "answer": Value("int8"),
        **{name: TEXT for name in ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")},
    },
    "mmstar": {
        "index": NUMBER,
        "question": TEXT,
        "image": Image(),
        "answer": TEXT,
        "category": TEXT,
        "l2_category": TEXT,
        "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT},
    },
    "pope": {"id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": Image(), "category": TEXT},
    "chartqa": {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()},
    "docvqa": {
        "questionId": TEXT,
        "question": TEXT,
        "question_types": TEXTS,
        "image": Image(),
        "docId": NUMBER,
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": TEXTS,
        "data_split": TEXT,
    },
    "whatsup": {"images": List(Image()), "positive_caption": TEXTS, "negative_caption": TEXTS, "original_file_name": TEXT},
    "vstar": {"image": Image(), "text": TEXT, "label": TEXT, "question_id": TEXT, "category": TEXT},
}
PICTURES = {"id": TEXT, "image": Image()}  # of GQA's other configuration

ROWS = {
    "vqav2": {
        "question_type": "where is",
        "multiple_choice_answer": "down",
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
            for number, answer in enumerate(["down"] * 7 + ["at table", "skateboard", "table"])
        ],
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000,
        "question": "Where is he looking?",
        "image": png(0),
    },
    "gqa": {
        "id": "201307251",
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "isBalanced": True,
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
    },
    "textvqa": {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "what is the BRAND of this camera?",
        "image": png(0),
        "answers": ["nous les gosses", *["dakota"] * 9],
        "ocr_tokens": ["DAKOTA", "DIGITAL"],
    },
    "ocrbench": {
        "dataset": "IIIT5K",
        "question": "what is written in the image? ",
        "question_type": "Regular Text Recognition",
        "answer": ["CENTRE"],
        "image": png(0),
    },
    "scienceqa": {
        "image": png(0),
        "question": "Which of these is a bird?",
        "choices": ["oak", "wren", "trout"],
        "answer": 1,
        "hint": "Birds have feathers.",
        "subject": "natural science",
    },
    "mmstar": {
        "index": 7,
        "question": "Which colour is the bus?\nOptions: A: red, B: blue, C: green, D: white\n",
        "image": png(0),
        "answer": "B",
        "category": "coarse perception",
        "l2_category": "image scene and topic",
        "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    },
    "pope": {
        "id": "0",
        "question_id": "1",
        "question": "Is there a snowboard in the image?",
        "answer": "Yes",
        "image_source": "COCO_val2014_000000310196",
        "image": png(0),
        "category": "adversarial",
    },
    "chartqa": {"type": "human_test", "question": "How many bars?", "answer": "14", "image": png(0)},
    "docvqa": {
        "questionId": "49153",
        "question": "What is the date?",
        "question_types": ["handwritten"],
        "image": png(0),
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["January 8", "Jan 8"],
        "data_split": "val",
    },
    "whatsup": {
        "images": [png(0)],
        "positive_caption": ["A mug on a table"],
        "negative_caption": ["A mug under a table", "A mug left of a table", "A mug right of a table"],
        "original_file_name": "controlled_images_dataset.json",
    },
    "vstar": {
        "image": png(0),
        "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather" + LETTER,
        "label": "A",
        "question_id": "0",
        "category": "direct_attributes",
    },
}

EXPECTED = {
    "vqav2": ("262148000", "262148", "vqav2", "Where is he looking?" + WORD, "down", "Down."),
    "gqa": ("201307251", "n161313", "gqa", "Is it overcast?" + WORD, "no", "No."),
    "textvqa": ("34602", "003a8ae2ef43b901", "textvqa", "What is the brand of this camera?" + WORD, "dakota", "Dakota"),
    "ocrbench": (None, None, "ocrbench/Regular Text Recognition", "what is written in the image?", "CENTRE", "It says Centre"),
    "scienceqa": (
        None,
        None,
        "scienceqa/natural science",
        "Context: Birds have feathers.\nWhich of these is a bird?\nA. oak\nB. wren\nC. trout" + LETTER,
        "B",
        "B. wren",
    ),
    "mmstar": (
        "7",
        None,
        "mmstar/coarse perception",
        "Which colour is the bus?\nOptions: A: red, B: blue, C: green, D: white" + LETTER.removesuffix("."),
        "B",
        "(B)",
    ),
    "pope": ("0", "COCO_val2014_000000310196", "pope/adversarial", "Is there a snowboard in the image?" + WORD, "yes", "Yes"),
    "chartqa": (None, None, "chartqa/human_test", "How many bars?\nAnswer the question with a single word.", "14", "14.5"),
    "docvqa": ("49153", "pybv0228-81", "docvqa", "What is the date?" + WORD, "January 8", "Jan 8"),
}


def written(folder, name: str, rows: list[dict], split: str | None = None) -> None:
    """Rows of a benchmark as the Hub has them: Parquet, by configuration and split."""
    benchmark = BENCHMARKS[name]
    file = folder / (benchmark.config or "data") / f"{split or benchmark.split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = [{column: row.get(column) for column in SCHEMAS[name]} for row in rows]
    datasets.Dataset.from_list(whole, features=Features(SCHEMAS[name])).to_parquet(file)
    if benchmark.join:
        file = folder / benchmark.join.config / f"{benchmark.split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures = dict.fromkeys(row["imageId"] for row in rows)
        shown = [{"id": one, "image": png(number)} for number, one in enumerate([*pictures, "not asked about"])]
        datasets.Dataset.from_list(shown, features=Features(PICTURES)).to_parquet(file)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing kept from elsewhere, and no way to the Hub."""
    monkeypatch.setenv("VLM_CLAIMS_CACHE", str(tmp_path / "cache"))

    def refused(path, *args, **kwargs):
        if path not in ("parquet", "json", "csv", "imagefolder") and not Path(path).is_dir():
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return loader(path, *args, **kwargs)

    loader = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", refused)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_declaration_reads_the_schema_of_its_set(name):
    benchmark = BENCHMARKS[name]
    assert Features(benchmark.columns) == Features(SCHEMAS[name])
    assert set(benchmark.key) <= set(benchmark.columns)
    assert benchmark.scorer in SCORERS


@pytest.mark.parametrize("name", EXPECTED)
def test_an_item_is_what_the_benchmark_prescribes(name, tmp_path):
    written(tmp_path, name, [ROWS[name]])
    items = load(name, source=tmp_path)
    require_items(items, SCORED if BENCHMARKS[name].candidates else [one for one in SCORED if one != "candidates"])
    item = items[0]
    identity, scene, task, prompt, answer, output = EXPECTED[name]
    assert (item["task"], item["prompt"], item["answer"], item["scorer"]) == (task, prompt, answer, BENCHMARKS[name].scorer)
    assert identity in (None, item["id"])
    assert scene in (None, item["scene_id"])
    assert item["image"].tobytes() == Pictures.open(io.BytesIO(png(0)["bytes"])).tobytes()
    assert score_answer(output, item) == 1.0
    assert score_answer("nothing of it, no", {**item, "answer": "yes", "references": ["yes"] * 10, "candidates": ["yes", "no"]}) == 0.0


def test_a_configuration_names_a_benchmark_as_a_factory(tmp_path):
    from vlm_core.sources import Items, items_of

    written(tmp_path, "pope", [ROWS["pope"], {**ROWS["pope"], "id": "1", "question": "Is there a car?", "answer": "no"}])
    source = Items(factory="probes.benchmarks:load", arguments={"name": "pope", "n": 2, "source": str(tmp_path)})
    items = items_of(source, "sets.pope", answered=True)
    assert sorted(item["answer"] for item in items) == ["no", "yes"]
    assert [item["scorer"] for item in items] == ["pope", "pope"]


def test_references_are_all_answers_of_a_row(tmp_path):
    for name, expected in (("vqav2", ["down"] * 7 + ["at table", "skateboard", "table"]), ("docvqa", ["January 8", "Jan 8"])):
        written(tmp_path / name, name, [ROWS[name]])
        assert load(name, source=tmp_path / name)[0]["references"] == expected
    written(tmp_path / "textvqa", "textvqa", [ROWS["textvqa"]])
    assert score_answer("Nous les gosses", load("textvqa", source=tmp_path / "textvqa")[0]) == pytest.approx(0.3)


@pytest.mark.parametrize(("name", "right"), [("whatsup", "A mug on a table"), ("vstar", "rubber")])
def test_options_of_a_set_that_has_the_right_one_first_are_shuffled_by_the_seed(name, right, tmp_path):
    row = ROWS[name]
    many = [{**row, "question_id": str(number)} if name == "vstar" else {**row, "images": [png(number)]} for number in range(48)]
    written(tmp_path, name, many)
    items = load(name, source=tmp_path)
    for item in items:
        letters = item["candidates"]
        assert letters == ["A", "B", "C", "D"]
        assert item["options"][letters.index(item["answer"])] == right
        assert f"\n{item['answer']}. {right}" in item["prompt"]
        assert item["prompt"].count(right) == 1 and item["prompt"].endswith(LETTER)
        assert score_answer(f"The answer is ({item['answer']})", item) == score_answer(right, item) == 1.0
    counts = [list(items["answer"]).count(letter) for letter in "ABCD"]
    # Of 48 uniform draws none of four cells is empty, but once in 250,000.
    assert min(counts) >= 3
    assert items["answer"][:] == load(name, source=tmp_path, seed=0)["answer"][:]
    assert items["answer"][:] != load(name, source=tmp_path, seed=1)["answer"][:]


def test_a_label_that_is_not_first_is_followed(tmp_path):
    written(tmp_path, "vstar", [{**ROWS["vstar"], "label": "C"}])
    item = load("vstar", source=tmp_path)[0]
    assert item["options"][item["candidates"].index(item["answer"])] == "kevlar"
    written(tmp_path / "damaged", "vstar", [{**ROWS["vstar"], "label": "E"}])
    with pytest.raises(ValueError, match=r"item 'direct_attributes-0' of vstar has the label 'E', which none of its options has \(A, B, "):
        load("vstar", source=tmp_path / "damaged")


def many(name: str, numbers) -> list[dict]:
    return [{**ROWS[name], "question_id": number, "image": png(number)} for number in numbers]


def test_a_subset_is_chosen_by_hash_whatever_the_order_and_smaller_ones_lie_in_larger(tmp_path):
    written(tmp_path / "up", "vqav2", many("vqav2", range(40)))
    written(tmp_path / "down", "vqav2", many("vqav2", reversed(range(40))))
    few = load("vqav2", n=8, source=tmp_path / "up")
    assert list(few["id"]) == list(load("vqav2", n=8, source=tmp_path / "down")["id"]) == chosen(map(str, range(40)), 8, 0)
    assert list(load("vqav2", n=20, source=tmp_path / "up")["id"])[:8] == list(few["id"])
    assert set(load("vqav2", n=8, seed=1, source=tmp_path / "up")["id"]) != set(few["id"])
    assert list(load("vqav2", source=tmp_path / "up")["id"]) == [str(number) for number in range(40)]
    assert len(load("vqav2", n=99, source=tmp_path / "up")) == 40
    # Each item has its own picture.
    assert few[3]["image"].tobytes() == Pictures.open(io.BytesIO(png(int(few[3]["id"]))["bytes"])).tobytes()


def test_the_card_is_of_these_declarations():
    from probes.benchmarks.card import PATH, text

    assert PATH.read_text(encoding="utf-8") == text(), "stale: run `python -m probes.benchmarks.card`"
    assert all(one.licence and one.citation and one.verified for one in BENCHMARKS.values())


def test_ranks_are_uniform():
    from scipy.stats import kstest

    assert kstest([rank(0, str(number)) for number in range(2000)], "uniform").pvalue > 1e-4


def test_a_subset_is_chosen_without_reading_pictures(tmp_path, monkeypatch):
    written(tmp_path, "vqav2", many("vqav2", range(12)))
    asked = []
    loader = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append(options) or loader(*args, **options))
    load("vqav2", n=2, source=tmp_path)
    assert [options.get("columns") for options in asked] == [["question_id"], None]
    assert all(options["streaming"] for options in asked)


def test_a_set_is_read_no_further_than_to_the_last_item(tmp_path, monkeypatch):
    from probes.benchmarks import loading

    written(tmp_path, "vqav2", many("vqav2", range(30)))
    last = max(int(one) for one in chosen(map(str, range(30)), 2, 0))
    assert last < 27
    read = []
    streamed = loading.stream

    def counted(benchmark, config, split, source, columns=None):
        for row in streamed(benchmark, config, split, source, columns):
            read.append(row["question_id"] if columns is None else None)
            yield row

    monkeypatch.setattr(loading, "stream", counted)
    assert len(load("vqav2", n=2, source=tmp_path)) == 2
    # One more, to see that it is not wanted.
    assert max(one for one in read if one is not None) == last + 1


def test_rows_without_a_number_are_named_by_their_content_and_told_apart(tmp_path):
    row, other = ROWS["chartqa"], {**ROWS["chartqa"], "question": "How many lines?"}
    written(tmp_path / "a", "chartqa", [row, other, row])
    written(tmp_path / "b", "chartqa", [other, row])
    first = list(load("chartqa", source=tmp_path / "a")["id"])
    assert len(set(first)) == 3 and first[2] == f"{first[0]}#2"
    assert list(load("chartqa", source=tmp_path / "b")["id"]) == [first[1], first[0]]
    scenes = list(load("chartqa", source=tmp_path / "a")["scene_id"])
    assert len(set(scenes)) == 1


def test_gqas_questions_are_joined_with_their_pictures_one_at_a_time(tmp_path, monkeypatch):
    rows = [{**ROWS["gqa"], "id": str(number), "imageId": f"n{number % 5}"} for number in range(20)]
    written(tmp_path, "gqa", rows)
    held, peak = set(), []

    class Held(bytes):
        """Bytes of a picture that say when they go."""

        def __del__(self):
            held.discard(id(self))

    from probes.benchmarks import loading

    streamed = loading.stream

    def counted(benchmark, config, *args):
        for row in streamed(benchmark, config, *args):
            if "image" in row:
                content = Held(row["image"]["bytes"])
                held.add(id(content))
                peak.append(len(held))
                yield {**row, "image": {"bytes": content, "path": None}}
                del content
            else:
                yield row

    monkeypatch.setattr(loading, "stream", counted)
    monkeypatch.setattr(loading, "BATCH", 2)
    items = load("gqa", source=tmp_path)
    assert sorted(items["id"], key=int) == [str(number) for number in range(20)]
    for item in items:
        expected = png(int(item["id"]) % 5)["bytes"]
        assert item["scene_id"] == f"n{int(item['id']) % 5}"
        assert item["image"].tobytes() == Pictures.open(io.BytesIO(expected)).tobytes()
    # Those of two items that wait to be written, and the next; the sixth is asked about by nobody and never read.
    assert len(peak) == 5 and max(peak) <= 3
    assert len(load("gqa", n=3, source=tmp_path)) == 3


def test_a_question_whose_picture_is_missing_is_named(tmp_path):
    written(tmp_path, "gqa", [ROWS["gqa"]])
    file = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    datasets.Dataset.from_list([{"id": "other", "image": png(0)}], features=Features(PICTURES)).to_parquet(file)
    with pytest.raises(ValueError, match="1 questions of gqa name pictures that testdev_balanced_images lacks, such as 'n161313'"):
        load("gqa", source=tmp_path)


def test_what_is_loaded_once_is_kept_and_nothing_half_done_is(tmp_path, cache, monkeypatch):
    written(tmp_path / "set", "pope", [ROWS["pope"], {**ROWS["pope"], "id": "1", "answer": "no"}])
    items = load("pope", source=tmp_path / "set")
    kept = list((cache / "benchmarks").iterdir())
    assert [file.suffix for file in kept] == [".arrow"]
    with monkeypatch.context() as patch:
        patch.setattr("probes.benchmarks.loading.stream", lambda *args: pytest.fail("it was read again"))
        assert load("pope", source=tmp_path / "set").to_dict() == items.to_dict()
    # Other files, another subset, a damaged one: each is read, none leaves a part behind.
    written(tmp_path / "set", "pope", [ROWS["pope"]])
    assert len(load("pope", source=tmp_path / "set")) == 1
    written(tmp_path / "set", "pope", [ROWS["pope"], {**ROWS["pope"], "id": "1", "image": {"bytes": b"damaged", "path": None}}])
    with pytest.raises(ValueError, match=r"^the image of item '1' of pope is no image that can be read"):
        load("pope", source=tmp_path / "set")
    assert all(file.suffix == ".arrow" for file in (cache / "benchmarks").iterdir())


def test_without_the_hub_one_sentence_says_how_a_benchmark_is_had():
    with pytest.raises(ValueError) as refused:
        load("vqav2")
    assert re.fullmatch(
        r"the benchmark 'vqav2' is not here: the Hub cannot be reached \(.*\); it is lmms-lab-encoder/VQAv2 on the Hugging Face Hub "
        r"\(before: "
        r"lmms-lab/VQAv2\): go online once, or fetch it elsewhere \(hf download --repo-type dataset lmms-lab-encoder/VQAv2\) and name its "
        r"folder, source=\.\.\.",
        str(refused.value),
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(present)``: a Hub with these ids, each the Parquet in ``tmp_path / "hub"``; gives the ids that were asked for."""
    asked = []

    def start(*present: str) -> list[str]:
        reader, builder = datasets.load_dataset, datasets.load_dataset_builder

        def files(options) -> dict:
            root = tmp_path / "hub" / (options.pop("name", None) or "data")
            split = options.pop("split", None)
            made = {"data_files": [str(file) for file in sorted(root.glob(f"{split or ''}*.parquet"))], **options}
            if not made["data_files"]:
                raise ValueError(f"Bad split: {split}")
            return made if split is None else {**made, "split": "train"}

        def resolved(path, **options):
            if path in ("parquet", "json", "csv", "imagefolder"):
                return reader(path, **options)
            asked.append(path)
            if path not in present:
                raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.")
            return reader("parquet", **files(options))

        def built(path, **options):
            if path not in ("parquet", "json", "csv", "imagefolder") and path not in present:
                raise DatasetNotFoundError(path)
            return builder("parquet", **files(options)) if path in present else builder(path, **options)

        monkeypatch.setattr(datasets, "load_dataset", resolved)
        monkeypatch.setattr(datasets, "load_dataset_builder", built)
        return asked

    return start


def test_the_hub_and_a_folder_give_the_same_items(tmp_path, hub):
    written(tmp_path / "hub", "gqa", [{**ROWS["gqa"], "id": str(number)} for number in range(6)])
    hub("lmms-lab-encoder/GQA")
    for n in (None, 3):
        assert load("gqa", n=n).to_dict() == load("gqa", n=n, source=tmp_path / "hub").to_dict()


CARD = """---
dataset_info:
- config_name: DocVQA
  features:
FEATURES
  splits:
  - name: validation
    num_examples: 5349
configs:
- config_name: DocVQA
  data_files:
  - split: validation
    path: DocVQA/validation-*
---
"""


def test_a_set_is_resolved_by_its_card_as_the_hub_has_it(tmp_path, monkeypatch):
    # The same resolution that an id gets: configuration, split and types of the card of lmms-lab/DocVQA (700643a).
    written(tmp_path / "set", "docvqa", [{**ROWS["docvqa"], "questionId": str(number)} for number in range(5)])
    kinds = {"image": "dtype: image", "docId": "dtype: int64", "question_types": "sequence: string", "answers": "sequence: string"}
    features = "\n".join(f"  - name: {name}\n    {kinds.get(name, 'dtype: string')}" for name in SCHEMAS["docvqa"])
    (tmp_path / "set" / "README.md").write_text(CARD.replace("FEATURES", features))
    there = dataclasses.replace(BENCHMARKS["docvqa"], ids=(str(tmp_path / "set"),))
    monkeypatch.setattr("probes.benchmarks.loading.BENCHMARKS", {"docvqa": there})
    assert list(load("docvqa", n=2)["id"]) == chosen(map(str, range(5)), 2, 0)
    assert len(load("docvqa")) == 5
    with pytest.raises(ValueError, match="has no split 'train' of DocVQA"):
        load("docvqa", split="train")


def test_an_older_id_is_tried_where_the_present_one_is_not_there(tmp_path, hub):
    written(tmp_path / "hub", "pope", [ROWS["pope"]])
    asked = hub("lmms-lab/POPE")
    assert load("pope")[0]["answer"] == "yes"
    assert asked == ["lmms-lab-encoder/POPE", "lmms-lab/POPE"]


def test_a_set_that_is_a_script_is_not_run(tmp_path, hub, monkeypatch):
    written(tmp_path / "hub", "whatsup", [ROWS["whatsup"]])
    hub("Mayfull/whats_up_vlms")
    resolved = datasets.load_dataset

    def scripted(path, **options):
        if path == "AsphyXIA/whatsup":
            raise RuntimeError("Dataset scripts are no longer supported, but found whatsup.py")
        return resolved(path, **options)

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert load("whatsup")[0]["task"] == "whatsup/controlled_images_dataset"


def test_the_present_id_is_taken_where_it_is_there(tmp_path, hub):
    written(tmp_path / "hub", "pope", [ROWS["pope"]])
    asked = hub("lmms-lab-encoder/POPE", "lmms-lab/POPE")
    load("pope")
    assert asked == ["lmms-lab-encoder/POPE"]


def test_a_benchmark_that_the_hub_has_under_no_id_is_named_with_all_of_them(hub):
    hub()
    with pytest.raises(ValueError, match="'pope' is not here: the Hub has none of lmms-lab-encoder/POPE, lmms-lab/POPE as data, or"):
        load("pope")


def test_a_split_that_is_not_there_is_named(tmp_path, hub):
    written(tmp_path / "hub", "pope", [ROWS["pope"]])
    hub("lmms-lab-encoder/POPE")
    with pytest.raises(ValueError, match="'lmms-lab-encoder/POPE' has no split 'train'"):
        load("pope", split="train")
    with pytest.raises(ValueError, match=r"has no file of the split 'train': it has test-00000-of-00001.parquet"):
        load("pope", split="train", source=tmp_path / "hub")


def test_a_split_whose_answers_are_blank_keeps_them(tmp_path):
    written(tmp_path, "textvqa", [{**ROWS["textvqa"], "answers": [""] * 10}], split="test")
    with pytest.raises(ValueError, match="of textvqa has no answer: the split 'test' seems to keep them"):
        load("textvqa", split="test", source=tmp_path)


def test_the_declared_split_is_read_of_a_folder_with_several(tmp_path):
    written(tmp_path, "docvqa", [{**ROWS["docvqa"], "answers": None}], split="test")
    written(tmp_path, "docvqa", [ROWS["docvqa"]])
    assert len(load("docvqa", source=tmp_path)) == 1
    with pytest.raises(ValueError, match="item '49153' of docvqa has no answer: the split 'test' seems to keep them, choose another"):
        load("docvqa", split="test", source=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vqa"}, "there is no benchmark 'vqa': it is one of chartqa, .*, or local"),
        ({"name": "pope", "n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"name": "pope", "columns": {"image": "x"}}, r"with them load\('local', ...\), not 'pope'"),
        ({"name": "pope", "source": "nowhere"}, "'pope' is not here: there is nothing at nowhere"),
        ({"name": "local"}, "local data lies somewhere: name its file or folder, source=..."),
    ],
)
def test_a_wrong_word_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_a_set_of_another_schema_is_named_with_its_columns(tmp_path):
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    datasets.Dataset.from_list([{"id": "0", "text": "Is it?"}]).to_parquet(file)
    with pytest.raises(ValueError, match=r"row 0 of .* has no column 'question_id' \(it has id, text\): it is not the schema of pope"):
        load("pope", source=tmp_path)
    with pytest.raises(ValueError, match="holds neither .parquet, .jsonl, .json, .csv nor pictures"):
        (tmp_path / "empty").mkdir()
        load("pope", source=tmp_path / "empty")


# Data of one's own


def pictures(folder, *names: str):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number)["bytes"])
    return folder


def test_json_lines_with_a_map_of_columns(tmp_path):
    folder = pictures(tmp_path / "own", "pics/a.png", "pics/b.png")
    rows = [
        {"file": "pics/a.png", "ask": "What?", "truth": ["mug", "mug", "cup"], "no": 1, "where": "x", "kind": "k", "among": ["mug", "cup"]},
        {"file": "pics/b.png", "ask": "Who?", "truth": ["cup"], "no": 2, "where": "y", "kind": "k", "among": ["mug", "cup"]},
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"image": "file", "prompt": "ask", "answer": "truth", "id": "no", "scene": "where", "task": "kind", "candidates": "among"}
    items = load("local", source=folder / "all.jsonl", columns=columns, scorer="contains")
    require_items(items, SCORED)
    found = [(item["id"], item["scene_id"], item["task"], item["answer"]) for item in items]
    assert found == [("1", "x", "k", "mug"), ("2", "y", "k", "cup")]
    assert items[0]["references"] == ["mug", "mug", "cup"] and items[0]["scorer"] == "contains"
    assert items[1]["image"].tobytes() == Pictures.open(folder / "pics/b.png").tobytes()
    assert list(load("local", source=folder / "all.jsonl", columns=columns, n=1)["id"]) == chosen(["1", "2"], 1, 0)


def test_parquet_with_the_usual_names_needs_no_map(tmp_path):
    features = Features({"image": Image(), "question": TEXT, "answer": TEXT})
    rows = [{"image": png(number), "question": "What?", "answer": "mug"} for number in range(2)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set.parquet")
    items = load("local", source=tmp_path / "set.parquet")
    assert [item["task"] for item in items] == ["local", "local"]
    assert len(set(items["id"])) == len(set(items["scene_id"])) == 2


def test_a_folder_of_pictures_by_class_asks_one_thing_of_all(tmp_path):
    folder = pictures(tmp_path / "zoo", "cat/a.png", "dog/b.png")
    items = load("local", source=folder, prompt="Which animal is it?")
    assert sorted((item["answer"], tuple(item["candidates"])) for item in items) == [("cat", ("cat", "dog")), ("dog", ("cat", "dog"))]
    require_items(items, SHOWN)
    with pytest.raises(ValueError, match=r"no column of the data looks like the prompt \(it has image, label\).*or ask one thing of every"):
        load("local", source=folder)


def test_a_folder_of_pictures_with_metadata(tmp_path):
    folder = pictures(tmp_path / "own", "a.png", "b.png")
    rows = [{"file_name": f"{name}.png", "question": f"What is {name}?", "answer": name} for name in "ab"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted((item["prompt"], item["answer"]) for item in load("local", source=folder)) == [("What is a?", "a"), ("What is b?", "b")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"picture": "file"}}, "columns name no field 'picture' of an item: there are image, prompt"),
        ({"columns": {"image": "nothing"}}, r"the data has no column 'nothing' for the image \(it has file, question, answer\)"),
        ({}, r"no column of the data looks like the image \(it has file, question, answer\): name it, columns={'image': ...}"),
        ({"columns": {"image": "file"}, "scorer": "rouge"}, "there is no scorer 'rouge': it is one of anls"),
    ],
)
def test_a_map_that_does_not_fit_is_one_sentence(options, message, tmp_path):
    folder = pictures(tmp_path / "own", "a.png")
    (folder / "all.jsonl").write_text(json.dumps({"file": "a.png", "question": "What?", "answer": "mug"}) + "\n")
    with pytest.raises(ValueError, match=message):
        load("local", source=folder / "all.jsonl", **options)


@pytest.mark.parametrize(
    ("path", "why"),
    [("../secret.png", "climbs out"), ("/etc/passwd", "absolute path"), ("https://x.org/a.png", "address"), ("out.png", "outside")],
)
def test_a_benchmark_shows_nothing_that_lies_elsewhere(path, why, tmp_path):
    folder = pictures(tmp_path / "own", "a.png")
    pictures(tmp_path, "secret.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "all.jsonl").write_text(json.dumps({"image": path, "question": "What?", "answer": "mug", "id": "q1"}) + "\n")
    with pytest.raises(ValueError, match=rf"^the image of item 'q1' of local .*{why}.*within .*own"):
        load("local", source=folder / "all.jsonl")


def test_a_link_in_a_folder_of_pictures_cannot_leave_it(tmp_path):
    folder = pictures(tmp_path / "zoo", "cat/a.png", "dog/c.png")
    pictures(tmp_path, "secret.png")
    (folder / "cat" / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="lies outside of its folder"):
        load("local", source=folder, prompt="Which animal is it?")
