"""Opening video files and decoding their streams.

Timestamps are seconds on the file's own clock.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from typing import Any

import av
import av.logging
import blobfile
from av.stream import Disposition

from ..files import is_remote
from . import MediaError

AnyPath = str | os.PathLike
AudioChoice = int | tuple[int, ...]  # the index of an audio stream, or (left, right) of mono ones
Rate = float | Fraction
av.logging.set_level(av.logging.PANIC)
# Decoding starts at least this long before a window, for codecs whose frames overlap.
PREROLL_SECONDS = 0.5
ATTACHED = Disposition.attached_pic | Disposition.timed_thumbnails
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MAX_PIXEL_ASPECT = 10
SETTLING_FRAMES = 2  # the first audio frames after a seek may be corrupt or misplaced


# What PyAV, libav's custom input, NumPy and PyTorch raise for contents that they cannot take.
UNDECODABLE = (
    av.error.FFmpegError,
    blobfile.Error,
    OSError,
    ValueError,
    ArithmeticError,
    RuntimeError,
)


@contextmanager
def open_media(path: AnyPath) -> Iterator[Any]:
    """The file, local or remote, as a PyAV container; errors in the block become MediaErrors."""
    path = os.fspath(path)
    try:
        file: Any = blobfile.BlobFile(path, "rb") if is_remote(path) else local_file(path, "rb")
        with file as source, av.open(source, metadata_errors="ignore") as container:
            yield container
    except MediaError:
        raise
    except UNDECODABLE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise MediaError(f"{path}: cannot be decoded ({reason})") from error


def local_file(path: str, mode: str) -> AbstractContextManager[Any]:
    """What `av.open` takes for a local file, whose name may have a colon or not be UTF-8."""
    is_utf8 = path.encode("utf-8", "replace") == os.fsencode(path)
    return nullcontext(f"file:{path}") if is_utf8 else open(path, mode)


def choose_stream(path: AnyPath, container, kind: str, index: int | None = None) -> Any:
    """The stream of that index in the file, or the best of its kind ("video" or "audio").

    Attached images, such as a cover, are no video.
    """
    streams = [s for s in container.streams if s.type == kind and not s.disposition & ATTACHED]
    indices = [stream.index for stream in streams]
    if index is not None and index not in indices:
        raise MediaError(f"{path}: stream {index} is not {kind} (its {kind} streams: {indices})")
    if not streams:
        raise MediaError(f"{path}: has no {kind} stream")
    best = container.streams.best(kind) if index is None else container.streams[index]
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise MediaError(f"{path}: its {kind} stream has an unknown codec")
    if kind == "audio" and not stream.codec_context.sample_rate:  # it begins late, without a header
        raise MediaError(f"{path}: its audio stream has an unknown sample rate")
    return stream


def choose_audio(path: AnyPath, container, indices: AudioChoice | None = None) -> list[Any]:
    """The audio stream to use (`choose_stream`), or the two mono streams of these indices."""
    if not isinstance(indices, tuple):
        return [choose_stream(path, container, "audio", indices)]
    pair = [choose_stream(path, container, "audio", index) for index in indices]
    for stream in pair:
        if stream.codec_context.channels != 1:
            found = f"stream {stream.index} has {stream.codec_context.channels} channels"
            raise MediaError(f"{path}: left and right must be mono streams ({found})")
    return pair


def find_fragments(path: AnyPath) -> tuple[bool, bool]:
    """Whether an mp4 file has fragments, and whether its last box is complete."""
    position, has_fragments = 0, False
    with blobfile.BlobFile(os.fspath(path), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        while position < size:
            file.seek(position)
            length, kind, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            has_fragments |= kind == b"moof"
            length = {0: size - position, 1: long_length}.get(length, length)
            if length < 8:
                break
            position += length
    return has_fragments, position == size


def last_packet_end(path: AnyPath, indices: set[int]) -> float:
    """Where the packets of these streams end, in s on the file's clock; reads the whole file."""
    end = Fraction(0)
    with open_media(path) as container:
        for packet in container.demux():
            if packet.stream_index in indices and packet.pts is not None and not packet.is_corrupt:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
    return float(end)


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
    seconds, previous = stream_start(stream), None
    for frame in _decode_packets(container, stream):
        if frame.pts is not None:
            seconds = frame.pts * frame.time_base
        elif previous is not None:
            seconds += frame_seconds(stream, previous)
        previous = frame
        yield seconds, frame


def _decode_packets(container, stream) -> Iterator[Any]:
    """The frames of a stream, up to a packet within which an mp4 file ends."""
    decoder = _decoder(stream)
    decoder.thread_count = 1
    for packet in container.demux(stream):
        if packet.is_corrupt and is_mp4(container):
            return
        yield from decoder.decode(packet)


def is_mp4(container) -> bool:
    return "mp4" in container.format.name.split(",")


def _decoder(stream) -> Any:
    """The stream's decoder; for VP8 and VP9 with transparency, the one that decodes it."""
    name = stream.codec_context.name
    if name in ALPHA_DECODERS:
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        if tags.get("alpha_mode") == "1":
            return av.CodecContext.create(ALPHA_DECODERS[name], "r")
    return stream.codec_context


def pixel_aspect(path: AnyPath, stream) -> Fraction:
    """Width over height of a stored pixel; MediaError where no display could show it."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        found = f"{aspect.numerator}:{aspect.denominator}"
        raise MediaError(f"{path}: corrupt pixel aspect ratio ({found})")
    return aspect


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
