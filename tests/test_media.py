"""Reading gives the right frames and samples of any file; writing is exact and atomic."""

import functools
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch as th
from media_files import (
    MEDIA,
    VIDEO_CODECS,
    clicks,
    grey_frames,
    make_clip,
    noise,
    real_media,
    restamp,
)

from mm_diffusion.data import MediaError, decode, encode, images, streams
from mm_diffusion.data.audio import stereo_converter

RAMP = list(range(0, 240, 4))  # 60 grey frames, 6 s at 10 fps


@pytest.mark.parametrize("suffix", VIDEO_CODECS)
def test_every_container_gives_its_frames_and_its_audio(tmp_path, suffix):
    rate = 48000
    t = np.arange(6 * rate) / rate
    tone = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.1 * np.sin(2 * np.pi * 440 * t)])
    path = make_clip(tmp_path / f"a{suffix}", grey_frames(RAMP), audio=tone, rate=rate)
    info = decode.probe(path)
    assert (info.width, info.height, info.sample_rate, info.channels) == (48, 32, rate, 2)
    assert info.duration_seconds == pytest.approx(6, abs=0.11)
    frames, audio = decode.read_window(path, 2, 8, 4, 32, 48, 16000, 32000)
    assert (frames.shape, audio.shape, audio.dtype) == ((8, 32, 48, 3), (2, 32000), th.float32)
    shown = frames.float().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(
        shown, [RAMP[int(10 * (2 + i / 4) + 1e-6)] for i in range(8)], atol=5
    )
    levels = audio.square().mean(dim=1).sqrt()
    np.testing.assert_allclose(levels, np.array([0.5, 0.1]) / 2**0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        (".mkv", "pcm_s16le", 16000),
        (".mkv", "flac", 44100),
        (".mkv", "aac", 44100),
        (".mp4", "aac", 16000),
        (".mkv", "vorbis", 44100),
        (".webm", "libopus", 48000),
        (".mp4", "flac", 22050),
        (".mov", "aac", 48000),
        (".avi", "pcm_s16le", 16000),
    ],
)
def test_a_click_comes_out_at_its_own_sample_wherever_the_window_starts(
    tmp_path, suffix, codec, rate
):
    path = make_clip(
        tmp_path / f"a{suffix}",
        grey_frames(RAMP),
        audio=clicks(6 * rate, 3001),
        rate=rate,
        codec=codec,
    )
    for start in (0, 0.73, 2.25, 3.9):
        _, audio = decode.read_window(path, start, 1, 4, 8, 8, rate, 2 * rate)
        peaks = np.flatnonzero(audio[0].numpy() > 0.4) + round(start * rate)
        assert len(peaks) >= 2 * rate // 3001
        assert set(peaks % 3001) == {0}


def test_a_click_keeps_its_time_through_resampling(tmp_path):
    path = make_clip(
        tmp_path / "a.mkv", grey_frames(RAMP), audio=clicks(6 * 44100, 44100), rate=44100
    )
    _, audio = decode.read_window(path, 1.5, 1, 4, 8, 8, 16000, 3 * 16000)
    for click in (2.0, 3.0, 4.0):
        around = audio[0, round((click - 1.5) * 16000) - 200 :][:400]
        assert around.argmax() == 200


@pytest.mark.parametrize("rate", [8000, 11127, 44100])
def test_a_window_equals_the_same_piece_of_the_resampled_whole(tmp_path, rate):
    path = make_clip(tmp_path / "a.mkv", grey_frames(RAMP), audio=noise(6 * rate), rate=rate)
    _, whole = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 6 * 16000)
    _, piece = decode.read_window(path, Fraction(7, 3), 1, 4, 8, 8, 16000, 16000)
    np.testing.assert_allclose(piece, whole[:, 37333 : 37333 + 16000], atol=1e-4)


STAMPED = [
    (".mp4", "flac", 48000),
    (".mkv", "flac", 44100),
    (".mkv", "pcm_s16le", 16000),
    (".webm", "libopus", 48000),
    (".mkv", "vorbis", 44100),
]
WINDOWS = [(0, 5), (1.9, 2), (3.13, 2.5)]  # (start, seconds)


