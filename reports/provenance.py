"""Where a run was made: commit, versions, machine, memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys

_PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "datasets", "safetensors", "pillow",
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
    """The platform key of the run."""
    return {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}


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
