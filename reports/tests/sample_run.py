"""A synthetic run with every verdict and every figure kind, for tests and for looking at the page.

``write(folder)`` leaves ``run.json`` and ``evidence.json`` as a session would.
"""

from __future__ import annotations

import base64
import hashlib
import io

import numpy as np
import pandas as pd

from reports import record

TASKS = ("color", "shape", "count", "relation", "binding", "position", "needle")

_CLAIMS = {
    "H1.necessity": (
        "Removing the image from the top 10 % of heads costs at least 10 points of accuracy.",
        "superiority",
        0.10,
        "Kim et al. 2025, arXiv:2509.17588",
    ),
    "H1.specificity": (
        "It costs at least 5 points more than removing it from layer-matched random heads of the same number.",
        "superiority",
        0.05,
        "Kim et al. 2025, arXiv:2509.17588",
    ),
    "H1.redundancy": (
        "At least 80 % of single-head ablations change the answer logit by less than 5 %.",
        "superiority",
        0.80,
        "Michel et al. 2019, arXiv:1905.10650",
    ),
    "H1.object_tokens": (
        "Mean-ablating the object's tokens costs at least 40 points more than as many random tokens.",
        "superiority",
        0.40,
        "Neo et al. 2024, arXiv:2410.07149",
    ),
    "H1.attention_is_not_attribution": (
        "Image attention does not predict attribution (absolute Spearman correlation below 0.3).",
        "equivalence",
        0.3,
        "Jain & Wallace 2019, arXiv:1902.10186",
    ),
    "H2.noninferior": (
        "Dropping half of the visual tokens from mid-depth on costs less than 5 points.",
        "non-inferiority",
        0.05,
        "Chen et al. 2024, arXiv:2403.06764",
    ),
    "H2.trend": (
        "Sensitivity to dropping tokens falls with the layer at which they go.",
        "trend",
        None,
        "Chen et al. 2024, arXiv:2403.06764",
    ),
    "H3.sft": (
        "Training on the teacher's answers lifts the student at least 5 points over its own baseline.",
        "superiority",
        0.05,
        "Shu et al. 2024, arXiv:2408.15881",
    ),
    "H3.uses_image": ("The gain vanishes when the image is another scene's.", "equivalence", 0.03, "Goyal et al. 2017, arXiv:1612.00837"),
}


def make(claim_id, verdict, estimate, half, *, params=None, controls=(), figures=(), reason=None, **extra):
    """One schema-valid record."""
    sentence, kind, threshold, source = _CLAIMS[claim_id]
    params = params or {}
    lower, upper = (None, None) if estimate is None else (round(estimate - half, 6), round(estimate + half, 6))
    exploratory = claim_id == "H1.attention_is_not_attribution"
    entry = {
        "schema_version": 1,
        "claim_id": claim_id,
        "params": params,
        "verdict": verdict,
        "reason": reason or _reason(verdict, lower, upper, kind, threshold),
        "hypothesis": claim_id.split(".")[0],
        "tier": "exploratory" if exploratory else "confirmatory",
        "sentence": sentence,
        "declaration": {
            "id": claim_id,
            "effect": "accuracy(full) - accuracy(ablated), paired per item",
            "source": source,
            "unit": "scene",
            "alpha": 0.05,
            "hash": hashlib.sha256(claim_id.encode()).hexdigest()[:16],
        },
        "test": {"kind": kind, "description": f"{kind}" + (f" {threshold}" if threshold is not None else "")},
        "estimate": estimate,
        "lower": lower,
        "upper": upper,
        "threshold": threshold,
        "alpha": 0.05,
        "family_size": 17,
        "confidence": 0.994,
        "given_p_value": None,
        "method": "BCa cluster bootstrap, 9999 resamples",
        "p_value": None if verdict == "invalid" else 0.00004 if verdict == "supported" else 0.21,
        "p_holm": None if verdict == "invalid" else 0.0008 if verdict == "supported" else 1.0,
        "n_items": 420,
        "n_clusters": 140,
        "n_seeds": 3 if claim_id.startswith("H3") else None,
        "mde": 0.0412,
        "n_needed": 96.0,
        "underpowered": verdict == "inconclusive",
        "baseline": {"accuracy": 0.91, "blind": 0.31, "chance": 0.25},
        "controls": list(controls),
        "details": {},
        "figures": list(figures),
        "effects": None,
        "reproduced": None,
        "replicated": None,
        "reproduce": f"python -m pytest -k 'test_{claim_id.split('.')[1]}[{'-'.join(map(str, params.values()))}]'",
        "nodeid": f"hypotheses/test_{claim_id.split('.')[0].lower()}.py::test_{claim_id.split('.')[1]}",
        "duration_s": 12.5,
        "outcome": "decided",
    }
    return record.validate({**entry, **extra})


