"""Probe sets: balanced questions over scenes, as `datasets.Dataset`.

``build`` draws scenes of one split in a fixed order, puts every task's question to each and takes it while that answer's quota is open,
so answers are balanced exactly, by rejection, as in CLEVR.  Splits draw from disjoint streams of seeds; ``assert_disjoint`` checks by
content hash that no picture is in two of them.

Exports: ``SPLITS``, ``scene_stream``, ``build``, ``items_of``, ``on_disk``, ``debug_set``,
``content_hash``, ``assert_disjoint``, ``target_mask``.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from PIL import Image

from vlm_core.pictures import PackedPicture

from .render import detail_mask, object_box, object_mask, render
from .scene import IMAGE_SIZE, Scene, sample_scene
from .tasks import TASKS

SPLITS = {"train": 0, "discovery": 1, "confirmation": 2, "debug": 3}
PROPOSALS = 3  # questions put to a scene per task before it is passed over
BALANCE = 1.1  # no answer more often than this times the next, CLEVR's bound

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "scene_id": datasets.Value("string"),
        "task": datasets.Value("string"),
        "image": datasets.Image(),
        "prompt": datasets.Value("string"),
        "paraphrase": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "candidates": datasets.List(datasets.Value("string")),
        "target": datasets.List(datasets.Value("int64")),
        "boxes": datasets.List(datasets.List(datasets.Value("int64"))),
        "objects": datasets.Value("string"),
        "partner_image": datasets.Image(),
        "partner_answer": datasets.Value("string"),
    }
)


def scene_stream(split: str, seed: int = 0, start: int = 0) -> Iterator[tuple[int, Scene, np.random.Generator]]:
    """Endless ``(index, scene, rng)`` of a split; the rng belongs to that scene's questions.

    Raises
    ------
    ValueError
        If the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is unknown: expected one of {', '.join(SPLITS)}")
    for index in itertools.count(start):
        rng = np.random.default_rng(np.random.SeedSequence((SPLITS[split], seed, index)))
        yield index, sample_scene(rng), rng


