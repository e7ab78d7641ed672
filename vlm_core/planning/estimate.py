"""A suite's cost on one subject: operations, memory, hours.

``estimate(...)``   an `Estimate`; its ``text()`` is what ``python -m vlm_core.plan`` prints
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_core.planning.devices import Device
from vlm_core.planning.sizes import Sizes
from vlm_core.planning.workload import Workload

__all__ = ["Estimate", "estimate"]

_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What is known before anything runs.

    Parameters
    ----------
    flops : mapping of part to float
        Operations, by hypothesis; benchmarks are parts too.
    cpu_seconds : mapping of part to float
        Of one core of the machine that was counted on.
    weights, cache, activations : int
        Bytes; cache and activations of one batch.
    hours : list of (name, hours, GiB of the device or None)
    """

    workload: Workload
    sizes: Sizes
    flops: dict[str, float]
    cpu_seconds: dict[str, float]
    weights: int
    cache: int
    activations: int
    hours: list[tuple[str, float, int | None]]
    batch: int
    element: int
    utilisation: float

    @property
    def memory(self) -> int:
        """Bytes at once."""
        return self.weights + self.cache + self.activations

    def text(self) -> str:
        """For a terminal."""
        sizes, workload = self.sizes, self.workload
        passes = workload.passes(sizes)
        lines = [
            f"{sizes.name}: {sizes.family}, {sizes.parameters / 1e9:.3f} G parameters, {sizes.layers} layers of {sizes.heads} heads",
            f"a prompt of profile {workload.profile}: {sizes.prompt_tokens:.0f} tokens, {sizes.image_tokens:.0f} of them visual "
            f"({sizes.image_size[0]} x {sizes.image_size[1]} pixels); prefill {_flop(sizes.prefill_flops)}, "
            f"image {_flop(sizes.image_flops)}; "
            f"{_flop(sizes.prefill_flops / sizes.prompt_tokens)} a token",
            "",
            *(f"{part:12} {_flop(flops):>12}   {_hours(self.cpu_seconds[part]):>9} core-hours here" for part, flops in self.flops.items()),
            f"{'in all':12} {_flop(sum(self.flops.values())):>12}   {_hours(sum(self.cpu_seconds.values())):>9} core-hours here",
            "",
            f"through the subject's decoder: as many operations as {_count(passes['whole'])} whole prompts, {_count(passes['tail'])} tails "
            f"of prompts (what follows the image), {_count(passes['one'])} tokens one by one and {_count(passes['gradients'])} prompts "
            "trained on",
            "",
            f"memory, {self.batch} prompts at once, {self.element} bytes a number: weights {self.weights / _GIB:.2f} GiB, keys and values "
            f"{self.cache / _GIB:.2f} GiB, activations {self.activations / _GIB:.2f} GiB, together {self.memory / _GIB:.2f} GiB "
            f"(a batch that does not fit is halved)",
            "",
            f"at {self.utilisation:.0%} of the vendor's dense 16-bit peak, assumed:",
        ]
        for name, hours, gib in self.hours:
            fits = (
                ""
                if gib is None
                else ""
                if self.memory <= gib * _GIB
                else "; this batch does not fit"
                if self._least <= gib * _GIB
                else "; too small"
            )
            lines.append(f"  {name:12} {_hours(3600 * hours):>9} GPU-hours{fits}")
        return "\n".join([*lines, "", *self._provenance()])

    @property
    def _least(self) -> float:
        return self.weights + (self.cache + self.activations) / self.batch

    def _provenance(self) -> list[str]:
        workload = self.workload
        errors = workload.errors()
        lines = [
            f"Work counted on {workload.reference.name} ({workload.made['date']}, commit {str(workload.made['commit'])[:10]}, "
            f"{sum(workload.claims.values())} claims, "
            f"{sum(workload.seconds.values()):.0f} core-seconds), scaled by layers, heads, widths, tokens.",
        ]
        if errors:
            names = ", ".join(name for name, *_ in errors)
            flops, seconds = (max(one[place] for one in errors) for place in (1, 2))
            lines.append(
                f"Validated against {len(errors)} measured run{'s' * (len(errors) > 1)} ({names}): operations within a factor of "
                f"{flops:.2f}, core-hours within {seconds:.2f}."
            )
        else:
            lines.append(
                "Not validated: no other subject was measured at this profile (python -m fixtures.workload PROFILE --check SUBJECT)."
            )
        rates = (
            "Core-hours are operations over the rate of the counted run, GPU-hours over an assumed one, which was not measured: a large "
            "model is faster on a core than that, a small one slower on a GPU."
        )
        return [*lines, rates]


def estimate(
    workload: Workload,
    sizes: Sizes,
    *,
    devices: Sequence[Device] = (),
    flops_per_second: float | None = None,
    utilisation: float,
    element: int = 2,
    batch: int = 128,
    benchmarks: Sequence[tuple[int, int]] = (),
) -> Estimate:
    """What a profile's suite, and benchmarks beside it, cost on a subject.

    Parameters
    ----------
    benchmarks : sequence of (prompts, generated tokens of each)
        Prompts as long as the suite's.
    """
    flops, seconds = workload.flops(sizes), workload.cpu_seconds(sizes)
    here = sum(workload.flops(workload.reference).values()) / sum(workload.seconds.values())
    per_token = sizes.layers * (2 * sizes.layer_weights + 4 * sizes.width * sizes.prompt_tokens) + 2 * sizes.head_weights
    for number, (prompts, tokens) in enumerate(benchmarks, 1):
        name = f"benchmark {number}" if len(benchmarks) > 1 else "benchmark"
        flops[name] = prompts * (sizes.prefill_flops + sizes.image_flops + tokens * per_token)
        seconds[name] = flops[name] / here
    total = sum(flops.values())
    hours = [(one.name, total / (one.peak * utilisation) / 3600, one.memory) for one in devices]
    if flops_per_second is not None:
        if not flops_per_second > 0:
            raise ValueError(f"--flops-per-second must be above 0, got {flops_per_second}")
        hours.append(("your device", total / flops_per_second / 3600, None))
    return Estimate(
        workload,
        sizes,
        flops,
        seconds,
        sizes.weight_bytes(element),
        batch * sizes.cache_bytes(element),
        batch * sizes.activation_bytes(element),
        hours,
        batch,
        element,
        utilisation,
    )


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _hours(seconds: float) -> str:
    """Two digits that count."""
    return f"{float(f'{seconds / 3600:.2g}'):,.6f}".rstrip("0").rstrip(".").replace(",", " ")


def _flop(value: float) -> str:
    for power, unit in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {unit}"
    return f"{value / 1e6:.2f} MFLOP"