def _reason(verdict, lower, upper, kind, threshold):
    if lower is None:
        return "the control 'other scene' failed: 0.34, expected below 0.30"
    asked = "0" if threshold is None else f"the declared {threshold:.2f}"
    place = {"supported": "lies on the side of", "refuted": "lies beyond", "inconclusive": "holds"}.get(verdict, "")
    return f"the interval {lower:.2f} to {upper:.2f} {place} {asked}"


def records():
    rng = np.random.default_rng(0)
    floor = {
        "name": "layer-matched random heads",
        "kind": "negative",
        "passed": True,
        "value": 0.021,
        "expected": "below 0.05",
        "detail": "200 draws",
    }
    positive = {"name": "all heads ablated", "kind": "ceiling", "passed": True, "value": 0.58, "expected": "at least 0.40", "detail": ""}
    failed = {"name": "other scene's image", "kind": "negative", "passed": False, "value": 0.34, "expected": "below 0.30", "detail": ""}
    entries = []
    drops = (0.43, 0.38, 0.06, 0.31, 0.22, 0.115, 0.51)
    verdicts = ("supported", "supported", "refuted", "supported", "supported", "inconclusive", "supported")
    for task, drop, verdict in zip(TASKS, drops, verdicts, strict=True):
        half = 0.025 if verdict == "refuted" else 0.06
        figures = [overlay(rng, task)] if task in ("color", "relation") else []
        if task == "color":
            figures = [head_map(rng), bars(), *figures]
        entries.append(make("H1.necessity", verdict, drop, half, params={"task": task}, controls=[floor, positive], figures=figures))
    draws = [float(value) for value in rng.normal(0.02, 0.03, 200).round(4)]
    entries += [
        make(
            "H1.specificity",
            "supported",
            0.29,
            0.07,
            controls=[positive],
            figures=[
                figure(
                    "null_histogram",
                    {"draws": draws, "observed": 0.31, "p_value": 1 / 201, "x_label": "drop of accuracy, random heads"},
                    "Targeted heads against 200 random sets",
                )
            ],
        ),
        make("H1.redundancy", "inconclusive", 0.82, 0.05, figures=[usage(np.random.default_rng(1))]),
        make("H1.object_tokens", "invalid", None, 0, controls=[failed], figures=[sheet(rng)]),
        make("H1.attention_is_not_attribution", "refuted", 0.48, 0.11),
        make(
            "H2.noninferior",
            "supported",
            0.008,
            0.021,
            controls=[floor],
            figures=[curves(rng), heatmap(rng)],
            details={"literature": {"published": "loss of 0.6 points at 50 % kept", "where": "Table 1"}},
        ),
        make("H2.trend", "supported", 0.31, 0.12, figures=[trend(rng), front(rng), kept(rng), nights(rng)]),
        make("H3.sft", "supported", 0.117, 0.041, figures=of_students(rng)),
        make("H3.uses_image", "inconclusive", 0.012, 0.035, outcome="expected"),
    ]
    return entries


def figure(kind, data, title, caption="Intervals are 95 % cluster bootstrap over scenes."):
    return {"kind": kind, "title": title, "caption": caption, "alt": f"{title}: {kind.replace('_', ' ')}", "data": record.to_builtins(data)}


def head_map(rng):
    values = rng.gamma(0.6, 0.05, (6, 8)).round(4)
    values[3, 2], values[4, 5], values[4, 1] = 0.42, 0.36, 0.29
    marks = [{"layer": 3, "head": 2, "label": "O"}, {"layer": 4, "head": 5, "label": "R"}, {"layer": 4, "head": 1}]
    data = {"values": values, "marks": marks, "value_label": "attribution (share of logit)"}
    return figure(
        "head_map",
        data,
        "Few heads carry the image",
        "Attribution per head; outlined heads were ablated. O: object heads, R: relation heads.",
    )


def bars():
    rows = [
        ("intact", 0.91, "baseline"),
        ("targeted 10 %", 0.48, "targeted"),
        ("random 10 %, same layers", 0.89, "random"),
        ("blind", 0.31, "floor"),
    ]
    data = {
        "bars": [{"label": n, "value": v, "lower": v - 0.03, "upper": v + 0.03, "role": r} for n, v, r in rows],
        "chance": 0.25,
    }
    return figure("accuracy_bars", data, "Accuracy with heads ablated")


