"""Live progress: a rewritten line on a terminal, now and then a line elsewhere, a file in a worker."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from reports import terminal

pytest_plugins = ["pytester"]


class Reporter:
    """The part of pytest's terminal reporter that progress uses."""

    def __init__(self, isatty):
        self.isatty = isatty
        self.out = io.StringIO()
        self._tw = SimpleNamespace(fullwidth=80, write=lambda text, flush=False: self.out.write(text))

    def ensure_newline(self):
        self.out.write("")

    def write_line(self, line):
        self.out.write(line + "\n")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def _progress(isatty, **workerinput):
    reporter, clock = Reporter(isatty), Clock()
    plugins = SimpleNamespace(getplugin=lambda name: reporter if name == "terminalreporter" else None)
    config = SimpleNamespace(pluginmanager=plugins)
    if workerinput:
        config.workerinput = workerinput
    return terminal.Progress(config, clock), reporter.out, clock


def test_on_a_terminal_one_line_is_rewritten_and_taken_away():
    progress, out, clock = _progress(isatty=True)
    for done in range(5):
        clock.now += 1
        progress("measuring heads", done, 4)
    shown = out.getvalue()
    assert "\r\x1b[Kmeasuring heads  0/4  0%" in shown and "3/4" in shown
    assert shown.endswith("\r\x1b[K") and "\n" not in shown


def test_elsewhere_lines_come_now_and_then():
    progress, out, clock = _progress(isatty=False)
    for done in range(1, 101):
        clock.now += 0.4
        progress("measuring heads", done, 100)
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 4 and lines[1] == "  measuring heads  44/100  44%  about 22 s left"


def test_a_quick_measurement_stays_silent():
    progress, out, _ = _progress(isatty=False)
    progress("quick", 1, 2)
    progress("quick", 2, 2)
    assert out.getvalue() == ""


def test_workers_leave_their_progress_for_the_controller(tmp_path):
    progress, _, clock = _progress(isatty=False, claims_progress=str(tmp_path), workerid="gw0")
    progress("measuring heads", 3, 40)
    watcher = terminal.WorkerProgress(Reporter(isatty=False), tmp_path)
    assert watcher.text() == "gw0 measuring heads  3/40  8%"
    progress("measuring heads", 40, 40)
    assert watcher.text() == ""


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", True), ("ascii", False)])
def test_symbols_are_used_where_the_terminal_has_them(encoding, mark):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert terminal.can_show_symbols(SimpleNamespace(_tw=SimpleNamespace(_file=stream))) is mark


def test_progress_reaches_the_terminal_through_pytests_capture(suite):
    suite.write(
        """
def test_slow(progress):
    progress._clock = iter(range(0, 100, 5)).__next__
    progress("heads", 1, 3)
    progress("heads", 2, 3)
    print("hidden")
"""
    )
    result = suite.run()
    result.stdout.fnmatch_lines(["  heads  2/3  67%*"])
    assert "hidden" not in result.stdout.str()
