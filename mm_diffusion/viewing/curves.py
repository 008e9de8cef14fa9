"""Curves of training runs: rows of progress.csv -> a picture with a panel per quantity and a colour per run."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, EngFormatter, FuncFormatter, LogLocator, NullFormatter

from ..files import short_names

AXES = {"step": "steps", "samples": "samples", "hours": "hours of training"}
PICTURES = (".png", ".svg", ".pdf")
EXACT = ("lr", "log2_loss_scale")  # set, not measured: never smoothed
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#5c5c5c",
)  # told apart by all eyes
QUARTILE = re.compile(
    r"(.+)_q[0-3]"
)  # what the trainer adds to the name of a loss for a quartile of the timestep
QUARTILE_NAMES = ("q0 (least noise)", "q1", "q2", "q3 (most noise)")
FULLY_SMOOTHED = 10  # an average over N rows (rate 1 - 1 / N) takes a run of this times N rows
PANEL_INCHES = (4.4, 2.9)
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The numbers that a run wrote: columns of equal length, nan where a row has no such number."""

    name: str
    columns: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one panel shows: a column, or those of the quartiles of a loss."""

    title: str
    columns: list[str]
    is_log: bool  # where all numbers are positive


def read_runs(paths: Sequence[str | os.PathLike]) -> list[Run]:
    """Runs from output folders, or from csv files; the names are as short as tells them apart."""
    tables = [_table_of(path) for path in paths]
    names = short_names([_run_name(table) for table in tables])
    return [Run(name, read_columns(table)) for name, table in zip(names, tables, strict=True)]


def _table_of(path: str | os.PathLike) -> Path:
    table = Path(path).resolve()
    if table.is_dir():
        table = table / "progress.csv"
    if not table.is_file():
        raise ValueError(
            f"{path}: holds no progress.csv; name the output folder of a training run, or a csv file"
        )
    return table


def _run_name(table: Path) -> Path:
    """The folder of a progress.csv, or another file without its suffix."""
    return table.parent if table.name == "progress.csv" else table.with_suffix("")


def read_columns(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The columns of a progress.csv that hold numbers, with `hours`; ValueError where there are less than two rows.

    Where a run went back to an earlier step, what it did anew takes the place of what it had done.
    """
    with open(path, newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        keys = list(reader.fieldnames or [])
        if not keys:
            raise ValueError(f"{path}: is empty; the first row comes after --log_interval steps")
        if "step" not in keys:
            raise ValueError(f"{path}: has no column 'step', so it is no progress.csv")
        rows = [[_number(row[key], key, path, reader.line_num) for key in keys] for row in reader]
    table = np.array(rows, dtype=np.float64).reshape(-1, len(keys))
    table = table[_last_pass(table[:, keys.index("step")])]
    if len(table) < 2:
        raise ValueError(
            f"{path}: a curve needs two rows, this has {len(table)}; wait for the next --log_interval"
        )
    columns = {
        key: values for key, values in zip(keys, table.T, strict=True) if np.isfinite(values).any()
    }
    return columns | _hours(columns)


def _number(cell: str | None, key: str, path: str | os.PathLike, line: int) -> float:
    """A finite number, or nan for an empty cell and for what is not finite."""
    try:
        value = float(cell or "nan")
    except (TypeError, ValueError):
        raise ValueError(f"{path}, line {line}: {key} is {cell!r}, need a number") from None
    return value if np.isfinite(value) else np.nan


def _last_pass(step: np.ndarray) -> np.ndarray:
    """Numbers of the rows that have a step, and after which the step only grew."""
    rows = np.flatnonzero(np.isfinite(step))
    least_after = np.minimum.accumulate(np.append(step[rows], np.inf)[::-1])[::-1][1:]
    return rows[step[rows] < least_after]


def _hours(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hours of training, from samples and samples per second, where both are known."""
    if not {"samples", "samples_per_second"} <= columns.keys():
        return {}
    seconds = np.diff(columns["samples"], prepend=0.0) / columns["samples_per_second"]
    return {"hours": np.cumsum(np.nan_to_num(seconds, posinf=0.0)) / 3600}


def choose_panels(runs: Sequence[Run], keys: Iterable[str] = ()) -> list[Panel]:
    """A panel per key: a column, or LOSS_q for the quartiles of a loss. Without keys: those worth a look.

    ValueError for a key that no run has.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.columns))
    losses: dict[str, list[str]] = {}
    for key in known:
        if match := QUARTILE.fullmatch(key):
            losses.setdefault(match[1], []).append(key)
    quartiles = {f"{loss}_q": sorted(columns) for loss, columns in losses.items()}
    worth = [
        *list(losses)[:1],
        *list(quartiles)[:1],
        *list(losses)[1:],
        "grad_norm",
        "lr",
        "samples_per_second",
    ]
    chosen = list(keys) or [key for key in worth if key in known or key in quartiles]
    for key in chosen:
        if key not in known and key not in quartiles:
            raise ValueError(
                f"keys {key!r}: no run has it; choose from {', '.join([*known, *quartiles])}"
            )
    if not chosen:
        raise ValueError(f"keys: no run has a loss; choose from {', '.join(known)}")
    return [
        Panel(f"{key[:-2]} by quartile of the timestep", quartiles[key], True)
        if key in quartiles
        else Panel(
            key, [key], key == "grad_norm" or key in losses or QUARTILE.fullmatch(key) is not None
        )
        for key in chosen
    ]


