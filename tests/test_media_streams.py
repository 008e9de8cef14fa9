"""The streams that are chosen, and where in time their audio lies."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import av
import numpy as np
import pytest
import torch as th
from media_files import MEDIA, grey_frames, make_changing_audio, make_clip, noise, real_media

from mm_diffusion.config import DataConfig, SamplingConfig
from mm_diffusion.data import MediaError, decode, encode
from mm_diffusion.data.audio import stereo_converter
from mm_diffusion.data.index import ClipIndex, probe_folders

FRAMES = grey_frames(range(0, 200, 10))  # 2 s at 10 fps
RATE = 16000
EMPTY = np.zeros((1, 0), np.float32)


def read(path, start=0.0, count=2 * RATE, **streams):
    return decode.read_window(path, start, 1, 4, 8, 8, RATE, count, **streams)[1]


def test_two_mono_streams_are_left_and_right(tmp_path):
    left, right = noise(2 * RATE, 1, seed=1), noise(2 * RATE, 1, seed=2)
    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=[left, right])
    info = decode.probe(path, audio_stream=(1, 2))
    assert (info.audio_stream, info.channels, info.mono_streams) == ((1, 2), 2, (1, 2))
    np.testing.assert_allclose(
        read(path, audio_stream=(1, 2)), np.concatenate([left, right]), atol=1e-4
    )
    swapped = read(path, 0.5, RATE, audio_stream=(2, 1))
    assert swapped.equal(read(path, audio_stream=(1, 2)).flip(0)[:, RATE // 2 : 3 * RATE // 2])


def test_only_mono_streams_can_be_left_and_right(tmp_path):
    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=[noise(2 * RATE, 1), noise(2 * RATE, 2)])
    for use in (decode.probe, read):
        with pytest.raises(
            MediaError, match=r"a\.mkv: left and right .* \(stream 2 has 2 channels"
        ):
            use(path, audio_stream=(1, 2))


@pytest.mark.parametrize(
    ("waveforms", "expected"),
    [
        ([noise(2 * RATE, 1), noise(2 * RATE, 1)], (1, 2)),
        ([noise(2 * RATE, 2), noise(2 * RATE, 1), noise(2 * RATE, 1)], (2, 3)),
        ([noise(2 * RATE, 1), noise(RATE, 1)], ()),
        ([noise(2 * RATE, 1)], ()),
        ([noise(2 * RATE, 2), noise(2 * RATE, 2)], ()),
        ([noise(RATE // 2, 1), noise(RATE // 2, 1)], (1, 2)),  # 1.5 s before the video ends
        ([noise(2 * RATE, 2), EMPTY, noise(2 * RATE, 1), noise(2 * RATE, 1)], (3, 4)),
        ([noise(2 * RATE, 2), EMPTY, EMPTY], ()),
    ],
)
def test_mono_streams_of_one_length_are_found(tmp_path, waveforms, expected):
    assert (
        decode.probe(make_clip(tmp_path / "a.mkv", FRAMES, audio=waveforms)).mono_streams
        == expected
    )


def test_what_was_probed_survives_json(tmp_path):
    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=[noise(2 * RATE, 1), noise(2 * RATE, 1)])
    info = decode.probe(path, audio_stream=(2, 1))
    assert decode.ClipInfo(**json.loads(json.dumps(dataclasses.asdict(info)))) == info


def test_where_the_audio_begins_and_ends_is_known(tmp_path):
    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=noise(RATE), rate=RATE, audio_starts=0.5)
    info = decode.probe(path)
    assert info.audio_begin_seconds == pytest.approx(0.5, abs=0.002)
    assert info.audio_end_seconds == pytest.approx(1.5, abs=0.002)


def tones(rate, begin, end, channels=2):
    """[C, L] from `begin` to `end` s: 440 Hz left and 1,000 Hz right, and silence."""
    t = np.arange(round(begin * rate), round(end * rate)) / rate
    loud = [0.5 * np.sin(2 * np.pi * 440 * t), 0.25 * np.sin(2 * np.pi * 1000 * t)]
    return np.stack([*loud, *(4 * [0 * t])])[:channels]


@pytest.mark.parametrize(
    ("codec", "before", "after"),
    [
        ("mp2", (48000, 2), (32000, 2)),
        ("mp2", (32000, 2), (48000, 2)),
        ("mp2", (48000, 1), (48000, 2)),
        ("mp2", (48000, 2), (48000, 1)),
        ("ac3", (48000, 2), (48000, 6)),
    ],
)
def test_audio_that_changes_its_rate_or_channels_stays_in_place(tmp_path, codec, before, after):
    change, parts = 1.92, []
    for (rate, channels), begin, end in ((before, 0, change), (after, change, 4)):
        parts.append((begin, rate, tones(rate, begin, end, channels)))
    path = make_changing_audio(tmp_path / "a.ts", codec, parts)
    whole = read(path, 0, 4 * RATE).numpy()
    for (_, channels), begin, end in ((before, 0.2, 1.8), (after, 2.2, 3.7)):
        front = 1 / (1 + 2**0.5) if channels == 6 else 1  # its weight in a downmix
        expected = front * tones(RATE, begin, end)[[0, 0] if channels == 1 else [0, 1]]
        found = whole[:, round(begin * RATE) : round(end * RATE)]
        np.testing.assert_allclose(found, expected, atol=0.03)
    for start in (0.7, 2.3):
        piece = read(path, start, RATE)
        first = round(start * RATE)
        np.testing.assert_allclose(piece, whole[:, first : first + RATE], atol=1e-4)


def write_fragments(path, movflags):
    """6 s, in fragments of 1 s if movflags says so."""
    options = {"movflags": movflags}
    frames = grey_frames(range(0, 240, 4))
    return make_clip(path, frames, audio=noise(6 * RATE), rate=RATE, muxer_options=options)


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "dash+frag_keyframe"])
def test_a_truncated_fragmented_mp4_is_used_as_far_as_it_decodes(tmp_path, flags, share):
    path = write_fragments(tmp_path / "a.mp4", flags)
    assert decode.probe(path).note == ""
    whole, data = read(path, 0, 2 * RATE), path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    info = decode.probe(path)
    assert info.note == "is truncated; used as far as it decodes"
    assert ClipIndex([(str(path), info)], {}).report() == f"1 clips\n  {path}: {info.note}"
    assert 6 * share - 1.2 < info.audio_end_seconds < 6 * share + 0.2
    frames, audio = decode.read_window(path, 0, 8, 4, 32, 48, RATE, 2 * RATE)
    assert audio.equal(whole)
    shown = frames.float().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(shown, [4 * int(10 * i / 4) for i in range(8)], atol=4)
    assert decode.video_duration(path) == info.duration_seconds


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_another_truncated_mp4_is_an_error(tmp_path, share):
    path = write_fragments(tmp_path / "a.mp4", "faststart")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(MediaError, match=r"a\.mp4: is truncated \(ends at \d\.\d of 6\.\d s\)"):
        decode.probe(path)


def test_a_file_is_complete_though_a_stream_that_is_not_used_lasts_longer(tmp_path):
    """The header of Matroska has one duration, that of the longest stream."""
    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=[noise(2 * RATE), noise(4 * RATE, 1)])
    info = decode.probe(path)
    assert (info.duration_seconds, info.audio_end_seconds, info.audio_stream) == (2, 2, 1)
    assert decode.video_duration(path) == 2
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for measure in (decode.probe, decode.video_duration):
        with pytest.raises(MediaError, match=r"a\.mkv: is truncated \(ends at \d\.\d of 4\.0 s\)"):
            measure(path)


@pytest.mark.parametrize(("text", "value"), [("3", 3), (3, 3), ("1,2", (1, 2)), ((1, 2), (1, 2))])
def test_the_flag_takes_one_stream_or_two(text, value):
    assert DataConfig(audio_stream=text).audio_stream == value


@pytest.mark.parametrize("text", ["-1", "1,2,3", "left", ""])
def test_the_flag_refuses_other_streams(text):
    with pytest.raises(ValueError, match=r"--audio_stream .*: need an index of a stream, or two"):
        DataConfig(audio_stream=text)


ODD_NAMES = [
    "2026-11-27T10:00:00/a:b.mp4",  # a protocol to libav
    "run:1/a.mp4",  # a URL to blobfile
    os.fsdecode(b"caf\xe9/\xff.mp4"),
    "%d \u00e9.mp4",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_of_a_file_can_be_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video, audio = th.zeros(4, 3, 32, 48), th.from_numpy(noise(RATE))
    encode.write_clip(name, video, 4, audio, RATE)
    encode.write_wav(f"{name}.wav", audio, RATE)
    assert decode.read_wav(f"{name}.wav")[0].shape == (2, RATE)
    info = decode.probe(name)
    assert (info.width, info.height, info.duration_seconds) == (48, 32, 1)
    np.testing.assert_allclose(read(name, 0, RATE), audio, atol=1e-4)
    assert len(list(decode.read_frames(name, 0, 4, 4))) == 4
    folder = os.path.dirname(name) or "."
    assert [os.path.basename(path) for path, _ in probe_folders(folder).clips] == [
        os.path.basename(name)
    ]


def test_folders_with_a_colon_are_none_of_a_url():
    assert SamplingConfig(output_dir="run:1").output_dir == os.path.abspath("run:1")
    for name in ("gs://bucket/run:1", "a/run:1", "/run:1", "run"):
        assert (
            SamplingConfig(multimodal_model_path=name, output_dir="a").multimodal_model_path == name
        )
    both = SamplingConfig(multimodal_model_path="a, run:1/b.pt", output_dir="a")
    assert both.multimodal_model_path == f"a,{os.path.abspath('run:1/b.pt')}"


def test_an_odd_name_of_a_missing_or_false_file_is_in_its_error(tmp_path):
    for name in (b"\xff.mp4", b"a:b.mp4"):
        path = os.path.join(tmp_path, os.fsdecode(name))
        with pytest.raises(
            MediaError, match=re.escape(path) + ": cannot be decoded .*No such file"
        ):
            decode.probe(path)
        with open(path, "wb") as file:
            file.write(b"no video\n" * 200)
        with pytest.raises(
            MediaError, match=re.escape(path) + ": cannot be decoded .*Invalid data"
        ):
            decode.probe(path)


READ_LEVELS = """
import sys
from mm_diffusion.data import decode
_, audio = decode.read_window(sys.argv[1], 0, 1, 4, 8, 8, 16000, 16000)
print(decode.probe(sys.argv[1]).channels, *audio.std(dim=1).tolist())
"""


def read_levels(path):
    """[channels, level of the left, of the right], read in a process that may die."""
    command = [sys.executable, "-c", READ_LEVELS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [float(word) for word in done.stdout.split()]


def test_eight_channels_of_pcm_in_mov_are_downmixed(tmp_path):
    surround = np.zeros((8, RATE), np.float32)
    surround[1] = noise(RATE, 1)[0]  # front right
    path = make_clip(tmp_path / "a.mov", FRAMES, audio=surround, rate=RATE, codec="pcm_s16le")
    channels, left, right = read_levels(path)
    assert channels == 8
    assert left < 1e-3 < 0.03 < right


@pytest.mark.parametrize(("layout", "channels"), [("3.0", 3), ("quad", 4), ("5.0", 5), ("7.1", 8)])
def test_a_downmix_of_equal_channels_is_one_of_them(layout, channels):
    """Not their sum, which clips: libav's weights of 5.1 add up to 2.4."""
    wave = np.sin(np.arange(100)).astype(np.float32)
    packed = np.repeat(wave, channels)[None]
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.sample_rate = RATE
    np.testing.assert_allclose(stereo_converter()(frame), [wave, wave], atol=1e-6)


