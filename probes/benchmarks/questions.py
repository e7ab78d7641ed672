"""Open questions about photographs: VQAv2, GQA, TextVQA.

Prompts are those of lmms-eval (commit 75571cfe, ``lmms_eval/tasks``): the question, then ``WORD``. Columns and types are those of the cards
on the Hub where ``verified`` says so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets

from .declaration import TEXT, TEXTS, WORD, Benchmark, Join, Row

__all__ = ["GQA", "TEXTVQA", "VQAV2", "majority"]

NUMBER = datasets.Value("int64")


def majority(answers: list[str]) -> str:
    """The commonest, the first of those that tie."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _vqav2(row: Row, name: str, seed: int) -> dict[str, Any]:
    answers = [one["answer"] for one in row["answers"] or ()]
    return {
        "task": "vqav2",
        "prompt": row["question"] + WORD,
        "answer": row["multiple_choice_answer"] or majority(answers),
        "references": answers,
        "question_type": row["question_type"],
        "answer_type": row["answer_type"],
    }


VQAV2 = Benchmark(
    name="vqav2",
    ids=("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2"),
    split="validation",
    item=_vqav2,
    id=lambda row: str(row["question_id"]),
    scene=lambda row: str(row["image_id"]),
    key=("question_id",),
    scorer="vqa",
    licence="CC BY 4.0",
    citation="Goyal et al. 2017, Making the V in VQA Matter, CVPR, arXiv:1612.00837",
    verified="id: lmms-eval 75571cfe; columns, types, split and licence: the card of lmms-lab/VQAv2 (d138bef)",
    columns={
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": datasets.List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}),
        "image_id": NUMBER,
        "answer_type": TEXT,
        "question_id": NUMBER,
        "question": TEXT,
        "image": datasets.Image(),
    },
    extra={"question_type": TEXT, "answer_type": TEXT},
)


def _gqa(row: Row, name: str, seed: int) -> dict[str, Any]:
    types = row["types"] or {}
    return {
        "task": "gqa",
        "prompt": row["question"] + WORD,
        "answer": row["answer"],
        "references": [row["answer"]],
        "structural": types.get("structural") or "",
        "semantic": types.get("semantic") or "",
    }


GQA = Benchmark(
    name="gqa",
    ids=("lmms-lab-encoder/GQA", "lmms-lab/GQA"),
    config="testdev_balanced_instructions",
    split="testdev",
    item=_gqa,
    id=lambda row: str(row["id"]),
    scene=lambda row: str(row["imageId"]),
    key=("id",),
    join=Join("testdev_balanced_images", on="imageId"),
    scorer="gqa",
    licence="MIT (the set on the Hub); pictures are Visual Genome's, CC BY 4.0",
    citation="Hudson & Manning 2019, GQA, CVPR, arXiv:1902.09506",
    verified="id, configurations, split, join: lmms-eval 75571cfe; licence: the card of lmms-lab/GQA; names of the columns: "
    "published code that "
    "reads them; their types are not verified",
    columns={
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": datasets.Value("bool"),
        "types": {"detailed": TEXT, "semantic": TEXT, "structural": TEXT},
    },
    extra={"structural": TEXT, "semantic": TEXT},
)


def _textvqa(row: Row, name: str, seed: int) -> dict[str, Any]:
    answers = list(row["answers"] or ())
    return {
        "task": "textvqa",
        "prompt": row["question"].capitalize() + WORD,
        "answer": majority(answers),
        "references": answers,
        "ocr_tokens": list(row["ocr_tokens"] or ()),
    }


TEXTVQA = Benchmark(
    name="textvqa",
    ids=("lmms-lab-encoder/textvqa", "lmms-lab/textvqa"),
    split="validation",
    item=_textvqa,
    id=lambda row: str(row["question_id"]),
    scene=lambda row: str(row["image_id"]),
    key=("question_id",),
    scorer="textvqa",
    licence="CC BY 4.0",
    citation="Singh et al. 2019, Towards VQA Models That Can Read, CVPR, arXiv:1904.08920",
    verified="id: lmms-eval 75571cfe; columns, types, splits: the card of a duplicate of lmms-lab/textvqa (pppop7/textvqa); "
    "licence: the card of "
    "facebook/textvqa",
    columns={
        "image_id": TEXT,
        "question_id": datasets.Value("int32"),
        "question": TEXT,
        "question_tokens": TEXTS,
        "image": datasets.Image(),
        "image_width": datasets.Value("int32"),
        "image_height": datasets.Value("int32"),
        "flickr_original_url": TEXT,
        "flickr_300k_url": TEXT,
        "answers": TEXTS,
        "image_classes": TEXTS,
        "set_name": TEXT,
        "ocr_tokens": TEXTS,
    },
    extra={"ocr_tokens": TEXTS},
)
