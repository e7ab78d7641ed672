"""The ``--claims-*`` options: declared, and checked once, before anything is loaded."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PROFILES = ("smoke", "default", "nightly")
INCONCLUSIVE = ("fail", "warn")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("4bit", "8bit")
SPREAD = "auto"  # of --claims-device: over all devices that are there
DEFAULT_SUBJECT = "fixtures/embedded/vlm"
DEFAULT_OUT = "reports/runs"


@dataclass(frozen=True)
class Options:
    """The checked options of a run."""

    subject: str
    revision: str | None
    profile: str
    seed: int
    alpha: float | None
    out: Path
    inconclusive: str
    expectations: Path | None
    baseline: Path | None
    update_baseline: str | None
    history: Path | None
    seed_given: bool
    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None

    @property
    def loading(self):
        """How the subject is loaded, as `vlm_core.load_vlm` takes it: path apart."""
        placed = {"device_map": "auto"} if self.device == SPREAD else {"device": self.device or "auto"}
        return {"revision": self.revision, "dtype": self.dtype, "quantization": self.quantization, **placed}

    @property
    def subject_name(self):
        return Path(self.subject.rstrip("/")).name or "subject"

    def as_arguments(self):
        """The command-line arguments that differ from the defaults, with ``=``: pytest takes a separate existing path for a test folder."""
        arguments = []
        if self.subject != DEFAULT_SUBJECT:
            arguments += [f"--claims-subject={self.subject}"]
        if self.revision:
            arguments += [f"--claims-revision={self.revision}"]
        if self.device:
            arguments += [f"--claims-device={self.device}"]
        if self.dtype != "auto":
            arguments += [f"--claims-dtype={self.dtype}"]
        if self.quantization:
            arguments += [f"--claims-quantization={self.quantization}"]
        if self.profile != "default":
            arguments += [f"--claims-profile={self.profile}"]
        if self.seed:
            arguments += [f"--claims-seed={self.seed}"]
        if self.alpha is not None:
            arguments += [f"--claims-alpha={self.alpha}"]
        return arguments


def declare(parser):
    """Add the options to pytest's parser; values are checked in `read`, with one sentence each."""
    group = parser.getgroup("claims", "research claims about a vision-language model")
    add = group.addoption
    add("--claims-subject", metavar="PATH_OR_ID", default=DEFAULT_SUBJECT, help="model to test, written with = (default: %(default)s)")
    add("--claims-revision", metavar="REV", default=None, help="branch, tag or commit of a hub model")
    add("--claims-device", metavar="cpu|cuda:0|auto", default=None, help="where the subject computes (default: a GPU where there is one); auto: spread over all of them and the host")
    add("--claims-dtype", metavar="|".join(DTYPES), default="auto", help="what it computes in (default: the checkpoint's own, float32 on a CPU)")
    add("--claims-quantization", metavar="|".join(QUANTIZATIONS), default=None, help="linear maps of fewer bits, by bitsandbytes")
    add("--claims-profile", metavar="|".join(PROFILES), default="default", help="how much to measure (default: default)")
    add("--claims-seed", metavar="INT", default=None, help="seed of data draws and resampling (default: 0; with a history, the night's own)")
    add("--claims-alpha", metavar="A", default=None, help="error rate of every family of claims, in place of the declared ones (records say so)")
    add("--claims-out", metavar="DIR", default=None, help=f"where runs are written (default: {DEFAULT_OUT})")
    add(
        "--claims-inconclusive",
        metavar="|".join(INCONCLUSIVE),
        default="fail",
        help="fail: exit 10 when a claim is inconclusive or invalid (default); warn: exit 0",
    )
    add("--claims-expectations", metavar="FILE", default=None, help="known outcomes of the subject (TOML or JSON)")
    add("--claims-baseline", metavar="FILE", default=None, help="compare item by item with what is stored there (JSON lines); exit 11 on a regression")
    add("--claims-update-baseline", metavar="REASON", default=None, help="add this run to the baseline; A/A: the same code again, to measure the noise; 'none yet': only where nothing in it can be compared")
    add("--claims-history", metavar="DIR", default=None, help="a night of its own scenes, its evidence added to that of the nights there")
    add("--claims-retrain", action="store_true", help="train students again that are in the cache")
    add("--claims-list", action="store_true", help="list the declared claims and stop")


