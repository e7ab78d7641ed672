"""Runs of three subjects of two families, small and made up: one finds what the first finds, one does not.

``write(folder)``   ``{name: run directory}``
"""

from __future__ import annotations

from . import sample_run

LAYERS = {"first": 6, "second": 4, "third": 8}
FAMILY = {"first": "llava", "second": "llava", "third": "qwen2_vl"}


def entries(name):
    """Records of one subject."""
    depth = LAYERS[name]
    holds = name != "third"
    heads = {"heads": [[1, 2], [1, 0], [depth - 1, 3]]}
    found = []
    for task in ("color", "count"):
        estimate, verdict = (0.4, "supported") if holds or task == "count" else (0.02, "refuted")
        found.append(sample_run.make("H1.necessity", verdict, estimate, 0.03, params={"task": task}, details=heads, family_size=3))
    found.append(sample_run.make("H1.redundancy", "inconclusive" if name == "second" else "supported", 0.85, 0.04, family_size=3))
    found.append(sample_run.make("H2.noninferior", "refuted", 0.2, 0.02, family_size=1))
    return found


def horizon(name, layer):
    """A record of the horizon; its declaration is that of the sample's trend."""
    details = {"layer": 3, "first layer on discovery items": layer, "depth": LAYERS[name]}
    return sample_run.make("H2.trend", "supported", 0.3, 0.1, params={"task": "color"}, details=details, family_size=1, tier="exploratory")


def write(folder):
    """Write the runs; returns ``{name: directory}``."""
    found = {}
    for name, depth in LAYERS.items():
        subject = {"name": name, "source": f"checkpoints/{name}", "family": FAMILY[name], "weights": name * 8}
        subject |= {"n_layers": depth, "n_heads": 4, "n_parameters": 1000 * depth}
        late = {**horizon(name, depth // 2), "claim_id": "H2.horizon"}
        facts = dict.fromkeys(("alpha", "revision", "expectations"), None) | {"declarations": {}, "counts": {}, "partial_families": False}
        facts |= {"problems": [], "complete": True, "files": ["attribution-by-layer.csv"], "data": {"confirmation": "2595eeeae9746bec"}}
        facts["machine"] = {"platform": "Linux-6", "processor": "x86_64", "instructions": "avx2", "cores": 2, "accelerator": None}
        run = sample_run.write(folder / name, [*entries(name), late], heads=False, name=name, subject=subject, **facts)
        shares = [0.08] * depth
        shares[4 if name == "third" else 1] += 1 - 0.08 * depth
        rows = [f"{task},{layer},{share}" for task in ("color", "count") for layer, share in enumerate(shares)]
        (run / "attribution-by-layer.csv").write_text("\n".join(["task,layer,share", *rows, ""]))
        found[name] = run
    return found
