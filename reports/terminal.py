"""What a person sees in the terminal: live progress, and the verdict table at the end.

``Progress``        the ``progress(label, done, total)`` callable of this process
``WorkerProgress``  shows what pytest-xdist's workers are doing
``verdict_table``   the verdicts and their reasons
``lane_lines``      what the nightly lanes found
``claims_list``     the declared claims
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from reports.record import describe_params, dumps
from reports.wording import interval_numbers, threshold_text

SYMBOLS = {"supported": "●", "refuted": "✕", "inconclusive": "◐", "invalid": "–"}
LETTERS = {"supported": "S", "refuted": "R", "inconclusive": "I", "invalid": "N"}
COLOURS = {"supported": "green", "refuted": "red", "inconclusive": "yellow", "invalid": "light"}


def can_show_symbols(reporter):
    """Whether the terminal's encoding has the verdict symbols."""
    encoding = getattr(reporter._tw._file, "encoding", None) or "ascii"
    try:
        "".join(SYMBOLS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def line_of(label, done, total, seconds):
    """``measuring heads  120/400  30 %  about 2 min left``."""
    share = done / total if total else 1.0
    text = f"{label}  {done}/{total}  {share:.0%}"
    if 0 < share < 1 and seconds > 3:
        left = seconds * (1 - share) / share
        text += f"  about {left:.0f} s left" if left < 90 else f"  about {left / 60:.0f} min left"
    return text


class Progress:
    """Shows how far a long measurement is, without disturbing pytest's own lines.

    On a terminal one line is rewritten in place (at once for ``done == 0``, else after half a second); elsewhere
    a line is written now and then (after two seconds, then every fifteen). In a
    pytest-xdist worker the state is left in a file for the controller.

    Parameters
    ----------
    config : pytest.Config
    clock : callable
    """

    def __init__(self, config, clock=time.monotonic):
        self._clock = clock
        self._plugins = config.pluginmanager
        workerinput = getattr(config, "workerinput", {})
        folder = workerinput.get("claims_progress")
        self._file = Path(folder) / f"{workerinput['workerid']}.json" if folder else None
        self._label = None
        self._began = self._shown = 0.0
        self._live = False

    @property
    def _reporter(self):
        return self._plugins.getplugin("terminalreporter")

    def __call__(self, label, done, total):
        """Report that `done` of `total` steps of `label` are finished."""
        now = self._clock()
        if label != self._label:
            self._label, self._began, self._shown = label, now, now
        finished = done >= total
        text = line_of(label, done, total, now - self._began)
        if self._file is not None:
            self._leave("" if finished else text, now, finished)
        elif self._reporter is not None and self._reporter.isatty:
            if finished:
                self.clear()
            elif now - self._shown >= 0.1 if self._live else done == 0 or now - self._began >= 0.5:
                self._shown = now
                self._write(lambda: self._rewrite(text))
        elif self._reporter is not None and now - self._shown >= (2 if self._shown == self._began else 15):
            self._shown = now
            self._write(lambda: self._line(text))

    def clear(self):
        """Take the live line away, before pytest writes its own."""
        if self._live:
            self._live = False
            self._write(lambda: self._reporter._tw.write("\r\x1b[K", flush=True))

    def _leave(self, text, now, finished):
        if finished or now - self._shown >= 0.5 or self._shown == self._began:
            self._shown = now
            fresh = self._file.with_suffix(".new")
            fresh.write_text(dumps({"text": text}), encoding="utf-8")
            os.replace(fresh, self._file)

    def _write(self, action):
        capture = self._plugins.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            action()

    def _rewrite(self, text):
        if not self._live:
            self._reporter.ensure_newline()
        self._live = True
        width = self._reporter._tw.fullwidth - 1
        self._reporter._tw.write("\r\x1b[K" + text[:width], flush=True)

    def _line(self, text):
        self._reporter.ensure_newline()
        self._reporter.write_line("  " + text)


PROGRESS = pytest.StashKey[Progress]()
"""Where a process keeps its line."""


class WorkerProgress(threading.Thread):
    """Reads what the workers left in `folder` and shows it, until `stop`."""

    def __init__(self, reporter, folder):
        super().__init__(daemon=True)
        self._reporter = reporter
        self._folder = Path(folder)
        self._ended = threading.Event()
        self._every = 1.0 if reporter.isatty else 15.0

    def run(self):
        shown = ""
        while not self._ended.wait(self._every):
            text = self.text()
            if text and text != shown:
                self._reporter.ensure_newline()
                self._reporter.write_line("  " + text)
                shown = text
                self._every = 15.0

    def text(self):
        """``gw0 measuring heads 3/40 · gw1 ...``."""
        parts = []
        for path in sorted(self._folder.glob("*.json")):
            state = json.loads(path.read_text(encoding="utf-8"))["text"]
            if state:
                parts.append(f"{path.stem} {state}")
        return "  ·  ".join(parts)

    def stop(self):
        self._ended.set()
        self.join()


def verdict_table(reporter, records):
    """Write claim, parameters, verdict, estimate with interval and threshold; reasons below."""
    marks = SYMBOLS if can_show_symbols(reporter) else LETTERS
    rows = [
        (
            entry["claim_id"],
            describe_params(entry["params"]),
            entry["verdict"],
            _estimate(entry),
            threshold_text(entry, ascii_only=marks is LETTERS),
            {"expected": "expected", "unexpected": "not expected"}.get(entry["outcome"], ""),
        )
        for entry in records
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    reporter.write_sep("=", "claims")
    for row, entry in zip(rows, records, strict=True):
        claim, params, verdict, estimate, threshold, note = row
        reporter._tw.write(f"{marks[verdict]} {verdict.upper():<12}  ", **{COLOURS[verdict]: True})
        reporter._tw.write(f"{claim:<{widths[0]}}  {params:<{widths[1]}}  ")
        reporter._tw.line(f"{estimate:>{widths[3]}}  {threshold:<{widths[4]}}  {note}".rstrip())
        if verdict != "supported":
            reporter._tw.line(f"    {entry['reason']}")


def _estimate(entry):
    if entry["estimate"] is None:
        return "not measured"
    estimate, lower, upper = interval_numbers(entry)
    return f"{estimate} [{lower}, {upper}]"


def lane_lines(reporter, lines):
    """Write lines with their colours."""
    for text, colour in lines:
        reporter.write_line(text, **({colour: True} if colour else {}))


def claims_list(reporter, found):
    """Write every declared claim with its tier, test, sentence and instances."""
    by_claim = {}
    for instance in found:
        by_claim.setdefault(instance.declared, []).append(instance)
    for claim, its in sorted(by_claim.items(), key=lambda pair: (pair[0].hypothesis, pair[0].tier, pair[0].id)):
        reporter.write_line("")
        reporter._tw.write(claim.id, bold=True)
        reporter._tw.line(f"  {claim.tier}, {claim.test.describe()}, declaration {claim.hash}")
        reporter._tw.line(f"    {claim.sentence}")
        shown = [describe_params(instance.params) for instance in its if instance.params]
        if shown:
            reporter._tw.line("    " + "; ".join(shown))
    reporter.write_line("")
    reporter.write_line(f"{len(by_claim)} claims, {len(found)} instances")