def smoothed(values: np.ndarray, share: float) -> np.ndarray:
    """Exponential moving average [N] in which a value counts `share` of the one after it; unbiased from the start."""
    total, weight = 0.0, 0.0
    result = np.empty(len(values))
    for row, value in enumerate(values):
        total, weight = share * total + value, share * weight + 1
        result[row] = total / weight
    return result


def draw(
    runs: Sequence[Run], panels: Sequence[Panel], x: str = "step", smooth: float = 0.0
) -> Figure:
    """All panels over the column `x` of AXES: raw numbers faint, their moving average (rate `smooth`) strong.

    A logarithmic panel averages logarithms, so that a spike does not stand for many rows; a run of few rows is
    smoothed less, so that its average does not lag behind.
    """
    for run in runs:
        if x not in run.columns:
            raise ValueError(
                f"x {x!r}: {run.name} has no such column; choose from {', '.join(AXES)}"
            )
    width = {1: 1, 2: 2, 4: 2}.get(len(panels)) or min(
        (3, 4), key=lambda count: -len(panels) % count
    )
    height = -(-len(panels) // width)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            (width * PANEL_INCHES[0], height * PANEL_INCHES[1] + 0.3), layout="constrained"
        )
        all_axes = list(figure.subplots(height, width, squeeze=False).flat)
        for number, (axes, panel) in enumerate(zip(all_axes, panels, strict=False)):
            _draw_panel(axes, runs, panel, x, smooth)
            if number + width >= len(panels):
                axes.set_xlabel(AXES[x])
        for axes in all_axes[len(panels) :]:
            axes.remove()
        _tell_runs_apart(figure, runs)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure as its suffix says; folders are made."""
    check_picture_name(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150)


def check_picture_name(path: str | os.PathLike) -> None:
    """ValueError for a name that `save` would refuse."""
    if Path(path).suffix.lower() not in PICTURES:
        raise ValueError(f"out {path}: the name must end in {', '.join(PICTURES)}")


def _draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel, x: str, smooth: float) -> None:
    curves = []
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        for column, shade in zip(panel.columns, _shades(colour, len(panel.columns)), strict=True):
            values = run.columns.get(column, np.full(len(run.columns[x]), np.nan))
            there = np.isfinite(values) & np.isfinite(run.columns[x])
            if there.any():
                curves.append((run.columns[x][there], values[there], shade))
    is_log = panel.is_log and all(values.min() > 0 for _, values, _ in curves)
    share = 0.0 if panel.columns[0] in EXACT else smooth
    for across, values, shade in curves:
        rate = min(share, max(0.0, 1 - FULLY_SMOOTHED / len(values)))
        mean = np.exp(smoothed(np.log(values), rate)) if is_log else smoothed(values, rate)
        if share and (len(runs) == 1 or len(panel.columns) == 1):
            axes.plot(across, values, color=shade, alpha=0.25, linewidth=0.8)
        axes.plot(across, mean, color=shade, linewidth=1.6, marker="o" if len(across) == 1 else "")
    axes.set_title(panel.title, color="#222222")
    if len(panel.columns) > 1:
        _tell_quartiles_apart(axes, panel, _colours(1)[0] if len(runs) == 1 else "#333333")
    elif len(curves) == 1:
        axes.set_title(
            f"{mean[-1]:.4g} at the end",
            loc="right",
            color="#777777",
            fontsize=9,
            fontweight="normal",
        )
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _set_scale(axes, np.concatenate([values for _, values, _ in curves]), is_log)


def _set_scale(axes: Axes, values: np.ndarray, is_log: bool) -> None:
    """Linear ones start at 0 where nothing is below; logarithmic ones have enough ticks for what they span."""
    low, high = values.min(), values.max()
    if is_log:
        axes.set_yscale("log")
        decades = np.log10(high / low)
        axes.yaxis.set_major_locator(
            AutoLocator()
            if decades < 0.7
            else LogLocator(subs=(1, 2, 5)[: 3 if decades < 2 else 1])
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif low >= 0:
        axes.set_ylim(0, high * 1.05 or 1)


def _colours(count: int) -> list:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _shades(colour, count: int) -> list:
    """From light to the full colour, `count` of them."""
    full = np.array(to_rgb(colour))
    return [
        tuple(1 - (1 - full) * share) for share in np.linspace(0.35 if count > 1 else 1, 1, count)
    ]


def _tell_quartiles_apart(axes: Axes, panel: Panel, colour) -> None:
    lines = [
        Line2D([], [], color=shade, linewidth=2) for shade in _shades(colour, len(panel.columns))
    ]
    names = [QUARTILE_NAMES[int(column[-1])] for column in panel.columns]
    axes.legend(lines, names, fontsize=7.5, ncols=2, handlelength=1.2, columnspacing=1.0)


def _tell_runs_apart(figure: Figure, runs: Sequence[Run]) -> None:
    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontsize=11, color="#222222")
        return
    lines = [Line2D([], [], color=colour, linewidth=2.5) for colour in _colours(len(runs))]
    names = [run.name for run in runs]
    figure.legend(
        lines,
        names,
        loc="outside upper center",
        ncols=min(5, len(runs)),
        fontsize=9.5,
        handlelength=1.5,
    )
