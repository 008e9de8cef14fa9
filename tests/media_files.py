"""Makes clips of any kind for the tests, and finds the two real ones."""

import io
import math
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
real_media = pytest.mark.skipif(
    not (MEDIA / "nasa_13013.mp4").exists(), reason="../shared/media is not here"
)

VIDEO_CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx",
    ".avi": "mpeg4",
}
AUDIO_CODECS = {
    ".mp4": "aac",
    ".mov": "aac",
    ".mkv": "flac",
    ".webm": "libopus",
    ".avi": "pcm_s16le",
}
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def grey_frames(values, height=32, width=48):
    """Grey values -> [F, H, W, 3] uint8."""
    return np.broadcast_to(
        np.array(values, np.uint8)[:, None, None, None], (len(values), height, width, 3)
    )


def make_clip(
    path,
    frames,
    fps=10,
    audio=None,
    rate=16000,
    codec=None,
    video_codec=None,
    audio_starts=0.0,
    aspect=None,
    muxer_options=None,
):
    """Write [F, H, W, 3] uint8 and audio [C, L] (or None) with the container's usual codecs.

    A list of audio gives as many streams.
    """
    path = Path(path)
    waveforms = audio if isinstance(audio, list) else [] if audio is None else [audio]
    codec = codec or AUDIO_CODECS[path.suffix]
    options = {"strict": "experimental"} | (muxer_options or {})
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream(video_codec or VIDEO_CODECS[path.suffix], rate=Fraction(fps))
        video.height, video.width = frames.shape[1:3]
        odd = any(side % 2 for side in frames.shape[1:3])
        video.pix_fmt = "yuv444p" if odd and video.codec_context.name == "libx264" else "yuv420p"
        video.time_base = video.codec_context.time_base = 1 / Fraction(fps)
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        video.codec_context.gop_size, video.codec_context.bit_rate = 10, 4_000_000
        audio_streams = [add_audio(container, codec, rate, len(piece)) for piece in waveforms]
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(format=video.pix_fmt)
            frame.pts, frame.time_base = index, 1 / Fraction(fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for stream, waveform in zip(audio_streams, waveforms, strict=True):
            encode_audio(container, stream, waveform, rate, audio_starts)
    return path


def write_frames(
    path, frames, codec="libx264", pixel_format="yuv420p", rate=4, options=None, **properties
):
    """Write frames (PyAV's, or [h, w, 3 or 4] uint8) without audio; properties of the stream."""

    def as_frame(frame):
        if isinstance(frame, np.ndarray):
            kind = "rgb24" if frame.shape[-1] == 3 else "rgba"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=kind)
        return frame.reformat(format=pixel_format)

    frames = list(map(as_frame, frames))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = pixel_format
        stream.disposition = properties.pop("disposition", 0)
        for name, value in properties.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, 1 / Fraction(rate)
            for name in properties.keys() & {"color_trc", "color_primaries", "colorspace"}:
                setattr(frame, name, properties[name])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_changing_audio(path, codec, parts):
    """Write an audio stream (and grey frames) that changes where each part begins.

    parts: (first second, sample rate, audio [C, L]); each has an encoder of its own.
    """
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = add_audio(container, codec, parts[0][1], len(parts[0][2]))
        for index in range(100):
            frame = av.VideoFrame(48, 32, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for starts, rate, waveform in parts:
            encoder = av.CodecContext.create(codec, "w")
            encoder.sample_rate, encoder.time_base = rate, Fraction(1, rate)
            encoder.layout, encoder.format = LAYOUTS[len(waveform)], audio.format
            for packet in encoded(encoder, waveform, rate, starts):
                packet.stream, packet.time_base = audio, Fraction(1, rate)
                container.mux(packet)
    return path


def make_resized_video(path, sizes, fps, audio, rate):
    """Write grey frames of these (width, height) as JPEG, and audio [C, L]."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=fps)
        video.width, video.height = sizes[0]
        video.pix_fmt = "yuvj420p"
        audio_stream = add_audio(container, "pcm_s16le", rate, len(audio))
        for index, size in enumerate(sizes):
            held = io.BytesIO()
            Image.new("RGB", size, (90, 90, 90)).save(held, "JPEG")
            packet = av.Packet(held.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = (
                video,
                index,
                index,
                Fraction(1, fps),
            )
            packet.is_keyframe = True
            container.mux(packet)
        encode_audio(container, audio_stream, audio, rate, 0.0)
    return path


def make_gif(path, frames, milliseconds):
    """Write [F, H, W, 3] uint8, each frame shown that long."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=milliseconds)
    return path


def restamp(source, target, shift, keep=lambda k: True):
    """Copy a file; the timestamp of audio packet k moves by shift(k) seconds, if keep(k).

    They go on increasing, as muxers demand.
    """
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        number, last = 0, -math.inf
        for packet in old.demux():
            if packet.dts is None:
                continue
            if packet.stream.type == "audio":
                moved = packet.pts + round(shift(number) / packet.time_base)
                packet.pts = packet.dts = last = max(moved, last + 1)
                number += 1
                if not keep(number - 1):
                    continue
            packet.stream = streams[packet.stream.index]
            new.mux(packet)
    return target


def add_audio(container, codec, rate, channels):
    stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[channels])
    if codec == "vorbis":
        stream.codec_context.options = {"strict": "-2"}
    stream.format = av.Codec(codec, "w").audio_formats[0]
    return stream


