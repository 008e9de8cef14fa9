"""Makes clips of any kind for the tests, and finds the two real ones."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
real_media = pytest.mark.skipif(not (MEDIA / "nasa_13013.mp4").exists(), reason="../shared/media is not here")

VIDEO_CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4"}
AUDIO_CODECS = {".mp4": "aac", ".mov": "aac", ".mkv": "flac", ".webm": "libopus", ".avi": "pcm_s16le"}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def grey_frames(values, height=32, width=48):
    """Grey values -> [F, H, W, 3] uint8."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), height, width, 3))


def make_clip(path, frames, fps=10, audio=None, rate=16000, codec=None, video_codec=None, sound_starts=0.0):
    """Write [F, H, W, 3] uint8 and [C, L] float sound (None: none) with the container's usual codecs."""
    path = Path(path)
    with av.open(str(path), "w", options={"strict": "experimental"}) as container:
        picture = container.add_stream(video_codec or VIDEO_CODECS[path.suffix], rate=Fraction(fps))
        picture.height, picture.width = frames.shape[1:3]
        odd = any(side % 2 for side in frames.shape[1:3])
        picture.pix_fmt = "yuv444p" if odd and picture.codec_context.name == "libx264" else "yuv420p"
        picture.time_base = picture.codec_context.time_base = 1 / Fraction(fps)
        picture.codec_context.gop_size, picture.codec_context.bit_rate = 10, 4_000_000
        sound = None if audio is None else _add_sound(container, codec or AUDIO_CODECS[path.suffix], rate, len(audio))
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(format=picture.pix_fmt)
            frame.pts, frame.time_base = index, 1 / Fraction(fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if sound is not None:
            _encode_sound(container, sound, audio, rate, sound_starts)
    return path


def make_gif(path, frames, milliseconds):
    """Write [F, H, W, 3] uint8, each frame shown that long."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=milliseconds)
    return path


def _add_sound(container, codec, rate, channels):
    stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[channels])
    if codec == "vorbis":
        stream.codec_context.options = {"strict": "-2"}
    stream.format = av.Codec(codec, "w").audio_formats[0]
    return stream


def _encode_sound(container, stream, audio, rate, starts):
    """In pieces of 1,000 samples, as a camera would."""
    resampler = av.AudioResampler(format=stream.format, layout=LAYOUTS[len(audio)], rate=rate)
    for begin in range(0, audio.shape[1], 1000):
        piece = np.ascontiguousarray(audio[:, begin : begin + 1000].astype(np.float32))
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=LAYOUTS[len(audio)])
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = begin + round(starts * rate)
        for converted in resampler.resample(frame):
            container.mux(stream.encode(converted))
    container.mux(stream.encode(None))


def clicks(count, period, channels=2, height=0.9):
    """[C, count] silence with a click at every multiple of `period`, but not at 0."""
    audio = np.zeros((channels, count), np.float32)
    audio[:, period::period] = height
    return audio


def noise(count, channels=2, seed=0):
    """[C, count] smooth noise, well inside [-1, 1]."""
    white = np.random.default_rng(seed).normal(size=(channels, count + 8))
    return np.stack([np.convolve(row, np.ones(9) / 9, "valid") for row in white]).astype(np.float32) * 0.4
