"""A summary of a folder of clips as text (py_scripts/check_data.py)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from ..config import DataConfig
from . import MediaError, decode
from .clips import notes_on_audio, window_counts
from .decode import ClipInfo
from .index import ClipIndex
from .streams import decode_from, open_media, stream_start
from .workers import ReaderPool

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


def check_fully(index: ClipIndex[ClipInfo], num_workers: int) -> ClipIndex[ClipInfo]:
    """The index without files that cannot be decoded from beginning to end."""
    _, bad = _read_all(decode_fully, index.clips, num_workers)
    return index.leave_out(bad)


def measure_some(
    index: ClipIndex[ClipInfo], limit: int, num_workers: int
) -> tuple[ClipIndex[ClipInfo], list[MeasuredClip]]:
    """The index without those of the first `limit` files that fail, and measures of the others."""
    rows, bad = _read_all(measure, index.clips[:limit], num_workers)
    return index.leave_out(bad), rows


def _read_all(
    function: Callable[[str, ClipInfo], Any],
    clips: Sequence[tuple[str, ClipInfo]],
    num_workers: int,
) -> tuple[list[Any], dict[str, str]]:
    """`function(path, info)` of each clip by a `ReaderPool`, and path -> why it fails."""
    size = max(1, num_workers)
    results, bad = [], {}

    def call(clip: tuple[str, ClipInfo]) -> Any:
        try:
            return readers.call(function, *clip)
        except MediaError as error:
            return error

    with ReaderPool(size) as readers, ThreadPoolExecutor(size) as threads:
        answers = tqdm(threads.map(call, clips), "decoded", len(clips), unit="file", leave=False)
        for (path, _), answer in zip(clips, answers, strict=True):
            if isinstance(answer, MediaError):
                bad[path] = str(answer)
            else:
                results.append(answer)
    return results, bad


def decode_fully(path: str, info: ClipInfo) -> None:
    """Decode all frames and all audio; MediaError where that fails."""
    with open_media(path) as container:
        begin = stream_start(container.streams[info.video_stream])
    for _ in decode_from(path, info.video_stream, begin):
        pass
    seconds = MAX_MEASURED_SECONDS
    streams = (info.video_stream, info.audio_stream)
    for start in range(0, math.ceil(info.duration_seconds), seconds):
        samples = seconds * info.sample_rate
        decode.read_window(path, start, 1, 1, 8, 8, info.sample_rate, samples, *streams)


def measure(path: str, info: ClipInfo) -> MeasuredClip:
    """Measure at most a minute of audio from the middle; MediaError where it cannot be decoded."""
    seconds = min(info.duration_seconds, MAX_MEASURED_SECONDS)
    start = (info.duration_seconds - seconds) / 2
    samples = max(1, int(seconds * info.sample_rate))
    streams = (info.video_stream, info.audio_stream)
    _, audio = decode.read_window(path, start, 1, 1, 8, 8, info.sample_rate, samples, *streams)
    left, right = audio.double().square().mean(dim=1).tolist()
    loudness, balance = decibels((left + right) / 2), decibels(right) - decibels(left)
    return MeasuredClip(path, info, loudness, balance)


def describe(index: ClipIndex[ClipInfo], rows: list[MeasuredClip], config: DataConfig) -> str:
    """A row for each measured clip, a summary of all in training windows, and the bad files."""
    count, sizes = len(index.clips), (config.video_size[0], config.video_fps, config.clip_stride)
    durations = index.column("duration_seconds")
    windows = window_counts(durations, *sizes).sum()
    figures = (min(durations), statistics.median(durations), max(durations), sum(durations))
    frame_sizes = zip(index.column("width"), index.column("height"), strict=True)
    summary = {
        "clips": f"{count} files, {windows} windows",
        "seconds (min/median/max/total)": " / ".join(f"{seconds:.2f}" for seconds in figures),
        "frames per second": _tally(f"{fps:.4g}" for fps in index.column("fps")),
        "frame size": _tally(f"{width}x{height}" for width, height in frame_sizes),
        "samples per second": _tally(index.column("sample_rate")),
        "channels": _tally(index.column("channels")),
        "loudness (dBFS, median)": _median(row.loudness_db for row in rows),
        "right minus left (dB, median)": _median(row.right_minus_left_db for row in rows),
        "left out": f"{len(index.bad)} files",
    }
    lines = [" seconds    fps       size     Hz ch   dBFS  R-L dB  file", *map(_row, rows)]
    if count > len(rows):
        lines.append(f"... and {count - len(rows)} more (--limit)")
    lines += ["", *(f"{name:32}{value}" for name, value in summary.items())]
    lines += [f"  {line}" for line in [*index.bad.values(), *index.notes()]]
    return "\n".join(lines + [f"note: {note}" for note in notes_on_audio(index, config)])


def _row(row: MeasuredClip) -> str:
    info, size = row.info, f"{row.info.width}x{row.info.height}"
    video = f"{info.duration_seconds:8.2f} {info.fps:6.2f} {size:>10}"
    audio = f"{info.sample_rate:6d} {info.channels:2d} {row.loudness_db:6.1f}"
    return f"{video} {audio} {row.right_minus_left_db:+7.1f}  {row.path}"


def _tally(values: Iterable) -> str:
    found = Counter(values).most_common(MAX_VALUES)
    return ", ".join(f"{value} ({count})" for value, count in found)


def _median(values: Iterable[float]) -> str:
    known = list(values)
    return f"{statistics.median(known):+.1f} over {len(known)} files" if known else "unknown"
