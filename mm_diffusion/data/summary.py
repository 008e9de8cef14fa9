"""A summary of a folder of clips as text (py_scripts/check_data.py)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable

from ..config import DataConfig
from . import MediaError, decode
from .clips import count_windows
from .decode import ClipInfo
from .index import ClipIndex

QUIETEST = 1e-12  # mean square: -120 dB
MAX_MEASURED_SECONDS = 60  # of a file's audio, from its middle
MAX_VALUES = 6  # of a property, the most frequent ones


@dataclasses.dataclass(frozen=True)
class MeasuredClip:
    """A file, its RMS level in dB below full scale, and how much louder right is than left."""

    path: str
    info: ClipInfo
    loudness_db: float
    right_minus_left_db: float


def decibels(power: float) -> float:
    """Mean square -> dB relative to full scale, at least -120."""
    return 10 * math.log10(max(power, QUIETEST))


def measure(path: str, info: ClipInfo) -> MeasuredClip:
    """Measure at most a minute of audio from the middle; NaN where it cannot be decoded."""
    seconds = min(info.duration_seconds, MAX_MEASURED_SECONDS)
    start = (info.duration_seconds - seconds) / 2
    samples = max(1, int(seconds * info.sample_rate))
    streams = (info.video_stream, info.audio_stream)
    try:
        _, audio = decode.read_window(path, start, 1, 1, 8, 8, info.sample_rate, samples, *streams)
    except MediaError:
        return MeasuredClip(path, info, math.nan, math.nan)
    left, right = audio.double().square().mean(dim=1).tolist()
    loudness, balance = decibels((left + right) / 2), decibels(right) - decibels(left)
    return MeasuredClip(path, info, loudness, balance)


def describe(index: ClipIndex[ClipInfo], rows: list[MeasuredClip], config: DataConfig) -> str:
    """A row for each measured clip, a summary of all in training windows, and the bad files."""
    infos = [info for _, info in index.clips]
    sizes = (config.video_size[0], config.video_fps, config.clip_stride)
    windows = sum(count_windows(info, *sizes) for info in infos)
    durations = [info.duration_seconds for info in infos]
    figures = (min(durations), statistics.median(durations), max(durations), sum(durations))
    summary = {
        "clips": f"{len(infos)} files, {windows} windows",
        "seconds (min/median/max/total)": " / ".join(f"{seconds:.2f}" for seconds in figures),
        "frames per second": _tally(f"{info.fps:.4g}" for info in infos),
        "frame size": _tally(f"{info.width}x{info.height}" for info in infos),
        "samples per second": _tally(info.sample_rate for info in infos),
        "channels": _tally(info.channels for info in infos),
        "loudness (dBFS, median)": _median(row.loudness_db for row in rows),
        "right minus left (dB, median)": _median(row.right_minus_left_db for row in rows),
        "left out": f"{len(index.bad)} files",
    }
    lines = [" seconds    fps       size     Hz ch   dBFS  R-L dB  file", *map(_row, rows)]
    if len(infos) > len(rows):
        lines.append(f"... and {len(infos) - len(rows)} more (--limit)")
    lines += ["", *(f"{name:32}{value}" for name, value in summary.items())]
    return "\n".join([*lines, *(f"  {reason}" for reason in index.bad.values())])


def _row(row: MeasuredClip) -> str:
    info, size = row.info, f"{row.info.width}x{row.info.height}"
    video = f"{info.duration_seconds:8.2f} {info.fps:6.2f} {size:>10}"
    audio = f"{info.sample_rate:6d} {info.channels:2d} {row.loudness_db:6.1f}"
    return f"{video} {audio} {row.right_minus_left_db:+7.1f}  {row.path}"


def _tally(values: Iterable) -> str:
    found = Counter(values).most_common(MAX_VALUES)
    return ", ".join(f"{value} ({count})" for value, count in found)


def _median(values: Iterable[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{statistics.median(known):+.1f} over {len(known)} files" if known else "unknown"
