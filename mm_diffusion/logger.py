"""The log of rank 0: lines on the console, and rows in a table there and in progress.csv.

Trackers (see trackers.py), which the caller makes, get the rows, images and clips as well.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import blobfile as bf
import torch as th
from tqdm import tqdm

from .files import is_remote, write_text


class Clip(NamedTuple):
    """video [F, 3, H, W], in [-1, 1] or uint8, with audio [C, L] in [-1, 1]."""

    video: th.Tensor
    fps: float | Fraction  # frames per second
    audio: th.Tensor
    sample_rate: int  # in Hz


class Tracker(Protocol):
    """Another place to log to. `start` raises a ValueError if that cannot work."""

    name: str

    def start(self, step: int, flags: Mapping[str, Any]) -> None: ...
    def log_scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def log_image(self, name: str, image: th.Tensor, step: int) -> None: ...
    def log_clip(self, name: str, clip: Clip, step: int) -> None: ...


@dataclass
class _Logger:
    enabled: bool = True
    waiting: list[Tracker] = field(default_factory=list)
    trackers: list[Tracker] = field(default_factory=list)
    path: str = ""  # of progress.csv, local or remote
    values: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)  # of progress.csv; empty: to be written anew


_current = _Logger()


def configure(
    folder: str | os.PathLike | None = None, enabled: bool = True, trackers: Sequence[Tracker] = ()
) -> None:
    """Log to `folder` (None: console only), keeping the rows of its progress.csv.

    Ranks other than 0 pass enabled=False and stay silent. `start_trackers` starts the trackers.
    """
    global _current
    _current = _Logger(enabled, list(trackers) if enabled else [])
    if not enabled or folder is None:
        return
    if not is_remote(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    _current.path = bf.join(os.fspath(folder), "progress.csv")
    if bf.exists(_current.path):
        with bf.BlobFile(_current.path, "r") as file:
            _current.rows = list(csv.DictReader(file))


def start_trackers(step: int = 0, flags: Mapping[str, Any] | None = None) -> None:
    """Start the trackers of a run that resumes after `step` steps and shows `flags`.

    ValueError where one cannot start. One that fails later is dropped with a warning.
    """
    while _current.waiting:
        tracker = _current.waiting.pop(0)
        tracker.start(step, flags or {})
        _current.trackers.append(tracker)


def log(*words: object) -> None:
    """Print a line; a progress bar stays intact."""
    if _current.enabled:
        tqdm.write(" ".join(str(word) for word in words), file=sys.stdout)
        sys.stdout.flush()


def warn(*words: object) -> None:
    log("warning:", *words)


def logkv(key: str, value: float) -> None:
    """Set a value of the next row."""
    _current.values[key] = value


def dumpkvs() -> dict[str, float]:
    """Log the row of values set by `logkv`, start the next, and return the values."""
    values, _current.values = _current.values, {}
    if not _current.enabled or not values:
        return values
    row = {key: _cell(value) for key, value in values.items()}
    log(_table(row))
    if _current.path:
        _append_row(row)
    scalars = {key: value for key, value in values.items() if key != "step"}
    _track("log_scalars", scalars, int(values.get("step", 0)))
    return values


def log_image(name: str, image: th.Tensor, step: int) -> None:
    """Send an image [3, H, W], in [-1, 1] or uint8, to the trackers."""
    _track("log_image", name, image, step)


def log_clip(
    name: str,
    video: th.Tensor,
    fps: float | Fraction,
    audio: th.Tensor,
    sample_rate: int,
    step: int,
) -> None:
    """Send a clip, in the units of `Clip`, to the trackers."""
    _track("log_clip", name, Clip(video, fps, audio, sample_rate), step)


def _track(method: str, *values: Any) -> None:
    """Call a method of every tracker. One that fails is dropped: training must not end with it."""
    for tracker in list(_current.trackers):
        try:
            getattr(tracker, method)(*values)
        except Exception as error:
            _current.trackers.remove(tracker)
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{tracker.name} failed ({reason}); the run continues without it")


def peak_memory() -> int:
    """Peak bytes: of tensors on the GPU if this process uses one, else of the process."""
    if th.cuda.is_initialized():
        return th.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drop_rows_from(step: int) -> None:
    """Drop rows of steps after `step`, which a resumed run repeats."""
    steps = (row.get("step") or "" for row in _current.rows)
    kept = [text.isdigit() and int(text) <= step for text in steps]
    _current.rows = list(itertools.compress(_current.rows, kept))
    _current.columns = []


def _append_row(row: dict[str, str]) -> None:
    """Append to progress.csv, or write it anew where it is remote or the row has new columns."""
    _current.rows.append(row)
    if set(row) <= set(_current.columns) and not is_remote(_current.path):
        with open(_current.path, "a", newline="") as file:
            csv.DictWriter(file, _current.columns).writerow(row)
        return
    _current.columns = list(dict.fromkeys(itertools.chain.from_iterable(_current.rows)))
    table = io.StringIO()
    writer = csv.DictWriter(table, _current.columns)
    writer.writeheader()
    writer.writerows(_current.rows)
    write_text(_current.path, table.getvalue())


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _table(cells: dict[str, str]) -> str:
    left, right = max(map(len, cells)), max(map(len, cells.values()))
    lines = [f"| {key:<{left}} | {value:<{right}} |" for key, value in cells.items()]
    rule = "-" * len(lines[0])
    return "\n".join([rule, *lines, rule])