def encode_audio(container, stream, audio, rate, starts):
    for packet in encoded(stream, audio, rate, starts):
        container.mux(packet)


def encoded(encoder, audio, rate, starts):
    """The packets of [C, L], given in pieces of 1,000 samples, as a camera would."""
    resampler = av.AudioResampler(format=encoder.format, layout=LAYOUTS[len(audio)], rate=rate)
    for begin in range(0, audio.shape[1], 1000):
        piece = audio[:, begin : begin + 1000].astype(np.float32).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(piece, format="flt", layout=LAYOUTS[len(audio)])
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = begin + round(starts * rate)
        for converted in resampler.resample(frame):
            yield from encoder.encode(converted)
    yield from encoder.encode(None)


def clicks(count, period, channels=2, height=0.9):
    """[C, count] silence with a click at every multiple of `period`, but not at 0."""
    audio = np.zeros((channels, count), np.float32)
    audio[:, period::period] = height
    return audio


def noise(count, channels=2, seed=0):
    """[C, count] smooth noise, well inside [-1, 1]."""
    white = np.random.default_rng(seed).normal(size=(channels, count + 8))
    return (
        np.stack([np.convolve(row, np.ones(9) / 9, "valid") for row in white]).astype(np.float32)
        * 0.4
    )


# ---------------------------------------------------------------- corrupt files

GOOD_CODECS = [
    (".mp4", "aac"),
    (".mkv", "flac"),
    (".webm", "libopus"),
    (".avi", "pcm_s16le"),
    (".mov", "aac"),
]
GOOD_CODECS += [(".mp4", "flac"), (".mkv", "vorbis"), (".mkv", "pcm_f32le")]


def moving_frames(count, seed):
    """[F, 32, 48, 3] uint8: a soft pattern that drifts."""
    coarse = np.random.default_rng(seed).integers(20, 236, (4, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((48, 32), Image.Resampling.BICUBIC))
    return np.stack([np.roll(image, (k, 2 * k), (0, 1)) for k in range(count)])


def small_clip(path, codec=None, frames=20, fps=10, rate=16000, samples=None, seed=0):
    samples = 2 * rate if samples is None else samples
    return make_clip(path, moving_frames(frames, seed), fps, noise(samples, seed=seed), rate, codec)


def damage_middle(path, first=0.4, last=0.6):
    """Overwrite this part of an mp4's media data: its beginning, end and index stay intact."""
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    low, high = (begin + int(share * (end - begin)) for share in (first, last))
    data[low:high] = bytes(high - low)
    path.write_bytes(data)
    return path


def _cut(data, generator):
    return data[: generator.integers(1, len(data))]


def _flip_bits(first, last):
    """A function that flips a few bits between these shares of a file."""

    def flip(data, generator):
        data = bytearray(data)
        for at in generator.integers(
            int(first * len(data)), max(1, int(last * len(data))), generator.integers(1, 20)
        ):
            data[at] ^= 1 << int(generator.integers(8))
        return bytes(data)

    return flip


def _overwrite(fill):
    """A function that replaces a stretch of a file."""

    def overwrite(data, generator):
        first, last = sorted(generator.integers(0, len(data), 2))
        return data[:first] + fill(generator, last - first) + data[last:]

    return overwrite


def _claim_hours(data, generator):
    """Durations of mp4 and mov, and the sizes around them, replaced by huge numbers."""
    data = bytearray(data)
    for box, offset in {b"mvhd": 20, b"tkhd": 24, b"mdhd": 20}.items():
        at = data.find(box)
        while at >= 0 and generator.random() < 0.8:
            data[at + offset : at + offset + 4] = int(generator.integers(2**24, 2**32)).to_bytes(
                4, "big"
            )
            at = data.find(box, at + 1)
    at = data.find(b"\x44\x89\x88")  # Duration of Matroska, a double
    if at >= 0:
        data[at + 3 : at + 11] = np.array(10.0 ** generator.integers(7, 30), ">f8").tobytes()
    return bytes(data)


def _stretch_time(data, generator):
    """Durations of frames in mp4 and mov replaced: for hours, for years, or by 0."""
    data = bytearray(data)
    at = data.find(b"stts")
    while at >= 0:
        entries = int.from_bytes(data[at + 8 : at + 12], "big")
        last = at + 16 + 8 * int(generator.integers(entries))
        data[last : last + 4] = int(2 ** generator.uniform(0, 32)).to_bytes(4, "big")
        at = data.find(b"stts", at + 1) if generator.random() < 0.5 else -1
    return bytes(data)


DAMAGES: dict[str, Callable] = {
    "cut": _cut,
    "header": _flip_bits(0, 0.05),
    "middle": _flip_bits(0.05, 0.9),
    "end": _flip_bits(0.9, 1),
    "everywhere": _flip_bits(0, 1),
    "zeros": _overwrite(lambda generator, count: bytes(count)),
    "garbage": _overwrite(lambda generator, count: generator.bytes(count)),
    "doubled": lambda data, generator: data + data[generator.integers(len(data)) :],
    "hours": _claim_hours,
    "stretched": _stretch_time,
}


def _zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "no video\n" * 100)
    return file.getvalue()


