"""The report of an evaluation: a table for the console and metrics.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import blobfile as bf

from .. import logger
from ..dist_util import World
from ..files import write_text
from .bootstrap import LEVEL, Interval
from .scores import Score

CLIPS = "clips"  # how they are read, beside how measures are computed
METRICS = "metrics"  # the file's name without suffix
VERSION = 2  # of metrics.json, as metrics.schema.json describes it; version 1 had no intervals


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores, and all that they depend on."""

    scores: list[Score]
    notes: list[str]
    left_out: list[str]
    settings: dict[str, Any]
    histograms: dict[str, Any] = dataclasses.field(default_factory=dict)
    how: dict[str, str] = dataclasses.field(default_factory=dict)  # measure -> how it is computed
    clips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # path, start in seconds
    # Name of a score -> its value of each of these clips.
    clip_values: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
    memorisation: dict[str, Any] = dataclasses.field(default_factory=dict)  # threshold and pairs

    def text(self) -> str:
        """The table, how its figures are computed, notes, and what is left out and why."""
        notes = [f"note: {note}" for note in self.notes]
        left_out = [f"left out: {line}" for line in self.left_out]
        return "\n".join([table(self.scores), *self._how(), *notes, *left_out])

    def _how(self) -> list[str]:
        """A line for each measure that has scores, and one on the clips."""
        lines = [f"{CLIPS}: {self.how[CLIPS]}"] if self.how else []
        for measure, how in self.how.items():
            names = [score.name for score in self.scores if score.measure == measure]
            if names:
                lines.append(f"{'; '.join(names)}: {how}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The content of metrics.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"version": VERSION, **fields, "scores": [score.as_json() for score in self.scores]}

    def save(self, folder: str) -> str:
        """Write metrics.json into the folder -> its path; see `save_json`."""
        return save_json(self.as_json(), folder, METRICS)


def save_json(content: dict[str, Any], folder: str, name: str) -> str:
    """Write NAME.json into the folder -> its path.

    A different file that exists is kept: the new one is NAME_2.json, and so on.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path, number = bf.join(folder, f"{name}.json"), 1
    while bf.exists(path):
        with bf.BlobFile(path, "r") as file:
            if file.read() == text:
                return path
        number += 1
        path = bf.join(folder, f"{name}_{number}.json")
    write_text(path, text)
    return path


def publish(report: Report, folder: str, world: World) -> str:
    """Log the report and save it into the folder, on rank 0 -> path of metrics.json there."""
    if world.rank > 0:
        return ""
    logger.log(f"{report.settings['samples_path']}\n{report.text()}")
    path = report.save(folder)
    logger.log(f"saved to {path}")
    return path


def table(scores: list[Score]) -> str:
    """The scores as text, a row each, with intervals; "-" stands for an undefined value."""
    spread = f"{LEVEL:.0%} interval"
    rows = [("metric", "samples", spread, "reference", spread, "better", "count", "note")]
    for score in scores:
        counts = str(score.count)
        if score.reference_count:
            counts += f" / {score.reference_count}"
        values = cell(score.value), interval_cell(score.interval)
        true_values = cell(score.reference), interval_cell(score.reference_interval)
        count = f"{counts} {score.unit}"
        rows.append((score.name, *values, *true_values, score.better, count, score.note))
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A value in a table."""
    return "-" if value is None else f"{value:.4g}"


def interval_cell(interval: Interval) -> str:
    """An interval in a table; empty if there is none."""
    return f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else ""
