"""The token recipe: what a test leaves of it, and what the page shows.

``leave``      ``token-recipe.json``, which ``vlm_core.Recipe.load`` reads
``load``       read it back from a run; None where a run has none
``section``    the model of the page's section
"""

from __future__ import annotations

import json

ARTIFACT = "token-recipe.json"
_NEEDED = ("policy", "keep", "n_layers", "expected", "saving", "tasks", "not_for", "margin", "row")
_SAVED = {
    "prefill_flops": "operations of the prefill",
    "prefill_latency": "time of the prefill, in batches",
    "prefill_latency_alone": "time of the prefill, one prompt at a time",
    "decode_latency": "time of a generated token, in batches",
    "cache": "memory of keys and values",
    "peak_memory": "peak memory of the prefill, in batches",
}


def leave(evidence, recipe):
    """Leave the recipe (`vlm_core.reduction.recipe.Recipe`) with a test's evidence."""
    evidence.artifact_json(ARTIFACT, recipe.to_dict())


def load(folder):
    """The recipe of a run, or None."""
    path = folder / ARTIFACT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def section(recipe):
    """What the page says of a recipe, or None; ``lacks`` names what another version's recipe does not have."""
    if recipe is None:
        return None
    lacks = next((name for name in _NEEDED if name not in recipe), "")
    if lacks:
        return {"lacks": lacks}
    steps = recipe["row"] if isinstance(recipe["row"], list) else [recipe["row"]]
    tasks = [{"task": task, **found, "fits": task not in recipe["not_for"]} for task, found in recipe["tasks"].items()]
    return {
        "lacks": "",
        "policy": recipe["policy"],
        "steps": [{"layer": step["layer"], "keep": step["keep"]} for step in steps],
        "n_layers": recipe["n_layers"],
        "expected": recipe["expected"],
        "margin": recipe["margin"],
        "saving": [{"what": said, "share": recipe["saving"][name]} for name, said in _SAVED.items() if name in recipe["saving"]],
        "tasks": tasks,
        "not_for": list(recipe["not_for"]),
    }
