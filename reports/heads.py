"""The head report: what a test leaves of it, and what the page shows.

``leave``     ``head-report.json`` from `vlm_core.heads.report.HeadReport` and the items of its pictures
``load``      read it back from a run; None where a run has none
``section``   the model of the page's section on heads: cards, strips on shared scales, pictures
``links``     heads that have a card, and the card's address on the page
"""

from __future__ import annotations

import json

import numpy as np

from reports.pictures import png, thumbnail
from reports.scale import Scale
from reports.wording import interval_numbers, number

ARTIFACT = "head-report.json"
MANY = 300  # heads from which on a card shows only those of the list in its map
PICTURE_PIXELS = 64  # of a picture's longer side: what the embedded subject sees, a thumbnail of anything larger

# What the page asks of a report; one that another version wrote may lack some of it.
_ENTRY = (
    "name", "layer", "head", "category", "confidence", "effect", "by_task", "features", "attends", "kinds", "heat", "evidence", "sentence",
)  # fmt: skip
_ABOUT = (
    "layers", "heads_per_layer", "items", "clusters", "interval", "attribution_r2", "choice", "example_choice", "places", "both", "shortfall",
)  # fmt: skip
_HEAT = (214, 95, 0)  # the colour of attention in every figure that lies on a picture
_PARTS = ("the asked object", "the rest of the image", "the image", "words", "special tokens and delimiters")
_LETTERS = {"cross-modal grounding": "G", "vision summarisation": "V", "instruction following": "I", "routing": "R"}
_METRICS = {"margin": "margin of the answer (nats lost)", "accuracy": "accuracy lost"}


def leave(evidence, report, items, notes):
    """Leave the report with a test's evidence, its pictures embedded.

    Parameters
    ----------
    report : vlm_core.heads.report.HeadReport
    items : sequence of dict
        Those that the report's examples are of, or more, with ``id`` and ``image``.
    notes : dict
        Feature → what it is.
    """
    images = {item["id"]: item["image"] for item in items}
    content = report.as_dict()
    examples = [{**example, **_picture(images[example["id"]])} for example in content["examples"]]
    evidence.artifact_json(ARTIFACT, {**content, "examples": examples, "notes": dict(notes)})


def _picture(image):
    small = thumbnail(image, PICTURE_PIXELS)
    return {"width": small.width, "height": small.height, "image": png(small)}


def load(folder):
    """The head report of a run, or None."""
    path = folder / ARTIFACT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def links(described):
    """``{"layer.head": "#id of its card, or of its row in the table of every head"}``."""
    if not described or not described["heads"] or _lacks(described):
        return {}
    return {entry["name"]: f"#{_anchor(entry)}" for entry in [*described["heads"], *described.get("map", ())]}


def _lacks(described):
    """What the page needs and a report does not have; empty where it has all."""
    about = [f"{name!r} in 'about'" for name in _ABOUT if name not in described["about"]]
    return next(iter(about + [f"{name!r} in an entry of 'heads'" for name in _ENTRY for entry in described["heads"] if name not in entry]), "")


def _anchor(entry):
    return f"head-{entry['name']}"


def section(described):
    """What the template shows; None without a report or without heads in it, and one sentence for a report of another version."""
    if not described or not described["heads"]:
        return None
    if lacking := _lacks(described):
        return {"unreadable": f"Its {ARTIFACT} lacks {lacking}: another version of the suite wrote it. Run the suite again to see the heads."}
    entries, about = described["heads"], described["about"]
    scales = {metric: _scale([entry["effect"][metric] for entry in entries]) for metric in _METRICS}
    task_scale = _scale([one["margin"] for entry in entries for one in entry["by_task"].values()])
    examples = {one["id"]: {**one, "symbol": f"picture-{place}", "path": _path(one)} for place, one in enumerate(described["examples"], 1)}
    return {
        "unreadable": "",
        "title": f"The {len(entries)} heads of highest attribution" if len(entries) > 1 else "The head of highest attribution",
        "about": about,
        "percent": f"{100 * about['interval']:.0f} %",
        "examples": list(examples.values()),
        "notes": described["notes"],
        "scales": scales,
        "heads": [_card(entry, about, scales, task_scale, examples, [one["name"] for one in entries]) for entry in entries],
        "map": _map(described),
        "parts": [name for name in _PARTS if any(part["on"] == name for entry in entries for part in entry["attends"])],
    }


