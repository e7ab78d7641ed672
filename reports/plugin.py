"""The pytest adapter: options, markers, fixtures and hooks.

Load it from the root ``conftest.py`` (``pytest_plugins = ["reports.plugin"]``). It does nothing to tests
that carry no claim, and keeps Hypothesis from being imported where none of them uses it.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest

from reports import claims, controller, expectations, hooks, options, provenance, record, terminal
from reports.evidence import ClaimInconclusive, ClaimInvalid, ClaimRefuted, Evidence
from reports.nights import lanes
from vlm_core.secrets import hidden, hidden_in

_VERDICT_ERRORS = (ClaimRefuted, ClaimInconclusive, ClaimInvalid)
_ONLY_LOOKING = ("collectonly", "claims_list", "help", "markers", "showfixtures", "show_fixtures_per_test")
_OPTIONS = pytest.StashKey[options.Options]()
_FAMILIES = pytest.StashKey[dict]()
_LEFT_OUT = pytest.StashKey[dict]()
_WANTED = pytest.StashKey[list]()
_INSTANCE = pytest.StashKey[claims.ClaimInstance]()
_CONTROL = pytest.StashKey[dict]()
_EVIDENCE = pytest.StashKey[Evidence]()
_ENDED = pytest.StashKey[tuple]()


def pytest_addhooks(pluginmanager):
    pluginmanager.add_hookspecs(hooks)


def pytest_addoption(parser):
    options.declare(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.option.claims_list:
        config.option.numprocesses = 0


def pytest_configure(config):
    for marker in claims.MARKERS:
        config.addinivalue_line("markers", marker)
    chosen = config.stash[_OPTIONS] = options.read(config)
    config.stash[terminal.PROGRESS] = terminal.Progress(config)
    if hasattr(config, "workerinput"):
        return
    measuring = not any(getattr(config.option, name, False) for name in _ONLY_LOOKING)
    declared = measuring and claims.declares_claims(claims.argument_paths(config))
    if declared:
        options.check_writable(chosen.out)
        _precheck(chosen)
        nightly = lanes.Lanes(chosen)
        config.option.claims_seed = nightly.prepare()
        chosen = nightly.options = config.stash[_OPTIONS] = dataclasses.replace(chosen, seed=config.option.claims_seed)
    if measuring:
        config.pluginmanager.register(controller.Controller(config, chosen, nightly if declared else None), "claims-controller")


def _precheck(chosen):
    from vlm_core import precheck_subject

    try:
        precheck_subject(chosen.subject, chosen.revision)
        if (chosen.device or "cpu", chosen.quantization) != ("cpu", None):
            _require_loadable(chosen)
    except Exception as error:
        if not _is_subject_error(error):
            raise
        raise pytest.UsageError(hidden(str(error))) from None


def _require_loadable(chosen):
    """Refuse a device or a quantization that cannot be had here, which only torch knows."""
    from vlm_core.subjects.load import require_loadable

    wanted = {name: value for name, value in chosen.loading.items() if name in ("device", "dtype", "quantization")}
    try:
        require_loadable(**wanted)
    except ValueError as error:
        raise pytest.UsageError(f"--claims-device and --claims-quantization: {error}") from None


def _is_subject_error(error):
    return any(base.__name__ == "SubjectError" for base in type(error).__mro__)


def _cannot_be_measured(error):
    return any(base.__name__ == "NotMeasurable" for base in type(error).__mro__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _unmeasured_is_skipped(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _unmeasured_is_skipped(item))


def _unmeasured_is_skipped(item):
    """What does not exist on the subject is not measured: a claim about it is invalid, with the reason, and no error."""
    try:
        return (yield)
    except Exception as error:
        if "evidence" in getattr(item, "fixturenames", ()) and _cannot_be_measured(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    config = session.config
    config.stash[_WANTED] = claims.widen(config)
    # --lf leaves tests out while it collects; its own deselection, after families are counted, is enough.
    plugin = config.pluginmanager.getplugin("lfplugin-collwrapper")
    if plugin is not None and claims.declares_claims(claims.argument_paths(config)):
        config.pluginmanager.unregister(plugin)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _read_claims(config, items)
    controls = {item: item.stash[_CONTROL] for item in items if _CONTROL in item.stash}
    yield
    kept = {item.stash[_INSTANCE].claim.id for item in items if _INSTANCE in item.stash}
    items += [item for item, control in controls.items() if item not in set(items) and kept.intersection(control["claims"])]


def _read_claims(config, items):
    found = claims.instances(items, config.stash[_OPTIONS].alpha)
    for item, instance in found.items():
        item.stash[_INSTANCE] = instance
    for item, control in claims.controls(items).items():
        item.stash[_CONTROL] = control
    for item in claims.requiring(items):
        if "_capabilities" not in item.fixturenames:
            item.fixturenames.insert(0, "_capabilities")
    config.stash[_FAMILIES] = claims.family_sizes(found)
    chosen = config.stash[_OPTIONS]
    if found and chosen.expectations:
        entries = expectations.load(chosen.expectations)
        expectations.apply(entries, found, profile=chosen.profile, whole_suite=not claims.is_partial(config))
    left_out = {item: instance for item, instance in found.items() if config.hook.pytest_claims_leaves_out(config=config, item=item)}
    config.stash[_LEFT_OUT] = claims.family_sizes(left_out)
    if config.stash.get(_WANTED, None):
        items[:], others = claims.select(items, config.stash[_WANTED])
        config.hook.pytest_deselected(items=others)
    in_a_worker = hasattr(config, "workerinput")  # where pytest-xdist takes a usage error for a crash
    if left_out and items and all(item in left_out for item in items) and not in_a_worker:
        raise pytest.UsageError(f"{items[0].nodeid}: the {chosen.profile} profile leaves this claim out")
    if left_out:
        others = [item for item in items if item in left_out]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=others)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if not session.config.option.claims_list:
        return None
    found = [item.stash[_INSTANCE] for item in session.items if _INSTANCE in item.stash]
    terminal.claims_list(session.config.pluginmanager.getplugin("terminalreporter"), found)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    # Its summary imports the whole library in every process, also where no test used it. A session with workers has theirs to tell.
    config = session.config
    tells = "hypothesis" in sys.modules or getattr(config.option, "dist", "no") != "no"
    if not tells and config.pluginmanager.has_plugin("hypothesispytest"):
        config.pluginmanager.unregister(name="hypothesispytest")


@pytest.fixture
def _capabilities(request):
    """What the test's ``requires`` markers ask of the subject, asked before anything else is measured."""
    subject = request.getfixturevalue("subject")
    for capability in claims.required(request.node):
        try:
            subject.anatomy.require(capability)
        except Exception as error:
            if not _cannot_be_measured(error):
                raise
            pytest.skip(str(error))


