"""``python -m vlm_core.bench``: measure and print the table."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

DTYPES = ("float32", "bfloat16", "float16")
PAGE = Path(__file__).resolve().parents[1] / "BENCH.md"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from vlm_core.bench.subjects import EMBEDDED, SHAPES
    from vlm_core.bench.timing import CLOCKS
    from vlm_core.bench.works import WORKS

    arguments = argparse.ArgumentParser(
        prog="python -m vlm_core.bench",
        description="Time vlm_core beside plain transformers, nnsight, TransformerLens and pyvene on the same work.",
    )
    choices = ("embedded", *SHAPES)
    arguments.add_argument(
        "--subject", action="append", choices=choices, help="measure on this subject (repeatable; default: embedded and midsize, on a GPU embedded and 7b)"
    )
    arguments.add_argument("--device", default="cpu", help="cpu, or a GPU such as cuda:0 (default: cpu)")
    arguments.add_argument("--dtype", choices=tuple(DTYPES), help="what models compute in (default: float32, on a GPU bfloat16)")
    arguments.add_argument(
        "--checkpoint", type=Path, default=EMBEDDED, help="directory of the subject 'embedded' (default: the one in this checkout)"
    )
    arguments.add_argument("--only", action="append", choices=tuple(WORKS), help="this work only (repeatable)")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds; more for a busy machine (default: 5)")
    arguments.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    arguments.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, for a busy machine and one thread (default: wall)"
    )
    arguments.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    arguments.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON instead of Markdown on stdout, or beside it into FILE"
    )
    arguments.add_argument(
        "--write", nargs="?", const=PAGE, type=Path, metavar="FILE", help=f"also write the Markdown (default: {PAGE.name} in the package)"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether it ran, not whether bars are met."""
    options = parser().parse_args(argv)
    if options.rounds < 1 or options.threads < 1:
        print("--rounds and --threads must be at least 1", file=sys.stderr)
        return 2

    import torch
    from transformers.utils import logging as transformers_logging

    from vlm_core import SubjectError
    from vlm_core.bench.markdown import render
    from vlm_core.bench.report import Report, machine
    from vlm_core.bench.subjects import open_case
    from vlm_core.bench.works import WORKS, Bars, measure
    from vlm_core.memory import keep_freed_memory

    on_gpu = options.device.startswith("cuda")
    if not on_gpu and options.device != "cpu" or on_gpu and not torch.cuda.is_available():
        print(f"--device {options.device} is not there: choose cpu{' or cuda:0' if torch.cuda.is_available() else ''}", file=sys.stderr)
        return 2
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    start = perf_counter()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("httpx").setLevel(logging.ERROR)
    works = [work for work in WORKS if work in (options.only or WORKS)]
    subjects = list(dict.fromkeys(options.subject or ("embedded", "7b" if on_gpu else "midsize")))
    settings = {"subjects": subjects, "works": works, "rounds": options.rounds, "clock": options.clock, "seed": options.seed}
    settings |= {"device": options.device, "dtype": dtype}
    report = Report(machine(options.threads, options.device), settings)
    barless = on_gpu or dtype != "float32"

    def progress(message: str) -> None:
        print(f"{perf_counter() - start:6.1f} s  {message}", file=sys.stderr, flush=True)

    for name in subjects:
        try:
            case = open_case(name, options.checkpoint, options.seed, options.device, getattr(torch, dtype))
        except SubjectError as error:
            print(error, file=sys.stderr)
            return 1
        bars = Bars() if barless else None
        report.rows += measure(case, works, options.rounds, bars, progress=progress, clock=options.clock)
    report.seconds = perf_counter() - start
    page = render(report, options.write.read_text() if options.write and options.write.is_file() else "")
    if options.json == "-":
        print(report.as_json())
    else:
        print(page)
        if options.json:
            Path(options.json).write_text(report.as_json() + "\n")
    if options.write:
        options.write.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
