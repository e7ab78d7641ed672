"""Numbers and lists as a reader wants them, on the page and in the terminal."""

from __future__ import annotations

from reports.record import describe_params


def number(value):
    """Two decimals from 0.1 up, three below, none above 100: never ``0.8333333``."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 100:
        text = f"{value:,.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.0995 or size < 0.0005:
        text = f"{value:.2f}"
    else:
        text = f"{value:.3f}"
        text = text[:-1] if text.endswith("0") else text
    return text.lstrip("-") if not text.strip("-0.") else text


def with_unit(value, unit=""):
    """Three digits and a prefix: ``1.09 M`` without a unit, ``4.36 MB``, ``2.1 GFLOP``, ``3.4 ms``."""
    if value is None:
        return "–"
    short = {"bytes": "B"}.get(unit, unit)
    steps = ("", "k", "M", "B") if not unit else ("", "k", "M", "G", "T", "P", "E")
    if unit == "s" and 0 < abs(value) < 1:
        value, steps = (value * 1e3, ("m",)) if abs(value) >= 1e-3 else (value * 1e6, ("µ",))
    elif unit == "s":
        steps = ("",)
    power = 0
    while power + 1 < len(steps) and abs(value) >= 999.5 * 1000**power:
        power += 1
    number_ = f"{value / 1000**power:.3g}"
    number_ = f"{value / 1000**power:,.0f}" if "e" in number_ else number_
    return f"{number_} {steps[power]}{short}".rstrip()


def decimals_of(half):
    """Decimals that an interval of this half width deserves."""
    return next((count for count, least in enumerate((50, 0.5, 0.03, 0.003)) if half >= least), 3)


def interval_numbers(record):
    """Estimate and bounds with the decimals their interval deserves: ``("0.12", "0.06", "0.17")``."""
    values = [record[name] for name in ("estimate", "lower", "upper")]
    known = [value for value in values if value is not None]
    decimals = decimals_of((max(known) - min(known)) / 2 if known else 0.0)
    texts = ["–" if value is None else f"{value:,.{decimals}f}" for value in values]
    return tuple(text if text.strip("-0.") else text.lstrip("-") for text in texts)


def p_value(value):
    """``0.012``; never ``0.000``."""
    if value is None:
        return "–"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def test_kind(record):
    """The kind of test without spelling: ``superiority``, ``noninferiority``, ``equivalence``, ``trend``."""
    return record["test"]["kind"].lower().replace("-", "").replace("_", "").replace(" ", "")


def threshold_text(record, *, ascii_only=False):
    """``> 0.10``, ``< 0.05``, ``within ±0.03``."""
    kind, threshold = test_kind(record), record["threshold"]
    if kind == "trend":
        return "> 0"
    if threshold is None:
        return ""
    if kind == "noninferiority":
        return f"< {number(threshold)}"
    if kind == "equivalence":
        return f"within {'+/-' if ascii_only else '±'}{number(threshold)}"
    return f"> {number(threshold)}"


def short_name(claim_id):
    """``H1.object_tokens`` as ``object tokens``."""
    return claim_id.partition(".")[2].replace("_", " ") or claim_id


def title(record):
    shown = describe_params(record["params"])
    return f"{record['claim_id']} [{shown}]" if shown else record["claim_id"]


def plural(count, noun):
    return f"{count} {noun}" + ("" if count == 1 else "s")


def some(names, most=4):
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def listing(names):
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def other_alpha(alpha):
    """Said wherever a run's verdicts are shown that were decided at another alpha than declared."""
    return f"Decided at a family-wise alpha of {alpha:g} (--claims-alpha) in place of the declared one."


def little_was_measured(profile):
    """Said wherever the verdicts of a run are shown that was not meant to decide much; empty of other runs."""
    if profile != "smoke":
        return ""
    return "A smoke run: it shows that everything works, on so few items that most claims stay open or cannot be tested. For verdicts, run the default profile."
