"""Where a run was made: commit, versions, machine, memory; and by what two runs are known to be of the same subject, data and platform."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys

_PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "safetensors", "pillow",
    "numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "pytest", "pytest-xdist", "matplotlib", "jinja2",
)  # fmt: skip


def commit(root):
    """The checkout's commit, ``+`` appended when files differ from it; ``None`` outside a checkout."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root, *arguments):
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def versions():
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine():
    """The machine of the run."""
    return {"platform": platform.platform(), "processor": platform.machine(), "instructions": instructions(), "cores": os.cpu_count()}


def accelerator():
    """Name of the accelerator that this process uses; ``None`` where it uses none."""
    cuda = _cuda()
    return cuda.get_device_name() if cuda else None


def peaks_mb():
    """Peak memory of this process so far, in MiB: resident, and allocated on its accelerator (0 without one)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuda = _cuda()
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1), round(cuda.max_memory_allocated() / 2**20, 1) if cuda else 0.0


def _cuda():
    """``torch.cuda`` where this process uses it; asking loads nothing and starts nothing."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def instructions():
    """The widest vector instructions of the processor, as far as they are known here: they decide the last digits of a sum."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as found:
            flags = next((line.split() for line in found if line.startswith("flags")), ())
    except OSError:
        flags = ()
    return next((name for name in ("avx512f", "avx2", "avx") if name in flags), None)


def subject_key(identity):
    """What makes two runs' subjects the same: weights, number format and quantization; where no weights are known, its source and revision."""
    subject = identity["subject"]
    format = " ".join(str(subject[name]) for name in ("dtype", "quantization") if subject.get(name))
    if subject.get("weights"):
        return f"{subject['weights'][:32]} {format}".rstrip()
    return " ".join(str(part) for part in (subject["source"], subject.get("revision") or identity.get("revision"), subject.get("quantization")) if part)


def data_key(identity):
    """What makes two runs' data the same: the content hashes of their splits, the profile and the seed."""
    hashes = [f"{name} {value}" for name, value in sorted(identity["data"].items()) if isinstance(value, str)]
    return ", ".join([*hashes, f"profile {identity['profile']}", f"seed {identity['seed']}"])


def platform_key(identity):
    """What makes two machines compute alike: system, processor, its instructions, and the accelerator."""
    machine = identity["machine"]
    parts = (machine["platform"].split("-")[0], machine["processor"], machine.get("instructions"), machine.get("accelerator"))
    return " ".join(str(part) for part in parts if part)
