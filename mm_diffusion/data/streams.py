"""Opening video files and decoding their streams.

Timestamps are seconds on the file's own clock.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import Any

import av
import av.logging
import blobfile

from ..files import is_remote
from . import MediaError

AnyPath = str | os.PathLike
Rate = float | Fraction
av.logging.set_level(av.logging.PANIC)
# Decoding starts at least this long before a window, for codecs whose frames overlap.
PREROLL_SECONDS = 0.5
SETTLING_FRAMES = 2  # the first audio frames after a seek may be corrupt or misplaced


@contextmanager
def open_media(path: AnyPath) -> Iterator[Any]:
    """The file, local or remote, as a PyAV container; errors of libav become MediaErrors."""
    try:
        path = os.fspath(path)
        file: Any = blobfile.BlobFile(path, "rb") if is_remote(path) else nullcontext(path)
        with file as source, av.open(source, metadata_errors="ignore") as container:
            yield container
    except (av.error.FFmpegError, blobfile.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: cannot be decoded ({reason})") from error


def choose_stream(path: AnyPath, container, kind: str, index: int | None = None) -> Any:
    """The stream of that index in the file, or the best of its kind ("video" or "audio")."""
    indices = [stream.index for stream in container.streams if stream.type == kind]
    if index is not None and index not in indices:
        raise MediaError(f"{path}: stream {index} is not {kind} (its {kind} streams: {indices})")
    stream = container.streams.best(kind) if index is None else container.streams[index]
    if stream is None:
        raise MediaError(f"{path}: has no {kind} stream")
    if stream.codec_context is None:
        raise MediaError(f"{path}: its {kind} stream has an unknown codec")
    return stream


def stream_start(stream) -> Fraction:
    return Fraction(stream.start_time or 0) * stream.time_base


def frame_seconds(stream, frame) -> Fraction:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return Fraction(frame.samples, frame.sample_rate)
    steady = 1 / Fraction(stream.average_rate or 25)
    stated = Fraction(frame.duration or 0) * (frame.time_base or stream.time_base)
    is_rounded = abs(stated - steady) <= stream.time_base
    return steady if is_rounded or not stated else stated


def decode_stream(container, stream) -> Iterator[tuple[Fraction, Any]]:
    """(timestamp in seconds on the file's clock, frame) from the container's position on."""
    stream.codec_context.thread_count = 1
    due = stream_start(stream)
    for frame in container.decode(stream):
        seconds = due if frame.pts is None else frame.pts * Fraction(frame.time_base)
        due = seconds + frame_seconds(stream, frame)
        yield seconds, frame


def decode_from(path: AnyPath, index: int, begin: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Decode stream `index` from its last safe point before `begin` s, or from its start."""
    for preroll in (PREROLL_SECONDS, 16 * PREROLL_SECONDS, math.inf):
        with open_media(path) as container:
            stream = container.streams[index]
            if begin - preroll <= stream_start(stream):
                yield from decode_stream(container, stream)
                return
            settling = SETTLING_FRAMES if stream.type == "audio" else 0
            ticks = math.floor((begin - Fraction(preroll)) / stream.time_base)
            try:
                container.seek(ticks, stream=stream)
                timed = decode_stream(container, stream)
                head = list(itertools.islice(timed, settling + 1))[settling:]
            except av.error.FFmpegError:
                continue  # the last attempt decodes from the start and lets errors through
            if head and head[0][0] <= begin:
                yield from itertools.chain(head, timed)
                return
