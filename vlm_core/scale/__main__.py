"""``python -m vlm_core.scale {plan,run,slurm,merge,status} CONFIG``: many subjects, many claims and benchmarks.

Exit status: 0 all jobs are done; 1 one failed or is missing; 2 something is wrong with the configuration.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from vlm_core.command_line import one_line
from vlm_core.scale.backends import BACKENDS, run_jobs
from vlm_core.scale.config import ScaleConfig
from vlm_core.scale.jobs import jobs_of
from vlm_core.scale.merging import merge
from vlm_core.scale.running import Outcome, state, take_up
from vlm_core.scale.slurm import write_scripts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vlm_core.scale", description="Put many subjects to many claims and benchmarks, as a file declares."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "plan": "print every job and its command line",
        "run": "run what is missing",
        "slurm": "write OUT/slurm: a job array, a job that merges, and submit.sh, which hands in both",
        "merge": "write OUT/report from what is done",
        "status": "print how far each job is",
    }
    for name, text in helps.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("config", help="what to do: a .toml or .yaml file (vlm_core/scale/example.toml is one)")
        if name == "run":
            one.add_argument("--backend", choices=tuple(BACKENDS), default="local", help="where jobs run (default: local)")
            one.add_argument("--workers", type=int, help="jobs at once, in place of the number in the file")
            one.add_argument("--job", type=int, metavar="N", help="this job only, here: an element of an array")
    options = parser.parse_args(argv)
    try:
        config = ScaleConfig.from_file(options.config)
        return COMMANDS[options.command](config, options)
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return 2


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _plan(config: ScaleConfig, options: argparse.Namespace) -> int:
    for job in jobs_of(config):
        print(f"{job.number:4}  {job.id}  {job.title}: {shlex.join(['python', *job.command])}")
    return 0


def _run(config: ScaleConfig, options: argparse.Namespace) -> int:
    jobs = jobs_of(config)
    if options.job is not None:
        if not 0 <= options.job < len(jobs):
            raise ValueError(f"there is no job {options.job}: {options.config} has 0 to {len(jobs) - 1}")
        try:
            outcomes = [take_up(jobs[options.job], config.retries, wait=True)]
        except OSError as error:  # a disk that is full
            outcomes = [Outcome(options.job, "failed", True, reason=one_line(error))]
    else:
        config = config if options.workers is None else replace(config, workers=options.workers)
        outcomes = run_jobs(jobs, config, options.backend, _say)
    for outcome in outcomes:
        if outcome.state == "failed":
            _say(f"{jobs[outcome.number].title} failed: {outcome.reason}")
    return int(any(outcome.state != "done" for outcome in outcomes))


def _slurm(config: ScaleConfig, options: argparse.Namespace) -> int:
    submit = write_scripts(config, options.config)
    print(f"hand in {len(jobs_of(config))} jobs with: bash {submit}")
    return 0


def _merge(config: ScaleConfig, options: argparse.Namespace) -> int:
    status, missing = merge(config, _say)
    for sentence in missing:
        _say(f"not in the report: {sentence}")
    return int(bool(status or missing))


def _status(config: ScaleConfig, options: argparse.Namespace) -> int:
    found = [(job, state(job)) for job in jobs_of(config)]
    for job, known in found:
        failed = job.folder / "failed.json"
        print(f"{job.number:4}  {known:8} {job.title}" + (f"  ({failed})" if known == "failed" else ""))
    print(", ".join(f"{count} {known}" for known, count in Counter(known for _, known in found).items()))
    return int(any(known != "done" for _, known in found))


COMMANDS = {"plan": _plan, "run": _run, "slurm": _slurm, "merge": _merge, "status": _status}


if __name__ == "__main__":
    sys.exit(main())
