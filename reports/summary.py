"""What the page says, derived from the JSON of a run: sentences, counts, rows, scales.

``page``  the whole model the template renders

The sentences that belong to no run in particular (how to read a verdict, limitations) are here too: the page and the paper say the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from reports import opening
from reports.literature import WORKS
from reports.record import VERDICTS, instance_key
from reports.scale import Scale
from reports.wording import (
    interval_numbers,
    listing,
    number,
    p_value,
    plural,
    short_name,
    some,
    threshold_text,
    title,
    with_unit,
)

HYPOTHESES = {
    "H1": "A small subset of heads carries most cross-modal grounding",
    "H2": "Visual tokens become redundant after the middle layers",
    "H3": "Distillation improves a small student",
}

VERDICT_MEANING = {
    "supported": "The whole interval lies on the declared side of the threshold.",
    "refuted": "The whole interval lies on the other side: the subject does not do what the claim says.",
    "inconclusive": "The interval includes the threshold. More data could decide; nothing is concluded.",
    "invalid": "The measurement cannot bear on the claim: a control failed, the task left no room, or data lacked.",
}

READING = (
    "Thresholds, margins and the smallest effect of interest were declared before anything was measured; each declaration has a hash. "
    "Effects are paired per item and resampled by scene, so ten questions about one picture count as one picture. Each bound is one-sided at α divided "
    "by the size of the claim's family: a verdict holds whatever else was run. “Not significant” supports nothing.",
    "The minimum detectable effect is what this number of scenes would find in four runs of five. An inconclusive claim with a large one asks for more data, "
    "not for another threshold.",
)

BASELINE = (
    "Accuracy per task, on the confirmation split, beside what is reached without the right image (blind), by chance, and by always giving the majority answer. "
    "Accuracy is that of the likeliest candidate; in words, that of what the subject writes of its own accord on some of the items, right where it names the answer "
    "and nothing else. A task that does not rise above the highest of these floors is no evidence for grounding."
)

PUBLISHED = "Published figures were obtained on other models and data. They say where a claim comes from, not what was asked of this subject."

LIMITATIONS = (
    "The scenes are synthetic, with few shapes, colours and wordings, and known answers. Verdicts say nothing of vision-language models in general, nor of "
    "photographs; a subject trained on scenes like these does well on them for that reason alone.",
    "Benchmark questions and images may be in a model's training data. Scores on them, here and in the literature, may be higher than on unseen material.",
    "Attention maps illustrate and prove nothing by themselves. Ablation shows what the subject needs in the state that the ablation leaves it in, not how it "
    "reasons; heads can stand in for each other.",
    "Supported means at the declared threshold and error rate: with α = 0.05, up to one family in twenty in which nothing is true still supports a claim. "
    "Exploratory claims are never counted.",
)

RESPONSIBLE_USE = (
    "This is research: nothing here says that a model is ready to be deployed, safe or fair.",
    "A head or a token that can be removed without loss on these tasks may matter on others, and to some people more than to others. Before it goes from a model "
    "in use, evaluate on the data that model serves.",
    "A student inherits its teacher's errors, and what its teacher's licence and terms allow. Outputs of a proprietary teacher may be used for training only where "
    "its terms permit it, and must hold no sensitive data.",
    "Images and questions that you bring yourself stay in the files of a run: look at them before you share it.",
)


def page(identity, records, histories=None):
    """The model of the page.

    Parameters
    ----------
    identity : dict
        ``run.json``.
    records : list of dict
        ``evidence.json``.
    histories : dict, optional
        Claim instance (``reports.record.instance_key``) → its nights as ``reports.nights.sparkline.section`` draws them.

    Returns
    -------
    dict
    """
    histories = histories or {}
    records = [{**entry, "history": histories.get(instance_key(entry["claim_id"], entry["params"]))} for entry in records]
    hypotheses = [
        hypothesis_section(name, [entry for entry in records if entry["hypothesis"] == name])
        for name in sorted({entry["hypothesis"] for entry in records})
    ]
    counted = Counter(entry["verdict"] for entry in records if entry["tier"] == "confirmatory")
    return {
        "run": identity,
        "title": identity["subject"].get("name") or "subject",
        "subject_line": subject_line(identity["subject"]),
        "sentences": [f"{section['opening']}." for section in hypotheses],
        "counts": [{"verdict": verdict, "count": counted[verdict]} for verdict in VERDICTS],
        "total": len(records),
        "band": band(identity, records),
        "checks": checks(identity, records),
        "hypotheses": hypotheses,
        "baseline": baseline(identity),
        "works": works(records),
        "verdict_meaning": VERDICT_MEANING,
        "reading": READING,
        "baseline_note": BASELINE,
        "published_note": PUBLISHED,
        "limits": [*limits(identity, records), *LIMITATIONS],
        "use": RESPONSIBLE_USE,
        "families": families(records),
    }


def subject_line(subject):
    """Family, size and revision in one line, as far as they are known."""
    parts = [str(subject[name]) for name in ("family", "model_type") if subject.get(name)][:1]
    if subject.get("n_parameters"):
        parts.append(f"{with_unit(subject['n_parameters'])} parameters")
    if subject.get("n_layers") and subject.get("n_heads"):
        parts.append(f"{subject['n_layers']} layers × {subject['n_heads']} heads")
    if subject.get("dtype"):
        parts.append(str(subject["dtype"]).removeprefix("torch."))
    if subject.get("quantization"):
        parts.append(f"{subject['quantization']} weights")
    if subject.get("device"):
        parts.append(str(subject["device"]))
    if subject.get("revision"):
        parts.append(f"revision {str(subject['revision'])[:12]}")
    return " · ".join(parts)


def band(identity, records):
    """Sentences for the red band: missing evidence, crashed claims, failed controls, what is worse than its baseline."""
    sentences = [f"Evidence is incomplete: {problem}." for problem in identity.get("problems", ())]
    crashed = [title(entry) for entry in records if entry["outcome"] == "crashed"]
    if crashed:
        sentences.append(f"{plural(len(crashed), 'claim')} crashed before a verdict: {some(crashed)}.")
    failed = [
        f"{control['name']} ({title(entry)}{', as expected' if entry['outcome'] == 'expected' else ''})"
        for entry in records
        for control in entry["controls"]
        if not control["passed"] and control["kind"] not in ("info", "condition")
    ]
    if failed:
        sentences.append(f"{plural(len(failed), 'control')} failed: {some(failed)}. The claims behind are invalid.")
    worse = [title(entry) for entry in records if (entry.get("reproduced") or {}).get("state") == "regression"]
    if worse:
        sentences.append(f"{plural(len(worse), 'claim')} worse than the baseline: {some(worse)}.")
    return sentences


def checks(identity, records):
    """How complete the evidence is and how many controls passed, in two sentences."""
    measured = sum(entry["outcome"] not in ("crashed", "skipped") for entry in records)
    whole = "Evidence is complete" if identity.get("complete", not identity.get("problems")) else "Evidence is incomplete"
    sentences = [f"{whole}: {measured} of {plural(len(records), 'verdict')} measured."]
    made = [control for entry in records for control in entry["controls"] if control["kind"] not in ("info", "condition")]
    if made:
        sentences.append(f"{sum(control['passed'] for control in made)} of {plural(len(made), 'control')} passed.")
    return " ".join(sentences)


def hypothesis_section(name, records):
    groups = defaultdict(list)
    for entry in records:
        groups[entry["claim_id"]].append(entry)
    cards = [card(group) for group in groups.values()]
    confirmatory = [one for one in cards if one["tier"] == "confirmatory"]
    return {
        "name": name,
        "title": HYPOTHESES.get(name, ""),
        "opening": opening.line(name, confirmatory),
        "sentence": hypothesis_sentence(name, confirmatory),
        "confirmatory": confirmatory,
        "exploratory": [one for one in cards if one["tier"] != "confirmatory"],
    }


def hypothesis_sentence(name, cards):
    """``H1 holds``; or in parts: which claims hold, which do not, where, and what stays open."""
    if not cards:
        return f"{name} has exploratory claims only"
    whole = {card_["verdict"] for card_ in cards}
    if len(whole) == 1 and None not in whole:
        return f"{name} {_ENTIRELY[whole.pop()]}"
    parts = []
    for verdict, phrase in _IN_PART.items():
        names = [short_name(card_["id"]) for card_ in cards if card_["verdict"] == verdict]
        if names:
            parts.append(f"{listing(names)} {phrase[len(names) > 1]}")
    parts += [mixed_sentence(card_) for card_ in cards if card_["verdict"] is None]
    anywhere = any(row["verdict"] == "supported" for card_ in cards for row in card_["rows"])
    return f"{name} {'holds in part' if anywhere else 'is not supported'}: {', '.join(parts)}"


def mixed_sentence(card_):
    """``necessity holds in 5 of 7 cases (count refuted, position undecided)``."""
    holds = sum(row["verdict"] == "supported" for row in card_["rows"])
    against = [
        f"{listing(places)} {word}"
        for verdict, word in (("refuted", "refuted"), ("inconclusive", "undecided"), ("invalid", "not testable"))
        if (places := [row["where"] for row in card_["rows"] if row["verdict"] == verdict]) and len(places) <= 4
    ]
    shown = f" ({', '.join(against)})" if against else ""
    return f"{short_name(card_['id'])} holds in {holds} of {len(card_['rows'])} cases{shown}"


_ENTIRELY = {
    "supported": "holds",
    "refuted": "is refuted",
    "inconclusive": "is undecided",
    "invalid": "could not be tested",
}
_IN_PART = {
    "supported": ("holds", "hold"),
    "refuted": ("does not", "do not"),
    "inconclusive": ("is undecided", "are undecided"),
    "invalid": ("could not be tested", "could not be tested"),
}


def card(group):
    """One claim with all its instances on one shared scale."""
    first = group[0]
    verdicts = {entry["verdict"] for entry in group}
    scale = Scale.of(group)
    return {
        "id": first["claim_id"],
        "short": short_name(first["claim_id"]),
        "tier": first["tier"],
        "sentence": first["sentence"],
        "declaration": first["declaration"],
        "test": first["test"]["description"],
        "threshold": threshold_text(first),
        "verdict": verdicts.pop() if len(verdicts) == 1 else None,
        "counts": tally(group),
        "scale": scale,
        "rows": [row(entry, scale) for entry in group],
        "controls": controls(group),
        "figures": figures(group),
        "size": size_line(group),
        "published": published(group),
    }


def tally(group):
    """How many instances have each verdict that some have: ``[{verdict, count}]``."""
    return [{"verdict": verdict, "count": count} for verdict in VERDICTS if (count := sum(entry["verdict"] == verdict for entry in group))]


def size_line(group):
    """``420 items in 140 scenes, 3 seeds; p < 0.001 (Holm 0.004); detects 0.04``, ranges over the instances."""
    unit = group[0]["declaration"].get("unit", "cluster")
    group = [entry for entry in group if entry["estimate"] is not None] or group
    parts = [
        f"{text} {noun}"
        for name, noun in (("n_items", "items"), ("n_clusters", f"{unit}s"), ("n_seeds", "seeds"))
        if (text := _span(group, name, lambda value: f"{value:,}")) and not (name == "n_seeds" and text in ("0", "1"))
    ]
    line = ", ".join(parts)
    raw, holm = _span(group, "p_value", p_value), _span(group, "p_holm", p_value)
    if raw:
        line += f"; p {raw}" + (f" (Holm {holm})" if holm else "")
    if detects := _span(group, "mde", number):
        line += f"; detects {detects} at 80 % power"
    return line


def _span(group, name, show):
    values = [entry[name] for entry in group if entry[name] is not None]
    if not values:
        return ""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def row(record, scale):
    """One instance: its numbers, and where they sit on the card's scale (percent of its width)."""
    where = ", ".join(str(value) for value in record["params"].values())
    return {
        **record,
        "where": where or "overall",
        "title": title(record),
        "numbers": interval_numbers(record),
        "drawn": scale.place(record) if record["estimate"] is not None else None,
    }