@pytest.fixture
def evidence(request):
    """Decide the test's claim and leave its tables and figures: see ``reports.evidence.Evidence``."""
    return _evidence_of(request.node)


@pytest.fixture(scope="session")
def progress(request):
    """``progress(label, done, total)``: shows in the terminal how far a measurement is."""
    return request.config.stash[terminal.PROGRESS]


@pytest.fixture(scope="session")
def claims_options(request):
    """The checked ``--claims-*`` options: subject, revision, profile, seed, out."""
    return request.config.stash[_OPTIONS]


def _evidence_of(item):
    if _EVIDENCE not in item.stash:
        config, instance = item.config, item.stash.get(_INSTANCE, None)
        chosen = config.stash[_OPTIONS]
        item.stash[_EVIDENCE] = Evidence(
            instance,
            family_size=max(1, config.stash[_FAMILIES][instance.claim.hypothesis, instance.claim.tier]) if instance else 1,
            seed=chosen.seed,
            reproduce=claims.command_alone(item, instance.nodeid, config, chosen.as_arguments()) if instance else "",
        )
    return item.stash[_EVIDENCE]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.user_properties = [(str(name), record.property_value(value)) for name, value in report.user_properties]
    instance = item.stash.get(_INSTANCE, None)
    error = call.excinfo.value if call.excinfo else None
    if _CONTROL in item.stash:
        _note_control(item, report, error)
    if instance is not None:
        if error is not None and _is_subject_error(error) and call.when == "setup":
            report.claims_stop = report.longrepr = hidden(str(error))
            item.session.shouldstop = "there is no subject to measure"
        _note_end(item, report, error)
    _hide_secrets(report)
    if report.when == "teardown" and (instance is not None or _EVIDENCE in item.stash or _CONTROL in item.stash):
        payload = hidden_in(_payload(item))
        report.claims_payload = record.dumps(payload)
        if payload["record"] is not None:
            report.user_properties += record.properties(payload["record"])
    return report


