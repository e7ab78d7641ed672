"""Which subjects are put to which claims and benchmarks, and with what resources, as a declaration that fits in a file.

``ScaleConfig``   from TOML, YAML or Python; ``example.toml`` beside this module is one

Paths are taken from the working directory, the root of a checkout; what is no path is a Hub id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_core.settings import checked, declared, read_settings

__all__ = ["Benchmarks", "Claims", "Cluster", "Resources", "ScaleConfig", "SubjectAt"]

_OWN = ("--claims-subject", "--claims-out", "--claims-revision", "--claims-device", "--claims-dtype", "--claims-quantization")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SubjectAt:
    """A checkpoint, and how it is loaded: the settings of ``[[subjects]]`` of ``python -m vlm_core.evaluate``, which checks their values.

    ``name`` is what it is called in folders and on the page; default: the last part of its path.
    """

    path: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        checked(self)
        if self.name is None:
            object.__setattr__(self, "name", Path(self.path.rstrip("/")).name)
        _plain(self.name, "a subject")


@dataclass(frozen=True)
class Claims:
    """A part of the suite, as one job for each subject.

    Parameters
    ----------
    tests : tuple of str
        Files, folders or node ids given to pytest; none: the whole suite.
    keyword : str, optional
        As ``pytest -k``.
    profile, seed, alpha
        As ``--claims-profile``, ``--claims-seed`` and ``--claims-alpha``.
    processes : int
        Of pytest-xdist; 1: none but pytest's own.
    arguments : tuple of str
        Further ones for pytest.
    """

    tests: tuple[str, ...] = ()
    keyword: str | None = None
    profile: Literal["smoke", "default", "nightly"] = "default"
    seed: int = 0
    alpha: float | None = None
    processes: int = 1
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked(self)
        _at_least(self.seed, "seed", 0)
        _at_least(self.processes, "processes", 1)
        for argument in self.arguments:
            taken = [name for name in _OWN if argument.startswith(name)]
            if taken:
                raise ValueError(f"arguments hold {taken[0]}, which each job sets itself: leave it away")


@dataclass(frozen=True)
class Benchmarks:
    """Benchmark sets, as one job for each subject: what `vlm_core.evaluate` is asked.

    Parameters
    ----------
    sets : mapping of name to table
        As ``[sets.NAME]`` of ``python -m vlm_core.evaluate``.
    settings : mapping
        Further settings of that command's file (``mode``, ``max_new_tokens`` ...).
    """

    sets: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked(self)
        if not self.sets:
            raise ValueError("sets is empty: name at least one benchmark set")
        taken = [name for name in ("out", "subjects", "sets") if name in self.settings]
        if taken:
            raise ValueError(f"settings hold '{taken[0]}', which each job sets itself: leave it away")


@dataclass(frozen=True)
class Resources:
    """What one job asks of a cluster; ``memory`` and ``time`` as SLURM writes them, ``options`` are further ``#SBATCH`` lines."""

    cpus: int = 2
    gpus: int = 0
    memory: str = "8G"
    time: str = "04:00:00"
    partition: str | None = None
    account: str | None = None
    at_once: int | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked(self)
        _at_least(self.cpus, "cpus", 1)
        _at_least(self.gpus, "gpus", 0)
        if self.at_once is not None:
            _at_least(self.at_once, "at_once", 1)
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"options are lines that sbatch knows, such as '--qos=long', got {option!r}")
        for name in ("memory", "time", "partition", "account"):
            value = getattr(self, name)
            if value is not None and re.search(r"\s", value):
                raise ValueError(f"{name} is {value!r}: SLURM takes no spaces there")


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster: its address (none: Ray is started here), and settings for ``ray.init``."""

    address: str | None = None
    init: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked(self)

    @property
    def options(self) -> dict[str, Any]:
        """For ``ray.init``."""
        return {**self.init, **({} if self.address is None else {"address": self.address})}


@dataclass(frozen=True)
class ScaleConfig:
    """Subjects × selections of claims, and subjects × benchmark sets.

    Parameters
    ----------
    out : str
        Folder of jobs and report; all workers reach it under this path.
    subjects : tuple of SubjectAt
        As ``[[subjects]]`` of ``python -m vlm_core.evaluate``: path, revision, device, dtype, quantization, name.
    claims : mapping of name to Claims
    benchmarks : mapping of name to Benchmarks
    workers : int
        Jobs at once, on this machine or a Ray cluster.
    retries : int
        How often a job runs again whose command or worker was killed.
    resources : Resources
        Of one job.
    """

    out: str
    subjects: tuple[SubjectAt, ...]
    claims: Mapping[str, Claims] = field(default_factory=dict)
    benchmarks: Mapping[str, Benchmarks] = field(default_factory=dict)
    workers: int = 2
    retries: int = 2
    resources: Resources = field(default_factory=Resources)
    ray: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        checked(self)
        _at_least(self.workers, "workers", 1)
        _at_least(self.retries, "retries", 0)
        if not self.subjects:
            raise ValueError("subjects is empty: name at least one, with path = a directory or Hub id")
        if not self.claims and not self.benchmarks:
            raise ValueError("there is nothing to run: write [claims.NAME] or [benchmarks.NAME]")
        names = [subject.name for subject in self.subjects]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two subjects are called '{name}': give each its own name = ...")
        for name in self.claims:
            if name in self.benchmarks:
                raise ValueError(f"claims and benchmarks are both called '{name}': give each its own name")
        for name in (*self.claims, *self.benchmarks):
            _plain(name, "a selection")
        holders: dict[str, str] = {}
        for name, one in self.benchmarks.items():
            for own in one.sets:
                if holders.setdefault(own, name) != name:
                    raise ValueError(
                        f"benchmarks.{holders[own]} and benchmarks.{name} both have a set called '{own}': the page tells scores apart by it, give "
                        f"each its own name"
                    )

    @classmethod
    def from_file(cls, path: str | Path) -> ScaleConfig:
        """From a ``.toml``, ``.yaml`` or ``.yml`` file.

        Raises
        ------
        ValueError
            One sentence: no such file, not TOML or YAML, a setting that is unknown, missing or of another type.
        """
        content = read_settings(path, "a configuration of many runs", "out, subjects, and claims or benchmarks")
        try:
            return declared(cls, content)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error


def _plain(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' cannot name {what}: use letters, digits, '.', '_' and '-'")


def _at_least(value: int, name: str, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