def controls(group):
    """Controls of all instances, the same control once with every place it was made."""
    merged = {}
    for entry in group:
        for control in entry["controls"]:
            where = ", ".join(str(value) for value in entry["params"].values())
            merged.setdefault(control["name"], []).append({**control, "where": where})
    return [
        {
            "name": name,
            "kind": found[0]["kind"],
            "passed": all(control["passed"] for control in found),
            "places": found,
        }
        for name, found in merged.items()
    ]


def figures(group):
    """Figures of all instances; one that several instances left is shown once, and rows of one table that each left some of are together."""
    shown = []
    for figure in (figure for entry in group for figure in entry["figures"]):
        begun = next((one for one in shown if _same_table(one, figure)), None)
        if begun is None:
            shown += [figure] if figure not in shown else []
        elif missing := [row for row in figure["data"]["rows"] if row not in begun["data"]["rows"]]:
            joined = {**begun["data"], "rows": begun["data"]["rows"] + missing}
            shown[shown.index(begun)] = {**begun, "data": joined, "alt": f"{begun['alt']}; {figure['alt']}"}
    return shown


def _same_table(one, other):
    """Whether two figures are rows of one table: the same title over the same columns."""
    return one["kind"] == other["kind"] == "table" and (one["title"], one["data"]["columns"]) == (other["title"], other["data"]["columns"])


