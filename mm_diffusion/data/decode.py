"""Reading video files: what a file holds, and the frames and samples of a window.

Times are seconds on the file's own clock, where 0 is the start of its chosen video stream. The
frame at time t is the last one whose timestamp is at most t (before that, the first one). The
audio at time t is what the audio stream plays at t, and zeros where it plays nothing. A window
holds the frames at `start + i / fps` and `num_samples` samples from `start` on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.video.reformatter
import numpy as np
import PIL
import soundfile
import torch as th
import torchaudio
import torchvision

from . import MediaError
from .audio import read_samples, resampled, stereo_converter
from .colour import shown_aspect, to_rgb
from .images import (
    antialiased_bicubic,
    fit_image,
    published_bicubic,
    shown_size,
    square_pixels,
)
from .streams import (
    PREROLL_SECONDS,
    AnyPath,
    AudioChoice,
    Rate,
    choose_audio,
    choose_stream,
    decode_from,
    find_fragments,
    frame_seconds,
    is_mp4,
    last_packet_end,
    open_media,
    pixel_aspect,
    stream_start,
)

MAX_MISSING_SECONDS = 1.0  # a file that ends this much before its stated duration is truncated
ROUNDING_SECONDS = 0.05  # by which stated durations differ from those of the frames
MAX_SLACK_FRAMES = Fraction(1, 8)  # by which a frame may begin late and count as in time
MIN_BYTES_PER_SECOND = 16  # any codec needs more; fewer mean corrupt timestamps
MAX_MONO_DIFFERENCE_SECONDS = 0.1  # between beginnings and ends of streams of one recording
# Versions that may decide bits of what is read: keys of caches.
DECODER = {module.__name__: module.__version__ for module in (av, PIL, th, torchaudio, torchvision)}


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a file holds, of the chosen streams, with rates in Hz.

    Width and height are those of the upright image with square pixels, as players show it.
    """

    duration_seconds: float  # of the video
    fps: float
    width: int
    height: int
    sample_rate: int
    channels: int
    video_stream: int
    audio_stream: AudioChoice
    video_codec: str
    audio_codec: str
    audio_begin_seconds: float = 0.0  # after the video begins
    audio_end_seconds: float = math.inf
    mono_streams: tuple[int, ...] = ()  # two or more that last equally long, else none
    note: str = ""  # what is wrong with a file that is used all the same

    def __post_init__(self) -> None:
        for name in ("audio_stream", "mono_streams"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))


def probe(
    path: AnyPath, video_stream: int | None = None, audio_stream: AudioChoice | None = None
) -> ClipInfo:
    """What the file holds; decodes the beginning and the end of all streams that it describes.

    Streams are the best ones, or those of the given indices; two indices of audio are mono streams
    for left and right. MediaError if a stream is missing or cannot be decoded.
    """
    with open_media(path) as container:
        video = choose_stream(path, container, "video", video_stream)
        audio = choose_audio(path, container, audio_stream)
        video_codec, audio_codec = video.codec_context, audio[0].codec_context
        zero = stream_start(video)
        spans, note = _stream_spans(path, container, [video, *audio])
        image, aspect = _shown(path, video)(spans[0].first)
        height, width = shown_size(image, aspect)
        for span in spans[1:]:
            stereo_converter()(span.first)
        indices = tuple(stream.index for stream in audio)
        return ClipInfo(
            duration_seconds=float(spans[0].end - zero),
            fps=float(_frame_rate(video)),
            width=width,
            height=height,
            sample_rate=audio_codec.sample_rate,
            channels=sum(stream.codec_context.channels for stream in audio),
            video_stream=video.index,
            audio_stream=indices if len(indices) > 1 else indices[0],
            video_codec=video_codec.name,
            audio_codec=audio_codec.name,
            audio_begin_seconds=float(min(span.begin for span in spans[1:]) - zero),
            audio_end_seconds=float(max(span.end for span in spans[1:]) - zero),
            mono_streams=_mono_streams(path, container),
            note=note,
        )


