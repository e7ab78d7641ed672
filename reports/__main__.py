"""Pages and texts from what runs left.

``python -m reports render RUN``     draw a run's page again, from its JSON
``python -m reports compare A B``    two runs: verdicts that changed, paired differences, versions
``python -m reports models RUN ...``  many subjects on one page, the parts of one subject put together
``python -m reports trend HISTORY``  a history of nights as a page
``python -m reports index DIR``      a page that lists the runs of a directory and the folders in it that have such a page
``python -m reports summary RUN``    a run's verdicts in Markdown
``python -m reports paper RUN``      a run as a paper of a few pages, PDF
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reports import compare, index, markdown, models, page, paper, record
from reports.nights import trend


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what, text) in _OF_ONE.items():
        commands.add_parser(name, help=text).add_argument("folder", type=Path, metavar=what)
    both = commands.add_parser("compare", help="two runs beside each other, in words and as a page")
    both.add_argument("first", type=Path, metavar="A")
    both.add_argument("second", type=Path, metavar="B")
    both.add_argument("--out", type=Path, metavar="FILE", help="the page (default: compare.html in B)")
    one = commands.add_parser("paper", help="write RUN/paper.pdf: method, results with tables and figures, errors, limitations")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, metavar="FILE", help="the PDF (default: paper.pdf in RUN)")
    many = commands.add_parser("models", help="many subjects: a page across them, each with its own report beside it")
    many.add_argument("runs", nargs="*", metavar="RUN", help="a run, or NAME=RUN; runs of one subject are parts of one")
    many.add_argument("--out", type=Path, required=True, metavar="DIR", help="the page (index.html), models.json and a folder a subject")
    many.add_argument("--scores", action="append", default=[], metavar="NAME=DIR", help="what vlm_core.evaluate left of a subject")
    many.add_argument("--missing", action="append", default=[], metavar="TEXT", help="what should have been run: the page says so")
    given = parser.parse_args(arguments)
    if given.command == "compare":
        return _compare(given)
    if given.command == "models":
        return _models(given)
    if given.command == "paper":
        return _paper(given)
    make, what, _ = _OF_ONE[given.command]
    try:
        return make(given.folder)
    except (OSError, ValueError, KeyError) as error:
        kind = {"RUN": "a run that can be rendered", "HISTORY": "a history", "DIR": "a directory of runs"}[what]
        print(f"{given.folder} is not {kind}: {error}", file=sys.stderr)
        return 1


def _render(folder):
    print(page.render(folder))
    problems = record.load_run(folder)[0]["problems"]
    if problems:
        print(f"{folder} is incomplete: {'; '.join(problems)}", file=sys.stderr)
    return 0


def _printed(make):
    def run(folder):
        print(make(folder))
        return 0

    return run


_OF_ONE = {
    "render": (_render, "RUN", "draw RUN/report.html from RUN/run.json and RUN/evidence.json"),
    "trend": (_printed(trend.render), "HISTORY", "draw HISTORY/trend.html from what --claims-history left"),
    "index": (_printed(index.render), "DIR", "draw DIR/index.html, a list of the runs in DIR and of the folders in it that have such a list"),
    "summary": (_printed(markdown.summary), "RUN", "print RUN's verdicts in Markdown"),
}


COMMANDS = ("compare", "models", "paper", *_OF_ONE)


def _compare(given):
    try:
        found = compare.between(given.first, given.second)
        print("\n".join([*compare.lines(found), str(compare.render(found, given.out or given.second / "compare.html"))]))
    except (OSError, ValueError, KeyError) as error:
        print(f"{given.first} and {given.second} cannot be compared: {error}", file=sys.stderr)
        return 1
    return 0


def _models(given):
    try:
        wholes = models.gather(given.runs)
        scores = [(name, Path(folder)) for name, _, folder in (one.partition("=") for one in given.scores)]
        print(models.render(wholes, given.out, scores, given.missing))
    except (OSError, ValueError, KeyError) as error:
        print(f"no page can be made of these runs: {error}", file=sys.stderr)
        return 1
    problems = [f"{whole.name}: {problem}" for whole in wholes for problem in whole.identity["problems"]]
    for problem in (*given.missing, *problems):
        print(f"incomplete: {problem}", file=sys.stderr)
    return 0


def _paper(given):
    try:
        print(paper.write(given.run, given.out))
        problems = record.load_run(given.run)[0]["problems"]
    except paper.NotInstalled as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, KeyError) as error:
        print(f"{given.run} is not a run that a paper can be written of: {error}", file=sys.stderr)
        return 1
    if problems:
        print(f"{given.run} is incomplete: {'; '.join(problems)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