def _quotas(task: str, n: int) -> dict[str, int] | int:
    answers = TASKS[task].answers
    if answers is None:
        return n
    return {a: n // len(answers) + (i < n % len(answers)) for i, a in enumerate(answers)}


def _take(quota, answer: str) -> tuple[bool, object]:
    if isinstance(quota, int):
        return quota > 0, quota - 1
    return quota[answer] > 0, {**quota, answer: quota[answer] - 1}


def build(
    split: str, *, tasks: Sequence[str] = tuple(TASKS), n_per_task: int = 120, seed: int = 0, size: int = IMAGE_SIZE
) -> datasets.Dataset:
    """A balanced probe set.

    Parameters
    ----------
    split : {"train", "discovery", "confirmation", "debug"}
    tasks : names in ``TASKS``
    n_per_task : int
        Items of each task; a task's answers get equal shares (they differ by one where it does not divide).
    seed : int
        Another seed gives another, disjoint set of scenes of the same split.
    size : int
        Pixels of a picture's side. The same scenes and questions, drawn on more of them.

    Returns
    -------
    datasets.Dataset
        One row an item: ``id``, ``scene_id`` (the cluster), ``task``, ``image``, ``prompt``, ``paraphrase``, ``answer``,
        ``candidates``, ``target`` (object ids; empty means the dot), ``boxes`` (left, top, right, bottom of each target, pixels),
        ``objects`` (the scene as JSON), ``partner_image`` and ``partner_answer`` (the counterfactual).

    Raises
    ------
    ValueError
        If a task or the split is unknown or ``n_per_task`` is not positive.
    """
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise ValueError(f"task '{unknown[0]}' is unknown: expected one of {', '.join(TASKS)}")
    if n_per_task < 1:
        raise ValueError(f"n_per_task is {n_per_task}: expected at least one item a task")
    quotas = {t: _quotas(t, n_per_task) for t in tasks}
    missing = {t: n_per_task for t in tasks}
    rows: list[dict] = []
    for index, scene, rng in scene_stream(split, seed):
        asked = [(t, q) for t in tasks if missing[t] for q in [_propose(t, scene, rng, quotas)] if q is not None]
        if asked:  # what its questions share, once
            shown = {"scene_id": f"{split}-{seed}-{index:06d}-{scene.content_hash}", "image": _png(render(scene, size)), "objects": json.dumps(scene.as_dict())}
        for task, question in asked:
            missing[task] -= 1
            row = {"id": f"{split}-{seed}-{index:06d}-{task}", "task": task, **shown, **_row(scene, question, size)}
            rows.append({name: row[name] for name in FEATURES})
        if not any(missing.values()):
            break
    return datasets.Dataset.from_list(sorted(rows, key=lambda r: (tasks.index(r["task"]), r["id"])), features=FEATURES)


def _propose(task: str, scene: Scene, rng: np.random.Generator, quotas: dict):
    for _ in range(PROPOSALS):
        question = TASKS[task].ask(scene, rng)
        if question is not None:
            taken, rest = _take(quotas[task], question.answer)
            if taken:
                quotas[task] = rest
                return question
    return None


def _row(scene: Scene, question, size: int) -> dict:
    by_id = {o.id: o for o in scene.objects}
    return {
        "prompt": question.prompt,
        "paraphrase": question.paraphrase,
        "answer": question.answer,
        "candidates": list(question.candidates),
        "target": list(question.target),
        "boxes": [list(object_box(by_id[i], size)) for i in question.target],
        "partner_image": _png(render(question.partner, size)),
        "partner_answer": question.partner_answer,
    }


def _png(image: Image.Image) -> dict:
    """A picture as `datasets` stores it, compressed for speed."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def items_of(dataset: datasets.Dataset) -> list[dict]:
    """A probe set as a list of items, each picture decoded when someone looks at it and not before; those of one scene are one object."""
    table = dataset.with_format("arrow")[:]
    pictures: dict[str, PackedPicture] = {}
    items = table.drop_columns(["image", "partner_image"]).to_pylist()
    for item, *packed in zip(items, _packed(table["image"]), _packed(table["partner_image"]), strict=True):
        scene = item["scene_id"]
        if scene not in pictures:
            pictures[scene] = PackedPicture(packed[0])
        item["image"], item["partner_image"] = pictures[scene], PackedPicture(packed[1])
    return [{name: item[name] for name in dataset.features} for item in items]


def _packed(column: pyarrow.ChunkedArray) -> Iterator[pyarrow.Buffer]:
    """The bytes of pictures where the table has them, none copied."""
    return (stored.as_buffer() for chunk in column.chunks for stored in chunk.field("bytes"))


def on_disk(dataset: datasets.Dataset, path: Path) -> datasets.Dataset:
    """The same probe set in a file, memory-mapped: its pictures take no memory but the file's, which all processes that map it share."""
    partial = path.with_suffix(f".{os.getpid()}")
    table = dataset.with_format("arrow")[:]
    with pyarrow.OSFile(str(partial), "wb") as file, pyarrow.ipc.new_stream(file, dataset.features.arrow_schema) as writer:
        writer.write_table(table)
    os.replace(partial, path)
    return datasets.Dataset.from_file(str(path))


def debug_set(n: int = 100) -> datasets.Dataset:
    """A fixed small set over all tasks for fast iteration: ``n`` items (100 unless told)."""
    full = build("debug", n_per_task=-(-n // len(TASKS)))
    keep = sorted(range(len(full)), key=lambda i: (i % (-(-n // len(TASKS))), i))[:n]
    return full.select(sorted(keep))


def target_mask(row: dict) -> np.ndarray:
    """Pixels of the objects a question is about (of the dot where it names none): bool, of the picture's height and width."""
    from .scene import Detail, SceneObject

    scene, size = json.loads(row["objects"]), row["image"].width
    if not row["target"]:
        return detail_mask(Detail(**{**scene["detail"], "center": tuple(scene["detail"]["center"]), "tint": tuple(scene["detail"]["tint"])}), size)
    objects = [SceneObject(**{**o, "center": tuple(o["center"]), "tint": tuple(o["tint"])}) for o in scene["objects"] if o["id"] in row["target"]]
    return np.logical_or.reduce([object_mask(o, size) for o in objects])


def content_hash(dataset: datasets.Dataset) -> str:
    """Hash of a probe set's items: ids, pictures (through the scene's own hash), prompts and answers, in order-free form."""
    keys = sorted(zip(dataset["id"], dataset["scene_id"], dataset["prompt"], dataset["answer"], dataset["partner_answer"]))
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def _pictures(dataset: datasets.Dataset) -> set[str]:
    return {scene_id.rsplit("-", 1)[1] for scene_id in dataset["scene_id"]}


def assert_disjoint(sets: Iterable[datasets.Dataset]) -> None:
    """Raise ValueError if two probe sets share a picture (by the hash of what is drawn)."""
    for first, second in itertools.combinations(list(sets), 2):
        shared = _pictures(first) & _pictures(second)
        if shared:
            raise ValueError(f"two probe sets share {len(shared)} scenes, such as {sorted(shared)[0]}: discovery and confirmation must not")