def overlay(rng, task):
    from matplotlib.figure import Figure

    pixels = np.full((72, 72, 3), 0.93)
    pixels[12:36, 36:60] = (0.85, 0.2, 0.15)
    pixels[44:62, 10:28] = (0.15, 0.4, 0.8)
    out = io.BytesIO()
    canvas = Figure(figsize=(0.72, 0.72), dpi=100)
    canvas.figimage(pixels)
    canvas.savefig(out, format="png")
    grid = rng.random((6, 6)) * 0.05
    grid[1:3, 3:5] = 0.4
    mask = np.zeros((6, 6), int)
    mask[1:3, 3:5] = 1
    data = {
        "image": base64.b64encode(out.getvalue()).decode(),
        "values": grid,
        "mask": mask,
        "prompt": "What colour is the square at the top right of the picture?",
        "answer": "red",
    }
    return figure("attention_overlay", data, f"Where head 3.2 looks ({task})", "White outline: the object asked for.")


def sheet(rng):
    from matplotlib.figure import Figure

    from reports.drawings.claims import overlay_tile

    mask = np.zeros((40, 40), dtype=bool)
    mask[8:20, 20:34] = True
    picture = np.full((40, 40, 3), 236, dtype=np.uint8)
    picture[mask] = (217, 51, 38)
    tiles = [overlay_tile(picture, np.clip(rng.random((40, 40)) * 0.2 + 0.6 * mask, 0, 1), mask) for _ in range(10)]
    pixels = np.vstack([np.hstack(tiles[:5]), np.hstack(tiles[5:])])
    canvas, out = Figure(figsize=(2.0, 0.8), dpi=100), io.BytesIO()
    canvas.figimage(pixels)
    canvas.savefig(out, format="png")
    return figure("overlay_sheet", {"image": base64.b64encode(out.getvalue()).decode()}, "Ten images and one head's attention over each")


def curves(rng):
    series = []
    for name, role, loss in (
        ("attention", "targeted", 0.08),
        ("similarity merge", "targeted", 0.1),
        ("random", "random", 0.22),
        ("uniform stride", "random", 0.2),
    ):
        points = []
        for keep in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
            y = 0.91 - loss * (1 - keep) ** 2 - 0.01 * rng.random() * (keep < 1)
            points.append({"x": keep, "y": round(y, 4), "lower": round(y - 0.02, 4), "upper": round(y + 0.02, 4)})
        series.append({"name": name, "role": role, "points": points})
    return figure("keep_curves", {"series": series, "reference": 0.91}, "Accuracy against tokens kept, from layer 3 on")


def heatmap(rng):
    keeps = [0.0, 0.1, 0.25, 0.5, 0.75]
    values = [[round(max(0, 0.5 - 0.11 * layer) * (1 - keep) + 0.004 * rng.random(), 4) for keep in keeps] for layer in range(6)]
    data = {"rows": list(range(6)), "columns": keeps, "values": values, "horizon": 4}
    return figure("layer_heatmap", data, "Loss by layer and share kept")


def trend(rng):
    points = [
        {"x": layer, "y": round(0.45 + 0.09 * layer, 3), "lower": round(0.41 + 0.09 * layer, 3), "upper": round(0.49 + 0.09 * layer, 3)}
        for layer in range(6)
    ]
    data = {"points": points, "x_label": "layer from which all visual tokens are gone", "reference": 0.91, "reference_label": "intact"}
    return figure("trend_line", data, "Accuracy by the layer at which tokens go")


def nights(rng):
    """Estimates of twelve nights, the evidence they add up to, and an upgrade in between."""
    verdicts = ("supported", "supported", "inconclusive", "refuted", "invalid", "supported")
    entries = [
        {"night": night, "date": f"2026-01-{night:02d}", "verdict": verdicts[night % 6], "estimate": 0.3 + 0.01 * night, "lower": 0.2, "upper": 0.5,
         "support": 0.4 * night, "refute": -0.1 * night}
        for night in range(1, 13)
    ]  # fmt: skip
    data = {"nights": entries, "limits": [0.1], "needed": 2.3, "versions": [{"night": 7, "text": "torch 2.12 → 2.13"}]}
    return figure("nights", data, "Night by night")