def wobble(seconds):
    """Offsets of timestamps: none, late, early, half as late, in turn."""
    return lambda k: seconds * (0, 1, -1, 0.5)[k % 4]


def stamped_clip(folder, shift, clip=STAMPED[0], **options):
    """(a clip of 6 s, the same with other timestamps of its audio packets, its sample rate)."""
    suffix, codec, rate = clip
    source = folder / f"source{suffix}"
    if not source.exists():
        make_clip(source, grey_frames(RAMP), audio=noise(6 * rate), rate=rate, codec=codec)
        restamp(source, folder / f"steady{suffix}", lambda k: 0)
    odd = restamp(source, folder / f"odd{suffix}", shift, **options)
    return folder / f"steady{suffix}", odd, rate


def read_audio(path, rate, start, seconds):
    _, audio = decode.read_window(path, start, 1, 4, 8, 8, rate, round(seconds * rate))
    return audio


@pytest.mark.parametrize("clip", STAMPED, ids=lambda clip: "".join(clip[1::-1]))
@pytest.mark.parametrize("seconds", [0.001, 0.008])
def test_timestamps_that_wobble_change_no_sample_wherever_the_window_starts(
    tmp_path, clip, seconds
):
    steady, wobbling, rate = stamped_clip(tmp_path, wobble(seconds), clip)
    for start, length in WINDOWS:
        expected = read_audio(steady, rate, start, length)
        np.testing.assert_array_equal(read_audio(wobbling, rate, start, length), expected)


def test_a_first_timestamp_that_wobbles_does_not_move_the_audio(tmp_path):
    """The first packet of AAC is priming, so that the first frame is that of the second."""
    steady, wobbling, rate = stamped_clip(tmp_path, wobble(0.001), (".mp4", "aac", 44100))
    assert read_audio(wobbling, rate, 0, 5).equal(read_audio(steady, rate, 0, 5))


@pytest.mark.parametrize(
    "shift",
    [
        lambda k: 0.06 * (k % 9 == 4),
        lambda k: 0.06 * (k % 20 in (4, 5)),
        lambda k: 0.008 * np.sin(k / 8),
        lambda k: np.random.default_rng(k).uniform(-0.02, 0.02) * (k > 0),
    ],
    ids=["single", "pairs", "slow", "random"],
)
def test_timestamps_that_do_not_stay_displaced_are_no_gap(tmp_path, shift):
    steady, odd, rate = stamped_clip(tmp_path, shift)
    for start, length in WINDOWS:
        expected = read_audio(steady, rate, start, length)
        np.testing.assert_array_equal(read_audio(odd, rate, start, length), expected)


@pytest.mark.parametrize("step", [0.02, 0.05, 0.7, -0.05])
@pytest.mark.parametrize("slack", [0, 64])
def test_a_step_that_lasts_is_a_gap_or_an_overlap(tmp_path, step, slack):
    """`slack`: samples by which the origin after the step is uncertain where timestamps wobble."""
    shift = wobble(0.001 if slack else 0)
    steady, odd, rate = stamped_clip(tmp_path, lambda k: shift(k) + step * (k >= 28))
    whole = read_audio(steady, rate, 0, 6)
    at, moved = 28 * 4608, round(step * rate)  # of the frames of FLAC at 48 kHz
    for start, length in WINDOWS:
        audio = read_audio(odd, rate, start, length)
        begin, count = round(start * rate), audio.shape[1]
        before = max(0, min(at, at + moved - slack) - begin)
        assert audio[:, :before].equal(whole[:, begin : begin + before])
        gap = slice(max(0, at - begin), max(0, at + moved - slack - begin))
        assert audio[:, gap].eq(0).all()
        after = max(0, at + moved + slack - begin)
        origins = range(begin + after - moved - slack, begin + after - moved + slack + 1)
        found = [audio[:, after:].equal(whole[:, k : k + count - after]) for k in origins]
        assert any(found)


