"""Which collected tests are which claim instances.

An instance is a declared claim with the parameters of one test; ``(claim id, parameters)`` is its identity,
whatever its node id. Family sizes are counted over everything collected, before ``-k``, ``-m`` or ``--lf``
take anything away, so a verdict does not depend on what else was selected.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reports.record import describe_params, instance_key
from vlm_core.stats import CONTROL_KINDS

MARKERS = (
    "claim(CLAIM, **params): the test decides this declared claim",
    "control(CLAIM, ..., kind='negative'): the test is a control of these declared claims; where it does not pass they are invalid",
    "requires(capability, ...): what the test does to the subject; where its family lacks it the test is skipped and its claim invalid, with the reason",
)
_INVALIDATING = tuple(kind for kind in CONTROL_KINDS if kind not in ("condition", "info"))
_PLAIN_KEYWORD = re.compile(r"[\w:+\-.\[\]/]+")


@dataclass(frozen=True)
class ClaimInstance:
    """One declared claim with one set of parameters.

    Attributes
    ----------
    declared : vlm_core.stats.Claim
        As the test is marked with it.
    claim : vlm_core.stats.Claim
        As it is decided: with the run's alpha, where that was given.
    params : dict
        JSON builtins.
    nodeid : str
    order : int
        Position in the collected suite; records are written in this order.
    """

    declared: object
    claim: object
    params: dict = field(hash=False)
    nodeid: str
    order: int

    @property
    def key(self):
        return instance_key(self.claim.id, self.params)

    @property
    def title(self):
        shown = describe_params(self.params)
        return f"{self.claim.id} [{shown}]" if shown else self.claim.id


def instances(items, alpha=None):
    """Claim instances of collected items, as ``{item: ClaimInstance}``; with another family-wise ``alpha``, where one is given.

    Raises
    ------
    pytest.UsageError
        For a marker without a declaration, two claims on one test, or one instance on two tests.
    """
    found, seen = {}, {}
    for order, item in enumerate(items):
        marks = list(item.iter_markers("claim"))
        if not marks:
            continue
        if len(marks) > 1:
            raise pytest.UsageError(f"{item.nodeid} is marked with {len(marks)} claims: one test decides one claim")
        mark = marks[0]
        if len(mark.args) != 1 or not hasattr(mark.args[0], "as_dict"):
            raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.claim takes one declared Claim")
        params = dict(mark.kwargs)
        if hasattr(item, "callspec"):
            params.update(
                (name, value)
                for name, value in sorted(item.callspec.params.items())
                if value is None or type(value) in (str, int, float, bool)
            )
        declared = mark.args[0]
        claim = declared if alpha is None else dataclasses.replace(declared, alpha=alpha)
        instance = ClaimInstance(declared, claim, params, item.nodeid, order)
        if instance.key in seen:
            raise pytest.UsageError(f"{instance.title} is claimed by {seen[instance.key]} and by {item.nodeid}")
        seen[instance.key] = item.nodeid
        found[item] = instance
    return found


def controls(items):
    """Control tests of collected items, as ``{item: {"name", "claims", "kind"}}``.

    Raises
    ------
    pytest.UsageError
        For a marker that names no declared claim, an unknown kind, or a test that decides a claim itself.
    """
    found = {}
    for item in items:
        for mark in item.iter_markers("control"):
            kind = mark.kwargs.get("kind", "negative")
            if not mark.args or not all(hasattr(claim, "as_dict") for claim in mark.args) or mark.kwargs.keys() - {"kind"}:
                raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.control takes one or more declared Claims, and a kind")
            if kind not in _INVALIDATING:
                raise pytest.UsageError(f"{item.nodeid}: a control test's kind is one of {', '.join(_INVALIDATING)}, not {kind!r}")
            if item.get_closest_marker("claim") is not None or item in found:
                raise pytest.UsageError(f"{item.nodeid} is a control, once and for all its claims, and decides none itself")
            found[item] = {"name": item.nodeid.partition("::")[2], "claims": [claim.id for claim in mark.args], "kind": kind}
    return found


def required(item):
    """Capabilities that an item's ``requires`` markers name, the nearest marker last."""
    return [capability for mark in reversed(list(item.iter_markers("requires"))) for capability in mark.args]