def _encoded_image(kind):
    file = io.BytesIO()
    Image.fromarray(moving_frames(1, 0)[0]).save(file, kind)
    return file.getvalue()


NOT_VIDEOS = {
    "empty.mp4": b"",
    "one.mkv": b"\0",
    "text.mp4": b"no video\n" * 200,
    "subtitles.mp4": b"1\n00:00:01,000 --> 00:10:00,000\nHello\n\n" * 20,
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n",
    "concat.mp4": b"ffconcat version 1.0\nfile /etc/hostname\n",
    "jpeg.mp4": _encoded_image("JPEG"),
    "png.mov": _encoded_image("PNG"),
    "gif.mp4": _encoded_image("GIF"),
    "zip.mp4": _zipped(),
    "noise.webm": np.random.default_rng(0).bytes(5000),
    "html.avi": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}
ODD_VIDEOS = {
    "fps7.mp4": {"fps": 7},
    "fps_ntsc.mov": {"fps": Fraction(30000, 1001)},
    "fps120.mkv": {"fps": 120, "frames": 60},
    "rate_11025.mp4": {"rate": 11025},
    "rate_96000.mkv": {"rate": 96000},
    "rate_8000.avi": {"rate": 8000},
    "one_sample.mkv": {"samples": 1},
    "one_frame.mp4": {"frames": 1},
    "both.mkv": {"frames": 1, "samples": 1},
}


def damaged_clips(folder, count):
    """Write `count` corrupt videos, always the same, beside intact, misnamed and odd ones."""
    folder.mkdir(parents=True)
    for name, data in NOT_VIDEOS.items():
        (folder / name).write_bytes(data)
    for name, options in ODD_VIDEOS.items():
        small_clip(folder / name, **options)
    make_clip(folder / "silent.mp4", moving_frames(10, 0))
    intact = []
    for number, (suffix, codec) in enumerate(GOOD_CODECS):
        path = small_clip(folder / f"intact_{codec}{suffix}", codec, seed=number)
        intact.append(path)
        other_suffix = GOOD_CODECS[(number + 1) % len(GOOD_CODECS)][0]
        (folder / f"misnamed_{suffix[1:]}_{codec}{other_suffix}").write_bytes(path.read_bytes())
    _damage_all(intact, folder, count)


def damaged_images(folder, count):
    """Write `count` corrupt images, always the same, beside two intact ones and four false ones."""
    folder.mkdir(parents=True)
    intact = [folder / "intact.jpg", folder / "intact.png"]
    for path, kind in zip(intact, ("JPEG", "PNG"), strict=True):
        path.write_bytes(_encoded_image(kind))
    for name in ("empty.mp4", "text.mp4", "zip.mp4", "gif.mp4"):
        (folder / f"{name[:-4]}.jpg").write_bytes(NOT_VIDEOS[name])
    _damage_all(intact, folder, count)


def _damage_all(intact, folder, count):
    """Every kind of damage to every intact file in turn, as number_kind_name."""
    kinds = list(DAMAGES)
    for number in range(count):
        path, kind = (
            intact[(number + number // len(kinds)) % len(intact)],
            kinds[number % len(kinds)],
        )
        damaged = DAMAGES[kind](path.read_bytes(), np.random.default_rng(number))
        (folder / f"{number:04d}_{kind}_{path.name}").write_bytes(damaged)