def test_lost_packets_leave_silence_of_their_length(tmp_path):
    lost = range(25, 31)
    steady, odd, rate = stamped_clip(tmp_path, lambda k: 0, keep=lambda k: k not in lost)
    for start, length in WINDOWS:
        expected = read_audio(steady, rate, start, length)
        positions = np.arange(expected.shape[1]) + round(start * rate)
        expected[:, np.isin(positions // 4608, lost)] = 0
        np.testing.assert_array_equal(read_audio(odd, rate, start, length), expected)


def test_pcm_in_an_mpeg_program_stream_is_gapless(tmp_path):
    """Its timestamps are up to 10 ms late, and its frames of many lengths."""
    rate, audio = 48000, noise(6 * 48000)
    frames = grey_frames([i % 240 for i in range(150)], 240, 320)
    options = {"rate": rate, "codec": "pcm_s16be", "video_codec": "mpeg2video"}
    path = make_clip(tmp_path / "a.vob", frames, 25, audio, **options)
    whole = read_audio(path, rate, 0, 6).numpy()
    origin = np.flatnonzero(whole[0])[0]
    assert origin < rate
    np.testing.assert_allclose(whole[:, origin:], audio[:, : 6 * rate - origin], atol=1e-4)
    for start, length in WINDOWS:
        begin = round(start * rate)
        window = read_audio(path, rate, start, length)
        np.testing.assert_array_equal(window, whole[:, begin : begin + window.shape[1]])


@real_media
def test_the_wobbling_file_gives_the_samples_of_the_steady_one():
    steady, wobbling = (MEDIA / "odd" / name for name in ("steady.mp4", "wobble_1ms.mp4"))
    for start, length in [(0, 2), (0.3, 1), (1.1, 0.8)]:
        expected = read_audio(steady, 48000, start, length)
        np.testing.assert_array_equal(read_audio(wobbling, 48000, start, length), expected)


def test_mono_becomes_two_equal_channels_and_surround_a_stereo_downmix(tmp_path):
    mono = noise(32000, channels=1)
    path = make_clip(tmp_path / "mono.mkv", grey_frames(RAMP[:20]), audio=mono)
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    np.testing.assert_allclose(audio, np.repeat(mono, 2, axis=0), atol=1e-4)
    surround = np.zeros((6, 32000), np.float32)
    surround[0] = noise(32000, channels=1)[0]
    path = make_clip(tmp_path / "surround.mkv", grey_frames(RAMP[:20]), audio=surround)
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    assert audio[0].std() > 0.03
    assert audio[1].abs().max() < 1e-3


def test_audio_that_starts_late_lies_between_zeros(tmp_path):
    loud = np.full((2, 16000), 0.5, np.float32)
    path = make_clip(
        tmp_path / "a.mp4", grey_frames(RAMP), audio=loud, codec="flac", audio_starts=0.5
    )
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    loud_samples = np.flatnonzero(audio[0].numpy() > 0.25)
    assert (loud_samples[0], loud_samples[-1]) == (8000, 23999)


def test_audio_that_is_too_loud_is_clipped_and_nan_is_an_error(tmp_path):
    loud = noise(32000) * 8
    path = make_clip(tmp_path / "a.mkv", grey_frames(RAMP[:20]), audio=loud, codec="pcm_f32le")
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    np.testing.assert_array_equal(audio.numpy(), loud.clip(-1, 1))
    data, sample = path.read_bytes(), loud[0, 100].tobytes()
    path.write_bytes(data.replace(sample, np.float32(np.nan).tobytes()))
    with pytest.raises(MediaError, match=r"a\.mkv: audio contains NaN at 0\.01 s"):
        decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)


def test_corrupt_timestamps_that_stretch_few_bytes_over_days_are_an_error(tmp_path):
    path = make_clip(tmp_path / "a.mp4", grey_frames(RAMP[:20]), audio=noise(32000), codec="flac")
    data = bytearray(path.read_bytes())
    length = data.index(b"stts") + 16  # of the first frame, in ticks of 1/10240 s
    data[length : length + 4] = (10240 * 86400).to_bytes(4, "big")
    path.write_bytes(data)
    message = r"a\.mp4: corrupt timestamps \(0\.\d+ MB would last 24 h\)"
    with pytest.raises(MediaError, match=message):
        decode.video_duration(path)


def test_short_clips_repeat_their_last_frame(tmp_path):
    path = make_clip(tmp_path / "a.mkv", grey_frames([40, 80, 120]), fps=4, audio=noise(12000))
    frames, audio = decode.read_window(path, 0, 8, 4, 32, 48, 16000, 32000)
    np.testing.assert_allclose(frames.float().mean(dim=(1, 2, 3)), [40, 80] + 6 * [120], atol=4)
    assert audio[:, 12000:].abs().max() == 0


@pytest.mark.parametrize("fps", [24, Fraction(30000, 1001), 3])
def test_the_frame_shown_at_t_is_the_last_that_began_by_then(tmp_path, fps):
    path = make_clip(tmp_path / "a.mkv", grey_frames(RAMP), fps=fps, audio=noise(16000))
    times = [Fraction(1, 2) + Fraction(i, 4) for i in range(6)]
    frames, _ = decode.read_window(path, 0.5, 6, 4, 32, 48, 16000, 16000)
    expected = [RAMP[min(int(t * fps), len(RAMP) - 1)] for t in times]
    np.testing.assert_allclose(frames.float().mean(dim=(1, 2, 3)), expected, atol=3.9)


def test_frames_keep_their_aspect_on_centred_black(tmp_path):
    path = make_clip(
        tmp_path / "a.mkv", grey_frames([200], height=33, width=67), fps=4, audio=noise(4000)
    )
    frames, _ = decode.read_window(path, 0, 1, 4, 64, 64, 16000, 4000)
    rows = frames[0].float().mean(dim=(1, 2))
    assert np.flatnonzero(rows > 100).tolist() == list(range(16, 48))  # 32 rows: 16 above, 16 below
    assert images.fit_image(th.full((3, 4, 8), 255, dtype=th.uint8), 7, 8)[:, :, 0].tolist()[0] == [
        0
    ] + 4 * [255] + 2 * [0]


def test_frames_are_resized_without_antialiasing_unless_asked(tmp_path):
    """Stripes of one pixel, every fourth white: a quarter grey, or what cubic samples make of it.

    A row between the pixels 1 and 2 of each four has weights -0.09375, 0.59375, 0.59375, -0.09375.
    """
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::4] = 255
    path = make_clip(tmp_path / "a.mkv", stripes, fps=4, audio=noise(4000), video_codec="ffv1")
    for antialias, grey in {False: 0, True: 64}.items():
        options = {"antialias": antialias}
        frames, _ = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 4000, **options)
        assert (frames[0, :, 2:-2].float() - grey).abs().max() < 6