def front(rng):
    """Accuracy against time saved, one point a policy."""
    points = [
        {"x": round(0.08 * place, 3), "y": round(0.99 - 0.01 * place**1.5, 3), "lower": round(0.97 - 0.012 * place**1.5, 3), "upper": 0.995,
         "name": f"{name}, 0.25 from layer 3", "front": place != 2, "chosen": place == 3}
        for place, name in enumerate(("all tokens", "random", "stride", "fastv", "pooling"))
    ]
    data = {"points": points, "x_label": "share of prefill time saved", "y_label": "accuracy"}
    return figure("pareto_front", data, "What is saved against what is lost")


def kept(rng):
    """Two images, three shares of their 6 x 6 tokens."""
    order = rng.permutation(36)
    examples = []
    for task, wrong_from in (("color", 3), ("relation", 2)):
        data = overlay(rng, task)["data"]
        steps = []
        for place, count in enumerate((36, 18, 4)):
            grid = np.where(np.isin(np.arange(36), order[:count]), "1", "0").reshape(6, 6)
            steps.append({"kept": count, "of": 36, "rows": ["".join(row) for row in grid], "output": "red" if place < wrong_from else "blue", "correct": place < wrong_from})
        about = {"item": f"item-{task}", "task": task, "width": 72, "height": 72, "box": [0.0, 0.0, 1.0, 1.0], "steps": steps}
        examples.append({**about, **{key: data[key] for key in ("image", "prompt", "answer")}})
    return figure("kept_tokens", {"shares": [1.0, 0.5, 0.1], "examples": examples}, "Which tokens attention keeps")


def usage(rng):
    points = [
        {"x": round(3 * place + rng.normal(), 3), "y": round(2 * (place % 2) + rng.normal(), 3), "group": task, "tip": f"{task} {item}"}
        for place, task in enumerate(("color", "count", "relation"))
        for item in range(12)
    ]
    return figure("scatter", {"points": points, "x_label": "first axis", "y_label": "second axis"}, "Items by the heads they use")


def of_students(rng):
    """What the exhibits of distillation leave, on answers drawn at random: six arms with all and with fewer tokens, their costs, contrasts, gained and lost items."""
    from PIL import Image

    from reports import exhibits
    from reports.evidence import Evidence

    evidence = Evidence(None)
    arms = (
        ("before", "baseline", None, 0.42, 0),
        ("minimal", "minimal SFT", "baseline", 0.5, 0.1),
        ("sft", "SFT on the teacher's answers", "baseline", 0.61, 1),
        ("more", "SFT + more SFT", "SFT on the teacher's answers", 0.625, 2),
        ("preference", "SFT + preference", "SFT on the teacher's answers", 0.63, 3.1),
        ("on_policy", "SFT + on-policy distillation", "SFT on the teacher's answers", 0.65, 2.6),
    )
    stages, answers, costs = {}, {}, []
    for reduced in (False, True):
        for arm, label, start, accuracy, spent in arms:
            name, level = arm + "_reduced" * reduced, accuracy - 0.02 * reduced
            stages[name] = exhibits.students.Stage(label, reduced, start)
            answers[name] = [students_answers(rng, level) for _ in range(3 if start else 1)]
            mean = float(np.mean([run["correct"].mean() for run in answers[name]]))
            costs.append(
                {"arm": name, "label": label, "reduced": reduced, "steps": 80 * spent, "images": 1280 * spent, "tokens": 900_000 * spent,
                 "supervised_tokens": 18_000 * spent, "training_flops": 4e12 * spent * (0.7 if reduced else 1), "seconds": 9.0 * spent,
                 "answering_flops": 6e10 * bool(spent), "sampling_flops": 2e10 * (arm == "preference"), "ranking_flops": 5e10 * (arm == "preference"),
                 "accuracy": mean,
                 "lower": mean - 0.03, "upper": mean + 0.03, "inference_flops": 1.1e8 * (0.62 if reduced else 1)}
            )  # fmt: skip
    exhibits.students.students(evidence, answers, stages)
    pairs = (("sft", "before", 0.19), ("preference", "more", 0.005), ("on_policy", "more", 0.02), ("lora on the top heads' layers", "lora on random layers", -0.012))
    contrasts = [
        {"arm": arm, "against": against, "task": task, "difference": found, "lower": found - 0.017, "upper": found + 0.016, "confidence": 0.95, "seeds": 3,
         "items": 420}
        for arm, against, found in pairs for task in ("all", "color")
    ]  # fmt: skip
    exhibits.students.ablations(evidence, pd.DataFrame(contrasts))
    exhibits.students.costs(evidence, pd.DataFrame(costs))
    exhibits.students.student_against_teacher(evidence, pd.DataFrame(beside_the_teacher()))
    colours = {item: tuple(int(one) for one in rng.integers(40, 220, 3)) for item in answers["before"][0]["item"]}
    exhibits.students.errors(evidence, answers["before"][0], answers["sft"], lambda item: Image.new("RGB", (72, 72), colours[item]))
    return evidence.payload()["figures"]


