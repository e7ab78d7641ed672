"""``python -m vlm_core.plan SUBJECT PROFILE``: what a suite costs on a subject, before anyone pays.

Operations, memory, GPU-hours of known devices and processor-hours of the machine that was counted on. Nothing is loaded but the subject's
configuration and processor. Exit status: 0; 2 where the subject or the counted work is not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm_core.command_line import one_line
from vlm_core.errors import SubjectError
from vlm_core.planning.devices import DEVICES, UTILISATION

WORKLOAD = Path("fixtures") / "workload.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vlm_core.plan", description="Say what a suite costs on a subject, before anyone pays.")
    parser.add_argument("subject", help="a directory or Hub id; its configuration and processor are read, no weights")
    parser.add_argument("profile", help="smoke, default or nightly")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--device", action="append", choices=tuple(DEVICES), help="of these devices only (repeatable)")
    parser.add_argument(
        "--flops-per-second", type=float, metavar="X", help="of a device of your own: what it sustains, utilisation included"
    )
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help=f"share of a device's peak that is assumed (default: {UTILISATION})"
    )
    parser.add_argument("--element-bytes", type=int, choices=(2, 4), default=2, help="of a weight: 2 (default) or 4")
    parser.add_argument("--batch", type=int, default=128, help="prompts at once, for memory (default: 128)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="PROMPTS[:TOKENS]",
        help="so many prompts beside, each with so many generated tokens",
    )
    parser.add_argument(
        "--workload", type=Path, default=None, metavar="FILE", help=f"the counted work (default: {WORKLOAD}, here or in this checkout)"
    )
    given = parser.parse_args(argv)
    try:
        print(_said(given))
    except (SubjectError, ValueError) as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _said(given: argparse.Namespace) -> str:
    from vlm_core.planning.estimate import estimate
    from vlm_core.planning.sizes import sizes_of
    from vlm_core.planning.workload import read_workload

    beside = Path(__file__).resolve().parents[1] / WORKLOAD
    file = given.workload or (WORKLOAD if WORKLOAD.is_file() else beside)
    workload = read_workload(file, given.profile)
    if not 0 < given.utilisation <= 1:
        raise ValueError(f"--utilisation is a share above 0 and at most 1, got {given.utilisation}")
    sizes = sizes_of(given.subject, workload.prompts, revision=given.revision)
    devices = [DEVICES[name] for name in given.device or ()] or ([] if given.flops_per_second else list(DEVICES.values()))
    return estimate(
        workload,
        sizes,
        devices=devices,
        flops_per_second=given.flops_per_second,
        utilisation=given.utilisation,
        element=given.element_bytes,
        batch=given.batch,
        benchmarks=[_benchmark(text) for text in given.benchmark],
    ).text()


def _benchmark(text: str) -> tuple[int, int]:
    prompts, _, tokens = text.partition(":")
    if not prompts.isdecimal() or not (tokens or "0").isdecimal() or not int(prompts):
        raise ValueError(f"--benchmark is a number of prompts, then perhaps of generated tokens, such as 5000:16, got {text!r}")
    return int(prompts), int(tokens or 0)


if __name__ == "__main__":
    sys.exit(main())