@real_media
@pytest.mark.parametrize("name", ["nasa_13013.mp4", "big_buck_bunny_0_30.webm"])
def test_antialiasing_changes_real_frames_by_several_grey_levels(name):
    read = functools.partial(decode.read_window, MEDIA / name, 5, 4, 1, 64, 64, 16000, 16)
    plain, smooth = (read(antialias=antialias)[0].double() for antialias in (False, True))
    assert 4 < (plain - smooth).square().mean().sqrt() < 12


def test_only_the_window_is_decoded(tmp_path, monkeypatch):
    frames = grey_frames([i % 250 for i in range(1200)], 16, 16)
    path = make_clip(tmp_path / "long.mp4", frames, audio=noise(120 * 8000), rate=8000)
    decoded = {"video": 0, "audio": 0}
    original = streams.decode_stream

    def counting(container, stream):
        for item in original(container, stream):
            decoded[stream.type] += 1
            yield item

    monkeypatch.setattr("mm_diffusion.data.streams.decode_stream", counting)
    window, _ = decode.read_window(path, 90, 4, 4, 16, 16, 8000, 8000)
    assert abs(float(window[0].float().mean()) - 900 % 250) < 4
    assert decoded["video"] < 60
    assert decoded["audio"] < 60


def test_a_rotated_video_is_read_upright(tmp_path):
    image = grey_frames([30], 32, 32).copy()
    image[:, :16] = 220  # bright above
    path = make_clip(tmp_path / "a.mp4", image, fps=4, audio=noise(4000))
    raw = bytearray(path.read_bytes())
    identity = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16))
    quarter = b"".join((v & 0xFFFFFFFF).to_bytes(4, "big") for v in (0, 1 << 16, 0, -(1 << 16), 0))
    at = raw.index(identity, raw.index(b"tkhd"))
    raw[at : at + 20] = quarter  # ISO 14496-12: turn clockwise by 90 degrees
    path.write_bytes(raw)
    frames, _ = decode.read_window(path, 0, 1, 4, 32, 32, 16000, 4000)
    left, right = frames[0, :, :12].float().mean(), frames[0, :, 20:].float().mean()
    assert right > left + 100


