"""What a folder of clips holds, in words and figures (py_scripts/check_data.py)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence

from ..script_util import numbers
from . import MediaError, decode
from .clips import count_windows, require_positive
from .decode import ClipInfo
from .index import ClipIndex

QUIETEST_DB = -120.0
MAX_MEASURED_SECONDS = 60  # of a file's sound, from its middle


@dataclasses.dataclass(frozen=True)
class Measured:
    """A file and its sound: RMS level in dB below full scale, and how much louder right is than left, in dB."""

    path: str
    info: ClipInfo
    loudness_db: float
    right_minus_left_db: float


def decibels(power: float) -> float:
    """Mean square -> dB relative to full scale, at least -120."""
    return max(QUIETEST_DB, 10 * math.log10(power)) if power > 0 else QUIETEST_DB


def measure(path: str, info: ClipInfo) -> Measured:
    """Measure the sound of a clip (at most a minute from its middle); figures are nan where it cannot be decoded."""
    seconds = min(info.duration_seconds, MAX_MEASURED_SECONDS)
    start = (info.duration_seconds - seconds) / 2
    samples = max(1, int(seconds * info.sample_rate))
    try:
        streams = (info.video_stream, info.audio_stream)
        _, audio = decode.read_window(path, start, 1, 1, 8, 8, info.sample_rate, samples, *streams)
    except MediaError:
        return Measured(path, info, math.nan, math.nan)
    left, right = audio.double().square().mean(dim=1).tolist()
    return Measured(path, info, decibels((left + right) / 2), decibels(right) - decibels(left))


def windows_of(
    index: ClipIndex, video_size: str | Sequence[int], video_fps: float, clip_stride: int
) -> int:
    """How many training windows the clips hold; ValueError for impossible sizes."""
    num_frames = numbers("video_size", video_size, 4)[0]
    require_positive(video_fps=video_fps, clip_stride=clip_stride)
    return sum(count_windows(info, num_frames, video_fps, clip_stride) for _, info in index.clips)


def describe(index: ClipIndex, rows: list[Measured], windows: int) -> str:
    """The table: a row for each measured clip, a summary of all, and the files that cannot be used."""
    header = f"{'seconds':>8} {'fps':>6} {'size':>10} {'Hz':>6} {'ch':>2} {'dBFS':>6} {'R-L dB':>7}  file"
    infos = [info for _, info in index.clips]
    seconds = [info.duration_seconds for info in infos]
    lengths = f"{min(seconds):.2f} / {statistics.median(seconds):.2f} / {max(seconds):.2f} / {sum(seconds):.2f}"
    summary = {
        "clips": f"{len(infos)} files, {windows} windows",
        "seconds (min/median/max/total)": lengths,
        "frames per second": _tally(f"{info.fps:.4g}" for info in infos),
        "picture": _tally(f"{info.width}x{info.height}" for info in infos),
        "samples per second": _tally(info.sample_rate for info in infos),
        "channels": _tally(info.channels for info in infos),
        "loudness (dBFS, median)": _median(row.loudness_db for row in rows),
        "right minus left (dB, median)": _median(row.right_minus_left_db for row in rows),
        "left out": f"{len(index.bad)} files",
    }
    unlisted = len(infos) - len(rows)
    more = [f"... and {unlisted} more (--limit)"] if unlisted else []
    lines = [header, *map(_row, rows), *more, ""]
    lines += [f"{name:32}{value}" for name, value in summary.items()]
    return "\n".join([*lines, *(f"  {reason}" for reason in index.bad.values())])


def _row(row: Measured) -> str:
    info, size = row.info, f"{row.info.width}x{row.info.height}"
    return (
        f"{info.duration_seconds:8.2f} {info.fps:6.2f} {size:>10} {info.sample_rate:6d} {info.channels:2d} "
        f"{row.loudness_db:6.1f} {row.right_minus_left_db:+7.1f}  {row.path}"
    )


def _tally(values) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common(6))


def _median(values) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{statistics.median(known):+.1f} over {len(known)} files" if known else "unknown"
