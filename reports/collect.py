"""The controller's side of a run: gather payloads, gate completeness, write the run directory.

A run lives in ``OUT/.<name>.partial/`` while it is made (records are appended as claims finish, so a killed
run still shows what it had) and is renamed when complete: to ``OUT/<name>/``, or to ``OUT/<name>-incomplete/``
when evidence is missing. ``OUT/latest`` points at the last complete run.

``Run``        one run being gathered
``exit_code``  pytest's exit code for what a run found
"""

from __future__ import annotations

import base64
import csv
import os
import re
import secrets
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime

from reports import page, provenance, record, wording
from vlm_core import stats
from vlm_core.secrets import hidden_in

REFUTED_OR_FAILED = 1
EVIDENCE_LOST = 3
ONLY_UNDECIDED = 10
REGRESSED = 11


class Run:
    """Evidence of one session.

    Parameters
    ----------
    options : reports.options.Options
    command : str
    root : pathlib.Path
        The checkout.
    """

    def __init__(self, options, *, command, root):
        self.options = options
        self.command = command
        self.root = root
        self.started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._received = []
        self._decided = {}
        self.problems = []
        self._nightly = {}
        self._peaks = {}
        self._left_out = []
        self._accelerator = provenance.accelerator()
        self.folder = None
        self.name = f"{self.started:%Y%m%dT%H%M%SZ}-{re.sub(r'[^A-Za-z0-9._-]+', '-', options.subject_name)}-{secrets.token_hex(3)}"

    @property
    def partial_folder(self):
        return self.options.out / f".{self.name}.partial"

    @property
    def records(self):
        """Records received so far, in the order of the declared suite, each with the control tests of its claim that have run, and what
        the nightly lanes say of it."""
        ordered = sorted(self._received, key=lambda payload: payload["order"])
        controls = self.controls
        found = [controlled(payload["record"], controls) for payload in ordered if payload["record"]]
        return [{**entry, **self._nightly.get(record.instance_key(entry["claim_id"], entry["params"]), {})} for entry in found]

    @property
    def controls(self):
        """Control tests that have run, one entry a test: the first one that did not pass, where several workers ran it."""
        found = {}
        for payload in sorted(self._received, key=lambda payload: payload["order"]):
            one = payload["control"]
            if one is not None and found.get(one["name"], {"passed": True})["passed"]:
                found[one["name"]] = one
        return list(found.values())

    def add(self, payload):
        """Take one test's payload and append its record, checked, to ``records.jsonl``.

        An instance that several workers decided (``--dist each``) has one record; that they disagree makes the run incomplete.
        """
        used, self._left_out = payload["used"], payload["left_out"]
        self._accelerator = self._accelerator or used["accelerator"]
        self._peaks[used["process"]] = [max(pair) for pair in zip(used["peaks_mb"], self._peaks.get(used["process"], (0.0, 0.0)), strict=True)]
        entry = payload["record"]
        if entry:
            record.validate(entry)
            first = self._decided.setdefault(record.instance_key(entry["claim_id"], entry["params"]), entry)
            if first is not entry:
                if any(entry[name] != value for name, value in first.items() if name != "duration_s"):
                    self._problem(f"workers disagree about {wording.title(entry)}, the evidence that came first is kept")
                return
        self._received.append(payload)
        if entry:
            if self.folder is None:
                self._open()
            self._write_arrays(payload["arrays"])
            with (self.folder / "records.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(record.dumps(entry) + "\n")

    def _write_arrays(self, arrays):
        for digest, content in arrays.items():
            path = self.folder / record.ARRAYS / f"{digest}.npy"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.write_bytes(base64.b64decode(content))

    def _open(self):
        self.folder = self.partial_folder
        self.folder.mkdir(parents=True)
        self.problems.append("the run ended before it was finished")
        self._write_identity(exit_code=None, partial_families=False)
        self.problems.pop()

    def follow(self, lanes, *, complete):
        """Have the nightly lanes (`reports.nights.lanes.Lanes`) compare the records and add to what they keep."""
        if self.folder is None:
            self._open()
        records = self.records
        lanes.follow(self._identity(exit_code=None, partial_families=False), records, self.folder, complete and not self.problems)
        for entry in records:
            self._nightly[record.instance_key(entry["claim_id"], entry["params"])] = {name: entry[name] for name in ("reproduced", "replicated")}

    def finish(self, *, problems, exit_code, partial_families):
        """Write the run directory and its report.

        Parameters
        ----------
        problems : list of str
            Why the evidence is incomplete; empty when it is complete.
        exit_code : int
        partial_families : bool
            Whether less than the declared suite was collected.

        Returns
        -------
        pathlib.Path
            The finished directory.
        """
        if self.folder is None:
            self._open()
        self.problems += problems
        tables = self._write_tables()
        artifacts = self._write_artifacts()
        self._write_json("evidence.json", adjust(self.records))
        self._write_identity(exit_code=exit_code, partial_families=partial_families, files=sorted(tables + artifacts))
        page.render(self.folder, {key: one for payload in self._received for key, one in payload["drawings"].items()})
        return self._settle()

    def _settle(self):
        final = self.options.out / (self.name if not self.problems else f"{self.name}-incomplete")
        self.folder.rename(final)
        self.folder = final
        if not self.problems:
            _point_latest(self.options.out, final.name)
        return final

    def _write_identity(self, **ended):
        self._write_json("run.json", record.validate(self._identity(**ended), "run"))

    def _identity(self, *, exit_code, partial_families, files=()):
        about = self._about()
        memory, accelerator_memory = (max(peaks) for peaks in zip(provenance.peaks_mb(), *self._peaks.values(), strict=True))
        facts = {
            "schema_version": record.SCHEMA_VERSION,
            "name": self.name,
            "subject": {"name": self.options.subject_name, "source": self.options.subject, **about["subject"]},
            "data": about["data"],
            "profile": self.options.profile,
            "seed": self.options.seed,
            "alpha": self.options.alpha,
            "revision": self.options.revision,
            "command": self.command,
            "commit": provenance.commit(self.root),
            "versions": provenance.versions(),
            "machine": {**provenance.machine(), "accelerator": self._accelerator},
            "started": self.started.isoformat(timespec="seconds"),
            "duration_s": round(time.monotonic() - self._clock, 2),
            "peak_memory_mb": memory,
            "peak_accelerator_memory_mb": accelerator_memory or None,
            "processes": max(1, len(self._peaks)),
            "expectations": str(self.options.expectations) if self.options.expectations else None,
            "partial_families": partial_families,
            "left_out": [dict(zip(("hypothesis", "tier", "instances"), family, strict=True)) for family in self._left_out],
            "declarations": {entry["claim_id"]: entry["declaration"]["hash"] for entry in self.records},
            "controls": self.controls,
            "counts": dict(Counter(entry["verdict"] for entry in self.records)),
            "complete": not self.problems,
            "problems": list(self.problems),
            "exit_code": exit_code,
            "files": list(files),
        }
        return hidden_in(facts)

    def _about(self):
        merged = {"subject": {}, "data": {}}
        for payload in sorted(self._received, key=lambda payload: payload["order"]):
            for part, facts in payload["about"].items():
                for name, value in facts.items():
                    if merged[part].setdefault(name, value) != value and part == "subject":
                        self._problem(f"tests disagree about the subject's {name}")
        return merged

    def _problem(self, sentence):
        if sentence not in self.problems:
            self.problems.append(sentence)

    def _write_tables(self):
        tables = defaultdict(lambda: ({}, {}))
        for payload in self._received:
            for table in payload["tables"]:
                columns, rows = tables[table["name"]]
                columns.update(dict.fromkeys(table["columns"]))
                for values in table["rows"]:
                    row = dict(zip(table["columns"], values, strict=True))
                    rows.setdefault(record.dumps(row, sort_keys=True), row)
        for name, (columns, rows) in tables.items():
            columns = list(columns)
            ordered = sorted(rows.values(), key=lambda row: [_sortable(row.get(column)) for column in columns])
            with (self.folder / name).open("w", encoding="utf-8", newline="") as out:
                if name.endswith(".jsonl"):
                    out.writelines(record.dumps(row) + "\n" for row in ordered)
                else:
                    writer = csv.DictWriter(out, columns, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(ordered)
        return list(tables)

    def _write_artifacts(self):
        artifacts = {}
        for payload in sorted(self._received, key=lambda payload: payload["order"]):
            for artifact in payload["artifacts"]:
                name, content = artifact["name"], artifact["content"]
                if name not in artifacts:
                    artifacts[name] = content
                elif isinstance(content, dict) and isinstance(artifacts[name], dict):
                    artifacts[name] = {**content, **artifacts[name]}
                elif artifacts[name] != content:
                    self._problem(f"tests disagree about {name}")
        for name, content in artifacts.items():
            if isinstance(content, str):
                (self.folder / name).write_text(content, encoding="utf-8")
            else:
                self._write_json(name, content)
        return list(artifacts)

    def _write_json(self, name, content):
        """Write a file whole or not at all: a disk that is full must not leave half of it in the place of what was there."""
        fresh = self.folder / f".{name}.new"
        fresh.write_text(record.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, self.folder / name)


def controlled(entry, controls):
    """A record with the control tests of its claim beside its own controls; one that did not pass makes it invalid."""
    mine = [one for one in controls if entry["claim_id"] in one["claims"]]
    if not mine:
        return entry
    added = [
        {"name": one["name"], "kind": one["kind"], "passed": one["passed"], "value": None, "expected": "to pass", "detail": one["detail"]} for one in mine
    ]
    entry = {**entry, "controls": entry["controls"] + added}
    failed = [f"the {one['kind']} control {one['name']} did not pass: {one['detail']}" for one in mine if not one["passed"]]
    if not failed or entry["outcome"] in ("skipped", "crashed"):
        return entry
    return {**entry, "verdict": "invalid", "outcome": "decided", "reason": "; ".join([*failed, entry["reason"]])}


def adjust(records):
    """Records with Holm-adjusted p-values over each declared family.

    Instances of the family that were not run, or have no p-value, count as p = 1: the adjustment can only
    be stricter for it.
    """
    adjusted = {}
    families = defaultdict(list)
    for index, entry in enumerate(records):
        if entry["tier"] == "confirmatory" and entry["p_value"] is not None:
            families[entry["hypothesis"]].append(index)
    for indices in families.values():
        size = max(len(indices), *(records[index]["family_size"] for index in indices))
        raw = [records[index]["p_value"] for index in indices] + [1.0] * (size - len(indices))
        adjusted.update(zip(indices, (float(value) for value in stats.holm(raw)), strict=False))
    return [record.validate({**entry, "p_holm": adjusted.get(index)}) for index, entry in enumerate(records)]


def exit_code(base, *, records, lost, failures, hopeless, inconclusive, regressions=0):
    """pytest's exit code for what a run found.

    Parameters
    ----------
    base : int
        pytest's own code.
    records : list of dict
    lost : bool
        Whether an expected claim has no teardown report.
    failures : int
        Failed reports that are no claim verdict (crashes, ordinary tests, unexpected support).
    hopeless : bool
        Whether there was no subject to measure, or nowhere to keep evidence.
    inconclusive : {"fail", "warn"}
    regressions : int
        Claims that are worse than their baseline (`reports.nights.baselines`).

    Returns
    -------
    int
        3 evidence lost, nowhere to keep it or no subject, 1 refuted or failing, 11 worse than the baseline, 10 only inconclusive or invalid, 0;
        pytest's own 2 (interrupted), 4 (usage) and 5 (nothing collected) stay.
    """
    if hopeless:
        return EVIDENCE_LOST
    if base not in (0, 1):
        return base
    if lost:
        return EVIDENCE_LOST
    gating = [entry for entry in records if entry["tier"] == "confirmatory" and entry["outcome"] in ("decided", "skipped")]
    if failures or any(entry["verdict"] == "refuted" for entry in gating):
        return REFUTED_OR_FAILED
    if regressions:
        return REGRESSED
    if inconclusive == "fail" and any(entry["verdict"] in ("inconclusive", "invalid") for entry in gating):
        return ONLY_UNDECIDED
    return 0


def _sortable(value):
    if value is None:
        return (2, 0, "")
    if isinstance(value, (bool, int, float)):
        return (0, value, "")
    return (1, 0, value if isinstance(value, str) else record.dumps(value))


def _point_latest(out, name):
    """Put ``latest`` in place in one step: another run may do the same at the same time."""
    latest, fresh = out / "latest", out / f".latest-{name}"
    try:
        fresh.symlink_to(name, target_is_directory=True)
    except OSError:  # no links here
        fresh.write_text(name + "\n", encoding="utf-8")
    os.replace(fresh, latest)
