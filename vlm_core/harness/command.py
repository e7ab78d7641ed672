"""``python -m vlm_core.evaluate``: evaluate, compare, repeat.

    python -m vlm_core.evaluate --config FILE            every subject answers every set; goes on where it was killed
    python -m vlm_core.evaluate compare A B              two runs paired by item
    python -m vlm_core.evaluate repeat RUN               whether a run says the same again

Exit status: 0 done; 1 a run that is not reproduced; 2 something is wrong with the configuration, the items, a checkpoint or a folder;
3 a folder holds answers of another run (to other items, of other weights or code); 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

OTHER_ANSWERS = 3
_PROG = "python -m vlm_core.evaluate"
_OF_SUBJECT = ("revision", "device", "dtype", "quantization")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["compare"], ["repeat"]) else "evaluate"
    options = {"evaluate": _evaluate_options, "compare": _compare_options, "repeat": _repeat_options}[command](argv)
    # CUDA's matrix products are deterministic only where this is set before the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from vlm_core.command_line import one_line, quiet
    from vlm_core.errors import SubjectError
    from vlm_core.harness.run_folder import OtherAnswers

    quiet()
    try:
        return {"evaluate": _evaluate, "compare": _compare, "repeat": _repeat}[command](options)
    except (SubjectError, ValueError) as error:
        print(f"{_PROG}: {one_line(error)}", file=sys.stderr)
        return OTHER_ANSWERS if isinstance(error, OtherAnswers) else 2
    except KeyboardInterrupt:
        print(f"{_PROG}: interrupted; what was answered is kept, and the same command goes on", file=sys.stderr)
        return 130


# -- evaluate ---------------------------------------------------------------------------------------------------------


def _evaluate_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Let subjects answer sets of items, from a file or from the options below, which go before what the file says.",
        epilog=f"{_PROG} compare A B: two runs paired by item. {_PROG} repeat RUN: whether a run says the same again.",
    )
    parser.add_argument("--config", help="what to do: a .toml or .yaml file (vlm_core/harness/example.toml is one)")
    parser.add_argument("--out", help="folder of what comes out")
    parser.add_argument("--subject", action="append", metavar="PATH", help="a directory or Hub id; several times for several")
    for name in _OF_SUBJECT:
        parser.add_argument(f"--{name}", help="of what --subject names")
    parser.add_argument("--set", action="append", metavar="NAME={...}", help='a set as in the file: \'a = { factory = "probes:build" }\'')
    parser.add_argument("--mode", choices=("candidates", "greedy", "both"))
    for name in ("max-new-tokens", "batch-rows", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--logits", action="store_true", default=None, help="write every candidate's log-probability")
    options = parser.parse_args(argv)
    if options.config is None and None in (options.out, options.subject, options.set):
        parser.error("name a file (--config), or say all of --subject, --set and --out")
    alone = [name for name in _OF_SUBJECT if options.subject is None and getattr(options, name) is not None]
    if alone:
        parser.error(f"--{alone[0]} is of what --subject names: name it")
    return options


def _evaluate(options: argparse.Namespace) -> int:
    from vlm_core.command_line import timed_lines
    from vlm_core.harness.config import EvaluationConfig
    from vlm_core.harness.running import run_evaluation
    from vlm_core.harness.tables import OVERALL, shown, summary_table

    changes: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("out", "mode", "max_new_tokens", "batch_rows", "seed", "logits")
        if getattr(options, name) is not None
    }
    if options.subject is not None:
        where = {name: getattr(options, name) for name in _OF_SUBJECT if getattr(options, name) is not None}
        changes["subjects"] = [{"path": path, **where} for path in options.subject]
    if options.set is not None:
        changes["sets"] = _sets(options.set)
    config = EvaluationConfig.from_dict(changes) if options.config is None else EvaluationConfig.from_file(options.config, **changes)
    out = run_evaluation(config, say=timed_lines())
    table = summary_table(out)
    print(shown(table[table["task"] == OVERALL]))
    print(f"per task: {out / 'summary.csv'}; every answer: {out}/<subject>/<set>/answers.jsonl")
    return 0


def _sets(lines: Sequence[str]) -> dict[str, Any]:
    """Sets as the file would have them, one a line."""
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--set takes what stands in the file, NAME = {{ factory = \"module:function\", ... }}, got {lines} ({error})") from error


# -- compare ----------------------------------------------------------------------------------------------------------


def _compare_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"{_PROG} compare", description="Two runs paired by item: B minus A.")
    for name in ("a", "b"):
        parser.add_argument(name, help="OUT/SUBJECT, or OUT/SUBJECT/SET")
    parser.add_argument("--out", help="folder for comparison.csv and moved.csv (items gained and lost)")
    return parser.parse_args(argv)


def _compare(options: argparse.Namespace) -> int:
    from vlm_core.files import write_whole
    from vlm_core.harness.comparing import compare

    found = compare(options.a, options.b)
    for note in found.notes:
        print(note, file=sys.stderr)
    table = found.table.round(3)
    between = [f"{row.difference:+.3f} [{row.lower:+.3f}, {row.upper:+.3f}]" for row in found.table.itertuples()]
    table.insert(table.columns.get_loc("difference"), "b - a [95 %]", between)
    print(table.drop(columns=["difference", "lower", "upper"]).to_string(index=False))
    if options.out is not None:
        write_whole(Path(options.out) / "comparison.csv", found.table.to_csv(index=False))
        write_whole(Path(options.out) / "moved.csv", found.moved.to_csv(index=False))
    return 0


# -- repeat -----------------------------------------------------------------------------------------------------------


def _repeat_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"{_PROG} repeat", description="Ask a run's items again: are the answers the same?")
    parser.add_argument("run", help="OUT/SUBJECT, or OUT/SUBJECT/SET")
    parser.add_argument("--items", type=_positive(int), help="at least so many items of each set, the first ones; default: all")
    parser.add_argument("--tolerance", type=_positive(float), help="largest difference of a score or log-probability; default: by the dtype")
    parser.add_argument("--batch-rows", type=_positive(int), help="rows per batch: do answers depend on it?")
    return parser.parse_args(argv)


def _positive(kind: type) -> Any:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"{kind.__name__} above 0"
    return read


def _repeat(options: argparse.Namespace) -> int:
    from vlm_core.command_line import timed_lines
    from vlm_core.harness.repeating import repeat

    found = repeat(options.run, items=options.items, tolerance=options.tolerance, batch_rows=options.batch_rows, say=timed_lines())
    for note in found.notes:
        print(note, file=sys.stderr)
    print(found.table.to_string(index=False))
    print(found)
    return 0 if found.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
