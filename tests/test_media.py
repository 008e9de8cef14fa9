"""Reading: the right frames and the right samples of any file. Writing: what was meant, whole or not at all."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch as th
from media_files import MEDIA, VIDEO_CODECS, clicks, grey_frames, make_clip, noise, real_media

from mm_diffusion.data import MediaError, decode, encode, images

RAMP = list(range(0, 240, 4))  # 60 grey frames, 6 s at 10 fps


@pytest.mark.parametrize("suffix", VIDEO_CODECS)
def test_every_container_gives_its_frames_and_its_sound(tmp_path, suffix):
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


def test_sound_that_starts_late_is_preceded_by_silence_and_followed_by_it(tmp_path):
    loud = np.full((2, 16000), 0.5, np.float32)
    path = make_clip(
        tmp_path / "a.mp4", grey_frames(RAMP), audio=loud, codec="flac", sound_starts=0.5
    )
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    sounding = np.flatnonzero(audio[0].numpy() > 0.25)
    assert (sounding[0], sounding[-1]) == (8000, 23999)


def test_sound_that_is_too_loud_is_clipped_and_what_is_no_number_is_told(tmp_path):
    loud = noise(32000) * 8
    path = make_clip(tmp_path / "a.mkv", grey_frames(RAMP[:20]), audio=loud, codec="pcm_f32le")
    _, audio = decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)
    np.testing.assert_array_equal(audio.numpy(), loud.clip(-1, 1))
    data, sample = path.read_bytes(), loud[0, 100].tobytes()
    path.write_bytes(data.replace(sample, np.float32(np.nan).tobytes()))
    with pytest.raises(
        MediaError, match=r"a\.mkv: its sound holds what is no number, from 0\.00 s on"
    ):
        decode.read_window(path, 0, 1, 4, 8, 8, 16000, 32000)


def test_a_film_of_few_bytes_that_would_last_for_days_is_told(tmp_path):
    path = make_clip(tmp_path / "a.mp4", grey_frames(RAMP[:20]), audio=noise(32000), codec="flac")
    data = bytearray(path.read_bytes())
    length = (
        data.index(b"stts") + 16
    )  # of a frame, in ticks of 1/10240 s; the first is all that is shown
    data[length : length + 4] = (10240 * 86400).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(
        MediaError, match=r"a\.mp4: has damaged times \(its \d+ bytes would last 86400 s\)"
    ):
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


def test_pictures_keep_their_aspect_on_centred_black(tmp_path):
    path = make_clip(
        tmp_path / "a.mkv", grey_frames([200], height=33, width=67), fps=4, audio=noise(4000)
    )
    frames, _ = decode.read_window(path, 0, 1, 4, 64, 64, 16000, 4000)
    rows = frames[0].float().mean(dim=(1, 2))
    assert np.flatnonzero(rows > 100).tolist() == list(range(16, 48))  # 32 rows: 16 above, 16 below
    assert images.fit_image(th.full((3, 4, 8), 255, dtype=th.uint8), 7, 8)[:, :, 0].tolist()[0] == [
        0
    ] + 4 * [255] + 2 * [0]


def test_only_the_window_is_decoded(tmp_path, monkeypatch):
    frames = grey_frames([i % 250 for i in range(1200)], 16, 16)
    path = make_clip(tmp_path / "long.mp4", frames, audio=noise(120 * 8000), rate=8000)
    decoded = {"video": 0, "audio": 0}
    original = decode._decode

    def counting(container, stream):
        for item in original(container, stream):
            decoded[stream.type] += 1
            yield item

    monkeypatch.setattr("mm_diffusion.data.decode._decode", counting)
    window, _ = decode.read_window(path, 90, 4, 4, 16, 16, 8000, 8000)
    assert abs(float(window[0].float().mean()) - 900 % 250) < 4
    assert decoded["video"] < 60
    assert decoded["audio"] < 60


def test_a_turned_film_is_shown_upright(tmp_path):
    picture = grey_frames([30], 32, 32).copy()
    picture[:, :16] = 220  # bright above
    path = make_clip(tmp_path / "a.mp4", picture, fps=4, audio=noise(4000))
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
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    heard = heard.reshape(-1, 2).T / 32768
    assert heard.shape == (2, samples)
    np.testing.assert_allclose(heard, audio, atol=0.51 / 32768)
    _, again = decode.read_window(tmp_path / "a.mp4", 0, 5, 4, *size, rate, samples)
    np.testing.assert_array_equal(again.numpy(), heard.astype(np.float32))


def test_a_written_picture_is_nearly_what_was_meant(tmp_path):
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
        (".mkv", b"A_FLAC", "sound track"),
    ],
)
def test_a_codec_that_nobody_knows_is_told(tmp_path, suffix, known, kind):
    path = make_clip(tmp_path / f"a{suffix}", grey_frames(RAMP[:10]), audio=noise(16000))
    path.write_bytes(path.read_bytes().replace(known, known[:-4] + b"ZZZZ"))
    reads = [decode.probe, lambda path: decode.read_window(path, 0, 1, 4, 8, 8, 16000, 16)]
    seen = [decode.video_duration, lambda path: next(decode.read_frames(path, 0, 1, 4))]
    for read in reads + seen if kind == "video stream" else reads:
        with pytest.raises(MediaError, match=rf"a\{suffix}: its {kind} has an unknown codec$"):
            read(path)
    if kind == "sound track":  # which the picture alone does not need
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
    whole = np.concatenate(pieces, axis=1)  # in both files sound and picture start together
    for start in (1.3, 7):
        begin = round(start * info.sample_rate)
        _, audio = decode.read_window(
            path, start, 1, 4, 8, 8, info.sample_rate, 3 * info.sample_rate
        )
        np.testing.assert_allclose(audio, whole[:, begin : begin + audio.shape[1]], atol=1e-6)


def test_sound_whose_channels_change_on_the_way_is_stereo_throughout():
    convert = decode._stereo_converter()
    for layout, channels in (("5.1", 6), ("quad", 4), ("mono", 1), ("stereo", 2), ("5.1", 6)):
        frame = av.AudioFrame.from_ndarray(
            np.full((channels, 100), 0.25, np.float32), format="fltp", layout=layout
        )
        frame.sample_rate = 16000
        sound = convert(frame)
        assert sound.shape == (2, 100)
        assert sound.isfinite().all()
        assert sound.abs().max() > 0.1
        assert channels > 2 or sound.eq(0.25).all()


@pytest.mark.parametrize("layout", ["stereo", "BL+BR", "FL+LFE", "FC+LFE", "SL+SR"])
def test_two_channels_are_read_as_they_are_whatever_they_are_called(layout):
    levels = np.array([[0.125], [0.25]], np.float32) * np.ones((1, 100), np.float32)
    frame = av.AudioFrame.from_ndarray(levels, format="fltp", layout=layout)
    frame.sample_rate = 16000
    np.testing.assert_array_equal(decode._stereo_converter()(frame), levels)
