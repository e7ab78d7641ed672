"""The table as Markdown.

``render(report, page)``   the machine, one table a subject, and how to read them; what ``page`` says of the other kind of device stays
"""

from __future__ import annotations

import re

from vlm_core.bench.report import Report, Row

__all__ = ["render"]

HEADER = """# How fast the instrument is

Written by `python -m vlm_core.bench --write`. One machine, one process, one run; in every round (or pair) each contestant works once on the
same prompt, in an order drawn anew. A figure is the median of the rounds' ratios, its spread their quartiles; times are medians.
"""
LEGEND = """
## How to read it
* **The same work.** Before anything is timed its result is compared with that of plain hooks, and what is timed is compared again; the
  column `difference` is the largest found (logits, log-probabilities or shares of attention). A result that differs has no figure. A no-op
  through vlm_core must be bit-identical.
* **Image-KV ablation** replaces a head's image keys and values by their means for text queries. Hooks and peers compute that head again for
  the text queries only, from the projections that the model has just returned, and write it into the output projection's input.
* **In favour of the others.** They get the prompt with its image features already merged, unembed the last token only, and are timed on a
  few heads a round (each costs them a full pass). vlm_core's sweep runs over all heads and starts from the image's pixels: processor,
  vision tower, scoring and the table are in its time. Every round has a new image.
* **Single forward passes** are of one prompt without padding. Every pass of vlm_core has a batch of its own, encoded before the clock starts
  as the prompt of the others is, so that nothing kept from one pass helps the next. Each of its works has plain passes of its own beside
  it, in an order drawn anew, until the median of the ratios is known to a tenth of what the bar is away from 1, or to 0.01 (95 %
  interval of the sign test), or for a hundred pairs a round or about two minutes of plain passes: the last column says how well it
  is known. A bar is met by the median; one that is no further away than that may be missed by another run.
* **Plain hooks, 8 rows a pass** batches eight interventions; shown without a bar.
* **Efficiency** counts the arithmetic that a sweep needs (the prompt once, then the touched layer and those after it, for tokens that can
  change, of the last layer what the token read needs; no vision tower, norms, softmax or scoring) and divides by what the decoder's own
  matrix products reach at the width that the sweep runs at.
* **Memory** is the peak of what PyTorch's allocator hands out, beyond that of a plain forward pass.
* `midsize` is a LLaVA with random weights: 576 image and 24 text tokens, 12 layers x 8 heads, width 512, feed-forward 1376, vocabulary
  1024. `7b` has the sizes of LLaVA 1.5 with 7 G parameters. `embedded` is the VLM that ships with this repository. Bars are those of float32 on a
  CPU; in bfloat16 results must agree to its own rounding.
"""


KINDS = ("CPU", "GPU")
NOT_MEASURED = "No {} has been measured with this version of the page: what is said here of others says nothing of one."


def render(report: Report, page: str = "") -> str:
    """The whole report as Markdown.

    Parameters
    ----------
    page : str
        An earlier page: its part about the kind of device that this report is not of is kept.
    """
    here = "CPU" if report.machine["gpu"] is None else "GPU"
    parts = {kind: _part(report) if kind == here else _kept(page, kind) for kind in KINDS}
    told = [f"<!-- {kind} -->\n\n# On a {kind}\n\n{parts[kind]}\n" for kind in KINDS]
    return "\n".join([HEADER, *told, f"<!-- end -->\n{LEGEND}"])


def _kept(page: str, kind: str) -> str:
    found = re.search(rf"<!-- {kind} -->\n\n# On a {kind}\n\n(.*?)\n+<!-- ", page, re.DOTALL)
    return found.group(1) if found else NOT_MEASURED.format(kind)


def _part(report: Report) -> str:
    found = report.machine
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    settings = (
        f"{report.settings['rounds']} rounds, {report.settings['clock']} clock, seed {report.settings['seed']}, {report.settings['dtype']}, "
        f"{report.seconds:.0f} s"
    )
    processor = f"{found['cpu']} ({found['instructions']}), {found['cores']} cores, {found['threads']} thread(s)"
    gpu = "" if found["gpu"] is None else f"{found['gpu']['name']} ({found['gpu']['gib']} GiB, CUDA {found['gpu']['cuda']}); "
    lines = [f"{found['date']}. {gpu}{processor}, load {found['load']} at the start. {found['system']}; {versions}. {settings}."]
    for subject in dict.fromkeys(row.subject for row in report.rows):
        lines += ["", f"## {subject}", "", "| work | | against | figure | spread | bar | met | times | difference | |", "|" + "---|" * 10]
        lines += [_line(row) for row in report.rows if row.subject == subject]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.figure is None:
        cells = [row.work, row.by, row.against, "–", "", _bar(row), _met(row), "", "", row.note]
    else:
        spread = "" if row.low is None else f"{_number(row, row.low)} to {_number(row, row.high)}"
        times = f"{_short(row.own)}, {_short(row.other)} {row.measured_in}"
        difference = "" if row.difference is None else f"{row.difference:.1g}"
        cells = [
            row.work,
            row.by,
            row.against,
            f"**{_number(row, row.figure)}** {row.unit}",
            spread,
            _bar(row),
            _met(row),
            times,
            difference,
            row.note,
        ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _bar(row: Row) -> str:
    return "" if row.bar is None else f"{'≥' if row.at_least else '≤'} {_number(row, row.bar)}"


def _met(row: Row) -> str:
    return {None: "", True: "yes", False: "**no**"}[row.met]


def _number(row: Row, value: float) -> str:
    if row.unit.startswith("of the"):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}" if value >= 2 else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