@pytest.mark.parametrize(
    ("size", "samples", "rate"),
    [((8, 8), 1023, 512), ((9, 7), 5001, 16000), ((64, 64), 80000, 16000)],
)
def test_a_written_clip_holds_exactly_its_frames_and_samples(tmp_path, size, samples, rate):
    video, audio = th.rand(5, 3, *size) * 2 - 1, th.rand(2, samples) * 1.9 - 0.95
    encode.write_clip(tmp_path / "a.mp4", video, 4, audio, rate)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert len(list(container.decode(video=0))) == 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded_audio = np.concatenate(
            [frame.to_ndarray() for frame in container.decode(audio=0)], axis=1
        )
    decoded_audio = decoded_audio.reshape(-1, 2).T / 32768
    assert decoded_audio.shape == (2, samples)
    np.testing.assert_allclose(decoded_audio, audio, atol=0.51 / 32768)
    _, again = decode.read_window(tmp_path / "a.mp4", 0, 5, 4, *size, rate, samples)
    np.testing.assert_array_equal(again.numpy(), decoded_audio.astype(np.float32))


def test_written_frames_are_nearly_the_given_ones(tmp_path):
    rows, columns = th.meshgrid(th.linspace(-1, 1, 64), th.linspace(-1, 1, 64), indexing="ij")
    video = th.stack([rows, columns, rows * columns]).expand(4, 3, 64, 64)
    encode.write_clip(tmp_path / "a.mp4", video, 4, th.zeros(2, 16000), 16000)
    frames, _ = decode.read_window(tmp_path / "a.mp4", 0, 4, 4, 64, 64, 16000, 16000)
    assert (frames.permute(0, 3, 1, 2).float() - images.to_uint8(video).float()).abs().mean() < 2


def test_a_failed_write_leaves_nothing_and_harms_nothing(tmp_path):
    encode.write_clip(tmp_path / "a.mp4", th.zeros(2, 3, 8, 8), 4, th.zeros(2, 100), 16000)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match="need video"):
        encode.write_clip(tmp_path / "a.mp4", th.zeros(2, 4, 8, 8), 4, th.zeros(2, 100), 16000)
    with pytest.raises(OSError, match=r"a.mp4: cannot be written \(.*9999999 Hz"):
        encode.write_clip(tmp_path / "a.mp4", th.zeros(2, 3, 8, 8), 4, th.zeros(2, 100), 9_999_999)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_wav_holds_exactly_its_samples(tmp_path):
    audio = th.rand(2, 1023) * 2 - 1
    encode.write_wav(tmp_path / "a.wav", audio, 16000)
    again, rate = decode.read_wav(tmp_path / "a.wav")
    assert (again.shape, rate, soundfile.info(tmp_path / "a.wav").subtype) == (
        (2, 1023),
        16000,
        "PCM_16",
    )
    np.testing.assert_allclose(again, audio, atol=1.01 / 32768)


def test_a_contact_sheet_has_a_row_for_each_clip(tmp_path):
    images.save_contact_sheet(tmp_path / "a.png", th.rand(3, 5, 3, 8, 8) * 2 - 1, min_side=32)
    from PIL import Image

    assert Image.open(tmp_path / "a.png").size == (5 * 34 + 2, 3 * 34 + 2)


