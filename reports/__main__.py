"""``python -m reports render RUN``: draw a run's page again, from its JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reports import page, record


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m reports", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("render", help="draw RUN/report.html from RUN/run.json and RUN/evidence.json")
    draw.add_argument("run", type=Path, metavar="RUN", help="a run directory, for example reports/runs/latest")
    given = parser.parse_args(arguments)
    try:
        print(page.render(given.run))
        problems = record.load_run(given.run)[0]["problems"]
    except (OSError, ValueError, KeyError) as error:
        print(f"{given.run} is not a run that can be rendered: {error}", file=sys.stderr)
        return 1
    if problems:
        print(f"{given.run} is incomplete: {'; '.join(problems)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
