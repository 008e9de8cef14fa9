"""The only file that touches a decoder, an encoder or PIL: clips, sounds and pictures to arrays and back.

Times are seconds on the file's own clock, where 0 is the start of its chosen video stream. The frame shown at time t is
the last one whose presentation time is at most t (the first one, before that); the sound at time t is what the audio
stream plays at t, and silence where it plays nothing. A window's frames are those shown at `start + i / fps`, its sound
the samples of `[start, start + num_samples / sample_rate)`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import numpy as np
import soundfile
import torch as th
from torchvision.utils import make_grid, save_image

av.logging.set_level(av.logging.PANIC)

SAMPLE_STEPS = 32768  # 16 bit: a sample is an integer over this


class MediaError(ValueError):
    """A file that cannot be used; one line, naming the file and the reason."""


# ---------------------------------------------------------------- writing


def _atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Run `write` on a temporary file beside `path` and rename it: a file that exists is complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        write(str(temporary))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def to_uint8(images: th.Tensor) -> th.Tensor:
    """[-1, 1] floats -> 0..255, the inverse of `uint8 / 127.5 - 1`; uint8 passes through."""
    return images if images.dtype == th.uint8 else ((images.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8)


def _to_int16(audio: th.Tensor) -> np.ndarray:
    """[C, L] floats in [-1, 1] -> [C, L] int16."""
    scaled = (audio.detach().cpu().float() * SAMPLE_STEPS).round()
    return scaled.clamp(-SAMPLE_STEPS, SAMPLE_STEPS - 1).to(th.int16).numpy()


def write_clip(
    path: str | os.PathLike, video: th.Tensor, fps: float | Fraction, audio: th.Tensor, sample_rate: int
) -> None:
    """Write an mp4: H.264 picture (near transparent) and FLAC sound (16 bit, exactly L samples).

    video: [F, 3, H, W] in [-1, 1], or uint8; audio: [2, L] in [-1, 1]; fps in frames per second, sample_rate in Hz.
    ValueError for other shapes.
    """
    if video.ndim != 4 or video.shape[1] != 3 or audio.ndim != 2 or audio.shape[0] != 2 or not audio.shape[1]:
        raise ValueError(f"{path}: need video [F, 3, H, W] and audio [2, L], got {[*video.shape]}, {[*audio.shape]}")
    frames = np.ascontiguousarray(to_uint8(video.detach()).permute(0, 2, 3, 1).cpu().numpy())
    samples = _to_int16(audio)

    def encode(temporary: str) -> None:
        with av.open(temporary, "w", format="mp4") as container:
            picture = _add_video_stream(container, frames.shape[1:3], fps)
            sound = container.add_stream("flac", rate=sample_rate, layout="stereo", format="s16")
            _encode_video(container, picture, frames)
            _encode_audio(container, sound, samples)

    _atomically(path, encode)


def _add_video_stream(container, size: tuple[int, int], fps: float | Fraction):
    """An H.264 stream of (height, width); odd sides need unsubsampled colour."""
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
    """Encode [2, L] int16 whole; the encoder cuts it into its own frames."""
    interleaved = np.ascontiguousarray(samples.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_wav(path: str | os.PathLike, audio: th.Tensor, sample_rate: int) -> None:
    """Write [C, L] in [-1, 1] as 16-bit wav of exactly L samples."""
    samples = _to_int16(audio).T
    _atomically(path, lambda temporary: soundfile.write(temporary, samples, sample_rate, "PCM_16", format="WAV"))


def read_wav(path: str | os.PathLike) -> tuple[th.Tensor, int]:
    """-> ([C, L] float32 in [-1, 1], sample rate in Hz); MediaError if it is no readable sound file."""
    try:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise MediaError(f"{path}: cannot be read as sound ({error})") from error
    return th.from_numpy(samples.T.copy()), sample_rate


def save_contact_sheet(path: str | os.PathLike, videos: th.Tensor | Sequence[th.Tensor], min_side: int = 64) -> None:
    """Write a PNG of [N, F, 3, H, W] in [-1, 1] (or uint8): a clip's frames in a row, clips below each other.

    Frames smaller than `min_side` pixels are enlarged by a whole number, so that pixels stay square and sharp.
    """
    images = th.stack([to_uint8(video.detach().cpu()) for video in videos])
    factor = max(1, -(-min_side // min(images.shape[-2:])))
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(images.flatten(0, 1).float() / 255, nrow=images.shape[1], padding=2, pad_value=1.0)
    _atomically(path, lambda temporary: save_image(grid, temporary, format="png"))
