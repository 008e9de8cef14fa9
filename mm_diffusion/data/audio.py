"""The audio of a video file: samples of its decoded frames, placed in time and resampled."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
import torch as th
import torchaudio

from .streams import AnyPath, decode_from, decode_stream, open_media, stream_start

# A gap or an overlap displaces at least so many frames by more than so many seconds, which is less
# than one lost frame of the common codecs.
STEP_FRAMES = 5
STEP_SECONDS = 0.015
LEVEL_FRAMES = 8  # that a step is measured against: slow drift is no step
MAX_COUNTED_SECONDS = 120  # that may be decoded only to place a window to the sample
EXACT = 1e-3  # samples by which offsets differ if timestamps are not rounded
MAX_RESAMPLING_KERNEL = 8e6  # taps; odd pairs of rates are approximated (to about 1e-7)
RESAMPLING_CONTEXT = 64  # samples of the lower rate around a window: more than the filter reaches

_resampler = functools.lru_cache(maxsize=8)(torchaudio.transforms.Resample)


def resampled(
    read: Callable[[int, int], th.Tensor], in_rate: int, out_rate: int, first: int, count: int
) -> th.Tensor:
    """Samples [first, first + count) of the stream at `out_rate`; read(begin, end): at `in_rate`.

    A polyphase filter repeats every `ratio.denominator` input samples, so a piece that begins at
    a multiple of it, with enough context, gives the same values as resampling everything.
    """
    if in_rate == out_rate:
        return read(first, first + count)
    ratio = _ratio(in_rate, out_rate)
    context = math.ceil(RESAMPLING_CONTEXT * max(1.0, float(1 / ratio)))  # input samples
    block = math.floor((first / ratio - context) / ratio.denominator)
    begin, skip = block * ratio.denominator, first - block * ratio.numerator
    end = math.ceil((first + count) / ratio) + context
    piece = _resampler(ratio.denominator, ratio.numerator)(read(begin, end))
    return piece[:, skip : skip + count].contiguous()


def _ratio(in_rate: int, out_rate: int) -> Fraction:
    """out_rate / in_rate, or a ratio close to it whose filter is not too long."""
    ratio = Fraction(out_rate, in_rate)
    return ratio.limit_denominator(max(1, int(math.sqrt(MAX_RESAMPLING_KERNEL / ratio))))


def read_samples(
    path: AnyPath, index: int, zero: Fraction, rate: int, begin: int, end: int
) -> th.Tensor:
    """[2, end - begin]: samples [begin, end) of stream `index`, counted from `zero` s; else 0."""
    window = th.zeros(2, end - begin)
    for origin, samples in audio_segments(path, index, zero, rate, begin, end):
        low, high = max(origin, begin), min(origin + samples.shape[1], end)
        if low < high:
            window[:, low - begin : high - begin] = samples[:, low - origin : high - origin]
    return window


class FirstFrame(NamedTuple):
    """The first frame of an audio stream, in samples from the file's zero."""

    position: float
    length: int
    starts: list[float]  # where it may begin by the header of the file


class DecodedAudio(NamedTuple):
    """Consecutive frames of an audio stream, in samples from the file's zero at one rate."""

    positions: list[float]
    pieces: list[th.Tensor]  # [2, n] each
    changes: list[int]  # frames from which on the file has another sample rate
    half_tick: float  # of timestamps, at least 0.5


def audio_segments(
    path: AnyPath, index: int, zero: Fraction, rate: int, begin: int, end: int
) -> list[tuple[int, th.Tensor]]:
    """(first sample, [2, n]) of each gapless stretch of stream `index` around [begin, end).

    Samples count from `zero` s at `rate`. A frame's offset is its timestamp less all samples
    decoded before it. Offsets wobble: timestamps are rounded to ticks, wrong in single frames
    (Vorbis), or taken from a wall clock. So frames are contiguous whatever their timestamps, until
    the offset takes a step that lasts. Where neither timestamps nor frame lengths place a segment
    to the sample, samples are counted from the stream's start, unless that is too far.
    """
    positions, pieces, changes, half_tick = _decode_audio(path, index, zero, rate, begin, end)
    if not pieces:
        return []
    lengths = [piece.shape[1] for piece in pieces]
    before = [0, *itertools.accumulate(lengths)]
    offsets = np.array(positions) - before[:-1]
    first = None
    if half_tick > 0.5 or np.ptp(offsets) > EXACT:
        first = _first_audio_frame(path, index, zero, rate)
        wobble = np.median(abs(offsets - np.median(offsets)))
        unclear = half_tick < wobble and _common_length(lengths) < 4 * wobble
        if unclear and 0 < positions[0] - first.position < MAX_COUNTED_SECONDS * rate:
            earliest = math.floor(min(first.position, *first.starts))
            return audio_segments(path, index, zero, rate, earliest, end)
    segments, borders = [], {0, *changes, *_lasting_steps(offsets, rate), len(pieces)}
    for low, high in itertools.pairwise(sorted(borders)):
        origin = _origin(offsets[low:high] + before[low], lengths[low:high], half_tick, first)
        segments.append((origin, th.cat(pieces[low:high], dim=1)))
    return segments


def _decode_audio(
    path: AnyPath, index: int, zero: Fraction, rate: int, begin: int, end: int
) -> DecodedAudio:
    """From before `begin` to so many frames after `end` that a step before it shows if it lasts."""
    positions, pieces, rates, half_tick = [], [], [], 0.5
    to_stereo, late = stereo_converter(), 0
    for seconds, frame in decode_from(path, index, zero + Fraction(begin, rate)):
        position = float((seconds - zero) * rate)
        late = late + 1 if position >= end + STEP_SECONDS * rate else 0
        if late > STEP_FRAMES:
            break
        half_tick = max(0.5, float(frame.time_base) * rate / 2)
        positions.append(position)
        pieces.append(to_stereo(frame))
        rates.append(frame.sample_rate)
    changes = [k for k in range(1, len(rates)) if rates[k] != rates[k - 1]]
    same_rate = []
    for low, high in itertools.pairwise([0, *changes, len(rates)]):
        same_rate += _at_rate(pieces[low:high], rates[low], rate) if low < high else []
    return DecodedAudio(positions, same_rate, changes, half_tick)


