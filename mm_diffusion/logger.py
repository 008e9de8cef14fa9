"""What rank 0 tells: lines on the console, and at every `dumpkvs` a table there and a row of progress.csv."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class _Logger:
    def __init__(self) -> None:
        self.folder: Path | None = None
        self.enabled = True
        self.values: dict[str, float] = {}
        self.rows: list[dict[str, str]] = []
        self.database: Any = None  # a run of Weights and Biases
        self.stale = False  # progress.csv holds rows that are not in `rows`


_current = _Logger()


def configure(folder: str | os.PathLike | None = None, enabled: bool = True, use_db: bool = False) -> None:
    """Write below `folder` (None: console only). Ranks other than 0 pass enabled=False and stay silent.

    Rows that an earlier run left in progress.csv are kept. `use_db`: Weights and Biases as well, if it is installed;
    its key comes from its own environment variable.
    """
    global _current
    _current = _Logger()
    _current.enabled = enabled
    if folder is not None and enabled:
        _current.folder = Path(folder)
        _current.folder.mkdir(parents=True, exist_ok=True)
        if _table_path().exists():
            with _table_path().open(newline="") as file:
                _current.rows = list(csv.DictReader(file))
    if use_db and enabled:
        try:
            import wandb
        except ImportError:
            raise ValueError("use_db True needs Weights and Biases: pip install wandb, or leave the flag out") from None
        _current.database = wandb.init(dir=folder)


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
    if _current.database is not None:
        _current.database.log(values)
    if _current.folder is not None:
        _append_row({key: _cell(value) for key, value in values.items()})
    return values


def drop_rows_from(step: int) -> None:
    """Forget rows of steps later than `step`, which a resumed run makes anew."""
    kept = [row for row in _current.rows if float(row.get("step") or 0) <= step]
    _current.rows, _current.stale = kept, len(kept) < len(_current.rows)


def _table_path() -> Path:
    assert _current.folder is not None
    return _current.folder / "progress.csv"


def _append_row(row: dict[str, str]) -> None:
    """Add the row; a key seen for the first time adds a column, for which the file is written anew."""
    columns = list(dict.fromkeys(key for known in [*_current.rows[:1], row] for key in known))
    fresh = _current.stale or not _current.rows or list(_current.rows[0]) != columns
    _current.rows = [{key: known.get(key, "") for key in columns} for known in [*_current.rows, row]]
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


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _table(values: dict[str, float]) -> str:
    cells = [(key, _cell(value)) for key, value in values.items()]
    left, right = (max(len(cell[i]) for cell in cells) for i in range(2))
    rule = "-" * (left + right + 7)
    return "\n".join([rule, *(f"| {key:<{left}} | {value:<{right}} |" for key, value in cells), rule])