def baseline(identity):
    """Per-task accuracy beside its blind floor and chance, with the room above them."""
    rows = []
    for entry in identity.get("data", {}).get("baseline") or ():
        floor = max(entry.get("blind") or 0.0, entry.get("chance") or 0.0, entry.get("majority") or 0.0)
        rows.append({**entry, "floor": floor, "above": entry["accuracy"] - floor})
    return rows


def literature(records):
    """Published claims beside what was measured here: one row a claim that names a source."""
    rows = {}
    for entry in records:
        if entry["declaration"].get("source") and entry["claim_id"] not in rows:
            rows[entry["claim_id"]] = _beside_published([other for other in records if other["claim_id"] == entry["claim_id"]])
    return list(rows.values())


def works(records):
    """The same by work.

    Returns
    -------
    dict
        ``cited``: the works of `reports.literature` that some claim here rests on, each ``work`` with the rows of its ``claims``; ``others``: rows of claims
        that rest on none of them.
    """
    rows = literature(records)
    cited = [{"work": work, "claims": [row for row in rows if work.cited_in(row["source"])]} for work in WORKS]
    known = {row["id"] for one in cited for row in one["claims"]}
    return {"cited": [one for one in cited if one["claims"]], "others": [row for row in rows if row["id"] not in known]}