@real_media
def test_the_file_that_corrupts_the_heap_of_another_version_is_read():
    assert read_levels(MEDIA / "odd" / "pcm_7.1.mov") == [8, 0, 0]


def test_audio_whose_sample_rate_is_unknown_is_an_error_at_once(tmp_path):
    """It begins so late that libav does not find it when it opens the file."""
    options = {"audio": noise(RATE), "rate": RATE, "codec": "mp2", "video_codec": "mpeg2video"}
    path = make_clip(tmp_path / "a.ts", grey_frames(range(200), 16, 16), **options)
    for use in (decode.probe, read):
        with pytest.raises(MediaError, match=r"a\.ts: its audio stream has an unknown sample rate"):
            use(path)


@real_media
def test_channels_without_a_downmix_are_an_error_at_once():
    path = MEDIA / "odd" / "nine_channels.mkv"
    for use in (decode.probe, read):
        with pytest.raises(MediaError, match=r"nine_channels\.mkv: .*9 channels: no downmix"):
            use(path)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ZeroDivisionError, OSError])
@pytest.mark.parametrize("where", ["to_rgb", "fit_image", "resampled"])
def test_whatever_stops_a_decoder_or_resampler_is_an_error_with_the_name(
    tmp_path, monkeypatch, error, where
):
    def fail(*_):
        raise error("first line\nsecond line")

    path = make_clip(tmp_path / "a.mkv", FRAMES, audio=noise(RATE), rate=RATE)
    monkeypatch.setattr(decode, where, fail)
    with pytest.raises(MediaError, match=r"a\.mkv: cannot be decoded \(first line second line\)$"):
        read(path)
