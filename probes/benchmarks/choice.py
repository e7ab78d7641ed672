"""Multiple choice, and yes or no: ScienceQA-IMG, MMStar, POPE, What'sUp, V*.

Candidates are the letters of the options (``options`` says what they stand for), or "yes" and "no". What'sUp and V* have the right option
first: theirs are shuffled by a hash of the seed and the item's id, and the answer is the letter that it then has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets

from .choosing import lettered
from .declaration import LETTER, TEXT, TEXTS, WORD, Benchmark, Row
from .documents import content_id

__all__ = ["MMSTAR", "POPE", "SCIENCEQA", "VSTAR", "WHATSUP"]

OPTIONS = {"options": TEXTS}


def _choice(question: str, options: Sequence[str], right: int, letters: Sequence[str], post: str = LETTER) -> dict[str, Any]:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return {
        "prompt": f"{question}\n{listed}{post}",
        "answer": letters[right],
        "references": [letters[right]],
        "candidates": list(letters),
        "options": list(options),
    }


def _shuffled(question: str, options: Sequence[str], right: int, name: str, seed: int) -> dict[str, Any]:
    order = lettered(options, seed, name)
    places = [place for _, place in order]
    return _choice(question, [options[place] for place in places], places.index(right), [letter for letter, _ in order])


def _scienceqa(row: Row, name: str, seed: int) -> dict[str, Any]:
    letters = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return {"task": f"scienceqa/{row['subject']}", **_choice(context + row["question"], row["choices"], row["answer"], letters)}


SCIENCEQA = Benchmark(
    name="scienceqa",
    ids=("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA"),
    config="ScienceQA-IMG",
    split="test",
    item=_scienceqa,
    id=lambda row: content_id(row["question"], *row["choices"], row["hint"] or "", image=row["image"]),
    scorer="option",
    licence="CC BY-NC-SA 4.0",
    citation="Lu et al. 2022, Learn to Explain, NeurIPS, arXiv:2209.09513",
    verified="id, configuration, prompt: lmms-eval 75571cfe; columns, types, splits: the card of lmms-lab/ScienceQA (7d5be0f); "
    "licence: the "
    "authors' loading script (the card of derek-thomas/ScienceQA says CC BY-SA 4.0)",
    columns={
        "image": datasets.Image(),
        "question": TEXT,
        "choices": TEXTS,
        "answer": datasets.Value("int8"),
        "hint": TEXT,
        "task": TEXT,
        "grade": TEXT,
        "subject": TEXT,
        "topic": TEXT,
        "category": TEXT,
        "skill": TEXT,
        "lecture": TEXT,
        "solution": TEXT,
    },
    extra=OPTIONS,
    candidates=True,
)


def _mmstar(row: Row, name: str, seed: int) -> dict[str, Any]:
    letters = list("ABCD")
    return {
        "task": f"mmstar/{row['category']}",
        "prompt": row["question"].strip() + LETTER.removesuffix("."),
        "answer": row["answer"].strip().upper(),
        "references": [row["answer"].strip().upper()],
        "candidates": letters,
        "l2_category": row["l2_category"],
    }


MMSTAR = Benchmark(
    name="mmstar",
    ids=("Lin-Chen/MMStar",),
    split="val",
    item=_mmstar,
    id=lambda row: str(row["index"]),
    key=("index",),
    scorer="option",
    licence="not stated; drawn from six benchmarks with their own",
    citation="Chen et al. 2024, Are We on the Right Way for Evaluating Large Vision-Language Models?, NeurIPS, arXiv:2403.20330",
    verified="id, split, prompt: lmms-eval 75571cfe; columns and types: the card of a copy (macabdul9/MMStar); the options stand in "
    "the question; no "
    "licence found",
    columns={
        "index": datasets.Value("int64"),
        "question": TEXT,
        "image": datasets.Image(),
        "answer": TEXT,
        "category": TEXT,
        "l2_category": TEXT,
        "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT},
    },
    extra={"l2_category": TEXT},
    candidates=True,
)


def _pope(row: Row, name: str, seed: int) -> dict[str, Any]:
    answer = row["answer"].strip().lower()
    return {
        "task": f"pope/{row['category']}",
        "prompt": row["question"].strip() + WORD,
        "answer": answer,
        "references": [answer],
        "candidates": ["yes", "no"],
    }


POPE = Benchmark(
    name="pope",
    ids=("lmms-lab-encoder/POPE", "lmms-lab/POPE"),
    split="test",
    item=_pope,
    id=lambda row: str(row["id"]),
    scene=lambda row: row["image_source"],
    key=("id",),
    scorer="pope",
    licence="MIT (github.com/RUCAIBox/POPE); pictures are COCO's",
    citation="Li et al. 2023, Evaluating Object Hallucination in Large Vision-Language Models, EMNLP, arXiv:2305.10355",
    verified="id, split, prompt: lmms-eval 75571cfe; names of the columns and that id, question_id and category are text: a row printed in "
    "published code; licence: the authors' repository (3df3ba1b)",
    columns={
        "id": TEXT,
        "question_id": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "image_source": TEXT,
        "image": datasets.Image(),
        "category": TEXT,
    },
    candidates=True,
)


def _whatsup(row: Row, name: str, seed: int) -> dict[str, Any]:
    options = [*row["positive_caption"], *row["negative_caption"]]
    part = re.sub(r"\.\w+$", "", str(row["original_file_name"]).split("/")[-1])
    return {"task": f"whatsup/{part}", **_shuffled("Which caption describes the image?", options, 0, name, seed)}


WHATSUP = Benchmark(
    name="whatsup",
    ids=("AsphyXIA/whatsup", "Mayfull/whats_up_vlms"),
    split="test",
    item=_whatsup,
    id=lambda row: content_id(*row["positive_caption"], *row["negative_caption"], image=row["images"][0]),
    image="images",
    scorer="option",
    licence="MIT (github.com/amitakamath/whatsup_vlms)",
    citation="Kamath et al. 2023, What's \"up\" with vision-language models?, EMNLP, arXiv:2310.19785",
    verified="columns, types, split: the card of AsphyXIA/whatsup (Parquet, 4,089 rows), of the same columns as published code reads from "
    "Mayfull/whats_up_vlms, whose files are not verified; right option first, licence: the authors' repository (7c1f2550); the question is "
    "ours, they score captions",
    columns={
        "images": datasets.List(datasets.Image()),
        "positive_caption": TEXTS,
        "negative_caption": TEXTS,
        "original_file_name": TEXT,
    },
    extra=OPTIONS,
    candidates=True,
)

_MARKED = re.compile(r"\(([A-Z])\)\s*")


def _vstar(row: Row, name: str, seed: int) -> dict[str, Any]:
    question, *marked = _MARKED.split(row["text"].split("\nAnswer with the option")[0])
    letters, options = marked[::2], [option.strip() for option in marked[1::2]]
    if row["label"].strip() not in letters:
        raise ValueError(f"item '{name}' of vstar has the label {row['label']!r}, which none of its options has ({', '.join(letters)})")
    return {"task": f"vstar/{row['category']}", **_shuffled(question.strip(), options, letters.index(row["label"].strip()), name, seed)}


VSTAR = Benchmark(
    name="vstar",
    ids=("lmms-lab-encoder/vstar-bench", "lmms-lab/vstar-bench"),
    split="test",
    item=_vstar,
    id=lambda row: f"{row['category']}-{row['question_id']}",
    key=("category", "question_id"),
    scorer="option",
    licence="MIT (github.com/penghao-wu/vstar)",
    citation="Wu & Xie 2024, V*: Guided Visual Search as a Core Mechanism in Multimodal LLMs, CVPR, arXiv:2312.14135",
    verified="id, split, how the options stand in the text: lmms-eval 75571cfe; names of the columns: published code that reads "
    "them; their types "
    "are not verified; right option first, licence: the authors' repository (4ede6647)",
    columns={"image": datasets.Image(), "text": TEXT, "label": TEXT, "question_id": TEXT, "category": TEXT},
    extra=OPTIONS,
    candidates=True,
)
