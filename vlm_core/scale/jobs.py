"""What a configuration of many runs expands to: command lines, each with an id by content.

``Job``             one command line and where its outputs go
``jobs_of(config)`` all of them, in an order that depends on the configuration alone
``fingerprint``     what tells one subject from another, without reading all of its weights

Jobs share nothing: each may run alone, anywhere, at any time, and again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from vlm_core.scale.config import Benchmarks, Claims, ScaleConfig, SubjectAt

__all__ = ["OUT", "Job", "fingerprint", "jobs_of"]

OUT = "{out}"
"""Stands in a command for the folder that its outputs go to, and which other files of the job lie in."""

_WHOLE = 2**22
_SAMPLE = 2**16


@dataclass(frozen=True)
class Job:
    """One command line.

    Parameters
    ----------
    number : int
        Its place among all jobs of the configuration; the index in a SLURM array.
    kind : {"claims", "benchmarks"}
    subject, selection : str
        Their names.
    command : tuple of str
        Without the interpreter; `OUT` stands for the folder of its outputs.
    settings : str or None
        A file ``settings.yaml`` that the command reads beside its outputs.
    folder : Path
        Its own, named by its id.
    id : str
        Of what it does: command, settings and the subject's fingerprint. Where and how often it runs is no part of it.
    """

    number: int
    kind: str
    subject: str
    selection: str
    command: tuple[str, ...]
    settings: str | None
    folder: Path
    id: str

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.subject} {self.selection}"

    def command_line(self, out: Path) -> list[str]:
        """What is run, with its outputs in ``out``."""
        return [sys.executable, *(part.replace(OUT, str(out)) for part in self.command)]


def jobs_of(config: ScaleConfig) -> list[Job]:
    """Every job: subject by subject, its claims, then its benchmarks."""
    root = Path(config.out).absolute() / "jobs"
    found = []
    for subject in config.subjects:
        for kind, selection, command, settings in _commands(config, subject):
            content = [kind, selection, command, settings, fingerprint(subject.path, subject.revision)]
            own = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            folder = root / f"{subject.name}-{selection}-{own}"
            found.append(Job(len(found), kind, subject.name, selection, tuple(command), settings, folder, own))
    return found


def _commands(config: ScaleConfig, subject: SubjectAt) -> Iterator[tuple[str, str, list[str], str | None]]:
    for name, claims in config.claims.items():
        yield "claims", name, _pytest(subject, claims), None
    for name, benchmarks in config.benchmarks.items():
        yield "benchmarks", name, ["-m", "vlm_core.evaluate", "--config", f"{OUT}/settings.yaml"], _evaluation(subject, benchmarks)


def _pytest(subject: SubjectAt, claims: Claims) -> list[str]:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *claims.tests, f"--claims-subject={subject.path}", f"--claims-out={OUT}"]
    command += [f"--claims-{name}={value}" for name, value in _given(subject).items()]
    command += [f"--claims-profile={claims.profile}", f"--claims-seed={claims.seed}"]
    command += [] if claims.alpha is None else [f"--claims-alpha={claims.alpha}"]
    command += [] if claims.keyword is None else ["-k", claims.keyword]
    command += [] if claims.processes == 1 else ["-n", str(claims.processes)]
    return [*command, *claims.arguments]


def _given(subject: SubjectAt) -> dict[str, str]:
    """How a subject is loaded, as far as that is not left to whoever loads it."""
    values = {"revision": subject.revision, "device": subject.device, "dtype": subject.dtype, "quantization": subject.quantization}
    return {name: value for name, value in values.items() if value not in (None, "auto")}


def _evaluation(subject: SubjectAt, benchmarks: Benchmarks) -> str:
    own = {"path": subject.path, "name": subject.name, **_given(subject)}
    content = {**benchmarks.settings, "out": OUT, "subjects": [own], "sets": dict(benchmarks.sets)}
    return yaml.safe_dump(content, sort_keys=True)


@lru_cache(maxsize=256)
def fingerprint(path: str, revision: str | None = None) -> str:
    """Of a directory: names, sizes and contents of its files, of large ones 64 evenly spread blocks of 64 KiB; else the id and revision."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for number in range(64):
                stream.seek((size - _SAMPLE) * number // 63)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
