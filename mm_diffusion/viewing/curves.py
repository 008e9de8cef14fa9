"""Curves of training runs: progress.csv -> a figure with a panel per quantity, a colour per run."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import color_sequences, colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from ..files import short_names

AXES = {"step": "steps", "samples": "samples", "hours": "hours of training"}
EXACT = ("lr", "log2_loss_scale")  # settings rather than measurements: never smoothed
QUARTILE = re.compile(r"(.+)_q[0-3]")  # columns of a loss by quartile of the timestep
QUARTILE_LABELS = ("q0 (least noise)", "q1", "q2", "q3 (most noise)")
MIN_WINDOWS = 10  # the moving average spans at most 1 / MIN_WINDOWS of a run's rows


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's columns, of equal length; NaN where a row has no value."""

    name: str
    columns: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: a column, or the quartile columns of a loss."""

    title: str
    columns: list[str]
    is_log: bool  # if all values are positive


def read_runs(paths: Sequence[str | os.PathLike]) -> list[Run]:
    """Runs from output folders or csv files, with the shortest names that differ."""
    tables, named = [], []
    for path in map(Path, paths):
        table = (path / "progress.csv" if path.is_dir() else path).resolve()
        if not table.is_file():
            raise ValueError(f"{path}: no progress.csv; give an output folder or a csv file")
        tables.append(table)
        named.append(table.parent if table.name == "progress.csv" else table.with_suffix(""))
    names = short_names(named)
    return [Run(name, read_columns(table)) for name, table in zip(names, tables, strict=True)]


def read_columns(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The columns of a progress.csv that have finite values, and `hours` of training.

    Rows of a resumed run replace earlier rows of the same or later steps. ValueError for fewer
    than two rows.
    """
    rows: list[dict[str, float]] = []
    with open(path, newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or []):
            raise ValueError(f"{path}: is empty or has no column 'step'; need a progress.csv")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            row = {key: _parse(cells[key], f"{where}: {key}") for key in reader.fieldnames or []}
            if math.isnan(row["step"]):
                continue
            while rows and rows[-1]["step"] >= row["step"]:
                rows.pop()
            rows.append(row)
    if len(rows) < 2:
        found = f"need at least two rows, found {len(rows)}"
        raise ValueError(f"{path}: {found}; wait for the next --log_interval")
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    columns = {key: values for key, values in columns.items() if np.isfinite(values).any()}
    if {"samples", "samples_per_second"} <= columns.keys():
        seconds = np.diff(columns["samples"], prepend=0.0) / columns["samples_per_second"]
        columns["hours"] = np.cumsum(np.nan_to_num(seconds, posinf=0.0)) / 3600
    return columns


def _parse(cell: str | None, where: str) -> float:
    """A finite number; NaN for an empty cell, NaN and infinity."""
    try:
        value = float(cell or "nan")
    except ValueError:
        raise ValueError(f"{where} is {cell!r}, need a number") from None
    return value if math.isfinite(value) else math.nan


def choose_panels(runs: Sequence[Run], keys: Iterable[str] = ()) -> list[Panel]:
    """A panel per key: a column, or LOSS_q for the quartiles of a loss.

    Without keys: all losses, and how training proceeds. ValueError for a key that no run has.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.columns))
    quartiles: dict[str, list[str]] = {}
    for key in known:
        if match := QUARTILE.fullmatch(key):
            quartiles.setdefault(f"{match[1]}_q", []).append(key)
    losses = [key.removesuffix("_q") for key in quartiles]
    if not keys:
        wanted = dict.fromkeys(["loss", "loss_q", *losses, "grad_norm", "lr", "samples_per_second"])
        keys = [key for key in wanted if key in [*known, *quartiles]]
    if not keys:
        raise ValueError(f"keys: no run has a loss; choose from {', '.join(known)}")
    panels = []
    for key in keys:
        if key in quartiles:
            title = f"{key.removesuffix('_q')} by quartile of the timestep"
            panels.append(Panel(title, sorted(quartiles[key]), is_log=True))
        elif key in known:
            is_log = key in (*losses, "grad_norm") or QUARTILE.fullmatch(key) is not None
            panels.append(Panel(key, [key], is_log))
        else:
            choices = ", ".join([*known, *quartiles])
            raise ValueError(f"keys {key!r}: no run has this column; choose from {choices}")
    return panels


def smoothed(values: np.ndarray, rate: float) -> np.ndarray:
    """Exponential moving average [N], bias-corrected: a value weighs `rate` times the next one."""
    total, weight = 0.0, 0.0
    result = []
    for value in values:
        total = rate * total + value
        weight = rate * weight + 1
        result.append(total / weight)
    return np.array(result)


def draw(
    runs: Sequence[Run], panels: Sequence[Panel], x: str = "step", smooth: float = 0.0
) -> Figure:
    """All panels over the column `x` of AXES: faint values, strong moving averages of that rate."""
    for run in runs:
        if x not in run.columns:
            raise ValueError(f"x {x!r}: {run.name} has no such column; choose from {[*AXES]}")
    width = math.ceil(math.sqrt(len(panels)))
    height = math.ceil(len(panels) / width)
    figure = Figure((4.4 * width, 2.9 * height + 0.3), layout="constrained")
    all_axes = figure.subplots(height, width, squeeze=False).flat
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw_panel(axes, runs, panel, x=x, smooth=smooth)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    lines = [Line2D([], [], color=colour) for colour in _colours(len(runs))]
    names = [run.name for run in runs]
    figure.legend(lines, names, loc="outside upper center", ncols=min(5, len(runs)))
    return figure


def _draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel, x: str, smooth: float) -> None:
    values = np.concatenate([run.columns.get(key, []) for run in runs for key in panel.columns])
    lowest = np.nanmin(values)
    is_log = panel.is_log and lowest > 0
    rate = 0.0 if panel.columns[0] in EXACT else smooth
    opacities = np.linspace(1, 0.3, len(panel.columns))[::-1]
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        for column, opacity in zip(panel.columns, opacities, strict=True):
            if column not in run.columns:
                continue
            points = np.stack([run.columns[x], run.columns[column]])
            across, y = points[:, np.isfinite(points).all(axis=0)]
            if rate:
                axes.plot(across, y, color=colour, alpha=0.25 * opacity, linewidth=0.8)
            average = _average(y, rate=rate, is_log=is_log)
            marker = "o" if len(y) == 1 else ""
            axes.plot(across, average, color=colour, alpha=opacity, marker=marker)
    axes.set_title(panel.title)
    axes.set_xlabel(AXES[x])
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_log:
        axes.set_yscale("log")
    elif lowest >= 0:
        axes.set_ylim(bottom=0)
    if len(panel.columns) > 1:
        shades = [Line2D([], [], color="black", alpha=opacity) for opacity in opacities]
        labels = [QUARTILE_LABELS[int(column[-1])] for column in panel.columns]
        axes.legend(shades, labels, fontsize="small", ncols=2)


def _average(values: np.ndarray, rate: float, is_log: bool) -> np.ndarray:
    """The moving average, of logarithms on a log scale so that a spike does not dominate it.

    The rate of a short run is lower, so that the average does not lag behind.
    """
    rate = min(rate, max(0.0, 1 - MIN_WINDOWS / max(1, len(values))))
    return np.exp(smoothed(np.log(values), rate)) if is_log else smoothed(values, rate)


def _colours(count: int) -> list:
    if count <= 10:
        return color_sequences["petroff10"][:count]
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure in the format of its suffix; missing folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