def test_streams_can_be_chosen_and_a_wrong_choice_is_named(tmp_path):
    path = make_clip(tmp_path / "a.mkv", grey_frames(RAMP[:10]), audio=noise(16000))
    assert decode.probe(path, 0, 1).audio_stream == 1
    with pytest.raises(MediaError, match=r"a\.mkv: stream 0 is not audio"):
        decode.probe(path, audio_stream=0)


@pytest.mark.parametrize(
    ("suffix", "known", "kind"),
    [
        (".mp4", b"avc1", "video stream"),
        (".mkv", b"V_MPEG4", "video stream"),
        (".mkv", b"A_FLAC", "audio stream"),
    ],
)
def test_an_unknown_codec_is_named(tmp_path, suffix, known, kind):
    path = make_clip(tmp_path / f"a{suffix}", grey_frames(RAMP[:10]), audio=noise(16000))
    path.write_bytes(path.read_bytes().replace(known, known[:-4] + b"ZZZZ"))
    reads = [decode.probe, lambda path: decode.read_window(path, 0, 1, 4, 8, 8, 16000, 16)]
    reads_video = [decode.video_duration, lambda path: next(decode.read_frames(path, 0, 1, 4))]
    for read in reads + reads_video if kind == "video stream" else reads:
        with pytest.raises(MediaError, match=rf"a\{suffix}: its {kind} has an unknown codec$"):
            read(path)
    if kind == "audio stream":  # which the video alone does not need
        assert decode.video_duration(path) == pytest.approx(1, abs=0.01)


@real_media
def test_real_mp4_best_streams_and_windows():
    path = MEDIA / "nasa_13013.mp4"
    info = decode.probe(path)
    assert (info.width, info.height, info.sample_rate, info.video_stream, info.audio_stream) == (
        480,
        270,
        16000,
        3,
        4,
    )
    assert decode.probe(path, 0, 1).sample_rate == 8000
    _check_windows(path, info)


@real_media
def test_real_webm_windows_are_sample_exact():
    path = MEDIA / "big_buck_bunny_0_30.webm"
    info = decode.probe(path)
    assert (info.width, info.height, info.sample_rate) == (1280, 720, 44100)
    _check_windows(path, info)


def _check_windows(path, info):
    with av.open(str(path)) as container:
        pieces = [
            frame.to_ndarray() for frame in container.decode(container.streams[info.audio_stream])
        ]
    whole = np.concatenate(pieces, axis=1)  # in both files audio and video start together
    for start in (1.3, 7):
        begin = round(start * info.sample_rate)
        _, audio = decode.read_window(
            path, start, 1, 4, 8, 8, info.sample_rate, 3 * info.sample_rate
        )
        np.testing.assert_allclose(audio, whole[:, begin : begin + audio.shape[1]], atol=1e-6)


def test_audio_whose_channels_change_within_a_file_is_stereo_throughout():
    convert = stereo_converter()
    for layout, channels in (("5.1", 6), ("quad", 4), ("mono", 1), ("stereo", 2), ("5.1", 6)):
        frame = av.AudioFrame.from_ndarray(
            np.full((channels, 100), 0.25, np.float32), format="fltp", layout=layout
        )
        frame.sample_rate = 16000
        audio = convert(frame)
        assert audio.shape == (2, 100)
        assert audio.isfinite().all()
        assert audio.abs().max() > 0.1
        assert channels > 2 or audio.eq(0.25).all()


@pytest.mark.parametrize("layout", ["stereo", "BL+BR", "FL+LFE", "FC+LFE", "SL+SR"])
def test_two_channels_of_any_layout_are_read_as_they_are(layout):
    levels = np.array([[0.125], [0.25]], np.float32) * np.ones((1, 100), np.float32)
    frame = av.AudioFrame.from_ndarray(levels, format="fltp", layout=layout)
    frame.sample_rate = 16000
    np.testing.assert_array_equal(stereo_converter()(frame), levels)
