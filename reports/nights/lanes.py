"""The two nightly lanes of a session: what its records are compared with, and what they add to.

``Lanes``  reads and reserves before anything is measured; compares and appends when all is measured
"""

from __future__ import annotations

from collections import Counter

import pytest

from reports import record, wording
from reports.nights import baselines, history, sparkline

_SHOWN = {"regression": "red", "drift": "yellow", "voided": "yellow"}
_STATES = ("identical", "within noise", "drift", "regression", "voided", baselines.NO_BASELINE)


class Lanes:
    """Of one session.

    Parameters
    ----------
    options : reports.options.Options

    Attributes
    ----------
    regressions : int
        Claim instances that fell, or moved beyond the noise.
    problem : str or None
        Why something that was to be kept could not be.
    lines : list of (str, str or None)
        For the terminal, with their colours.
    """

    def __init__(self, options):
        self.options = options
        self.regressions = 0
        self.problem = None
        self.lines = []
        self._baselines = self._night = None

    def prepare(self):
        """Read the baseline and take a shard; the seed that the run is to have.

        Raises
        ------
        pytest.UsageError
        """
        options, seed = self.options, self.options.seed
        try:
            if options.baseline is not None:
                self._baselines = baselines.load(options.baseline)
                if options.update_baseline == baselines.SAME_CODE and not self._baselines.entries:
                    raise ValueError(f"{options.baseline} holds no baseline yet: {baselines.SAME_CODE} runs the code of one again")
            if options.history is not None:
                shard, seed = history.reserve(options.history, options.seed if options.seed_given else None)
                self._night = history.Night(options.history, shard)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(str(error)) from None
        return seed

    def follow(self, identity, records, folder, complete):
        """Compare the records and append them; annotate them with ``reproduced`` and ``replicated``.

        Parameters
        ----------
        identity : dict
        records : list of dict
        folder : pathlib.Path
            Where the run's arrays are.
        complete : bool
            Whether nothing is missing: only then a baseline or a history is added to.
        """
        try:
            if self._baselines is not None:
                self._compare(identity, records, folder)
                if self._updates(records) and complete:
                    added = baselines.update(self.options.baseline, identity, records, folder, self.options.update_baseline)
                    self.lines.append((f"baseline: {wording.plural(added, 'claim')} added to {self.options.baseline}", None))
            if self._night is not None and complete:
                self._night.write(identity, records, folder)
                sparkline.leave(folder, history.load(self.options.history))
                self._replicated(records)
        except (OSError, ValueError) as error:
            self.problem = str(error)
        if not complete and (self._night is not None or self.options.update_baseline is not None):
            self.lines.append(("evidence is incomplete: nothing was added to the baseline or the history", "red"))

    def _updates(self, records):
        """Whether this run is to become the baseline: where a reason is given; for the reason that there is none, where nothing was compared."""
        if self.options.update_baseline == baselines.NONE_YET:
            return all(entry["reproduced"]["state"] == baselines.NO_BASELINE for entry in records)
        return self.options.update_baseline is not None

    def _compare(self, identity, records, folder):
        for entry in records:
            entry["reproduced"] = baselines.compare(self._baselines, identity, entry, folder)
        counts = Counter(entry["reproduced"]["state"] for entry in records)
        self.lines.append(("against the baseline: " + ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state]), None))
        for entry in records:
            state = entry["reproduced"]["state"]
            if state in _SHOWN:
                self.lines.append((f"{state}: {wording.title(entry)}: {entry['reproduced']['sentence']}", _SHOWN[state]))
        self.lines += [(sentence, "yellow") for sentence in baselines.unmatched(records)]
        if unseen := self._baselines.unseen(records):
            self.lines.append((f"{wording.plural(len(unseen), 'claim')} of the baseline not run: {wording.some(unseen)}", "yellow"))
        if not self._updates(records):
            self.regressions = counts["regression"]

    def _replicated(self, records):
        for entry in records:
            entry["replicated"] = self._night.outcomes[record.instance_key(entry["claim_id"], entry["params"])]
        self.lines.append((f"night {self._night.shard} (seed {self.options.seed}):", None))
        for entry in records:
            if entry["replicated"]["verdict"] is not None:
                self.lines.append((f"  {wording.title(entry)}: {entry['replicated']['sentence']}", None))
        self.lines += [(f"warning: {line}", "yellow") for line in self._night.warnings]
