"""Reading text, charts and documents: OCRBench, ChartQA, DocVQA.

Prompts are those of lmms-eval (commit 75571cfe, ``lmms_eval/tasks``). OCRBench and ChartQA number nothing: picture and question name an
item, the picture's pixels its scene.
"""

from __future__ import annotations

import hashlib
from typing import Any

import datasets

from .declaration import TEXT, TEXTS, WORD, Benchmark, Row

__all__ = ["CHARTQA", "DOCVQA", "OCRBENCH", "content_id"]


def content_id(*texts: str, image: Any) -> str:
    """A name made of texts and a picture's bytes (its path, where the set has no bytes)."""
    digest = hashlib.sha256("\0".join(texts).encode())
    shown = image if isinstance(image, dict) else {"bytes": None, "path": image}
    digest.update(shown.get("bytes") or str(shown.get("path")).encode())
    return digest.hexdigest()[:16]


def _ocrbench(row: Row, name: str, seed: int) -> dict[str, Any]:
    answers = list(row["answer"] or ())
    return {
        "task": f"ocrbench/{row['question_type']}",
        "prompt": row["question"].strip(),
        "answer": answers[0] if answers else "",
        "references": answers,
        "dataset": row["dataset"],
    }


OCRBENCH = Benchmark(
    name="ocrbench",
    ids=("echo840/OCRBench",),
    split="test",
    item=_ocrbench,
    id=lambda row: content_id(row["question"], image=row["image"]),
    scorer="ocrbench",
    licence="not stated; the 29 sets it is drawn from have their own",
    citation="Liu et al. 2024, OCRBench, Science China Information Sciences, arXiv:2305.07895",
    verified="id, columns, types, split: the card of echo840/OCRBench; scorer: github.com/Yuliang-Liu/MultimodalOCR 794c36d6; no "
    "licence found",
    columns={"dataset": TEXT, "question": TEXT, "question_type": TEXT, "answer": TEXTS, "image": datasets.Image()},
    extra={"dataset": TEXT},
)


def _chartqa(row: Row, name: str, seed: int) -> dict[str, Any]:
    return {
        "task": f"chartqa/{row['type']}",
        "prompt": row["question"] + "\nAnswer the question with a single word.",
        "answer": row["answer"],
        "references": [row["answer"]],
    }


CHARTQA = Benchmark(
    name="chartqa",
    ids=("lmms-lab-encoder/ChartQA", "lmms-lab/ChartQA"),
    split="test",
    item=_chartqa,
    id=lambda row: content_id(row["type"], row["question"], image=row["image"]),
    scorer="relaxed",
    licence="GPL-3.0 (github.com/vis-nlp/ChartQA), not verified here",
    citation="Masry et al. 2022, ChartQA, Findings of ACL, arXiv:2203.10244",
    verified="id: lmms-eval 75571cfe; columns and types: the script that made the set (chartqa/upload_chartqa.py there); licence "
    "not verified",
    columns={"type": TEXT, "question": TEXT, "answer": TEXT, "image": datasets.Image()},
)


def _docvqa(row: Row, name: str, seed: int) -> dict[str, Any]:
    answers = list(row["answers"] or ())
    return {
        "task": "docvqa",
        "prompt": row["question"] + WORD,
        "answer": answers[0] if answers else "",
        "references": answers,
        "question_types": list(row["question_types"] or ()),
    }


DOCVQA = Benchmark(
    name="docvqa",
    ids=("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA"),
    config="DocVQA",
    split="validation",
    item=_docvqa,
    id=lambda row: str(row["questionId"]),
    scene=lambda row: f"{row['ucsf_document_id']}-{row['ucsf_document_page_no']}",
    key=("questionId",),
    scorer="anls",
    licence="Apache-2.0 (the set on the Hub); pages are of the UCSF Industry Documents Library",
    citation="Mathew et al. 2021, DocVQA, WACV, arXiv:2007.00398",
    verified="id, configuration: lmms-eval 75571cfe; columns, types, splits, licence: the card of lmms-lab/DocVQA (700643a); the "
    "split test keeps "
    "its answers",
    columns={
        "questionId": TEXT,
        "question": TEXT,
        "question_types": TEXTS,
        "image": datasets.Image(),
        "docId": datasets.Value("int64"),
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": TEXTS,
        "data_split": TEXT,
    },
    extra={"question_types": TEXTS},
)
