"""How a report opens: what a run found of each hypothesis, in one line made from its verdicts and what was measured with them.

``line``  ``H2 holds in part: all visual tokens can go from layer 4 of 6 on (count undecided); the recipe saves 54 % of the operations``

A few claims are spoken of in words of their own, with the numbers of the records that support them; other claims are counted.
"""

from __future__ import annotations

from reports.wording import listing

__all__ = ["line"]

STATE = {"supported": "holds", "refuted": "is refuted", "inconclusive": "is undecided", "invalid": "could not be tested"}
OPEN = {"refuted": "refuted", "inconclusive": "undecided", "invalid": "not testable"}
FEW = 3  # cases that are named; more are counted


def line(name, cards):
    """What was found of one hypothesis.

    Parameters
    ----------
    name : str
        ``H1``.
    cards : list of dict
        Its confirmatory claims as `reports.summary.card` makes them: ``id``, and ``rows``, records each with ``where`` it was measured.

    Returns
    -------
    str
        Without a full stop.
    """
    rows = [row for card in cards for row in card["rows"]]
    if not rows:
        return f"{name} has exploratory claims only"
    verdicts = {row["verdict"] for row in rows}
    if len(verdicts) == 1:
        state = STATE[verdicts.pop()]
        if state != STATE["supported"]:
            return f"{name} {state}"
    else:
        state = "holds in part" if "supported" in verdicts else "is not supported"
    told = {card["id"]: card["rows"] for card in cards}
    parts = _statements(told) + _gains(told)
    others = [row for claim, found in told.items() if claim not in _spoken_of(told) for row in found]
    if others and state != STATE["supported"]:
        found = [row["verdict"] for row in others]
        against = f", {found.count('refuted')} refuted" if "refuted" in found else ""
        parts.append(f"{found.count('supported')} of {len(found)} {'other ' if parts else ''}verdicts supported{against}")
    return f"{name} {state}: {'; '.join(parts)}" if parts else f"{name} {state}"


# -- what is so, and where it is not -----------------------------------------------------------------------------------------------------------


def _measured(rows):
    """The records whose numbers are told: those that support the claim, else those that measured anything."""
    return [row for row in rows if row["verdict"] == "supported"] or [row for row in rows if row["estimate"] is not None]


def _told(rows, *names):
    """What measured records say under some names of their details, a list for each; None where one of them does not say it."""
    found = [[row["details"].get(name) for name in names] for row in _measured(rows)]
    return list(zip(*found, strict=True)) if found and all(value is not None for one in found for value in one) else None


def _range(values, show=str):
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _size(rows, show):
    """The estimates of records that support a claim; elsewhere what the claim asks for."""
    found = [row["estimate"] for row in rows if row["verdict"] == "supported"]
    return _range(found or [row["threshold"] for row in rows], show)


def _necessary(rows):
    told = _told(rows, "heads", "heads that see the image")
    heads = f"{_range(list(map(len, told[0])))} of {_range(told[1])}" if told else "a few"
    return f"taking the image from {heads} heads costs {_size(rows, lambda value: f'{100 * value:.0f}')} points"


def _sufficient(rows):
    told = _told(rows, "heads")
    numbers = list(map(len, told[0])) if told else []
    return f"{_range(numbers)} head{'s are' if max(numbers) > 1 else ' is'} enough" if numbers else "few heads are enough"


def _from_layer(what, otherwise):
    def say(rows):
        told = _told(rows, "layer", "depth")
        return f"{what} can go from {f'layer {_range(told[0])} of {_range(told[1])}' if told else otherwise} on"

    return say


RECIPE = "the recipe saves "


def _saves(what):
    return lambda rows: f"{RECIPE}{_size(rows, lambda value: f'{100 * value:.0f} %')} of {what}"


STATEMENTS = {
    "H1.necessity": _necessary,
    "H1.sufficiency": _sufficient,
    "H2.horizon": _from_layer("all visual tokens", "three quarters of the depth"),
    "H2.noninferior": _from_layer("half of the visual tokens", "mid-depth"),
    "H2.compute_flops": _saves("the operations"),
    "H2.compute_latency": _saves("the time"),
}
"""What each claim says, of its records."""
MORE = {"H2.noninferior": "H2.horizon"}
"""Of these claims the second says more: where it is supported the first is not spoken of."""


