"""Runs and nights of claims with chosen effects, made without a test session."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from reports import effects, record
from reports.claims import ClaimInstance
from reports.nights import history
from vlm_core import stats

from . import sample_run

DROP = stats.Claim("H1.one", "It costs ten points.", "accuracy lost per item", stats.Superiority(0.1), "here")
LOSS = stats.Claim("H2.two", "It costs less than five.", "accuracy lost per item", stats.NonInferiority(0.05), "here")
RATIO = stats.Claim("H1.ratio", "A ratio of <sums> is above a tenth.", "ratio", stats.Superiority(0.1), "here")
IDENTITY = {
    "name": "run",
    "started": "2026-01-01T00:00:00+00:00",
    "commit": "abc",
    "versions": {"torch": "2.12"},
    "subject": {"name": "vlm", "source": "vlm", "weights": "w" * 64, "dtype": "float32"},
    "data": {"confirmation": "c0ffee", "baseline": [{"task": "color", "accuracy": 0.9, "blind": 0.3, "chance": 0.25}]},
    "profile": "default",
    "seed": 0,
    "machine": {"platform": "Linux-6.1", "processor": "x86_64", "instructions": "avx2", "accelerator": None},
}


@functools.cache
def _decision(claim):
    return stats.decide(claim, [1.0, 0.0] * 20, clusters=range(40))


def entry(folder, claim, effect, *, scenes="scene", bounds=(-1.0, 1.0), **changes):
    """The record of a decision (by its normal interval, which is quick), its arrays in the folder; ``bounds``: what one effect cannot leave."""
    effect, clusters = np.asarray(effect, dtype=float), [f"{scenes}-{item}" for item in range(len(effect))]
    mean, half = float(effect.mean()), 1.65 * float(effect.std(ddof=1)) / len(effect) ** 0.5
    sign = 1 if claim.test.kind == "superiority" else -1
    above, below = (sign * (mean - claim.test.limit) > half, sign * (mean - claim.test.limit) < -half)
    verdict = stats.Verdict.SUPPORTED if above else stats.Verdict.REFUTED if below else stats.Verdict.INCONCLUSIVE
    decision = dataclasses.replace(_decision(claim), verdict=verdict, estimate=mean, lower=mean - half, upper=mean + half)
    arrays = {}
    stored = effects.store(effects.pack(effect, clusters, bounds=bounds), arrays)
    (folder / record.ARRAYS).mkdir(parents=True, exist_ok=True)
    for digest, content in arrays.items():
        (folder / record.ARRAYS / f"{digest}.npy").write_bytes(content)
    instance = ClaimInstance(claim, claim, {}, "test", 0)
    built = record.build(instance, decision, details={}, figures=[], reproduce="", duration_s=0.0, effects=stored)
    return record.validate({**built, **changes})


def write(folder, effects_of, *, scenes="scene", **identity):
    """A run directory of the claims' effects; returns it."""
    records = [entry(folder, claim, effect, scenes=scenes) for claim, effect in effects_of.items()]
    facts = {**sample_run.identity(), **IDENTITY, "name": folder.name, **identity}
    (folder / "run.json").write_text(record.dumps(facts), encoding="utf-8")
    (folder / "evidence.json").write_text(record.dumps(records), encoding="utf-8")
    return folder


def nights(folder, count, *, clusters=40):
    """A history of nights of three claims: one that holds, one that holds until the tenth night, one without a mean over items."""
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        shard, seed = history.reserve(folder)
        run = folder.parent / f"run-{number}"
        drawn = rng.random((2, clusters))
        records = [
            entry(run, DROP, (drawn[0] < 0.35).astype(float), scenes=f"night{number}"),
            entry(run, LOSS, (drawn[1] < (0.01 if number < 10 else 0.2)).astype(float), scenes=f"night{number}"),
        ]
        records.append({**entry(run, RATIO, drawn[0]), "effects": None})
        identity = {**IDENTITY, "name": run.name, "seed": seed, "started": f"2026-01-{number:02d}T02:17:00+00:00"}
        identity["versions"] = {"torch": "2.12" if number < 8 else "2.13"}
        history.Night(folder, shard).write(identity, records, run)
    return folder
