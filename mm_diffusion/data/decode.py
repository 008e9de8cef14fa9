"""The only file that touches a decoder, an encoder or PIL: clips, sounds and pictures to arrays and back.

Times are seconds on the file's own clock, where 0 is the start of its chosen video stream. The frame shown at time t is
the last one whose presentation time is at most t (the first one, before that); the sound at time t is what the audio
stream plays at t, and silence where it plays nothing. A window's frames are those shown at `start + i / fps`, its sound
the samples of `[start, start + num_samples / sample_rate)`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import av
import av.logging
import av.video.reformatter
import blobfile
import numpy as np
import PIL
import soundfile
import torch as th
import torchaudio
import torchvision.io

from . import MediaError
from .images import fit_image

av.logging.set_level(av.logging.PANIC)
PREROLL_SECONDS = (
    0.5  # decoding starts at least this long before a window, for codecs whose frames overlap
)
SOUND_FRAMES_TO_SETTLE = 2  # after a seek the first sound frames may be damaged or misplaced
MAX_MISSING_SECONDS = (
    1.0  # a file whose streams all end earlier than it announces by more than this is truncated
)
MIN_BYTES_PER_SECOND = (
    16  # a file that lasts longer has damaged time stamps: pictures of any codec take more
)
MAX_RESAMPLING_KERNEL = (
    8e6  # taps of the polyphase filter; odd pairs of rates are approximated (to about 1e-7)
)
RESAMPLING_CONTEXT = (
    64  # samples of the lower rate on either side of a window: more than the filter reaches
)
DECODER = {
    module.__name__: module.__version__ for module in (av, PIL, th, torchaudio, torchvision)
}  # may decide bits


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a file holds, of the chosen streams; sizes in pixels, rates in Hz."""

    duration_seconds: float  # of the picture
    fps: float
    width: int
    height: int
    sample_rate: int
    channels: int
    video_stream: int
    audio_stream: int
    video_codec: str
    audio_codec: str


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file as a PyAV container (local, gs://, az://, https://); libav's errors become MediaErrors."""
    try:
        with ExitStack() as stack:
            is_local = "://" not in path
            source = path if is_local else stack.enter_context(blobfile.BlobFile(path, "rb"))
            yield stack.enter_context(av.open(source, metadata_errors="ignore"))
    except (av.error.FFmpegError, blobfile.Error) as error:
        raise MediaError(
            f"{path}: cannot be decoded ({getattr(error, 'strerror', None) or error})"
        ) from error


def _choose_stream(path: str, container, kind: str, index: int | None) -> Any:
    """The stream of that index in the file, or the best of its kind ("video" or "audio")."""
    streams, name = list(container.streams), "sound track" if kind == "audio" else "video stream"
    if index is not None and (not 0 <= index < len(streams) or streams[index].type != kind):
        found = [stream.index for stream in streams if stream.type == kind]
        raise MediaError(f"{path}: stream {index} is not {kind} (its {kind} streams: {found})")
    stream = container.streams.best(kind) if index is None else streams[index]
    if stream is None:
        raise MediaError(f"{path}: has no {name}")
    if stream.codec_context is None:
        raise MediaError(f"{path}: its {name} has an unknown codec")
    return stream


def _start(stream) -> Fraction:
    return Fraction(stream.start_time or 0) * stream.time_base


def _frame_seconds(stream, frame) -> Fraction:
    """How long a decoded frame lasts."""
    if stream.type == "audio":
        return Fraction(frame.samples, frame.sample_rate)
    steady, tick = 1 / Fraction(stream.average_rate or 25), Fraction(stream.time_base)
    told = Fraction(frame.duration or 0) * Fraction(frame.time_base or tick)
    return (
        told if told and abs(told - steady) > tick else steady
    )  # within a tick what is told is rounded


def _decode(container, stream) -> Iterator[tuple[Fraction, Any]]:
    """(presentation time in seconds on the file's clock, frame) from where the container stands."""
    stream.codec_context.thread_count = 1
    due = _start(stream)
    for frame in container.decode(stream):
        seconds = due if frame.pts is None else frame.pts * Fraction(frame.time_base)
        due = seconds + _frame_seconds(stream, frame)
        yield seconds, frame


def _decode_from(path: str, stream_index: int, begin: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Decode a stream from its last safe point before `begin` seconds; from its start where seeking does not help."""
    for back in (PREROLL_SECONDS, 16 * PREROLL_SECONDS, None):
        with _opened(path) as container:
            stream = container.streams[stream_index]
            if back is None or begin - Fraction(back) <= _start(stream):
                yield from _decode(container, stream)
                return
            settle = SOUND_FRAMES_TO_SETTLE if stream.type == "audio" else 0
            try:
                container.seek(
                    math.floor((begin - Fraction(back)) / stream.time_base), stream=stream
                )
                timed = _decode(container, stream)
                head = list(itertools.islice(timed, settle + 1))
            except av.error.FFmpegError:
                continue  # the last attempt decodes from the start and lets errors through
            if len(head) > settle and head[settle][0] <= begin:
                yield from itertools.chain(head[settle:], timed)
                return


def probe(
    path: str | os.PathLike, video_stream: int | None = None, audio_stream: int | None = None
) -> ClipInfo:
    """What the file holds. Decodes the beginning and the end of both streams: a good header alone does not pass.

    Streams are the best ones, or those of the given indices in the file. MediaError with the reason where the file has
    no video stream, no sound track, or cannot be decoded.
    """
    path = os.fspath(path)
    with _opened(path) as container:
        picture = _choose_stream(path, container, "video", video_stream)
        sound = _choose_stream(path, container, "audio", audio_stream)
        end = _ends(path, container, [picture, sound])[0]
        rate = picture.average_rate or picture.guessed_rate or 1
        return ClipInfo(
            duration_seconds=float(end - _start(picture)),
            fps=float(rate),
            width=picture.codec_context.width,
            height=picture.codec_context.height,
            sample_rate=sound.codec_context.sample_rate,
            channels=sound.codec_context.channels,
            video_stream=picture.index,
            audio_stream=sound.index,
            video_codec=picture.codec_context.name,
            audio_codec=sound.codec_context.name,
        )


def video_duration(path: str | os.PathLike) -> float:
    """How long the picture of a film lasts, which may be silent; MediaError as in `probe`."""
    path = os.fspath(path)
    with _opened(path) as container:
        picture = _choose_stream(path, container, "video", None)
        sound = (
            None if picture.duration else container.streams.best("audio")
        )  # what is announced may be its end
        streams = [picture, sound] if sound and sound.codec_context else [picture]
        return float(_ends(path, container, streams)[0] - _start(picture))


def _ends(path: str, container, streams: list) -> list[Fraction]:
    """When each stream ends, in seconds on the file's clock; MediaError if all do so before the file says they do."""
    file_end = Fraction((container.start_time or 0) + (container.duration or 0), 1_000_000)
    announced = [_start(s) + s.duration * s.time_base if s.duration else file_end for s in streams]
    ends = [_last_instant(path, s, end) for s, end in zip(streams, announced, strict=True)]
    if max(ends) < max(announced) - Fraction(MAX_MISSING_SECONDS):
        held, promised = float(max(ends)), float(max(announced))
        raise MediaError(
            f"{path}: is truncated (ends at {held:.1f} s, should reach {promised:.1f} s)"
        )
    if 0 < container.size < MIN_BYTES_PER_SECOND * (lasts := max(ends) - _start(streams[0])):
        raise MediaError(
            f"{path}: has damaged times (its {container.size} bytes would last {float(lasts):.0f} s)"
        )
    return ends


def _last_instant(path: str, stream, announced: Fraction) -> Fraction:
    """When the stream's last decodable frame ends, in seconds on the file's clock; its first frame must decode too."""
    first = next(_decode_from(path, stream.index, _start(stream)), None)
    if first is None:
        raise MediaError(f"{path}: its {stream.type} stream holds nothing that can be decoded")
    tail = _decode_from(path, stream.index, max(announced - Fraction(PREROLL_SECONDS), first[0]))
    seconds, frame = functools.reduce(lambda _, last: last, tail, first)
    return seconds + _frame_seconds(stream, frame)


def read_window(
    path: str | os.PathLike,
    start_seconds: float | Fraction,
    num_frames: int,
    fps: float | Fraction,
    height: int,
    width: int,
    sample_rate: int,
    num_samples: int,
    video_stream: int | None = None,
    audio_stream: int | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """-> (frames [F, H, W, 3] uint8, audio [2, L] float32) of the window that starts at `start_seconds`.

    Frames are fitted into H x W (bicubic, aspect kept) and padded with black; past the picture's end its last frame
    repeats, and where there is no sound there are zeros. Mono becomes two equal channels, more than two are downmixed
    (libav's matrix). The window starts on the grid of output samples: at sample round(start * rate) of the resampled
    whole; what lies outside [-1, 1], as lossy codecs may have it, is clipped. MediaError where the file cannot be
    decoded, or its sound is not numbers.
    """
    path = os.fspath(path)
    with _opened(path) as container:
        picture = _choose_stream(path, container, "video", video_stream)
        sound = _choose_stream(path, container, "audio", audio_stream)
        zero, in_rate, sound_index = _start(picture), sound.codec_context.sample_rate, sound.index
        start = Fraction(start_seconds)
        shown = _shown_frames(path, picture, start, num_frames, fps)
    frames = list(shown)

    def cut(begin: int, end: int) -> th.Tensor:
        return _cut_sound(path, sound_index, zero, in_rate, begin, end)

    audio = _resampled(cut, in_rate, sample_rate, round(start * sample_rate), num_samples).clamp_(
        -1, 1
    )
    if audio.isnan().any():
        raise MediaError(f"{path}: its sound holds what is no number, from {float(start):.2f} s on")
    converter = (
        av.video.reformatter.VideoReformatter()
    )  # one for all: setting it up costs more than a small frame
    fitted = {id(frame): fit_image(_to_rgb(frame, converter), height, width) for frame in frames}
    return th.stack([fitted[id(frame)] for frame in frames]).permute(0, 2, 3, 1).contiguous(), audio


def read_frames(
    path: str | os.PathLike, first: int, count: int, fps: float | Fraction
) -> Iterator[th.Tensor]:
    """The pictures [3, h, w] uint8 shown at (first + i) / fps seconds, i < count, one by one; no sound is needed.

    Upright RGB; past the end the last one repeats. MediaError where the file cannot be decoded.
    """
    path = os.fspath(path)
    with _opened(path) as container:
        picture = _choose_stream(path, container, "video", None)
        shown = _shown_frames(path, picture, first / Fraction(fps), count, fps)
    converter, last = av.video.reformatter.VideoReformatter(), None
    for frame in shown:
        if frame is not last:
            image, last = _to_rgb(frame, converter), frame
        yield image


def _shown_frames(
    path: str, stream, start: Fraction, count: int, fps: float | Fraction
) -> Iterator[Any]:
    """The frames shown `start + i / fps` seconds after the stream's beginning."""
    times = [_start(stream) + start + i / Fraction(fps) for i in range(count)]
    slack = Fraction(stream.time_base) / 2 + Fraction(1, 10**6)
    return _pick_frames(path, _decode_from(path, stream.index, times[0]), times, slack)


def _pick_frames(
    path: str, timed: Iterable[tuple[Fraction, Any]], times: list[Fraction], slack: Fraction
) -> Iterator[Any]:
    """The frame shown at each of `times` (ascending); `slack` allows for the rounding of time stamps."""
    picked, shown = 0, None
    for seconds, frame in timed:
        while shown is not None and picked < len(times) and seconds > times[picked] + slack:
            yield shown
            picked += 1
        if picked == len(times):
            return
        shown = frame
    if shown is None:
        raise MediaError(f"{path}: no frame can be decoded at {float(times[0]):.2f} s")
    yield from itertools.repeat(shown, len(times) - picked)


def _to_rgb(frame, converter) -> th.Tensor:
    """-> [3, h, w] uint8, turned upright as the file's display matrix asks."""
    array = np.rot90(
        converter.reformat(frame, format="rgb24").to_ndarray(), round(frame.rotation / 90)
    )
    return th.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def _resampled(
    cut: Callable[[int, int], th.Tensor], in_rate: int, out_rate: int, first: int, count: int
) -> th.Tensor:
    """Samples [first, first + count) of the whole sound at `out_rate`, where cut(begin, end) gives it at `in_rate`.

    A polyphase filter repeats every `ratio.denominator` input samples, so a cut that begins at a multiple of that and
    has enough context gives the same numbers as resampling everything.
    """
    if in_rate == out_rate:
        return cut(first, first + count)
    ratio = Fraction(out_rate, in_rate)
    ratio = ratio.limit_denominator(max(1, int(math.sqrt(MAX_RESAMPLING_KERNEL / ratio))))
    context = math.ceil(RESAMPLING_CONTEXT * max(1.0, float(1 / ratio)))  # input samples
    block = math.floor((first / ratio - context) / ratio.denominator)
    begin, skip = block * ratio.denominator, first - block * ratio.numerator
    end = math.ceil((first + count) / ratio) + context
    return _resampler(ratio.denominator, ratio.numerator)(cut(begin, end))[
        :, skip : skip + count
    ].contiguous()


@functools.lru_cache(maxsize=8)
def _resampler(in_step: int, out_step: int) -> th.nn.Module:
    return torchaudio.transforms.Resample(in_step, out_step)


def _cut_sound(
    path: str, stream_index: int, zero: Fraction, rate: int, begin: int, end: int
) -> th.Tensor:
    """[2, end - begin]: samples begin..end at the stream's own rate, counted from `zero` seconds; silence elsewhere."""
    window = th.zeros(2, end - begin)
    for origin, samples in _runs_of_sound(path, stream_index, zero, rate, begin, end):
        low, high = max(origin, begin), min(origin + samples.shape[1], end)
        if low < high:
            window[:, low - begin : high - begin] = samples[:, low - origin : high - origin]
    return window


@dataclasses.dataclass
class _Run:
    """Sound frames without a gap; time stamps, being rounded, only bound where the run begins (in samples)."""

    low: float
    high: float
    pieces: list[th.Tensor]
    length: int = 0

    def expects(self, position: float, half_tick: float) -> bool:
        """Whether a frame at `position` can be the next of this run."""
        return self.low - half_tick - 1 <= position - self.length <= self.high + half_tick + 1

    def append(self, position: float, half_tick: float, samples: th.Tensor) -> None:
        """Take the next frame; the bounds tighten if its time stamp is plausible."""
        if self.expects(position, half_tick):
            start = position - self.length
            self.low, self.high = (
                max(self.low, start - half_tick),
                min(self.high, start + half_tick),
            )
        self.pieces.append(samples)
        self.length += samples.shape[1]


def _runs_of_sound(path: str, stream_index: int, zero: Fraction, rate: int, begin: int, end: int):
    """(first sample, [2, n]) of each gapless stretch of sound that touches the window; samples counted from `zero`."""
    frames, half_tick, to_stereo = [], 0.5, _stereo_converter()
    for seconds, frame in _decode_from(path, stream_index, zero + Fraction(begin, rate)):
        half_tick = max(0.5, float(frame.time_base) * rate / 2)
        position = float((seconds - zero) * rate)
        if position - half_tick >= end:
            break
        frames.append((position, to_stereo(frame)))
    runs = _gapless_runs(frames, half_tick)
    first_sound = _first_sound(path, stream_index, zero, rate) if half_tick > 0.5 and runs else None
    return [(_origin(run, first_sound), th.cat(run.pieces, dim=1)) for run in runs]


def _gapless_runs(frames: list[tuple[float, th.Tensor]], half_tick: float) -> list[_Run]:
    """Group (position, samples) in order. One odd time stamp (Vorbis has them) is no gap; two in a row are."""
    runs: list[_Run] = []
    for index, (position, samples) in enumerate(frames):
        following = frames[index + 1][0] - samples.shape[1] if index + 1 < len(frames) else None
        odd = bool(runs) and not runs[-1].expects(position, half_tick)
        if not runs or (
            odd and following is not None and not runs[-1].expects(following, half_tick)
        ):
            runs.append(_Run(position - half_tick, position + half_tick, []))
        runs[-1].append(position, half_tick, samples)
    return runs


def _first_sound(path: str, stream_index: int, zero: Fraction, rate: int) -> tuple[float, int]:
    """(where the stream's first frame begins, its length), in samples from `zero`."""
    with _opened(path) as container:
        seconds, frame = next(_decode(container, container.streams[stream_index]))
    return float((seconds - zero) * rate), frame.samples


def _origin(run: _Run, first_sound: tuple[float, int] | None) -> int:
    """The sample at which a run begins.

    Where time stamps are too coarse to tell, it lies on a grid: that of the frames' common length counted from the end
    of the stream's first frame, or one of 64 samples, which all common codecs keep.
    """
    middle = (run.low + run.high) / 2
    if first_sound is None:
        return round(middle)
    first, first_length = first_sound
    if run.low <= first <= run.high:
        return round(first)
    common = math.gcd(*(piece.shape[1] for piece in run.pieces[:-1] or run.pieces))
    for step in (common, math.gcd(common, 64)):
        snapped = round(first) + first_length + step * round((middle - first - first_length) / step)
        if run.low - 1 <= snapped <= run.high + 1:
            return snapped
    return round(middle)


def _stereo_converter() -> Callable[[Any], th.Tensor]:
    """A function frame -> [2, n] float32 in [-1, 1]: mono doubled, stereo as it is, more channels downmixed."""
    converters: dict[tuple, av.AudioResampler] = {}

    def convert(frame) -> th.Tensor:
        layout = frame.layout  # which may change on the way, like all of the key
        key = frame.format.name, layout.name, frame.sample_rate, layout.nb_channels
        if key not in converters:
            converters[key] = av.AudioResampler(
                "fltp", layout if layout.nb_channels <= 2 else "stereo"
            )
        (frame,) = converters[key].resample(frame)
        return th.from_numpy(frame.to_ndarray()).expand(2, -1)

    return convert


def read_wav(path: str | os.PathLike) -> tuple[th.Tensor, int]:
    """-> ([C, L] float32 in [-1, 1], sample rate in Hz); MediaError if it is no readable sound file."""
    try:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as sound ({error})") from error
    return th.from_numpy(samples.T.copy()), sample_rate