def _map(described):
    """Every head, layer by layer: how strong its attribution is, its category, and where its evidence is; None for a report without a map."""
    entries = described.get("map") or ()
    if not entries:
        return None
    carded = {entry["name"] for entry in described["heads"]}
    peak = max((one["attribution"] for one in entries if one["attribution"] is not None), default=0.0)
    layers = {}
    for one in entries:
        known = one["attribution"] is not None
        share = max(one["attribution"], 0.0) / peak if known and peak > 0 else 0.0
        told = f"attribution {number(one['attribution'])}" if known else "does not see the image"
        layers.setdefault(one["layer"], []).append(
            {
                **one,
                "id": _anchor(one),
                "carded": one["name"] in carded,
                "strength": round(100 * share),
                "letter": _LETTERS.get(one["category"], ""),
                "label": f"Head {one['name']}: {told}; {one['category']}" + ("; described below" if one["name"] in carded else ""),
                "paths": [(name, interval_numbers({"estimate": path["drop"], **path}) if path["drop"] is not None else None) for name, path in one["drops"].items()],
            }
        )
    used = {one["category"] for one in entries}
    return {
        "layers": layers,
        "paths": list(entries[0]["drops"]),
        "letters": [(letter, name) for name, letter in _LETTERS.items() if name in used],
        "peak": peak,
        "strongest": max(entries, key=lambda one: -1e9 if one["attribution"] is None else one["attribution"])["name"],
        "rest": [cell for row in layers.values() for cell in row if not cell["carded"]],
    }


def _card(entry, about, scales, task_scale, examples, names):
    shown = entry["features"]
    effects = [
        {"name": label, "metric": metric, **_effect(entry["effect"][metric], scales[metric]), "scale": scales[metric]}
        for metric, label in _METRICS.items()
    ]
    tasks = [
        {"task": task, "accuracy": _effect(one["accuracy"], scales["accuracy"])["numbers"], **_effect(one["margin"], task_scale)}
        for task, one in entry["by_task"].items()
    ]
    return {
        **entry,
        "id": _anchor(entry),
        "effects": effects,
        "tasks": tasks,
        "task_scale": task_scale,
        "place": [
            {"row": layer, "column": head, "this": f"{layer}.{head}" == entry["name"], "other": f"{layer}.{head}" in names}
            for layer in range(about["layers"])
            for head in range(about["heads_per_layer"])
            if about["layers"] * about["heads_per_layer"] < MANY or f"{layer}.{head}" in names
        ],
        "pictures": [_shown(examples[name], heat, entry["name"]) for name, heat in entry["heat"].items() if name in examples],
        "attends": [
            {**part, "class": f"part-{_PARTS.index(part['on'])}"} for part in sorted(entry["attends"], key=lambda p: _PARTS.index(p["on"]))
        ],
        "looks": [(name, {**one, "numbers": _numbers(one)}) for name, one in shown.items() if one["value"] is not None],
        "image": shown["answer_to_image"]["value"],
        "object": shown.get("object_share", {}).get("value"),
    }


def _scale(measured):
    """One axis for all heads, so that their strips can be compared; no side of it supports anything."""
    values = [one[name] for one in measured for name in ("value", "lower", "upper") if one[name] is not None] + [0.0]
    pad = (max(values) - min(values) or 1.0) * 0.08
    return Scale(min(values) - pad, max(values) + pad, None)


def _effect(measured, scale):
    if measured["value"] is None:
        return {"numbers": None, "drawn": None, "side": "none"}
    record = {"estimate": measured["value"], "lower": measured["lower"], "upper": measured["upper"]}
    known = measured["lower"] is not None and measured["upper"] is not None
    side = "none" if not known or measured["lower"] <= 0 <= measured["upper"] else "lost" if measured["value"] > 0 else "gained"
    return {"numbers": _numbers(measured), "drawn": scale.place(record), "side": side}


def _numbers(measured):
    if measured["lower"] is None or measured["upper"] is None:
        return number(measured["value"]), "–", "–"
    return interval_numbers({"estimate": measured["value"], "lower": measured["lower"], "upper": measured["upper"]})


def _shown(example, heat, name):
    """One picture under one head's attention."""
    where = f"{number(heat['image'])} of its attention on the image"
    if heat["object"] is not None:
        where += f", {number(heat['object'])} of that on the asked object"
    return {
        "example": example,
        "heat": _heat(heat["values"]),
        "object": heat["object"],
        "alt": f"Head {name} on “{example['prompt']}” (answer: {example['answer']}): {where}.",
    }


def _heat(values):
    """Attention as a transparent picture, strongest where the head's own largest value on it is."""
    from PIL import Image

    values = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    peak = np.nanmax(values) if np.isfinite(values).any() else 0.0
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.round(255 * 0.8 * np.nan_to_num(values).clip(min=0.0) / (peak or 1.0))
    return png(Image.fromarray(pixels, "RGBA"))


def _path(example):
    """The asked object's outline as an SVG path on the picture, empty without one."""
    from reports.drawings.claims import outline_edges

    if not example["mask"] or not any(map(any, example["mask"])):
        return ""
    edges = outline_edges(np.asarray(example["mask"]) > 0, example["width"], example["height"])
    return "".join(f"M{x0:g} {y0:g}{f'H{x1:g}' if y0 == y1 else f'V{y1:g}'}" for (x0, y0), (x1, y1) in edges)
