"""Which work is compared with what, and the bars.

``measure(case, works, rounds)``   rows of one subject
``WORKS``, ``BARS``                  the works by name; the bars by subject

Before anything is timed, its result is compared with that of plain hooks; what is timed is compared again afterwards. A result that differs
makes the row say so, without a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlm_core import HeadId
from vlm_core.allocation import peak_bytes
from vlm_core.bench.flops import Products, sweep_flops, typical_width
from vlm_core.bench.own import Own
from vlm_core.bench.peers import open_peers
from vlm_core.bench.plain import HOOKS, OutputAttentions, PlainHooks
from vlm_core.bench.report import Row
from vlm_core.bench.subjects import Case, Prompt
from vlm_core.bench.timing import compare, in_pairs, interleave

__all__ = ["BARS", "WORKS", "Agreement", "Bars", "measure", "same_work"]

WORKS = {
    "image-kv": "single-head image-KV ablations of one item",
    "zero-heads": "single-head all-position ablations of one item",
    "mass": "image mass of every head",
    "memory": "extra peak memory of the image mass",
    "no-op": "one no-op instrumented forward",
}
METHODS = {"image-kv": "replace_image_kv", "zero-heads": "zero_heads"}
PLAIN = "plain forward"
BATCH = 8  # rows of the batched hooks
CHECKED = 6  # heads compared before anything is timed
SAMPLE = 3  # heads a full-pass tool ablates in a round: each costs it the same
SECONDS_OF_FORWARDS = 120.0  # of plain passes at most beside a work, about
PAIRS_A_ROUND = 100  # at most
KNOWN = 0.1, 0.01  # how well such a ratio's median has to be known: a share of what the bar is away from 1, but no better than this
WITHOUT_BAR = 1.5  # the bar whose precision is asked where there is none
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value: what two orders of summing may differ by
MASS_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHARE_OF_PRODUCTS = 3e10  # operations of matrix products timed beside a sweep


@dataclass(frozen=True)
class Bars:
    """What vlm_core is held to on one subject; None where nothing is asked."""

    image_kv: float | None = None
    zero_heads: float | None = None
    efficiency: float | None = None
    text_mass: float | None = None
    all_mass: float | None = None
    memory: float | None = None
    no_op: float | None = None

    def of_sweep(self, work: str, against: str) -> float | None:
        """The least by which a sweep is faster: image-KV ablation than hooks, all-position ablation than everyone.

        Hooks in batches are shown without a bar.
        """
        if against.startswith(f"{HOOKS},"):
            return None
        if work == "zero-heads":
            return self.zero_heads
        return self.image_kv if against == HOOKS else None


_BOTH = Bars(zero_heads=1.8, text_mass=1.15, all_mass=1.5, memory=0.05, no_op=1.02)
BARS = {"embedded": _BOTH, "midsize": replace(_BOTH, image_kv=25.0, efficiency=0.60)}


@dataclass(frozen=True)
class Agreement:
    """How closely two results must agree: rounding, and far less than what an intervention does.

    ``allowed`` is the smaller of ``ROUNDING`` of the largest value and a share of the median effect: a twentieth in float32, half of it in
    types that round more coarsely, whose own rounding is a good part of what one head does.
    """

    allowed: float
    effect: float

    @classmethod
    def of(cls, reference: np.ndarray, clean: np.ndarray, dtype: torch.dtype = torch.float32) -> Agreement:
        """From the reference's ``[intervention, value]`` and the values ``[1, value]`` without intervention."""
        effect = float(np.median(np.abs(reference - clean).max(1)))
        share = 0.05 if dtype == torch.float32 else 0.5
        return cls(min(ROUNDING[dtype] * max(1.0, float(np.abs(reference).max())), share * effect), effect)

    def judge(self, values: np.ndarray, reference: np.ndarray) -> tuple[float, str]:
        """Largest difference, and why it is not the same work (empty where it is)."""
        if self.effect == 0.0:
            return 0.0, "the interventions change nothing, so nothing shows that the work is the same"
        if values.shape != reference.shape:
            return float("inf"), f"not the same work: results of shape {values.shape}, expected {reference.shape}"
        difference = float(np.abs(values - reference).max()) if np.isfinite(values).all() else float("inf")
        if difference <= self.allowed:
            return difference, ""
        return difference, f"not the same work: results differ by {difference:.2g}, allowed are {self.allowed:.2g}"


