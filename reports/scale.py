"""The axis that a claim's instances share: what lies where, in percent of its width, and its round numbers."""

from __future__ import annotations

import math

from reports.wording import test_kind


class Scale:
    """A shared axis: data range, ticks, the threshold and the side that supports."""

    def __init__(self, low, high, zone):
        self.low, self.high, self.zone = low, high, zone

    @classmethod
    def of(cls, group):
        values = [value for entry in group for value in (entry["estimate"], entry["lower"], entry["upper"]) if value is not None]
        kind, threshold = test_kind(group[0]), group[0]["threshold"]
        threshold = 0.0 if threshold is None and kind == "trend" else threshold
        marks = [0.0] + ([] if threshold is None else [threshold])
        if kind == "equivalence" and threshold is not None:
            marks.append(-threshold)
        low, high = min(values + marks), max(values + marks)
        pad = (high - low or 1.0) * 0.08
        low, high = low - pad, high + pad
        zone = None
        if threshold is not None:
            zone = {"noninferiority": (low, threshold), "equivalence": (-threshold, threshold)}.get(kind, (threshold, high))
        return cls(low, high, zone)

    def at(self, value):
        """Percent of the axis width."""
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 2)

    def place(self, record):
        lower = record["lower"] if record["lower"] is not None else record["estimate"]
        upper = record["upper"] if record["upper"] is not None else record["estimate"]
        return {"at": self.at(record["estimate"]), "from": self.at(lower), "to": self.at(upper)}

    @property
    def zero(self):
        return self.at(0.0)

    @property
    def supported(self):
        """``(from, width)`` of the supporting side, in percent."""
        if self.zone is None:
            return None
        return self.at(self.zone[0]), round(self.at(self.zone[1]) - self.at(self.zone[0]), 2)

    @property
    def edges(self):
        """Thresholds strictly inside the axis, in percent."""
        return [self.at(edge) for edge in self.zone or () if self.low < edge < self.high]

    @property
    def ticks(self):
        """Round numbers along the axis: ``[(percent, text)]``."""
        rough = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        decimals = next(count for count in range(12) if math.isclose(step * 10**count, round(step * 10**count)))
        return [
            (self.at(index * step), f"{index * step:.{decimals}f}".replace("-", "−"))
            for index in range(first, last + 1)
            if 3 <= self.at(index * step) <= 97
        ]