def students_answers(rng, accuracy, per_task=60):
    """A table as `vlm_core.evaluate` gives it."""
    n = per_task * len(TASKS)
    correct = rng.random(n) < accuracy
    return pd.DataFrame(
        {"item": [f"item-{place}" for place in range(n)], "cluster": [f"scene-{place // 3}" for place in range(n)], "task": np.repeat(TASKS, per_task),
         "prompt": "What colour is the square at the top right of the picture?", "image": "", "answer": "red", "correct": correct,
         "output": np.where(correct, "red", rng.choice(["blue", "green", "yellow"], n)), "score": 0.0}
    )  # fmt: skip


def beside_the_teacher():
    """Rows as `vlm_core.distill.costs.model_costs` gives them."""
    quantities = (
        ("parameters", "", 1_834_112, 1_090_304), ("weights", "bytes", 7_336_448, 4_361_216), ("peak memory", "bytes", 8_912_896, 3_145_728),
        ("prefill operations", "FLOP", 2.1e8, 1.1e8), ("first token", "s", 0.0213, 0.0112), ("further token", "s", 0.00218, 0.00124),
    )  # fmt: skip
    return [
        {"model": model, "quantity": quantity, "unit": unit, "value": value, "of_reference": value / whole,
         "lower": value / whole - 0.02 if unit == "s" else None, "upper": value / whole + 0.03 if unit == "s" else None}
        for quantity, unit, whole, part in quantities for model, value in (("teacher", whole), ("student", part))
    ]  # fmt: skip


def identity(**changes):
    accuracy = (0.97, 0.95, 0.62, 0.88, 0.84, 0.41, 0.9)
    facts = {
        "schema_version": 1,
        "name": "20260101T120000Z-vlm-a1b2c3",
        "subject": {
            "name": "vlm",
            "source": "fixtures/embedded/vlm",
            "family": "LLaVA",
            "model_type": "llava",
            "n_parameters": 1_834_112,
            "n_layers": 6,
            "n_heads": 8,
            "dtype": "float32",
            "device": "cpu",
            "weights": "sha256:" + "9f" * 16,
        },
        "data": {
            "baseline": [
                {
                    "task": task,
                    "accuracy": a,
                    "lower": a - 0.03,
                    "upper": min(1, a + 0.03),
                    "blind": 0.27 if task != "position" else 0.35,
                    "chance": 0.25,
                    "majority": 0.28,
                    "spoken": a - 0.02,
                    "spoken_lower": a - 0.09,
                    "spoken_upper": min(1, a + 0.04),
                    "spoken_n": 40,
                    "n": 420,
                }
                for task, a in zip(TASKS, accuracy, strict=True)
            ],
            "splits": {"discovery": "sha256:1b2c3d4e5f60", "confirmation": "sha256:a0b1c2d3e4f5"},
        },
        "profile": "default",
        "seed": 0,
        "revision": None,
        "command": "python -m pytest --claims-subject fixtures/embedded/vlm",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.12.8", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
        "machine": {"platform": "Linux-6.1-x86_64", "processor": "x86_64", "cores": 8},
        "started": "2026-01-01T12:00:00+00:00",
        "duration_s": 412.3,
        "peak_memory_mb": 1834.0,
        "processes": 2,
        "expectations": None,
        "partial_families": False,
        "counts": {},
        "complete": True,
        "problems": [],
        "exit_code": 1,
        "files": ["head-ablation.csv", "token-drop-curves.csv"],
    }
    return {**facts, **changes}