def _attempt(work: Callable[[], object]) -> tuple[object, str]:
    # A competitor may fail in any way it likes on a subject; that is its row then, and the others are still measured.
    try:
        return work(), ""
    except Exception as error:
        return None, f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def same_work(
    case: Case, work: str, contestants: dict, prompt: Prompt, heads: Sequence[HeadId]
) -> tuple[dict[str, tuple[float, str]], Agreement]:
    """Do contestants' interventions give what plain hooks give?

    Returns
    -------
    judged : dict of name to (largest difference, reason against it or empty)
    agreement : Agreement
    """
    plain = PlainHooks(case)
    reference = case.values(getattr(plain, METHODS[work])(prompt, heads))
    agreement = Agreement.of(reference, case.values(plain.forward(prompt)), case.dtype)
    judged = {}
    for name, contestant in contestants.items():
        result, reason = _attempt(lambda contestant=contestant: getattr(contestant, METHODS[work])(prompt, heads))
        judged[name] = (float("nan"), reason) if reason else agreement.judge(_values(case, result), reference)
    return judged, agreement


def _values(case: Case, result) -> np.ndarray:
    return case.values(result) if torch.is_tensor(result) else result


def _sample(heads: Sequence[HeadId], count: int, number: int) -> list[HeadId]:
    """``count`` heads spread over the layers, others in every round."""
    count = min(count, len(heads))
    return [heads[(7 * number + index * len(heads) // count) % len(heads)] for index in range(count)]


def sweep_rows(case: Case, work: str, competitors: dict, rounds: int, bars: Bars, clock: str = "wall") -> list[Row]:
    """Rows of one sweep: vlm_core's over all heads against each competitor's time per intervention."""
    own, method, heads = Own(case), METHODS[work], case.heads
    title = f"{len(heads)} {WORKS[work]}"
    check = case.prompt(0)
    judged, agreement = same_work(case, work, {own.name: own, **competitors}, check, _sample(heads, CHECKED, 0))
    own_difference, own_reason = judged.pop(own.name)
    prompts = [case.prompt(1 + number) for number in range(rounds)]
    results: dict[str, list[tuple[list[HeadId], object]]] = {name: [] for name in (own.name, *competitors)}

    def contestant(name: str, tool, count: int) -> Callable[[int], int]:
        def run(number: int) -> int:
            chosen = list(heads) if count == len(heads) else _sample(heads, count, number)
            results[name].append((chosen, getattr(tool, method)(prompts[number], chosen)))
            return len(chosen)

        return run

    timed = {}
    if not own_reason:
        timed[own.name] = contestant(own.name, own, len(heads))
        # The shared prefix is quick and batches by head; a resumed row is as wide whichever head it is for.
        shown = heads if work == "image-kv" else _sample(heads, CHECKED, 0)
        widths = own.widths(lambda: getattr(own, method)(check, shown))
        flops = sweep_flops(case, check, heads, whole=work == "zero-heads")
        products = Products(case, typical_width(widths, default=BATCH * check.question))
        times = max(1, round(min(0.1 * flops, SHARE_OF_PRODUCTS) / products.flops))
        timed["products"] = lambda number: products.run(times)
        products.run()
        for name, tool in competitors.items():
            if not judged[name][1]:
                timed[name] = contestant(name, tool, max(SAMPLE, getattr(tool, "rows", 1)))
    seconds = interleave(timed, rounds, clock, case.subject.device) if timed else {}
    rows = []
    for name in competitors:
        difference, reason = judged[name]
        reason = own_reason and f"vlm_core {own_reason}" or reason
        row = {"work": title, "subject": case.name, "by": own.name, "against": name, "bar": bars.of_sweep(work, name)}
        if not reason:
            difference, reason = _worst(case, agreement, results[name], results[own.name], max(difference, own_difference))
        if reason:
            rows.append(Row(**row, note=reason))
            continue
        ratio = compare(seconds[name], seconds[own.name])
        rows.append(
            Row(
                **row,
                figure=ratio.median,
                low=ratio.low,
                high=ratio.high,
                own=1e3 * float(np.median(seconds[own.name])),
                other=1e3 * float(np.median(seconds[name])),
                measured_in="ms an intervention",
                difference=difference,
                rounds=rounds,
            )
        )
    return [*rows, _efficiency(case, title, own_reason, bars, rounds, seconds, (flops, products) if timed else None)]


def _worst(case: Case, agreement: Agreement, theirs: list, ours: list, difference: float) -> tuple[float, str]:
    for (chosen, result), (heads, own) in zip(theirs, ours, strict=True):
        values = _values(case, own)[[heads.index(head) for head in chosen]]
        found, reason = agreement.judge(_values(case, result), values)
        difference = max(difference, found)
        if reason:
            return difference, f"{reason} (in a timed round)"
    return difference, ""


def _efficiency(case: Case, title: str, reason: str, bars: Bars, rounds: int, seconds: dict, counted) -> Row:
    row = {
        "work": f"arithmetic efficiency of {title}",
        "subject": case.name,
        "by": Own.name,
        "against": "matrix products of the same shape",
        "unit": "of the FLOP/s",
        "bar": bars.efficiency,
        "measured_in": "GFLOP/s",
    }
    if reason:
        return Row(**row, note=f"vlm_core {reason}")
    flops, products = counted
    per_flop = [one * len(case.heads) / flops for one in seconds[Own.name]]
    share = compare(seconds["products"], per_flop)
    return Row(
        **row,
        figure=share.median,
        low=share.low,
        high=share.high,
        own=1e-9 / float(np.median(per_flop)),
        other=1e-9 / float(np.median(seconds["products"])),
        rounds=rounds,
        note=f"{flops / 1e9:.1f} GFLOP needed by formula; products on {products.tokens} rows, the width that the sweep runs at",
    )


def forward_rows(case: Case, works: Sequence[str], peers: dict, rounds: int, bars: Bars, clock: str = "wall") -> list[Row]:
    """Rows of single forward passes: nothing done, and the image mass observed."""
    own, plain, maps, prompt = Own(case), PlainHooks(case), OutputAttentions(case), case.prompt(0)
    reference = {queries: maps.image_mass(prompt, queries) for queries in ("text", "all")}
    logits = plain.forward(prompt)
    own_runs: list[tuple[str, Callable, torch.Tensor, float, float | None]] = []
    peer_runs: list[tuple[str, str, Callable, torch.Tensor, float]] = []
    close, near = ROUNDING[case.dtype] * max(1.0, logits.abs().max().item()), MASS_ROUNDING[case.dtype]
    if "no-op" in works:
        own_runs.append((WORKS["no-op"], own.forward, logits, 0.0, bars.no_op))
        peer_runs += [(WORKS["no-op"], name, peer.forward, logits, close) for name, peer in peers.items()]
    if "mass" in works:
        text, everything = (f"{WORKS['mass']}, {queries} queries" for queries in ("text", "all"))
        own_runs.append((text, own.image_mass, reference["text"], near, bars.text_mass))
        own_runs.append((everything, lambda prompt: own.image_mass(prompt, "all"), reference["all"], near, bars.all_mass))
        tools = {HOOKS: plain, maps.name: maps, **peers}
        peer_runs += [(text, name, tool.image_mass, reference["text"], near) for name, tool in tools.items()]
    rows = _forwards(case, prompt, plain, [(title, own.name, *rest) for title, *rest in own_runs], rounds, True, clock)
    return rows + _forwards(case, prompt, plain, [(*one, None) for one in peer_runs], rounds, False, clock)


def _forwards(case: Case, prompt: Prompt, plain: PlainHooks, runs: list, rounds: int, judged_closely: bool, clock: str) -> list[Row]:
    """Rows of some works: each with plain passes of its own beside it (``judged_closely``), or all of them beside one in every round."""
    judged, works = {}, {}
    for title, by, work, expected, allowed, _ in runs:
        result, reason = _attempt(lambda work=work: work(prompt))
        difference = float("nan")
        if not reason:
            difference, reason = _apart(result, expected, allowed)
        judged[title, by] = difference, reason
        if not reason:
            works[f"{title} {by}"] = work
    if judged_closely:
        bars = {f"{title} {by}": bar for title, by, *_, bar in runs}
        timed = {
            name: _attempt(lambda name=name, work=work: _beside_plain(case, prompt, plain, work, bars[name], rounds, clock))
            for name, work in works.items()
        }
    else:
        timed = _beside_one(case, prompt, plain, works, rounds, clock)
    rows = []
    for title, by, _, expected, allowed, bar in runs:
        difference, reason = judged[title, by]
        if not reason:
            found, reason = timed[f"{title} {by}"]
        if not reason:
            *_, last = found
            off, reason = _apart(last, expected, allowed)
            difference, reason = float(np.maximum(difference, off)), reason and f"{reason} (in a timed round)"
        row = {"work": title, "subject": case.name, "by": by, "against": PLAIN, "unit": "x the time", "bar": bar, "at_least": False}
        if reason:
            rows.append(Row(**row, note=reason))
            continue
        spent, plainly, _ = found
        ratio = compare(spent, plainly)
        rows.append(
            Row(
                **row,
                figure=ratio.median,
                low=ratio.low,
                high=ratio.high,
                own=1e3 * float(np.median(spent)),
                other=1e3 * float(np.median(plainly)),
                difference=difference,
                rounds=len(spent),
                note=_known(len(spent), ratio.within) if judged_closely else "",
            )
        )
    return rows


def _beside_one(case: Case, prompt: Prompt, plain: PlainHooks, works: dict, rounds: int, clock: str) -> dict[str, tuple]:
    """All works beside one plain pass in every round: ``_attempt`` of each one's seconds, the plain pass's, and its last result."""

    def timed(some: dict) -> dict[str, tuple]:
        passes = {name: _Passes(work, [prompt] * rounds) for name, work in {PLAIN: plain.forward, **some}.items()}
        spent = interleave(passes, rounds, clock, case.subject.device)
        return {name: (spent[name], spent[PLAIN], passes[name].last) for name in some}

    together, reason = _attempt(lambda: timed(works))
    if not reason:
        return {name: (found, "") for name, found in together.items()}
    return {name: _attempt(lambda name=name, work=work: timed({name: work})[name]) for name, work in works.items()}


def _known(pairs: int, within: float) -> str:
    """How well a median is known, for the page."""
    return f"{pairs} pairs, median known to {within:.3f}" if np.isfinite(within) else f"{pairs} pairs, too few for an interval"


def _apart(result: torch.Tensor, expected: torch.Tensor, allowed: float) -> tuple[float, str]:
    """The largest difference, and the reason against a result that differs by more than is allowed."""
    off = (result - expected).abs().max().item() if result.shape == expected.shape else float("inf")
    return off, "" if off <= allowed else f"not the same work: results differ by {off:.2g}, allowed are {allowed:.2g}"


class _Passes:
    """Does the work on the prompt of a round; ``last`` is what came of the last one."""

    def __init__(self, work: Callable, prompts: Sequence[Prompt] | Mapping[int, Prompt]) -> None:
        self._work, self._prompts, self.last = work, prompts, None

    def __call__(self, number: int) -> int:
        self.last = self._work(self._prompts[number])
        return 1


def _beside_plain(case: Case, prompt: Prompt, plain: PlainHooks, work: Callable, bar: float | None, rounds: int, clock: str) -> tuple:
    """Seconds of the work and of plain passes beside it, until the median of their ratios is known as well as the bar asks."""
    device = case.subject.device
    once = min(interleave({PLAIN: _Passes(plain.forward, [prompt] * 3)}, 3, device=device)[PLAIN])
    most = rounds * max(1, min(PAIRS_A_ROUND, round(SECONDS_OF_FORWARDS / once / rounds)))
    fresh: dict[int, Prompt] = {}

    def encode(numbers: range) -> None:
        # Every pass is the first on its batch: nothing kept from one pass helps the next.
        fresh.clear()
        fresh.update({number: replace(prompt, batch=case.subject.encode_items([prompt.item])) for number in numbers})

    share, least = KNOWN
    known = max(least, share * abs((bar or WITHOUT_BAR) - 1.0))
    passes = _Passes(work, fresh)
    return *in_pairs(passes, _Passes(plain.forward, [prompt] * most), most, known, clock, device, before=encode), passes.last


def memory_rows(case: Case, bars: Bars) -> list[Row]:
    """Rows of the peak that observing adds to a plain forward, as a share of what attention maps add."""
    own, plain, maps, prompt, device = Own(case), PlainHooks(case), OutputAttentions(case), case.prompt(0), case.subject.device
    alone = peak_bytes(lambda: plain.forward(prompt), device)
    whole = peak_bytes(lambda: maps.image_mass(prompt), device) - alone
    rows = []
    for queries in ("text", "all"):
        row = {
            "work": f"{WORKS['memory']}, {queries} queries",
            "subject": case.name,
            "by": Own.name,
            "against": maps.name,
            "unit": "of the memory",
            "bar": bars.memory,
            "at_least": False,
            "measured_in": "MB",
        }
        peak, reason = _attempt(lambda queries=queries: peak_bytes(lambda: own.image_mass(prompt, queries), device))
        if reason:
            rows.append(Row(**row, note=reason))
            continue
        extra = max(0, peak - alone)
        rows.append(
            Row(
                **row,
                figure=extra / whole,
                own=extra / 1e6,
                other=whole / 1e6,
                rounds=1,
                note=f"a plain forward's peak is {alone / 1e6:.1f} MB",
            )
        )
    return rows


def measure(
    case: Case,
    works: Sequence[str] = tuple(WORKS),
    rounds: int = 5,
    bars: Bars | None = None,
    peers: dict | None = None,
    progress: Callable[[str], None] = lambda message: None,
    clock: str = "wall",
) -> list[Row]:
    """All rows of a subject; a peer that took no part has one row with the reason.

    Parameters
    ----------
    works : sequence of str
        Keys of ``WORKS``.
    bars : Bars, optional
        Default: the subject's of ``BARS``, or none.
    peers : dict of str to class, optional
        Default: ``vlm_core.bench.peers.PEERS``.
    clock : {"wall", "cpu"}
        See ``vlm_core.bench.timing.interleave``.
    """
    bars = bars or BARS.get(case.name, Bars())
    progress(f"{case.name}: opening the peers")
    opened, missing = open_peers(case, peers)
    competitors = {tool.name: tool for tool in (PlainHooks(case), PlainHooks(case, BATCH))} | opened
    rows = [Row("not compared", case.name, Own.name, name, note=reason) for name, reason in missing.items()]
    for work in METHODS:
        if work in works:
            progress(f"{case.name}: {WORKS[work]}")
            rows += sweep_rows(case, work, competitors, rounds, bars, clock)
    single = [work for work in ("mass", "no-op") if work in works]
    if single:
        progress(f"{case.name}: single forward passes")
        rows += forward_rows(case, single, opened, rounds, bars, clock)
    if "memory" in works:
        progress(f"{case.name}: memory")
        rows += memory_rows(case, bars)
    return rows
