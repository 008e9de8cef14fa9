"""What the sections of a run share: what to measure, for how long, and what is measured already."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import rates
from models import Size, forward_flop
from report import Figure, Report

CALLS = ("pass", "step")


@dataclass
class Bench:
    """`seconds`: for the repeats of a figure; `longest`: the most that a single sample may take."""

    report: Report
    sizes: dict[str, Size]
    precisions: list[str]
    variants: list[str]
    samplers: list[str]
    seconds: float = 30.0
    longest: float = 300.0
    batch_size: int = 1
    calls: tuple[str, ...] = CALLS
    quick: bool = False
    samples: dict[tuple[str, ...], Any] = field(default_factory=dict)  # the cache of clips.py
    _rates: dict[tuple[str, str], float] = field(default_factory=dict)
    _flop: dict[str, int] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, Size, str]]:
        """Every model in every precision: (name, size, precision)."""
        for name, size in self.sizes.items():
            for precision in self.precisions:
                yield name, size, precision

    def rate(self, kind: str, precision: str) -> float:
        """FLOP/s of "matrix" or "convolution", measured once in this process."""
        if (kind, precision) not in self._rates:
            figure = rates.rate(kind, precision, self.seconds)
            self.report.add(figure)
            self._rates[kind, precision] = median(figure.repeats)
        return self._rates[kind, precision]

    def flop(self, name: str) -> int:
        """FLOPs of a pass of one sample through the model."""
        if name not in self._flop:
            self._flop[name] = forward_flop(self.sizes[name])
        return self._flop[name]

    def add_passes(self, figure: Figure, passes: int) -> None:
        """Add a figure of a call that takes as much work as so many passes of the batch."""
        flop = passes * self.batch_size * self.flop(figure.model)
        reached = flop / median(figure.repeats)
        facts = {"flop_per_second": reached}
        for kind in rates.KINDS:
            facts[f"of_{kind}_rate"] = reached / self.rate(kind, figure.precision)
        figure.facts = {**facts, "flop": flop, **figure.facts}
        self.report.add(figure)


def measure_rates(bench: Bench) -> None:
    """The section "rates"."""
    for precision in bench.precisions:
        for kind in rates.KINDS:
            bench.rate(kind, precision)
    bench.report.add(rates.copy_rate(bench.seconds))
