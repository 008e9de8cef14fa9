"""Reading video files: what a file holds, and the frames and samples of a window.

Times are seconds on the file's own clock, where 0 is the start of its chosen video stream. The
frame at time t is the last one whose timestamp is at most t (before that, the first one). The
audio at time t is what the audio stream plays at t, and zeros where it plays nothing. A window
holds the frames at `start + i / fps` and `num_samples` samples from `start` on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.video.reformatter
import numpy as np
import PIL
import soundfile
import torch as th
import torchaudio
import torchvision

from . import MediaError
from .audio import read_samples, resampled
from .images import antialiased_bicubic, fit_image, published_bicubic
from .streams import (
    PREROLL_SECONDS,
    AnyPath,
    Rate,
    choose_stream,
    decode_from,
    frame_seconds,
    open_media,
    stream_start,
)

MAX_MISSING_SECONDS = 1.0  # a file that ends this much before its stated duration is truncated
MIN_BYTES_PER_SECOND = 16  # any codec needs more; fewer mean corrupt timestamps
# Versions that may decide bits of what is read: keys of caches.
DECODER = {module.__name__: module.__version__ for module in (av, PIL, th, torchaudio, torchvision)}


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a file holds, of the chosen streams; sizes in pixels, rates in Hz."""

    duration_seconds: float  # of the video
    fps: float
    width: int
    height: int
    sample_rate: int
    channels: int
    video_stream: int
    audio_stream: int
    video_codec: str
    audio_codec: str
    audio_begin_seconds: float = 0.0  # after the video begins
    audio_end_seconds: float = math.inf
    mono_streams: tuple[int, ...] = ()  # two or more that last equally long, else none


def probe(
    path: AnyPath, video_stream: int | None = None, audio_stream: int | None = None
) -> ClipInfo:
    """What the file holds; decodes the beginning and the end of both streams.

    Streams are the best ones, or those of the given indices. MediaError if a stream is missing or
    cannot be decoded.
    """
    with open_media(path) as container:
        video = choose_stream(path, container, "video", video_stream)
        audio = choose_stream(path, container, "audio", audio_stream)
        video_codec, audio_codec = video.codec_context, audio.codec_context
        end = _stream_ends(path, container, [video, audio])[0]
        return ClipInfo(
            duration_seconds=float(end - stream_start(video)),
            fps=float(video.average_rate or video.guessed_rate or 1),
            width=video_codec.width,
            height=video_codec.height,
            sample_rate=audio_codec.sample_rate,
            channels=audio_codec.channels,
            video_stream=video.index,
            audio_stream=audio.index,
            video_codec=video_codec.name,
            audio_codec=audio_codec.name,
        )


def video_duration(path: AnyPath) -> float:
    """Seconds of video in a file, which needs no audio; MediaError as in `probe`."""
    with open_media(path) as container:
        video, audio = choose_stream(path, container, "video"), container.streams.best("audio")
        streams = [video]
        if not video.duration and audio and audio.codec_context:
            streams.append(audio)  # the file's stated duration may be that of the audio
        return float(_stream_ends(path, container, streams)[0] - stream_start(video))


def _stream_ends(path: AnyPath, container, streams: list) -> list[Fraction]:
    """When each stream ends, in seconds on the file's clock; MediaError if the file is cut."""
    file_end = Fraction((container.start_time or 0) + (container.duration or 0), 1_000_000)
    stated, ends = [], []
    for stream in streams:
        duration = stream.duration and stream.duration * stream.time_base
        stated.append(stream_start(stream) + duration if duration else file_end)
        ends.append(_decoded_end(path, stream, stated[-1]))
    last, promised = float(max(ends)), float(max(stated))
    if last < promised - MAX_MISSING_SECONDS:
        raise MediaError(f"{path}: is truncated (ends at {last:.1f} of {promised:.1f} s)")
    seconds = last - float(stream_start(streams[0]))
    if 0 < container.size < MIN_BYTES_PER_SECOND * seconds:
        contradiction = f"{container.size / 1e6:.2g} MB would last {seconds / 3600:.3g} h"
        raise MediaError(f"{path}: corrupt timestamps ({contradiction})")
    return ends