def _hide_secrets(report):
    """Tokens of the environment are in no traceback and no captured output."""
    report.sections = [(name, hidden(content)) for name, content in report.sections]
    said = "" if report.longrepr is None else str(report.longrepr)
    if hidden(said) != said:
        skipped = isinstance(report.longrepr, tuple)
        report.longrepr = (*report.longrepr[:2], hidden(report.longrepr[2])) if skipped else hidden(said)


@pytest.hookimpl(tryfirst=True)
def pytest_collectreport(report):
    _hide_secrets(report)


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message):
    said = str(warning_message.message)
    if hidden(said) != said:
        warning_message.message = warning_message.category(hidden(said))


def _note_control(item, report, error):
    """Note whether a control test passed; one that is skipped vouches for nothing."""
    control = item.stash[_CONTROL]
    if report.when == "setup":
        control |= {"passed": True, "detail": ""}
    if not report.passed and control["passed"]:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        control |= {"passed": False, "detail": f"not measured: {said}" if report.skipped else said}


def _note_end(item, report, error):
    """Note how the test ended, and put a verdict in the place of its traceback."""
    taken = item.stash.get(_EVIDENCE, None)
    decided = taken.record if taken else None
    if report.when == "teardown":
        return
    if isinstance(error, _VERDICT_ERRORS) and report.failed:
        report.longrepr = f"{decided['verdict'].upper()} {error}" if decided else str(error)
    if isinstance(error, pytest.skip.Exception):
        item.stash[_ENDED] = ("skipped", f"not measured: {error.msg}")
    elif error is not None and not isinstance(error, _VERDICT_ERRORS):
        first_line = (str(error).splitlines() or [""])[0]
        item.stash[_ENDED] = ("crashed", f"the test crashed before a verdict: {type(error).__name__}: {first_line}")
    elif report.when == "call" and decided is None:
        item.stash[_ENDED] = ("crashed", "the test ended without deciding its claim")
        report.outcome = "failed"
        report.longrepr = f"{item.stash[_INSTANCE].title} ended without a verdict: call evidence.decide"
    elif report.when == "call":
        if hasattr(report, "wasxfail"):
            decided["outcome"] = "expected"
        elif report.failed and error is None:
            decided["outcome"] = "unexpected"
        report.claims_status = {"verdict": decided["verdict"], "outcome": decided["outcome"]}


def _payload(item):
    instance = item.stash.get(_INSTANCE, None)
    taken = _evidence_of(item)
    payload = taken.payload()
    payload["control"] = item.stash.get(_CONTROL, None)
    outcome, reason = item.stash.get(_ENDED, (None, None))
    if instance is not None and outcome is not None:
        payload["arrays"] = {}
        figures = taken.record["figures"] if taken.record else payload["figures"]
        payload["record"] = record.validate(
            record.unmeasured(
                instance,
                outcome=outcome,
                reason=reason,
                reproduce=taken.reproduce,
                duration_s=time.monotonic() - taken.started,
                figures=figures,
            )
        )
    payload["left_out"] = [[*family, count] for family, count in sorted(item.config.stash[_LEFT_OUT].items())]
    payload["order"] = item.session.items.index(item) if instance is None else instance.order
    payload["used"] = {
        "process": getattr(item.config, "workerinput", {}).get("workerid", "main"),
        "peaks_mb": provenance.peaks_mb(),
        "accelerator": provenance.accelerator(),
    }
    return payload


def pytest_report_teststatus(report, config):
    if hasattr(report, "claims_stop"):
        return "", "", ""
    status = getattr(report, "claims_status", None)
    if status is None:
        return None
    verdict, outcome = status["verdict"], status["outcome"]
    reporter = config.pluginmanager.getplugin("terminalreporter")
    marks = terminal.SYMBOLS if reporter and terminal.can_show_symbols(reporter) else terminal.LETTERS
    word = verdict.upper()
    if outcome == "expected":
        return f"{verdict} as expected", marks[verdict].lower(), (f"{word} (expected)", {"green": True})
    if outcome == "unexpected":
        return f"{verdict} against expectation", "!", (f"{word} (not expected)", {"red": True})
    return verdict, marks[verdict], (word, {terminal.COLOURS[verdict]: True})