def _at_rate(pieces: list[th.Tensor], in_rate: int, out_rate: int) -> list[th.Tensor]:
    """Contiguous pieces [2, n], resampled as one and cut where they were."""
    if in_rate == out_rate:
        return pieces
    ratio = _ratio(in_rate, out_rate)
    whole = _resampler(ratio.denominator, ratio.numerator)(th.cat(pieces, dim=1))
    ends = [round(end * ratio) for end in itertools.accumulate(p.shape[1] for p in pieces)]
    return [whole[:, low:high] for low, high in itertools.pairwise([0, *ends])]


def _first_audio_frame(path: AnyPath, index: int, zero: Fraction, rate: int) -> FirstFrame:
    with open_media(path) as container:
        stream = container.streams[index]
        seconds, frame = next(decode_stream(container, stream))
        position, stated = (float((at - zero) * rate) for at in (seconds, stream_start(stream)))
        starts, priming = [stated], stream.codec_context.delay
        if abs(stated + priming) <= max(0.5, float(stream.time_base) * rate / 2):
            starts = [-priming, 0]  # its audio begins at 0, and priming may be left out
        if stream.codec_context.name == "vorbis":  # whose first packet gives no frame
            starts.append(stated + frame.samples)
        return FirstFrame(position, frame.samples, starts)


def _lasting_steps(offsets: np.ndarray, rate: int) -> list[int]:
    """Frames from which on offsets stay away from those before, for STEP_FRAMES or to the end.

    Away is more than STEP_SECONDS, and more than three times what offsets usually differ from
    their neighbours. The last frame alone takes no step.
    """
    if np.ptp(offsets) <= STEP_SECONDS * rate:
        return []
    tolerance = max(STEP_SECONDS * rate, 3 * np.median(abs(np.diff(offsets))))
    steps = [0]
    for k in range(1, len(offsets) - 1):
        level = np.median(offsets[max(steps[-1], k - LEVEL_FRAMES) : k])
        if (abs(offsets[k : k + STEP_FRAMES] - level) > tolerance).all():
            steps.append(k)
    return steps[1:]


def _origin(
    estimates: np.ndarray, lengths: list[int], half_tick: float, first: FirstFrame | None
) -> int:
    """The first sample of a segment, as each of its frames estimates it.

    Where estimates differ, the origin has to be the same wherever decoding began: it is the
    stream's first timestamp, or lies a multiple of the frames' common length after the stream's
    first frame, or of 64 samples, which all common codecs keep.
    """
    distances = abs(estimates - np.median(estimates))
    plausible = estimates[distances <= max(2 * half_tick + 1, 3 * np.median(distances))]
    middle, wobble = (plausible.max() + plausible.min()) / 2, np.ptp(plausible) / 2
    if first is None or (half_tick <= 0.5 and wobble < EXACT):
        return round(middle)
    position = first.position
    start = min(first.starts, key=lambda start: abs(start - position))
    if abs(start - position) <= (2 * wobble if half_tick < wobble else half_tick):
        position = start  # unlike a timestamp that wobbles or is rounded
    if estimates[0] == first.position:
        return round(position)
    reach = max(2 * half_tick - wobble, wobble) + 1
    grid = round(position) + first.length
    common = _common_length(lengths)
    for step in (common, math.gcd(common, 64)):
        snapped = grid + step * round((middle - grid) / step)
        if abs(snapped - middle) <= reach:
            return snapped
    return round(middle)


def _common_length(lengths: list[int]) -> int:
    """The length that all frames are multiples of, but the last, which may be cut."""
    return math.gcd(*(lengths[:-1] or lengths))


def stereo_converter() -> Callable[[Any], th.Tensor]:
    """A function frame -> [2, n] float32 in [-1, 1]: mono doubled, stereo as is, more downmixed."""
    converters: dict[tuple, av.AudioResampler | _Downmix] = {}

    def convert(frame) -> th.Tensor:
        layout = frame.layout  # which may change within a stream, like all of the key
        key = frame.format.name, layout.name, frame.sample_rate, layout.nb_channels
        try:
            if key not in converters:
                is_mix = layout.nb_channels > 2
                converters[key] = _Downmix(frame) if is_mix else av.AudioResampler("fltp", layout)
            (frame,) = converters[key].resample(frame)
        except av.error.FFmpegError:
            raise ValueError(f"its audio is in {layout.name}: no downmix to stereo") from None
        return th.from_numpy(frame.to_ndarray()).expand(2, -1)

    return convert


class _Downmix:
    """Frames like the first -> stereo floats, by libav's weights over their sum: none clips."""

    def __init__(self, frame) -> None:
        self.graph = av.filter.Graph()
        source = self.graph.add_abuffer(
            sample_rate=frame.sample_rate,
            format=frame.format.name,
            layout=frame.layout.name,
            time_base=Fraction(1, frame.sample_rate),
        )
        mix = self.graph.add("aresample", "osf=fltp:ochl=stereo:rematrix_maxval=1")
        self.graph.link_nodes(source, mix, self.graph.add("abuffersink")).configure()

    def resample(self, frame) -> list[Any]:
        self.graph.push(frame)
        return [self.graph.pull()]