def _decoded_end(path: AnyPath, stream, stated: Fraction) -> Fraction:
    """When the last decodable frame of a stream ends, in s; its first frame must decode, too."""
    first = next(decode_from(path, stream.index, stream_start(stream)), None)
    if first is None:
        raise MediaError(f"{path}: its {stream.type} stream holds nothing that can be decoded")
    tail = decode_from(path, stream.index, max(stated - Fraction(PREROLL_SECONDS), first[0]))
    seconds, frame = functools.reduce(lambda _, last: last, tail, first)
    return seconds + frame_seconds(stream, frame)


def read_window(
    path: AnyPath,
    start_seconds: float | Fraction,
    num_frames: int,
    fps: Rate,
    height: int,
    width: int,
    sample_rate: int,
    num_samples: int,
    video_stream: int | None = None,
    audio_stream: int | None = None,
    antialias: bool = False,
) -> tuple[th.Tensor, th.Tensor]:
    """-> (frames [F, H, W, 3] uint8, audio [2, L] float32) of the window from `start_seconds` on.

    Frames are fitted into H x W (`fit_image`), by default without antialiasing, as published.
    After the end of the video its last frame repeats. Mono becomes two equal channels, more than
    two are downmixed (libav's matrix). The window begins at sample round(start * rate) of the
    resampled stream; values beyond [-1, 1], as lossy codecs may give, are clipped.
    MediaError if the file cannot be decoded or has NaN as audio.
    """
    start = Fraction(start_seconds)
    with open_media(path) as container:
        video = choose_stream(path, container, "video", video_stream)
        audio = choose_stream(path, container, "audio", audio_stream)
        frames = list(_frames_at(path, video, start, num_frames, fps))
        in_rate = audio.codec_context.sample_rate
        read = functools.partial(read_samples, path, audio.index, stream_start(video), in_rate)
        first = round(start * sample_rate)
        waveform = resampled(read, in_rate, sample_rate, first, num_samples).clamp_(-1, 1)
    invalid = waveform.isnan().any(dim=0)
    if invalid.any():
        seconds = float(start) + int(invalid.int().argmax()) / sample_rate
        raise MediaError(f"{path}: audio contains NaN at {seconds:.2f} s")
    converter = av.video.reformatter.VideoReformatter()  # one for all: its setup costs
    size = height, width, antialiased_bicubic if antialias else published_bicubic
    fitted = {frame: fit_image(_to_rgb(frame, converter), *size) for frame in set(frames)}
    images = th.stack([fitted[frame] for frame in frames])
    return images.permute(0, 2, 3, 1).contiguous(), waveform


def read_frames(path: AnyPath, first: int | Fraction, count: int, fps: Rate) -> Iterator[th.Tensor]:
    """The upright RGB frames [3, h, w] uint8 at (first + i) / fps seconds, i < count, one by one.

    Needs no audio. After the end the last frame repeats. MediaError if the file cannot be decoded.
    """
    with open_media(path) as container:
        video = choose_stream(path, container, "video")
        converter, last = av.video.reformatter.VideoReformatter(), None
        for frame in _frames_at(path, video, first / Fraction(fps), count, fps):
            if frame is not last:
                image, last = _to_rgb(frame, converter), frame
            yield image


def _to_rgb(frame, converter) -> th.Tensor:
    """-> [3, h, w] uint8, turned upright as the file's display matrix asks."""
    array = converter.reformat(frame, format="rgb24").to_ndarray()
    upright = np.rot90(array, round(frame.rotation / 90))
    return th.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)


def _frames_at(path: AnyPath, stream, start: Fraction, count: int, fps: Rate) -> Iterator[Any]:
    """The decoded frames at `start + i / fps` seconds from the stream's beginning, i < count."""
    begin = stream_start(stream) + start
    slack = Fraction(stream.time_base) / 2 + Fraction(1, 10**6)  # for rounded timestamps
    latest = [begin + i / Fraction(fps) + slack for i in range(count)]
    chosen, current = 0, None
    for seconds, frame in decode_from(path, stream.index, begin):
        while current is not None and chosen < count and seconds > latest[chosen]:
            yield current
            chosen += 1
        if chosen == count:
            return
        current = frame
    if current is None:
        raise MediaError(f"{path}: no frame can be decoded at {float(begin):.2f} s")
    yield from itertools.repeat(current, count - chosen)


def read_wav(path: AnyPath) -> tuple[th.Tensor, int]:
    """-> ([C, L] float32 in [-1, 1], sample rate in Hz); MediaError if it cannot be read."""
    try:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as audio ({error})") from error
    return th.from_numpy(samples.T.copy()), sample_rate
