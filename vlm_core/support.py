"""The support matrix: which capability holds for which family, as the conformance suite found it.

``python -m vlm_core.support``   run the conformance suite and write the installed transformers' section of ``SUPPORT.md``
``CLAIMS``                       the capabilities, by the short name that heads their column
``read_matrix()``                ``SUPPORT.md`` as ``{version: {(family, capability): verdict}}``
``read_digests()``               the suite that each section was written by; ``suite_digest()`` is the one that is here

A verdict is ``"yes"``, ``"no: <reason>"``, ``"not applicable: <reason>"``, or says how far it holds: ``"eager only: <reason>"``. The suite
attaches it to each of its tests as a property, which is read here from pytest's JUnit report; sections of other transformers versions
are kept as they are: an environment with one of them rewrites its own. Each test also compares its own verdict with its cell, so a
section that is out of date fails the suite under its version, without a second run. A section of another version cannot be run again
here: it is out of date as soon as the suite's source is another than the one it was written by.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

__all__ = [
    "CLAIMS", "MATRIX", "contradiction", "outcome_property", "read_digests", "read_matrix", "render", "suite_digest", "this_version",
    "write_matrix",
]  # fmt: skip

MATRIX = Path(__file__).with_name("SUPPORT.md")
SUITE = Path(__file__).with_name("tests") / "conformance"
STANDS_ON = ("family_models.py", "family_processors.py", "layout_oracle.py", "oracles.py", "tiny.py")
"""Beside the suite: the models, processors and oracles that its verdicts rest on."""
WRITING = "VLM_CORE_SUPPORT_WRITING"

CLAIMS = {
    "no-op": "an empty plan is bit-identical to the plain model, with eager attention and sdpa",
    "bfloat16": "no-op and zeroed heads are exact in bfloat16 too; knock-outs, image KV, dropped tokens, steering, patches and captured "
    "mass are float32's within three times the plain model's own rounding",
    "float16": "the same in float16",
    "padding": "left and right padding give the same numbers under interventions",
    "observers": "left and right padding show every observer the same numbers, also after tokens were dropped or merged",
    "hidden states": "`output_hidden_states` shows the intervened stream",
    "restored": "nothing is left behind after an exception, nothing reaches other threads",
    "causality": "later tokens change nothing before them (but inside a prompt that sees itself both ways)",
    "two-way image": "image tokens see each other both ways in the row engine, as in the model",
    "zero head": "zeroing a head equals an output-projection pre-hook exactly",
    "gate 1": "keeping every head is the plain model exactly, in a batch whose other row loses them",
    "head sum": "contributions of the heads sum to the attention output",
    "mass": "captured attention mass of one query, of some and of all equals `output_attentions`, with eager attention and sdpa",
    "knock-out": "a knock-out equals an explicit mask on the plain eager model",
    "nothing out": "knocking out nothing is the identity",
    "image KV": "image-KV replacement touches no other key, value or head; for one query, no other position; for all, none before "
    "the image",
    "drop": "dropped image tokens leave the sequence, text is as if it could not see them",
    "merge": "merged image tokens equal their size-weighted means on a plain model whose sequence hooks make shorter",
    "replace tokens": "replaced tokens equal a hook on what enters the first layer",
    "patch": "a clean run's activations undo a corruption, at every site",
    "steer": "steering equals a hook that adds the direction",
    "rows": "the row engine equals the whole model under every intervention",
    "resume": "rows start from the stored residual stream at the first layer that they touch",
    "shared prefix": "rows that touch only the question run it alone, on the prefix's stored keys and values",
    "appended": "appended answer tokens equal a longer prompt",
    "images": "several images per prompt, captured together and measured as each alone",
    "generate": "`generate()` under interventions equals one forward pass after another, each with the cache and each without",
    "generate padded": "`generate()` under interventions from prompts padded on the left equals each prompt alone",
    "spans": "image tokens are where the layout of a real processor's prompt says",
    "boxes": "exactly those image tokens change whose boxes hold the changed pixels",
    "self-check": "the self-check at load passes",
}

_HEAD = """# Support

Which capability of the instrument holds for which family: found by the conformance suite (`vlm_core/tests/conformance`)
on tiny random-weight models built from configs, float32 unless said otherwise, on the CPU. Written by `python -m vlm_core.support`.
A family is a row of `vlm_core/tests/family_models.py`; how it is declared is in `vlm_core/families/family.py`. What is not a plain `yes`
carries its reason below the table; a plan that asks for what is `no` is refused in that sentence; `-` was not asked yet under that version.

Each section was written under its own version, by the suite whose digest it names (SHA-256 of its sources, not of the library's: the
section of the version at hand is compared with the library in every run of the tests, the others when they are written). The package asks
for the version from which on the rest is tested too, training above all.
"""


def this_version() -> str:
    """Major and minor version of the installed transformers."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def suite_digest() -> str:
    """What tells this conformance suite from another: SHA-256 of its sources, 12 hexadecimal digits."""
    sources = [*sorted(SUITE.glob("*.py")), *(SUITE.with_name(name) for name in STANDS_ON)]
    found = hashlib.sha256()
    for source in sources:
        found.update(f"{source.name}\n".encode() + source.read_text(encoding="utf-8").encode())
    return found.hexdigest()[:12]


