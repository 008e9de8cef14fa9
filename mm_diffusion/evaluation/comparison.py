"""Runs compared: their scores side by side, and the intervals of their differences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from .. import logger
from ..dist_util import World
from .bootstrap import LEVEL, Interval, interval
from .report import Report, align, cell, interval_cell, save_json
from .scores import Score

COMPARISON = "comparison"  # the file's name without suffix
VERSION = 1  # of comparison.json, as metrics.schema.json describes it
UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A score of a run less that of the baseline, both with the same draws of the reference."""

    name: str
    run: str
    value: float | None
    interval: Interval
    verdict: str


def difference(run: str, score: Score, baseline: Score) -> Difference:
    """The verdict is "better", "worse" ("higher", "lower" for figures whose aim is the reference).

    It is "undecided" unless the interval excludes zero.
    """
    if score.value is None or baseline.value is None:
        return Difference(score.name, run, None, None, UNDECIDED)
    value, spread = score.value - baseline.value, None
    draws, other = score.draws, baseline.draws
    # Of a set that is too small for draws there are fewer.
    if draws and other and len(draws.values) == len(other.values):
        spread = interval(draws - other, centred=True)
    return Difference(score.name, run, value, spread, _verdict(spread, score.better))


def _verdict(spread: Interval, better: str) -> str:
    if spread is None or spread[0] <= 0 <= spread[1]:
        return UNDECIDED
    direction = "lower" if spread[1] < 0 else "higher"
    if not better:
        return direction
    return "better" if direction == better else "worse"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Reports by the names of runs; the first one is the baseline."""

    runs: Mapping[str, Report]

    @property
    def baseline(self) -> str:
        """The name of the first run."""
        return next(iter(self.runs))

    @functools.cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """(run, score) -> difference, of every run but the baseline and scores that both have."""
        base = {score.name: score for score in self.runs[self.baseline].scores}
        found = {}
        for run, report in self.runs.items():
            for score in report.scores:
                if run != self.baseline and score.name in base:
                    found[run, score.name] = difference(run, score, base[score.name])
        return found

    def notes(self) -> list[str]:
        """Notes on every run, and on sets of different size."""
        notes = [f"{run}: {note}" for run, report in self.runs.items() for note in report.notes]
        counts = {run: report.settings["clips"]["samples"] for run, report in self.runs.items()}
        if len(set(counts.values())) > 1:
            sizes = ", ".join(f"{run} {count}" for run, count in counts.items())
            notes.append(f"numbers of clips differ ({sizes}); distances of fewer clips are larger")
        return notes

    def text(self) -> str:
        """One table of all runs, and notes."""
        spread = f"{LEVEL:.0%} interval"
        header, base = ["metric"], self.baseline
        for run in self.runs:
            header += [run, spread]
            header += [f"less {base}", spread, "verdict"] if run != base else []
        rows = [header, *(self._row(score.name) for score in self.runs[base].scores)]
        return "\n".join([align(rows), *(f"note: {note}" for note in self.notes())])

    def _row(self, name: str) -> list[str]:
        row = [name]
        for run, report in self.runs.items():
            found = [score for score in report.scores if score.name == name]
            score = found[0] if found else Score(name, None)
            row += [cell(score.value), interval_cell(score.interval)]
            if run != self.baseline:
                nothing = Difference(name, run, None, None, UNDECIDED)
                this = self.differences.get((run, name), nothing)
                row += [cell(this.value), interval_cell(this.interval), this.verdict]
        return row

    def as_json(self) -> dict[str, Any]:
        """The content of comparison.json."""
        runs = {run: report.as_json() for run, report in self.runs.items()}
        differences = [dataclasses.asdict(this) for this in self.differences.values()]
        return {"version": VERSION, "runs": runs, "differences": differences}


def publish_comparison(comparison: Comparison, folder: str, world: World) -> str:
    """Log the comparison and save it, on rank 0 -> path of comparison.json there."""
    if world.rank > 0:
        return ""
    logger.log(comparison.text())
    path = save_json(comparison.as_json(), folder, COMPARISON)
    logger.log(f"saved to {path}")
    return path
