"""What a claim test talks to.

A test asks the ``evidence`` fixture for a verdict (``evidence.decide``) and leaves tables, artefacts and
figures with it. The verdict becomes the pytest outcome; everything else travels, as one JSON string on the
test's teardown report, to the controller, which alone writes files.

``ClaimRefuted``, ``ClaimInconclusive``, ``ClaimInvalid``  the outcomes that are not support
``Evidence``                                             the fixture's object
"""

from __future__ import annotations

import base64
import re
import time

from reports import effects, record
from vlm_core import stats

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = {"run.json", "evidence.json", "records.jsonl", "report.html", "history.json"}


class ClaimRefuted(AssertionError):
    """The evidence contradicts the declared claim."""


class ClaimInconclusive(Exception):
    """The evidence decides the claim neither way."""


class ClaimInvalid(Exception):
    """The evidence cannot bear on the claim: a control failed, no room, too few clusters."""


RAISED_BY = {"refuted": ClaimRefuted, "inconclusive": ClaimInconclusive, "invalid": ClaimInvalid}


class Evidence:
    """Evidence of one test, claim or not.

    Parameters
    ----------
    instance : reports.claims.ClaimInstance or None
        The claim instance the test is marked with.
    family_size : int
        Instances of the claim's hypothesis and tier in the declared suite.
    seed : int
        Seed of the resampling.
    reproduce : str
        Command that runs this test alone.
    """

    def __init__(self, instance, *, family_size=1, seed=0, reproduce=""):
        self.instance = instance
        self.family_size = family_size
        self.seed = seed
        self.reproduce = reproduce
        self.record = None
        self.started = time.monotonic()
        self._figures = []
        self._drawings = {}
        self._tables = []
        self._artifacts = []
        self._arrays = {}
        self._about = {"subject": {}, "data": {}}

    @property
    def alpha(self):
        """One-sided error rate of each bound of the test's claim: its family's, shared equally by the instances of the family."""
        return self.instance.claim.alpha / self.family_size

    def decide(self, claim, effect, *, clusters=None, seeds=None, baseline=None, controls=(), p_value=None, details=None, **options):
        """Decide the claim on per-item effects and make its verdict the test's outcome.

        Parameters
        ----------
        claim : vlm_core.stats.Claim
            The declaration the test is marked with.
        effect : array, shape [item], or vlm_core.stats.Estimate
            Paired effect per item (per item and seed when `seeds` is given), or a statistic with its own bounds.
        clusters : array, shape [item]
            Needed for effects per item.
        seeds : array, shape [item], optional
        baseline : vlm_core.stats.Baseline, optional
        controls : sequence of vlm_core.stats.Control
        p_value : float, optional
            A p-value the declaration asks for (Monte-Carlo, Page's trend test).
        details : mapping, optional
            Further numbers for the reader, NaN and infinities kept; arrays of 16 KiB or more go into files of their own.
            ``details["literature"]`` with ``published`` and ``where`` fills the literature table.
        **options
            Passed on to `vlm_core.stats.decide` (``bounds``).

        Returns
        -------
        vlm_core.stats.Decision
            For a supported claim, and for any exploratory one: those never gate.

        Raises
        ------
        ClaimRefuted, ClaimInconclusive, ClaimInvalid
        """
        if self.instance is None:
            raise LookupError(f"deciding {claim.id} needs @pytest.mark.claim({claim.id}) on the test")
        if claim != self.instance.declared:
            raise ValueError(f"the test is marked with {self.instance.declared.id} but decides {claim.id}")
        if self.record is not None:
            raise ValueError(f"{self.instance.title} is decided already: one verdict per claim instance")
        bounds = None if claim.test.kind == "trend" else options.get("bounds", (-1.0, 1.0))
        decision = stats.decide(
            self.instance.claim,
            effect,
            clusters=clusters,
            seeds=seeds,
            family_size=self.family_size,
            baseline=baseline,
            controls=controls,
            p_value=p_value,
            rng=self.seed,
            **options,
        )
        self.record = record.validate(
            record.build(
                self.instance,
                decision,
                details=record.to_builtins(dict(details or {}), f"{claim.id} details", keep=record.NON_FINITE, arrays=self._arrays),
                figures=self._figures,
                effects=effects.store(effects.pack(effect, clusters, seeds, bounds), self._arrays),
                reproduce=self.reproduce,
                duration_s=time.monotonic() - self.started,
            )
        )
        verdict = self.record["verdict"]
        if verdict != "supported" and claim.tier == "confirmatory":
            raise RAISED_BY[verdict](f"{self.instance.title}: {self.record['reason']}")
        return decision

    def table(self, name, frame):
        """Leave rows for the run's CSV `name`; rows of all tests are joined, duplicates dropped; NaN is an empty cell."""
        self._add_rows(name, frame, ".csv")

    def jsonl(self, name, frame):
        """Leave rows for the run's JSON-lines file `name`."""
        self._add_rows(name, frame, ".jsonl")

    def _add_rows(self, name, frame, suffix):
        _check_name(name, suffix)
        columns = [str(column) for column in frame.columns]
        rows = frame.astype(object).to_numpy().tolist()
        self._tables.append({"name": name, "columns": columns, "rows": record.to_builtins(rows, name, keep=record.INFINITE)})

    def artifact_json(self, name, content):
        """Leave a JSON artefact; mappings of the same name are merged over tests."""
        _check_name(name, ".json")
        self._artifacts.append({"name": name, "content": record.to_builtins(content, name)})

    def document(self, name, text):
        """Leave a Markdown text; tests that leave one of the same name must agree about it."""
        _check_name(name, ".md")
        if not isinstance(text, str):
            raise ValueError(f"{name!r} is a {type(text).__name__}: a document is a text")
        self._artifacts.append({"name": name, "content": text})

    def figure(self, kind, data, *, title, caption, alt):
        """Leave a figure of a registered kind; see ``reports.drawings`` for the data each takes.

        A claim that is not supported raises in `decide`: draw first, then decide. The figure is drawn
        here, so that data that cannot be drawn fails the test that made it; the run's page takes this drawing.
        """
        from reports import figures

        for name, text in (("title", title), ("caption", caption), ("alt", alt)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"figure {kind!r} needs a non-empty {name}")
        data = record.to_builtins(data, f"figure {title!r}")
        if kind == "accuracy_bars" and isinstance(data, list):
            data = {"bars": data}
        figures.check(kind, data)
        self._drawings[figures.key(kind, data)] = figures.draw(kind, data)
        self._figures.append({"kind": kind, "title": title, "caption": caption, "alt": alt, "data": data})

    def about(self, subject=None, data=None):
        """State what was measured on what: subject identity, data hashes, baselines per task.

        ``data["baseline"]`` is a list of ``{task, accuracy, lower, upper, blind, chance, majority, n}``.
        """
        for part, facts in (("subject", subject), ("data", data)):
            self._about[part].update(record.to_builtins(dict(facts or {}), f"about {part}"))

    def payload(self):
        """Everything this test leaves for the controller, as builtins."""
        return {
            "record": self.record,
            "tables": self._tables,
            "artifacts": self._artifacts,
            "arrays": {digest: base64.b64encode(content).decode("ascii") for digest, content in self._arrays.items()},
            "figures": self._figures if self.record is None else [],
            "drawings": self._drawings,
            "about": self._about,
        }


def _check_name(name, suffix):
    if not _FILE_NAME.fullmatch(name) or not name.endswith(suffix) or name in _RESERVED:
        raise ValueError(f"{name!r} is no file name for a run: expected a plain name ending in {suffix}")
