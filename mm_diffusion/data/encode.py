"""Writing clips and waveforms."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import blobfile
import numpy as np
import soundfile
import torch as th
import torchaudio

from ..files import write_atomically
from .images import enlarge, to_uint8
from .streams import AnyPath, Rate, local_file

SAMPLE_STEPS = 32768  # 16 bit: a sample is an integer over this
# Audio codec -> how its stream is made. FLAC is exact; players of slides and of Windows want AAC.
CODEC_SETTINGS: dict[str, dict[str, Any]] = {
    "flac": {"format": "s16"},
    "aac": {"format": "fltp", "bit_rate": 256_000},
}
WATCH_PIXELS, WATCH_HZ = 256, 16000  # that any player takes


def _write(path: AnyPath, encode: Callable[[str], object]) -> None:
    """`write_atomically`; whatever stops an encoder is an OSError of one line with the path."""
    try:
        write_atomically(path, encode)
    except (OSError, ValueError, RuntimeError, av.error.FFmpegError, blobfile.Error) as error:
        _, _, logged = getattr(error, "log", None) or ("", "", "")  # by FFmpeg
        reason = logged or getattr(error, "strerror", None) or error
        raise OSError(f"{path}: cannot be written ({reason})") from error


def _to_int16(audio: th.Tensor) -> np.ndarray:
    """[2, L] floats in [-1, 1] -> [2, L] int16; mono [1, L] becomes two equal channels."""
    audio = audio.expand(2, -1) if len(audio) == 1 else audio
    scaled = (audio.detach().cpu().float() * SAMPLE_STEPS).round()
    return scaled.clamp(-SAMPLE_STEPS, SAMPLE_STEPS - 1).to(th.int16).numpy()


def check_audio_codec(codec: str, sample_rate: int) -> None:
    """ValueError where a codec cannot have this sample rate."""
    rates = av.Codec(codec, "w").audio_rates
    if rates and sample_rate not in rates:
        raise ValueError(
            f"--audio_codec {codec}: has no sample rate of {sample_rate} Hz; choose flac"
        )


def write_clip(
    path: AnyPath,
    video: th.Tensor,
    fps: Rate,
    audio: th.Tensor,
    sample_rate: int,
    codec: str = "flac",
) -> None:
    """Write an mp4: H.264 video (near transparent), and audio of exactly L samples.

    video: [F, 3, H, W] in [-1, 1], or uint8; audio: [2, L] in [-1, 1], or mono [1, L], written as
    two equal channels; sample_rate in Hz; codec: flac (16 bit), or aac, which is lossy.
    ValueError for other shapes.
    """
    found = f"{[*video.shape]}, {[*audio.shape]}"
    is_audio = audio.ndim == 2 and len(audio) in (1, 2) and audio.numel() > 0
    if video.ndim != 4 or video.shape[1] != 3 or not is_audio:
        raise ValueError(f"{path}: need video [F, 3, H, W] and audio [2, L] or [1, L], got {found}")
    frames = to_uint8(video.detach()).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    samples = _to_int16(audio)

    def encode(temporary: str) -> None:
        with local_file(temporary, "wb") as file, av.open(file, "w", format="mp4") as container:
            h264 = _add_video_stream(container, frames.shape[1:3], fps)
            settings = {"layout": "stereo", **CODEC_SETTINGS[codec]}
            stream = container.add_stream(codec, rate=sample_rate, **settings)
            _encode_video(container, h264, frames)
            _encode_audio(container, stream, samples)

    _write(path, encode)


def _add_video_stream(container, size: tuple[int, int], fps: Rate):
    """An H.264 stream of (height, width); odd sides need full colour."""
    rate = Fraction(fps).limit_denominator(60_000)
    stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "preset": "medium"})
    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if any(side % 2 for side in size) else "yuv420p"
    stream.codec_context.thread_count = 1
    stream.time_base = stream.codec_context.time_base = 1 / rate
    return stream


def _encode_video(container, stream, frames: np.ndarray) -> None:
    for index, array in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=stream.pix_fmt)
        frame.pts, frame.time_base = index, stream.codec_context.time_base
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _encode_audio(container, stream, samples: np.ndarray) -> None:
    """Encode [2, L] int16 as one frame; the encoder cuts it into its own."""
    interleaved = np.ascontiguousarray(samples.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_wav(path: AnyPath, audio: th.Tensor, sample_rate: int) -> None:
    """Write [2, L] in [-1, 1], or mono as two channels, as 16-bit wav of exactly L samples."""
    samples, wav = _to_int16(audio).T, {"subtype": "PCM_16", "format": "WAV"}

    def encode(temporary: str) -> None:
        with open(temporary, "wb") as file:  # libsndfile takes no names that are not UTF-8
            soundfile.write(file, samples, sample_rate, **wav)

    _write(path, encode)


def write_watchable(
    path: AnyPath, video: th.Tensor, fps: float, audio: th.Tensor, sample_rate: int
) -> None:
    """`write_clip` with frames, sample rate and codec that any player takes."""
    resampled = torchaudio.functional.resample(audio, sample_rate, WATCH_HZ).clamp(-1, 1)
    write_clip(path, enlarge(video, WATCH_PIXELS), fps, resampled, WATCH_HZ, "aac")
