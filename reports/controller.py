"""What the controlling process does with what its tests leave: gather it, gate completeness, write the run, say so.

``Controller``   a pytest plugin; registered by ``reports.plugin`` in the one process that writes
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile

import pytest

from reports import claims, collect, terminal, wording

__all__ = ["Controller"]


class Controller:
    """Gathers what tests leave, gates completeness and writes the run; lives in the controlling process only."""

    def __init__(self, config, chosen, nightly):
        self.config = config
        self.options = chosen
        self.nightly = nightly
        self.declared = nightly is not None
        command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
        self.run = collect.Run(chosen, command=command, root=config.rootpath)
        self.expected = {}
        self.ended = set()
        self.failures = 0
        self.session = None
        self.stop_reason = None
        self.written = None
        self.trouble = None
        self._progress_folder = None
        self._watcher = None

    @property
    def reporter(self):
        return self.config.pluginmanager.getplugin("terminalreporter")

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_collection_finish(self, session):
        self.expected.update(dict.fromkeys(item.nodeid for item in session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        if self._progress_folder is None:
            self._progress_folder = tempfile.mkdtemp(prefix="claims-progress-")
            if self.reporter is not None:
                self._watcher = terminal.WorkerProgress(self.reporter, self._progress_folder)
                self._watcher.start()
        node.workerinput["claims_progress"] = self._progress_folder
        node.workerinput["claims_seed"] = self.options.seed

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.expected.update(dict.fromkeys(ids))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report):
        self.config.stash[terminal.PROGRESS].clear()
        stop = getattr(report, "claims_stop", None)
        if stop is not None:
            self._stop(stop)
        elif report.failed and getattr(report, "claims_status", {}).get("outcome") != "decided":
            self.failures += 1
        if report.when == "teardown":
            self.ended.add(report.nodeid)
            if hasattr(report, "claims_payload"):
                self._add(json.loads(report.claims_payload))

    def pytest_collectreport(self, report):
        self.failures += bool(report.failed)

    def _add(self, payload):
        if self.stop_reason is None and self.trouble is None:
            try:
                self.run.add(payload)
            except OSError as error:
                self._cannot_write(error)

    def _cannot_write(self, error):
        self.trouble = f"the run cannot be written to {self.options.out}: {error.strerror or error}"
        if self.run.folder is not None and (self.run.folder / "records.jsonl").exists():
            self.trouble += f"; what was written before is in {self.run.folder}"
        self._end_session("evidence cannot be kept")

    def _stop(self, reason):
        self.stop_reason = self.stop_reason or reason
        self._end_session("there is no subject to measure")

    def _end_session(self, why):
        self.session.shouldstop = why
        distributor = self.config.pluginmanager.getplugin("dsession")
        if distributor is not None:
            distributor.shouldstop = why

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if self._watcher is not None:
            self._watcher.stop()
        if self._progress_folder is not None:
            shutil.rmtree(self._progress_folder, ignore_errors=True)
        missing = [nodeid for nodeid in self.expected if nodeid not in self.ended]
        stopped = exitstatus not in (0, 1) or bool(session.shouldfail)
        lost = bool(missing) and not stopped and (self.declared or bool(self.run.records))
        if not self.run.records and not lost and self.stop_reason is None and self.trouble is None:
            return
        problems = [self.stop_reason] if self.stop_reason else []
        problems += _missing_sentences(missing, stopped)
        kept = self.trouble is None and (bool(self.run.records) or lost)
        if kept and self.declared:
            self._follow(problems)
            lost = lost or self.nightly.problem is not None
        code = collect.exit_code(
            1 if exitstatus == pytest.ExitCode.INTERRUPTED and self._workers_failed_enough() else int(exitstatus),
            records=self.run.records,
            lost=lost,
            failures=self.failures,
            hopeless=self.stop_reason is not None or self.trouble is not None,
            inconclusive=self.options.inconclusive,
            regressions=self.nightly.regressions if self.declared else 0,
        )
        if kept and self.trouble is None:
            code = self._finish(problems, code)
        session.exitstatus = code

    def _workers_failed_enough(self):
        """Whether ``-x`` or ``--maxfail`` ended the session: with workers it ends as interrupted (2), without them as failed (1)."""
        distributor = self.config.pluginmanager.getplugin("dsession")
        return distributor is not None and bool(distributor.maxfail) and distributor.countfailures >= distributor.maxfail

    def _follow(self, problems):
        try:
            self.run.follow(self.nightly, complete=not problems)
        except OSError as error:
            self._cannot_write(error)
        if self.nightly.problem is not None:
            problems.append(self.nightly.problem)

    def _finish(self, problems, code):
        try:
            self.written = self.run.finish(problems=problems, exit_code=code, partial_families=claims.is_partial(self.config))
        except OSError as error:
            self._cannot_write(error)
            return collect.EVIDENCE_LOST
        except Exception as error:
            self.config.notify_exception(pytest.ExceptionInfo.from_exception(error))
            self.trouble = f"the report could not be drawn; the evidence is in {self.run.folder}"
            return collect.EVIDENCE_LOST
        return code

    def pytest_terminal_summary(self, terminalreporter):
        if self.stop_reason is not None:
            terminalreporter.write_line(self.stop_reason, red=True)
        if self.trouble is not None:
            terminalreporter.write_line(self.trouble, red=True)
        if self.written is not None:
            terminal.verdict_table(terminalreporter, self.run.records)
            if self.declared:
                terminal.lane_lines(terminalreporter, self.nightly.lines)
            if said := wording.little_was_measured(self.options.profile):
                terminalreporter.write_line(said, yellow=True)
            if self.options.alpha is not None:
                terminalreporter.write_line(wording.other_alpha(self.options.alpha), yellow=True)
            for problem in self.run.problems:
                terminalreporter.write_line(f"evidence is incomplete: {problem}", red=True)
            terminalreporter.write_line("report:")
            terminalreporter.write_line(str(self.written / "report.html"))


def _missing_sentences(missing, stopped):
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if stopped:
        return [f"the run was stopped before {len(missing)} tests: {shown}"]
    return [f"no report came back from {shown}"]
