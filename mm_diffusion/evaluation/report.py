"""The report of an evaluation: a table for the console and metrics.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import blobfile as bf

from .. import logger
from ..dist_util import World
from ..files import write_text
from .scores import Score

CLIPS = "clips"  # how they are read, beside how measures are computed


@dataclasses.dataclass(frozen=True)
class Report:
    """Scores, and all that they depend on."""

    scores: list[Score]
    notes: list[str]
    left_out: list[str]
    settings: dict[str, Any]
    histograms: dict[str, Any] = dataclasses.field(default_factory=dict)
    how: dict[str, str] = dataclasses.field(default_factory=dict)  # measure -> how it is computed

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

    def save(self, folder: str) -> str:
        """Write metrics.json into the folder -> its path.

        A different report that exists is kept: the new one is metrics_2.json, and so on.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        path, number = bf.join(folder, "metrics.json"), 1
        while bf.exists(path):
            with bf.BlobFile(path, "r") as file:
                if file.read() == text:
                    return path
            number += 1
            path = bf.join(folder, f"metrics_{number}.json")
        write_text(path, text)
        return path


def publish(report: Report, folder: str, world: World) -> None:
    """Log the report and save it into the folder, on rank 0."""
    if world.rank == 0:
        logger.log(f"{report.settings['samples_path']}\n{report.text()}")
        logger.log(f"saved to {report.save(folder)}")


def table(scores: list[Score]) -> str:
    """The scores as text, a row each; "-" stands for an undefined value."""
    rows = [("metric", "samples", "reference", "better", "count", "note")]
    for score in scores:
        counts = str(score.count)
        if score.reference_count:
            counts += f" / {score.reference_count}"
        values = _cell(score.value), _cell(score.reference)
        rows.append((score.name, *values, score.better, f"{counts} {score.unit}", score.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