def described(names=("3.2", "4.5", "4.1"), pictures=2, shortfall="2 of 3 heads have both kinds of evidence, fewer than 5"):
    """A head report: heads with an effect, without one, and one that gains; with pictures or without."""
    rng = np.random.default_rng(2)
    overlays = [overlay(rng, task)["data"] for task in ("color", "relation")[:pictures]]
    examples = [
        {"id": f"item-{place}", "task": "color", "width": 72, "height": 72} | {key: data[key] for key in ("image", "prompt", "answer", "mask")}
        for place, data in enumerate(overlays)
    ]
    entries = []
    for rank, name in enumerate(names):
        layer, head = map(int, name.split("."))
        margin = [(1.2, 0.9, 1.5), (0.02, -0.03, 0.07), (-0.4, -0.6, -0.2)][rank % 3]
        effect = {"margin": _measured(*margin), "accuracy": _measured(0.03, -0.01, 0.06)}
        features = {"answer_to_image": _measured(0.62, 0.6, 0.64), "entropy": _measured(2.1, 2.0, 2.2), "iou": _measured(None)}
        attends = [{"on": "the image", "share": 0.62}, {"on": "words", "share": 0.38}]
        if pictures:
            features |= {"object_share": _measured(0.4, 0.38, 0.42), "even_share": _measured(0.11, None, None)}
            attends = [{"on": "the rest of the image", "share": 0.37}, {"on": "the asked object", "share": 0.25}, attends[1]]
        entries.append(
            {
                "name": name,
                "layer": layer,
                "head": head,
                "depth": (layer + 1) / 6,
                "category": "cross-modal grounding",
                "confidence": 0.93,
                "attribution": _measured(0.4, 0.3, 0.5),
                "effect": effect,
                "by_task": {task: effect for task in TASKS},
                "features": features,
                "attends": attends,
                "kinds": {"tile": 0.7, "thumbnail": 0.3} if rank == 0 else {"patch": 1.0},
                "heat": {f"item-{place}": {"image": 0.6, "object": 0.31, "values": data["values"]} for place, data in enumerate(overlays)},
                "evidence": {"causal": rank % 3 != 1, "diagnostic": True},
                "sentence": f"Head {name} (cross-modal grounding, in 0.93 of resamples): the margin falls by 1.20 [-0.90, 1.50].",
            }
        )
    about = {
        "layers": 6,
        "heads_per_layer": 8,
        "items": 168,
        "clusters": 44,
        "tasks": list(TASKS),
        "interval": 0.95,
        "attribution_r2": 0.83,
        "attribution_items": 168,
        "choice": f"the {len(names)} heads of the highest attribution over discovery items of all tasks together",
        "example_choice": "the first item of each task that the untouched subject answers right, each of another scene",
        "places": "" if pictures else "its image tokens are learned queries",
        "both": 2,
        "shortfall": shortfall,
    }
    notes = {"answer_to_image": "attention mass of the prompt's last token on image keys"}
    content = {"heads": entries, "examples": examples, "about": about, "notes": notes, "map": every_head(entries)}
    return record.to_builtins(content, "head report")


def every_head(described):
    """The map of a head report: all heads of 6 layers, the described ones the strongest, one layer without sight of the image."""
    rng = np.random.default_rng(3)
    strong = {entry["name"]: 0.4 - 0.1 * rank for rank, entry in enumerate(described)}
    paths = ("cross-modal grounding", "vision summarisation", "instruction following", "routing")
    found = []
    for layer, head in np.ndindex(6, 8):
        name = f"{layer}.{head}"
        category = paths[0] if name in strong else (*paths[1:], "no effect", "no effect")[(layer + head) % 5]
        drops = {path: {"drop": (drop := float(rng.normal(0, 0.01) + 0.2 * (path == category))), "lower": drop - 0.02, "upper": drop + 0.02} for path in paths}
        attribution = None if layer == 5 else strong.get(name, float(rng.normal(0, 0.02)))
        about = {"category": category, "confidence": 0.8, "drops": drops, "evidence": f"Without its path, the margin falls by {100 * drops[paths[0]]['drop']:.1f} %."}
        found.append({"name": name, "layer": layer, "head": head, "attribution": attribution, **about})
    return found


def _measured(value, lower=None, upper=None):
    return {"value": value, "lower": lower, "upper": upper}


def write(folder, entries=None, heads=None, **changes):
    """Write the run's JSON; returns the folder. ``heads``: a head report, none with False."""
    folder.mkdir(parents=True, exist_ok=True)
    if heads is not False:
        (folder / "head-report.json").write_text(record.dumps(described() if heads is None else heads), encoding="utf-8")
    (folder / "run.json").write_text(record.dumps(identity(**changes), indent=2), encoding="utf-8")
    (folder / "evidence.json").write_text(record.dumps(records() if entries is None else entries), encoding="utf-8")
    return folder
