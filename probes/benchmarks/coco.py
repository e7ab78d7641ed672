"""What is in the picture, with the mask of where: object identification from COCO, at the sizes of three papers.

``COCO_HEAR, COCO_HI, COCO_NEO, COCO_NEO_LENS``   the benchmarks
``Selection``                                   which objects of an annotated set are asked about, and how many the paper has
``target_mask(item)``, ``others_mask(item)``    pixels of the object, and of all other annotated ones
``annotation_mask(segmentation, height, width)``  polygons or run lengths as pixels

From the annotations of COCO (``instances_SPLIT.json``) and its pictures. An item asks which of four things is in the picture: the object,
whose category occurs once there, and three that are not there, in an order that the seed decides. The papers ask otherwise (what the main
object is, or for a description); a choice has a chance level, and is scored from candidates and from free answers alike.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from vlm_core.paths import within

from .choosing import rank
from .declaration import WORD, Benchmark, Row

__all__ = ["COCO_HEAR", "COCO_HI", "COCO_NEO", "COCO_NEO_LENS", "SELECTIONS", "Selection", "annotation_mask", "others_mask", "target_mask"]

OPTIONS = 4


@dataclass(frozen=True)
class Selection:
    """Which objects are asked about: one a picture, the largest of those whose category occurs once and that fit.

    Parameters
    ----------
    size : int or None
        How many pictures the paper has; None where that is not known.
    source : str
        Where size and bounds are from.
    area : (float, float), optional
        Bounds of the object's pixels, both exclusive.
    share : float, optional
        The least share of the picture that the object covers.
    annotations : int, optional
        The most annotations that a picture may have.
    """

    size: int | None
    source: str
    area: tuple[float, float] | None = None
    share: float | None = None
    annotations: int | None = None

    def chosen(self, image: Mapping[str, Any], annotations: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The annotation that is asked about in a picture, None where none fits."""
        if self.annotations is not None and len(annotations) > self.annotations:
            return None
        categories = [one["category_id"] for one in annotations]
        fitting = [
            one
            for one in annotations
            if categories.count(one["category_id"]) == 1
            and not one.get("iscrowd", 0)
            and (self.area is None or self.area[0] < one["area"] < self.area[1])
            and (self.share is None or one["area"] >= self.share * image["width"] * image["height"])
        ]
        return max(fitting, key=lambda one: (one["area"], -one["id"]), default=None)


_MAIN = 0.1
SELECTIONS = {
    "coco-hear": Selection(
        200,
        "Kim et al. 2025 (arXiv:2509.17588): 200 COCO pictures, asked about the main object; that it is the only one of its category and "
        "covers a tenth of the picture is ours, their selection is not public",
        share=_MAIN,
    ),
    "coco-hi": Selection(
        None,
        "Sergeev & Kotelnikov 2025 (arXiv:2511.23375): pictures of COCO with masks of key objects (there from Florence-2 and SAM 2, "
        "here COCO's "
        "own); how many is not known to us, so all that fit are given; key objects are chosen as main ones are",
        share=_MAIN,
    ),
    "coco-neo": Selection(
        4318,
        "Neo et al. 2025 (arXiv:2410.07149), github.com/clemneo/llava-interp 7bd565ac scripts/ablation_experiment.py: at most three "
        "annotations, "
        "an object of 1,000 to 2,000 pixels that is the only one of its category; 4,318 pictures are left once their model's "
        "answers have been "
        "looked at too, which is not done here",
        area=(1000, 2000),
        annotations=3,
    ),
    "coco-neo-lens": Selection(
        170,
        "Neo et al. 2025: 170 validation pictures with objects of 20,000 to 30,000 pixels, for the logit lens",
        area=(20000, 30000),
    ),
}  # fmt: skip


def annotation_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Pixels of an annotated object: of polygons, or of run lengths, compressed or not.

    Returns
    -------
    bool [height, width]

    Raises
    ------
    ValueError
        Without pycocotools, or for what is no segmentation.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ValueError("masks of COCO are read with pycocotools, which is not installed: pip install -e '.[benchmarks]'") from error
    try:
        runs = coco.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) or isinstance(
            segmentation["counts"], list
        ) else segmentation  # fmt: skip
        found = coco.decode(coco.merge(runs) if isinstance(runs, list) else runs)
    except Exception as error:  # a library in C: it raises whatever it likes
        raise ValueError(f"a segmentation cannot be read ({' '.join(str(error).split())[:100]}): the annotations are damaged") from error
    if found.shape != (height, width):
        raise ValueError(f"a segmentation is of {found.shape[1]} x {found.shape[0]} pixels, its picture of {width} x {height}")
    return found.astype(bool)