def outcome_property(family: str, capability: str, verdict: str) -> tuple[str, str]:
    """Name and value under which a test records its verdict."""
    return "support", f"{family}|{capability}|{verdict}"


def contradiction(family: str, capability: str, verdict: str) -> str | None:
    """What is wrong with the cell of ``SUPPORT.md`` for a verdict; None where they agree, or while it is being written.

    A transformers version without a section yet is held to the newest section: what worked must go on working.
    """
    if WRITING in os.environ:
        return None
    matrix = read_matrix()
    newest = next(iter(matrix), None)
    stated = matrix.get(this_version(), matrix.get(newest, {})).get((family, capability))
    if stated == verdict:
        return None
    return (
        f"{MATRIX.name} says '{stated}' for {family} and {capability} under transformers {this_version()}, the test "
        f"'{verdict}': run python -m vlm_core.support"
    )


def render(matrix: dict[str, dict[tuple[str, str], str]], digests: dict[str, str]) -> str:
    """``SUPPORT.md`` as text; versions newest first."""
    listed = "\n".join(f"* **{name}**: {claim}" for name, claim in CLAIMS.items())
    versions = sorted(matrix, key=lambda version: tuple(map(int, version.split("."))), reverse=True)
    return "\n".join([_HEAD, listed, *(_section(version, matrix[version], digests[version]) for version in versions)]) + "\n"


def _section(version: str, cells: dict[tuple[str, str], str], digest: str) -> str:
    families = list(dict.fromkeys(family for family, _ in cells))
    notes: dict[str, int] = {}

    def cell(verdict: str | None) -> str:
        if verdict is None or verdict == "yes":
            return verdict or "-"
        kind = verdict.partition(": ")[0]
        return f"{'n/a' if kind == 'not applicable' else kind} [{notes.setdefault(verdict, len(notes) + 1)}]"

    rows = [
        f"| {family} | " + " | ".join(cell(cells.get((family, name))) for name in CLAIMS) + " |" for family in families
    ]
    return "\n".join(
        [
            f"\n## transformers {version}\n",
            f"Suite `{digest}`\n",
            f"| family | {' | '.join(CLAIMS)} |",
            "|---" * (len(CLAIMS) + 1) + "|",
            *rows,
            "",
            *(f"[{number}] {verdict}  " for verdict, number in notes.items()),
        ]
    )


def _sections(text: str | None) -> dict[str, list[str]]:
    if text is None:
        text = MATRIX.read_text() if MATRIX.exists() else ""
    parts = (part.splitlines() for part in re.split(r"^## transformers ", text, flags=re.MULTILINE)[1:])
    return {version.strip(): lines for version, *lines in parts}


def read_digests(text: str | None = None) -> dict[str, str]:
    """Digest of the suite that each section was written by; ``""`` where a section names none."""
    named = {version: [re.match(r"Suite `(\w+)`", line) for line in lines] for version, lines in _sections(text).items()}
    return {version: next((found[1] for found in matches if found), "") for version, matches in named.items()}


def read_matrix(text: str | None = None) -> dict[str, dict[tuple[str, str], str]]:
    """What ``SUPPORT.md`` (or its ``text``) says; empty where there is none."""
    matrix = {}
    for version, lines in _sections(text).items():
        notes = dict(match.groups() for line in lines if (match := re.match(r"\[(\d+)\] (.*\S)", line)))
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        cells = matrix[version] = {}
        for family, *row in table[2:]:
            for name, cell in zip(table[0][1:], row, strict=True):
                if cell == "-":
                    continue
                note = re.search(r"\[(\d+)\]", cell)
                cells[family, name] = notes[note[1]] if note else cell
    return matrix


def write_matrix() -> int:
    """Run the conformance suite and write the section of the installed transformers; the suite's exit status."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(SUITE), f"--junitxml={report}", "-o", "junit_family=xunit1"]
        status = subprocess.run(command, env={**os.environ, WRITING: "1"}, cwd=SUITE.parents[2]).returncode
        if status != 0:
            print(f"the conformance suite failed: {MATRIX.name} is left as it was", file=sys.stderr)
            return status
        found = [
            entry.get("value", "").split("|", 2)
            for entry in ElementTree.parse(report).iter("property")
            if entry.get("name") == "support"
        ]
    matrix, digests = read_matrix(), read_digests()
    families = list(dict.fromkeys(family for family, _, _ in found))
    verdicts = {(family, capability): verdict for family, capability, verdict in found}
    matrix[this_version()] = {(family, name): verdicts[family, name] for family in families for name in CLAIMS}
    digests[this_version()] = suite_digest()
    MATRIX.write_text(render(matrix, digests))
    return 0


if __name__ == "__main__":
    sys.exit(write_matrix())