def read(config):
    """Check the options.

    Raises
    ------
    pytest.UsageError
        One sentence naming the option, what it got and what it takes.
    """
    given = config.option
    _one_of("--claims-profile", given.claims_profile, PROFILES)
    _one_of("--claims-inconclusive", given.claims_inconclusive, INCONCLUSIVE)
    _one_of("--claims-dtype", given.claims_dtype, DTYPES)
    if given.claims_quantization is not None:
        _one_of("--claims-quantization", given.claims_quantization, QUANTIZATIONS)
    if given.claims_device is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", given.claims_device):
        raise pytest.UsageError(f"--claims-device takes cpu, cuda, cuda:0, mps or auto (spread over all that are there), not {given.claims_device!r}")
    given.claims_seed = getattr(config, "workerinput", {}).get("claims_seed", given.claims_seed)  # a night's is known to the controller
    seed_given = given.claims_seed is not None
    try:
        seed = int(given.claims_seed) if seed_given else 0
    except ValueError:
        raise pytest.UsageError(f"--claims-seed takes a whole number, not {given.claims_seed!r}") from None
    if seed < 0:
        raise pytest.UsageError(f"--claims-seed takes a number from 0 on, not {seed}")
    if not given.claims_subject.strip():
        raise pytest.UsageError("--claims-subject takes a path or a model id, not an empty string")
    given.claims_seed = seed
    here = config.invocation_params.dir
    return Options(
        subject=_subject(config),
        revision=given.claims_revision,
        profile=given.claims_profile,
        seed=seed,
        alpha=_alpha(given.claims_alpha),
        out=here / given.claims_out if given.claims_out else config.rootpath / DEFAULT_OUT,
        inconclusive=given.claims_inconclusive,
        expectations=_expectations_file(config),
        baseline=_baseline(config),
        update_baseline=given.claims_update_baseline,
        history=here / given.claims_history if given.claims_history else None,
        seed_given=seed_given,
        device=given.claims_device,
        dtype=given.claims_dtype,
        quantization=given.claims_quantization,
    )


def _subject(config):
    """A folder of the checkout is found from wherever pytest is started."""
    subject, root = config.option.claims_subject, config.rootpath
    if not (config.invocation_params.dir / subject).exists() and (root / subject).exists():
        return str(root / subject)
    return subject


def _alpha(given):
    try:
        alpha = None if given is None else float(given)
    except ValueError:
        alpha = math.nan
    if alpha is not None and not 0 < alpha < 0.5:
        raise pytest.UsageError(f"--claims-alpha takes a number between 0 and 0.5, not {given!r}")
    return alpha


def _baseline(config):
    """The given file: one that is there, unless this run is to be its first entry."""
    given, reason = config.option.claims_baseline, config.option.claims_update_baseline
    if reason is not None and not reason.strip():
        raise pytest.UsageError("--claims-update-baseline takes the reason for it, not an empty text")
    if not given:
        if reason is not None:
            raise pytest.UsageError("--claims-update-baseline needs the file, --claims-baseline=FILE")
        return None
    path = config.invocation_params.dir / given
    if not path.is_file() and reason is None:
        raise pytest.UsageError(f"--claims-baseline {path} was not found: --claims-update-baseline=REASON makes it from this run")
    return path


def _one_of(option, value, allowed):
    if value not in allowed:
        raise pytest.UsageError(f"{option} takes one of {', '.join(allowed)}, not {value!r}")


def _expectations_file(config):
    """The given file, or ``expectations.toml`` inside the subject's folder or ``<subject>.expectations.toml`` beside it."""
    if config.option.claims_expectations:
        path = config.invocation_params.dir / config.option.claims_expectations
        if not path.is_file():
            raise pytest.UsageError(f"--claims-expectations {path} was not found")
        return path
    subject = config.option.claims_subject
    for base in (config.invocation_params.dir, config.rootpath):
        folder = base / subject
        for path in (folder / "expectations.toml", folder.with_name(folder.name + ".expectations.toml")):
            if path.is_file():
                return path
    return None


def check_writable(out):
    """Refuse an output folder that cannot be written, before hours are spent.

    Raises
    ------
    pytest.UsageError
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise pytest.UsageError(f"--claims-out {out} cannot be written: {error.strerror or error}") from None
