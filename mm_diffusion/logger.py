"""What rank 0 tells: lines on the console, and at every `dumpkvs` a table there and a row of progress.csv.

TensorBoard and Weights & Biases get the rows as well, and pictures and clips, where they are asked for.
"""

from __future__ import annotations

import csv
import os
import resource
import sys
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import blobfile as bf
import torch as th
from tqdm import tqdm

from .training import trackers


class _Logger:
    def __init__(self) -> None:
        self.folder: Path | None = None
        self.remote = ""  # where the table is copied
        self.enabled = True
        self.values: dict[str, float] = {}
        self.rows: list[dict[str, str]] = []
        self.idle: list[
            Any
        ] = []  # trackers (see trackers.py) that are asked for and not started yet
        self.trackers: list[Any] = []
        self.stale = False  # progress.csv may be other than `rows`, and is to be written anew


_current = _Logger()


def configure(
    folder: str | os.PathLike | None = None,
    enabled: bool = True,
    use_db: bool = False,
    use_tensorboard: bool = False,
) -> None:
    """Write below `folder` (None: console only). Ranks other than 0 pass enabled=False and stay silent.

    Rows that an earlier run left in progress.csv are kept. `use_db` asks for Weights & Biases, `use_tensorboard` for
    event files in `folder`/tensorboard: ValueError where a package or a key is missing; `start_trackers` starts them.
    """
    global _current
    _current = _Logger()
    _current.enabled = enabled
    if not enabled:
        return
    if folder is not None:
        if "://" in str(folder) and use_tensorboard:
            raise ValueError("use_tensorboard True needs a local --output_dir")
        if "://" in str(folder):  # kept here, and copied there after every row
            _current.remote = bf.join(str(folder), "progress.csv")
            _current.folder = Path(tempfile.mkdtemp())
            if bf.exists(_current.remote):
                bf.copy(_current.remote, str(_table_path()), overwrite=True)
        else:
            _current.folder = Path(folder)
        _current.folder.mkdir(parents=True, exist_ok=True)
        if _table_path().exists():
            with _table_path().open(newline="") as file:
                _current.rows = list(csv.DictReader(file))
            _current.stale = bool(_current.rows)  # its last line may be cut
    wanted = {trackers.TensorBoard: use_tensorboard, trackers.WeightsAndBiases: use_db}
    _current.idle = [tracker(_current.folder) for tracker, wish in wanted.items() if wish]


def start_trackers(step: int = 0, flags: Mapping[str, Any] | None = None) -> None:
    """Start what `configure` was asked for, for a run that goes on after `step` steps; `flags` are shown with it.

    ValueError where one cannot start. One that fails later is left out, with a warning.
    """
    idle, _current.idle = _current.idle, []
    for tracker in idle:
        tracker.start(step, flags or {})
        _current.trackers.append(tracker)


def log(*words: object) -> None:
    """One line on the console that leaves a progress bar whole."""
    if _current.enabled:
        tqdm.write(" ".join(str(word) for word in words), file=sys.stdout)
        sys.stdout.flush()


def warn(*words: object) -> None:
    log("warning:", *words)


def logkv(key: str, value: float) -> None:
    """Note a value for the next row."""
    _current.values[key] = value


def dumpkvs() -> dict[str, float]:
    """Print the noted values as a table, append them to progress.csv, forget them, and return them."""
    values, _current.values = _current.values, {}
    if not _current.enabled or not values:
        return values
    log(_table(values))
    if _current.folder is not None:
        _append_row({key: _cell(value) for key, value in values.items()})
    _track(
        "numbers",
        {key: value for key, value in values.items() if key != "step"},
        int(values.get("step", 0)),
    )
    return values


def log_image(name: str, image: th.Tensor, step: int) -> None:
    """Show a picture [3, H, W] in [-1, 1] (or uint8) in TensorBoard and Weights & Biases, where they are in use."""
    _track("image", name, image, step)


def log_clip(
    name: str,
    video: th.Tensor,
    fps: float | Fraction,
    audio: th.Tensor,
    sample_rate: int,
    step: int,
) -> None:
    """Show a clip, [F, 3, H, W] (or uint8) and [C, L] in [-1, 1], in TensorBoard and Weights & Biases likewise.

    The latter plays it; TensorBoard has the frames in one picture beside the sound. fps in frames per second,
    sample_rate in Hz.
    """
    _track("clip", name, video, fps, audio, sample_rate, step)


def _track(method: str, *values: Any) -> None:
    """Hand values to every tracker. Training is worth more than any of them: one that fails is dropped."""
    for tracker in list(_current.trackers):
        try:
            getattr(tracker, method)(*values)
        except Exception as error:
            _current.trackers.remove(tracker)
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{tracker.name} failed ({reason}); the run goes on without it")


def peak_memory() -> int:
    """The most bytes used so far: by tensors on the GPU where this process uses one, else by the process."""
    if th.cuda.is_initialized():
        return th.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drop_rows_from(step: int) -> None:
    """Forget rows of steps later than `step`, which a resumed run makes anew."""
    kept = [
        row
        for row in _current.rows
        if (row.get("step") or "").isdigit() and int(row["step"]) <= step
    ]
    _current.rows = kept


def _table_path() -> Path:
    assert _current.folder is not None
    return _current.folder / "progress.csv"


def _append_row(row: dict[str, str]) -> None:
    """Add the row; a key seen for the first time adds a column, for which the file is written anew."""
    known = list(_current.rows[0]) if _current.rows else []
    columns = list(dict.fromkeys([*known, *row]))
    fresh = _current.stale or columns != known
    if fresh:
        _current.rows = [{key: old.get(key, "") for key in columns} for old in _current.rows]
    _current.rows.append({key: row.get(key, "") for key in columns})
    path = _table_path()
    target = path.with_suffix(".tmp") if fresh else path
    with target.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(_current.rows if fresh else _current.rows[-1:])
    if fresh:
        os.replace(target, path)
        _current.stale = False
    if _current.remote:
        bf.copy(str(path), _current.remote, overwrite=True)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _table(values: dict[str, float]) -> str:
    cells = [(key, _cell(value)) for key, value in values.items()]
    left, right = (max(len(cell[i]) for cell in cells) for i in range(2))
    rule = "-" * (left + right + 7)
    return "\n".join(
        [rule, *(f"| {key:<{left}} | {value:<{right}} |" for key, value in cells), rule]
    )