def published(group):
    """``{published, where}`` as one of a claim's instances says; empty where none does."""
    return next((entry["details"]["literature"] for entry in group if entry["details"].get("literature")), {})


def _beside_published(group):
    """One claim with what its instances came to, and what was published where the claim says so."""
    found = published(group)
    return {
        "id": group[0]["claim_id"],
        "sentence": group[0]["sentence"],
        "source": group[0]["declaration"]["source"],
        "published": found.get("published", ""),
        "where": found.get("where", ""),
        "measured": _range([entry["estimate"] for entry in group if entry["estimate"] is not None]),
        "threshold": threshold_text(group[0]),
        "counts": tally(group),
    }


def limits(identity, records):
    """What limits this very run, in sentences."""
    said = []
    parameters = identity["subject"].get("n_parameters")
    if parameters:
        said.append(f"One subject of {with_unit(parameters)} parameters was tested, with seed {identity.get('seed')} and profile {identity.get('profile')}.")
    counted = [entry for entry in records if entry["tier"] == "confirmatory"]
    weak = [title(entry) for entry in counted if entry["underpowered"]]
    if weak:
        said.append(f"{len(weak)} of {plural(len(counted), 'confirmatory verdict')} had too few scenes to find the declared effect in four runs of five: {some(weak)}.")
    untested = [title(entry) for entry in counted if entry["verdict"] == "invalid"]
    if untested:
        said.append(f"{plural(len(untested), 'confirmatory claim')} could not be tested and count{'s' * (len(untested) == 1)} neither way: {some(untested)}.")
    small = min((entry["n_clusters"] for entry in counted if entry["estimate"] is not None and entry["n_clusters"]), default=None)
    if small is not None and small < 20:
        said.append(f"The smallest sample of a confirmatory claim has {small} independent units; its interval rests on few of them.")
    return said


def _range(values):
    if not values:
        return "not measured"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def families(records):
    """Confirmatory families: ``[(hypothesis, declared size, here)]``."""
    sizes = defaultdict(lambda: [0, 0])
    for entry in records:
        if entry["tier"] == "confirmatory":
            sizes[entry["hypothesis"]][0] = max(sizes[entry["hypothesis"]][0], entry["family_size"] or 0)
            sizes[entry["hypothesis"]][1] += 1
    return [(name, *size) for name, size in sorted(sizes.items())]