def requiring(items):
    """The items that require capabilities of the subject.

    Raises
    ------
    pytest.UsageError
        For a marker that names no capability, or one that there is not.
    """
    found = [item for item in items if item.get_closest_marker("requires") is not None]
    if found:
        from vlm_core.families.family import CAPABILITIES

        for item in found:
            for mark in item.iter_markers("requires"):
                unknown = [name for name in mark.args if name not in CAPABILITIES]
                if unknown or mark.kwargs or not mark.args:
                    given = f", not {unknown[0]!r}" if unknown else ""
                    raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.requires takes capabilities of {', '.join(CAPABILITIES)}{given}")
    return found


def family_sizes(found):
    """Instances per (hypothesis, tier): what shares one error rate. Exploratory claims cost confirmatory ones nothing."""
    return Counter((instance.claim.hypothesis, instance.claim.tier) for instance in found.values())


def declares_claims(paths):
    """Whether any test module at or below the paths marks a test with a claim (read, not imported)."""
    return any(_marks_claim(module) for path in paths for module in _test_modules(Path(path)))


def _test_modules(path):
    if path.is_dir():
        return sorted({*path.rglob("test_*.py"), *path.rglob("*_test.py")})
    return [path] if path.suffix == ".py" and path.is_file() else []


def _marks_claim(module):
    source = module.read_text(encoding="utf-8", errors="replace")
    if "mark.claim" not in source:
        return False
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Attribute) and node.attr == "claim" and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
        for node in ast.walk(tree)
    )


def argument_paths(config):
    """The files and folders pytest was pointed at, node ids cut off."""
    base = config.invocation_params.dir
    return [base / argument.split("::")[0] for argument in config.args]


@dataclass(frozen=True)
class Wanted:
    """A part of the declared suite that pytest was pointed at: a path, and names inside it where a node id was given."""

    argument: str
    path: Path
    names: str

    def includes(self, item):
        if item.path != self.path and self.path not in item.path.parents:
            return False
        inside = item.nodeid.partition("::")[2]
        return not self.names or inside == self.names or inside.startswith((f"{self.names}[", f"{self.names}::"))


def widen(config):
    """Have the whole declared suite collected where a part of it is pointed at, and say which part that was.

    A family is what was declared, not what was asked for: ``pytest FILE::test[x]`` must not make its threshold easier. The rest of the
    suite is collected, counted and deselected.

    Returns
    -------
    list of Wanted, or None
        None where nothing needs deselecting.
    """
    roots = [(config.rootpath / name).resolve() for name in config.getini("testpaths")]
    wanted, arguments, whole = [], [], True
    for argument in config.args:
        location, bracket, rest = argument.partition("[")
        file, _, names = location.partition("::")
        path = (config.invocation_params.dir / file).resolve()
        root = next((root for root in roots if path == root or root in path.parents), None)
        if root is None or not path.exists() or not declares_claims([root]):
            return None
        wanted.append(Wanted(argument, path, names + bracket + rest if names else ""))
        arguments.append(str(root))
        whole = whole and path == root and not names
    if whole:
        return None
    config.args[:] = list(dict.fromkeys(arguments))
    return wanted


def select(items, wanted):
    """Split items into those that were asked for and the others.

    Raises
    ------
    pytest.UsageError
        Where an argument names nothing.
    """
    for part in wanted:
        if not any(part.includes(item) for item in items):
            raise pytest.UsageError(f"not found: {part.argument}")
    kept = [item for item in items if any(part.includes(item) for part in wanted)]
    return kept, [item for item in items if item not in set(kept)]


def is_partial(config):
    """Whether less than the declared suite (``testpaths``) was pointed at, so families are not whole."""
    if any("::" in argument for argument in config.args):
        return True
    given = [path.resolve() for path in argument_paths(config)]
    declared = [(config.rootpath / name).resolve() for name in config.getini("testpaths")]
    if not declared:
        return any(path.is_file() for path in given)
    return not all(any(root == path or path in root.parents for path in given) for root in declared)


def command_alone(item, nodeid, config, arguments):
    """The command that runs one test alone and leaves its family whole: what was pointed at, narrowed by ``-k``."""
    given = config.args if is_partial(config) else []
    if any("::" in argument for argument in given) or not _PLAIN_KEYWORD.fullmatch(item.name):
        return shlex.join(["python", "-m", "pytest", nodeid, *arguments])
    return shlex.join(["python", "-m", "pytest", *given, "-k", item.name, *arguments])