def _mono_streams(path: AnyPath, container) -> tuple[int, ...]:
    """The mono audio streams that play as long as the first of them; none if that is alone."""
    audio = [stream for stream in container.streams.audio if stream.codec_context]
    mono = [stream for stream in audio if stream.codec_context.channels == 1]
    if len(mono) < 2:
        return ()
    spans = {}
    for stream in mono:
        with contextlib.suppress(MediaError):  # of a stream that need not be used
            spans[stream.index] = _decoded_span(path, stream, _stated_end(container, stream))
    ends = np.array([span[:2] for span in spans.values()], float).reshape(-1, 2)
    is_alike = (abs(ends - ends[:1]) <= MAX_MONO_DIFFERENCE_SECONDS).all(axis=1)
    alike = tuple(itertools.compress(spans, is_alike))
    return alike if len(alike) > 1 else ()


def video_duration(path: AnyPath) -> float:
    """Seconds of video in a file, which needs no audio; MediaError as in `probe`."""
    with open_media(path) as container:
        video, audio = choose_stream(path, container, "video"), container.streams.best("audio")
        streams = [video]
        if not video.duration and audio and audio.codec_context:
            streams.append(audio)  # the file's stated duration may be that of the audio
        spans, _ = _stream_spans(path, container, streams)
        return float(spans[0].end - stream_start(video))


class Span(NamedTuple):
    """Where the decodable part of a stream begins and ends, in s on the file's clock."""

    begin: Fraction
    end: Fraction
    first: Any  # its first frame


def _stream_spans(path: AnyPath, container, streams: list) -> tuple[list[Span], str]:
    """What can be decoded of each stream, and a note on what is missing.

    MediaError if the file is truncated, unless it is a fragmented mp4: that is used up to its end.
    """
    stated = [_stated_end(container, stream) for stream in streams]
    spans = [_decoded_span(path, *of_one) for of_one in zip(streams, stated, strict=True)]
    last, promised = float(max(span.end for span in spans)), float(max(stated))
    missing = [float(end - span.end) for end, span in zip(stated, spans, strict=True)]
    is_cut, has_fragments = last < promised - MAX_MISSING_SECONDS, False
    if is_cut:  # unless what is stated is the end of another stream
        others = {stream.index for stream in container.streams if stream not in streams}
        is_cut = last_packet_end(path, others) < promised - MAX_MISSING_SECONDS
    if is_mp4(container) and max(missing) > ROUNDING_SECONDS:
        has_fragments, is_complete = find_fragments(path)
        is_cut |= not is_complete
    if is_cut and not has_fragments:
        raise MediaError(f"{path}: is truncated (ends at {last:.1f} of {promised:.1f} s)")
    note = "is truncated; used as far as it decodes" if is_cut else ""
    seconds = last - float(stream_start(streams[0]))
    if 0 < container.size < MIN_BYTES_PER_SECOND * seconds:
        contradiction = f"{container.size / 1e6:.2g} MB would last {seconds / 3600:.3g} h"
        raise MediaError(f"{path}: corrupt timestamps ({contradiction})")
    return spans, note


def _stated_end(container, stream) -> Fraction:
    """The end of the stream by its header, else of the file, in s on the file's clock."""
    if stream.duration:
        return stream_start(stream) + stream.duration * stream.time_base
    return Fraction((container.start_time or 0) + (container.duration or 0), 1_000_000)


