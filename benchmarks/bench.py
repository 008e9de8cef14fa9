"""What the sections of a run share: what to measure, for how long, and what was measured already."""

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
    """`seconds` is the time for the repeats of a figure, `longest` what a single run may take for one."""

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
    drawn: dict[tuple[str, ...], Any] = field(
        default_factory=dict
    )  # what clips.py has sampled already
    _rates: dict[tuple[str, str], float] = field(default_factory=dict)
    _flop: dict[str, int] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, Size, str]]:
        """Model by model, the precisions."""
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
        """FLOPs of one sample's way through the model."""
        if name not in self._flop:
            self._flop[name] = forward_flop(self.sizes[name])
        return self._flop[name]

    def add_passes(
        self,
        section: str,
        name: str,
        what: str,
        seconds: list[float],
        precision: str,
        variant: str,
        passes: int,
        **facts: Any,
    ) -> None:
        """A figure of a call that takes as much work as this many passes of the batch through the model."""
        flop = passes * self.batch_size * self.flop(name)
        reached = flop / median(seconds)
        shares = {f"of_{kind}_rate": reached / self.rate(kind, precision) for kind in rates.KINDS}
        facts = {"flop_per_second": reached, **shares, "flop": flop, **facts}
        self.report.add(Figure(section, name, what, seconds, "s", precision, variant, facts))


def measure_rates(bench: Bench) -> None:
    """The section "rates"."""
    for precision in bench.precisions:
        for kind in rates.KINDS:
            bench.rate(kind, precision)
    bench.report.add(rates.copy_rate(bench.seconds))