def target_mask(item: Mapping[str, Any]) -> np.ndarray:
    """Pixels of the object that an item is about: bool [height, width] of its image."""
    return np.asarray(item["mask"]) > 0


def others_mask(item: Mapping[str, Any]) -> np.ndarray:
    """Pixels of all other annotated objects in the image: bool [height, width]."""
    return np.asarray(item["others"]) > 0


def _stored(mask: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray((mask * 255).astype(np.uint8)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _rows(selection: Selection):
    def rows(source: Path, split: str) -> Iterator[Row]:
        file, pictures = _places(source, split)
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {one["id"]: one["name"] for one in content["categories"]}
        of_image: dict[int, list] = {}
        for one in content["annotations"]:
            of_image.setdefault(one["image_id"], []).append(one)
        for image in sorted(content["images"], key=lambda one: one["id"]):
            annotations = of_image.get(image["id"], [])
            target = selection.chosen(image, annotations)
            if target is not None:
                yield {
                    "id": str(image["id"]),
                    "image": within(pictures, image["file_name"], f"the image of item '{image['id']}'"),
                    "size": (image["height"], image["width"]),
                    "target": target,
                    "others": [one for one in annotations if one is not target],
                    "name": names[target["category_id"]],
                    "absent": sorted(set(names.values()) - {names[one["category_id"]] for one in annotations}),
                }

    return rows


def _places(source: Path, split: str) -> tuple[Path, Path]:
    """The annotations, and the folder of the pictures."""
    named = [source] if source.is_file() else [source / "annotations" / f"instances_{split}.json", source / f"instances_{split}.json"]
    file = next((one for one in named if one.is_file()), None)
    if file is None:
        raise ValueError(f"{source} has no instances_{split}.json, nor in annotations/: name the folder that COCO is unpacked to")
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    return file, base / split if (base / split).is_dir() else base


def _item(row: Row, name: str, seed: int) -> dict[str, Any]:
    height, width = row["size"]
    others = [annotation_mask(one["segmentation"], height, width) for one in row["others"]]
    mask = annotation_mask(row["target"]["segmentation"], height, width)
    absent = sorted(row["absent"], key=lambda one: rank(seed, f"{name}\0{one}"))[: OPTIONS - 1]
    options = sorted([row["name"], *absent], key=lambda one: rank(seed, f"order\0{name}\0{one}"))
    left, top, across, down = row["target"]["bbox"]
    return {
        "task": "coco",
        "prompt": f"Which of these is in the image: {', '.join(options[:-1])} or {options[-1]}?{WORD}",
        "answer": row["name"],
        "references": [row["name"]],
        "candidates": options,
        "mask": _stored(mask),
        "others": _stored(np.logical_or.reduce(others) if others else np.zeros((height, width), dtype=bool)),
        "boxes": [[round(left), round(top), round(left + across), round(top + down)]],
    }


def _benchmark(name: str, split: str) -> Benchmark:
    selection = SELECTIONS[name]
    return Benchmark(
        name=name,
        ids=(),
        split=split,
        item=_item,
        id=lambda row: row["id"],
        scene=lambda row: row["id"],
        scorer="spoken",
        licence="annotations CC BY 4.0; pictures under their Flickr licences",
        citation=f"Lin et al. 2014, Microsoft COCO, ECCV, arXiv:1405.0312; {selection.source.split(' (')[0].split(':')[0]}",
        verified=f"{selection.source}; the question is ours",
        extra={"mask": datasets.Image(), "others": datasets.Image(), "boxes": datasets.List(datasets.List(datasets.Value("int64")))},
        candidates=True,
        get="fetch annotations_trainval2017.zip and the pictures from cocodataset.org, unpack both into one folder and name it, source=...",
        rows=_rows(selection),
        n=selection.size,
    )


COCO_HEAR = _benchmark("coco-hear", "val2017")
COCO_HI = _benchmark("coco-hi", "val2017")
COCO_NEO = _benchmark("coco-neo", "train2017")
COCO_NEO_LENS = _benchmark("coco-neo-lens", "val2017")