def _decoded_span(path: AnyPath, stream, stated: Fraction) -> Span:
    first = next(decode_from(path, stream.index, stream_start(stream)), None)
    if first is None:
        raise MediaError(f"{path}: its {stream.type} stream holds nothing that can be decoded")
    tail = decode_from(path, stream.index, max(stated - Fraction(PREROLL_SECONDS), first[0]))
    seconds, frame = functools.reduce(lambda _, last: last, tail, first)
    return Span(first[0], seconds + frame_seconds(stream, frame), first[1])


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
    audio_stream: AudioChoice | None = None,
    antialias: bool = False,
) -> tuple[th.Tensor, th.Tensor]:
    """-> (frames [F, H, W, 3] uint8, audio [2, L] float32) of the window from `start_seconds` on.

    Frames are fitted into H x W (`fit_image`), by default without antialiasing, as published.
    After the end of the video its last frame repeats. Mono becomes two equal channels, more than
    two are downmixed (`_Downmix`), two mono streams become left and right. The window begins
    at sample round(start * rate) of the resampled stream. Values beyond [-1, 1], as lossy codecs
    may give, are clipped. MediaError if the file cannot be decoded or has NaN as audio.
    """
    start = Fraction(start_seconds)
    with open_media(path) as container:
        video = choose_stream(path, container, "video", video_stream)
        audio = choose_audio(path, container, audio_stream)
        frames = list(_frames_at(path, video, start, num_frames, fps))
        first, waveforms = round(start * sample_rate), []
        for stream in audio:
            in_rate = stream.codec_context.sample_rate
            read = functools.partial(read_samples, path, stream.index, stream_start(video), in_rate)
            waveforms.append(resampled(read, in_rate, sample_rate, first, num_samples))
        left, right = waveforms[0][0], waveforms[-1][1]
        waveform = th.stack([left, right]).clamp_(-1, 1)
        resize = antialiased_bicubic if antialias else published_bicubic
        shown, fitted = _shown(path, video), {}
        for frame in set(frames):
            image, aspect = shown(frame)
            fitted[frame] = fit_image(image, height, width, resize, aspect)
    invalid = waveform.isnan().any(dim=0)
    if invalid.any():
        seconds = float(start) + int(invalid.int().argmax()) / sample_rate
        raise MediaError(f"{path}: audio contains NaN at {seconds:.2f} s")
    images = th.stack([fitted[frame] for frame in frames])
    return images.permute(0, 2, 3, 1).contiguous(), waveform


def read_frames(path: AnyPath, first: int | Fraction, count: int, fps: Rate) -> Iterator[th.Tensor]:
    """The upright RGB frames [3, h, w] uint8 at (first + i) / fps seconds, i < count, one by one.

    Their pixels are square. Needs no audio. After the end the last frame repeats. MediaError if the
    file cannot be decoded.
    """
    with open_media(path) as container:
        video = choose_stream(path, container, "video")
        shown, last = _shown(path, video), None
        for frame in _frames_at(path, video, first / Fraction(fps), count, fps):
            if frame is not last:
                image, last = square_pixels(*shown(frame)), frame
            yield image


def _shown(path: AnyPath, video) -> Callable[[Any], tuple[th.Tensor, Fraction]]:
    """A function frame -> ([3, h, w] uint8 as shown, width over height of its pixels)."""
    stored = pixel_aspect(path, video)
    converter = av.video.reformatter.VideoReformatter()  # one for all: its setup costs

    def show(frame) -> tuple[th.Tensor, Fraction]:
        return to_rgb(frame, converter), shown_aspect(frame, stored)

    return show


def _frames_at(path: AnyPath, stream, start: Fraction, count: int, fps: Rate) -> Iterator[Any]:
    """The decoded frames at `start + i / fps` seconds from the stream's beginning, i < count."""
    begin = stream_start(stream) + start
    slack = min(Fraction(stream.time_base) / 2, MAX_SLACK_FRAMES / _frame_rate(stream))
    slack += Fraction(1, 10**6)  # both for rounded timestamps
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


def _frame_rate(stream) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 1)


def read_wav(path: AnyPath) -> tuple[th.Tensor, int]:
    """-> ([C, L] float32 in [-1, 1], sample rate in Hz); MediaError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            samples, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: cannot be read as audio ({reason})") from error
    return th.from_numpy(samples.T.copy()), sample_rate