def _spoken_of(told):
    """The claims that have words of their own, in order."""
    return [claim for claim in STATEMENTS | GAINS if claim in told and not (claim in MORE and _supported(told.get(MORE[claim], ())))]


def _supported(rows):
    return any(row["verdict"] == "supported" for row in rows)


def _statements(told):
    """What the claims say, those with the same exceptions together, and those that nothing supports last."""
    so, not_so = {}, {}
    for claim in _spoken_of(told):
        if claim in STATEMENTS:
            rows, say = told[claim], STATEMENTS[claim]
            supported = _supported(rows)
            (so if supported else not_so).setdefault((_exceptions if supported else _unsupported)(rows), []).append(say(rows))
    return [_joined(said) + (f" ({exceptions})" if exceptions else "") for exceptions, said in so.items()] + [
        f"that {_joined(said)} {how}" for how, said in not_so.items()
    ]


def _joined(said):
    """Several statements as one, what the recipe saves said once."""
    saved = [one.removeprefix(RECIPE) for one in said if one.startswith(RECIPE)]
    others = [one for one in said if not one.startswith(RECIPE)]
    return listing([*others, RECIPE + listing(saved)] if saved else others)


def _by_verdict(rows):
    """Where records that do not support the claim are, by the word for their verdict."""
    places = {word: [row["where"] for row in rows if row["verdict"] == verdict] for verdict, word in OPEN.items()}
    return {word: found for word, found in places.items() if found}


def _exceptions(rows):
    """``count undecided``; where many are, ``color and needle only`` or ``in 4 of 8 cases``."""
    places = _by_verdict(rows)
    if sum(map(len, places.values())) > FEW:
        held = [row["where"] for row in rows if row["verdict"] == "supported"]
        return f"{listing(held)} only" if len(held) <= FEW else f"in {len(held)} of {len(rows)} cases"
    return ", ".join(f"{listing(found)} {word}" for word, found in places.items())


def _unsupported(rows):
    """``is refuted``; ``is refuted in 2 cases and undecided in 5``."""
    places = _by_verdict(rows)
    if len(places) == 1:
        return f"is {next(iter(places))}"
    return "is " + listing([f"{word} in {len(found)}" + " cases" * (number == 0) for number, (word, found) in enumerate(places.items())])


# -- what training gains -----------------------------------------------------------------------------------------------------------------------

GAINS = {
    "H3.sft": "training on the teacher's answers",
    "H3.preference": "preference tuning",
    "H3.grounded_answers": "grounded answers",
    "H3.head_informed": "head-informed tuning",
}
"""Ways to train, each with a claim that it gains."""
OUTCOMES = {
    "gains": lambda ways: f"for {ways}",
    "in part": lambda ways: f"in some comparisons for {ways}",
    "falls short": lambda ways: f"not for {ways}",
    "nothing": lambda ways: f"no measurable gain by {ways}",
    "undecided": lambda ways: f"undecided for {ways}",
    "untested": lambda ways: f"not testable for {ways}",
}


def _gains(told):
    """``for training on the teacher's answers (+10 points)``, ``no measurable gain by preference tuning``."""
    groups = {}
    for claim, way in GAINS.items():
        if claim in told:
            outcome = _outcome(told[claim])
            points = f" ({_points(told[claim])})" if outcome in ("gains", "in part", "falls short") else ""
            groups.setdefault(outcome, []).append(f"{way}{points}")
    return [say(listing(groups[outcome])) for outcome, say in OUTCOMES.items() if outcome in groups]


def _outcome(rows):
    verdicts = {row["verdict"] for row in rows}
    if "supported" in verdicts:
        return "gains" if len(verdicts) == 1 else "in part"
    if "refuted" in verdicts:
        return "falls short"
    if "inconclusive" not in verdicts:
        return "untested"
    open_ = [row for row in rows if row["verdict"] == "inconclusive"]
    return "nothing" if all(row["lower"] <= 0 <= row["upper"] for row in open_) else "undecided"


def _points(rows):
    """``+10 to +16 points``, over all that a way to train is compared with."""
    values = {round(100 * row["estimate"]) for row in rows if row["estimate"] is not None}
    return f"{_range(values, lambda value: f'{value:+d}' if value else '0').replace('-', '−')} point{'s' * (values not in ({1}, {-1}))}"
