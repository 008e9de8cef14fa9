"""Toy clips: their frames, audio and metadata agree, and so do the scores that measure it."""

import numpy as np
import pytest
import torch as th

from mm_diffusion.data import decode
from mm_diffusion.data.toy import ToyConfig, make_clip, write_toy_dataset
from mm_diffusion.evaluation.bright_object import (
    level_difference,
    mismatched_alignment,
    spatial_alignment,
)


def batch(config, count):
    clips = [make_clip(config, k) for k in range(count)]
    return th.stack([clip[0] for clip in clips]) / 127.5 - 1, th.stack([clip[1] for clip in clips])


@pytest.mark.parametrize(("side", "rate"), [(64, 16000), (8, 512)])
def test_audio_comes_from_where_the_object_is_and_only_in_its_own_clip(side, rate):
    videos, audios = batch(ToyConfig(height=side, width=side, seconds=2, sample_rate=rate), 48)
    assert spatial_alignment(videos, audios) > 0.95
    assert abs(mismatched_alignment(videos, audios)) < 0.1
    assert spatial_alignment(videos, audios.flip(1)) < -0.95
    assert spatial_alignment(videos.flip(-1), audios.flip(1)) == pytest.approx(
        spatial_alignment(videos, audios)
    )


def test_alignment_ignores_frames_that_are_dark_or_nearly_silent():
    videos, audios = batch(ToyConfig(height=16, width=16, seconds=2, sample_rate=2048), 16)
    first_second = spatial_alignment(videos[:, :4], audios[:, :, :2048])
    audios[:, :, 2048:] = 1e-6 * th.randn(16, 2, 2048)
    assert spatial_alignment(videos, audios) == pytest.approx(first_second, abs=0.02)
    assert np.isnan(spatial_alignment(videos, th.zeros_like(audios)))


def test_a_clip_depends_on_seed_and_number_only():
    config = ToyConfig(height=24, width=32, seconds=1)
    for first, second in zip(make_clip(config, 3), make_clip(config, 3), strict=True):
        assert (first == second) if isinstance(first, list) else first.equal(second)
    other = ToyConfig(height=24, width=32, seconds=1, seed=1)
    assert not make_clip(config, 3)[0].equal(make_clip(config, 4)[0])
    assert not make_clip(config, 3)[1].equal(make_clip(other, 3)[1])


@pytest.mark.parametrize(
    "shape", [(8, 8, 4, 2, 512), (45, 80, 12.5, 1.3, 44100), (256, 144, 4, 0.5, 8000)]
)
def test_any_size_rate_and_length(shape):
    config = ToyConfig(*shape, num_objects=2)
    video, audio, rows = make_clip(config, 0)
    assert video.shape == (round(shape[2] * shape[3]), 3, *shape[:2])
    assert audio.shape == (2, round(shape[3] * shape[4]))
    assert audio.abs().max() <= 1
    assert len(rows) == 2 * int(10 * shape[3])


def test_audio_is_never_silent_for_long():
    _, audios = batch(ToyConfig(height=8, width=8, seconds=4), 16)
    power = audios.square().sum(dim=1).unfold(-1, 1600, 1600).mean(dim=-1)  # of every 1/10 s
    assert power.min() > 1e-4


def test_brightness_follows_loudness():
    config = ToyConfig(height=32, width=32, fps=25, seconds=4, sample_rate=8000)
    for index in range(4):
        video, audio, _ = make_clip(config, index)
        brightness = video.float().mean(dim=1).flatten(1).amax(dim=1)
        loudness = level_difference(audio[None], config.num_frames)[1][0].sqrt().float()
        assert th.corrcoef(th.stack([brightness, loudness]))[0, 1] > 0.7


def test_the_data_set_has_the_published_shape_and_can_be_completed(tmp_path):
    config = ToyConfig(height=32, width=64, seconds=1)
    write_toy_dataset(tmp_path, 2, config)
    write_toy_dataset(tmp_path, 3, config)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("toy_*"))
    assert names == [
        f"{d}/toy_0000{k}.{e}"
        for d, e in (("metadata_dev", "csv"), ("video_dev", "mp4"))
        for k in range(3)
    ]
    rows = np.loadtxt(tmp_path / "metadata_dev/toy_00000.csv", delimiter=",", dtype=int)
    assert rows[:, 0].tolist() == list(range(10))
    assert set(rows[:, 1]) <= {0, 1}
    assert 0 <= rows[:, 2:].min() <= rows[:, 2:].max() <= 255
    frames, _ = decode.read_window(
        tmp_path / "video_dev/toy_00000.mp4", 0, 4, 4, 32, 64, 16000, 16000
    )
    brightness = frames.float().mean(dim=-1)
    brightest = (
        (brightness - brightness.flatten(1).median(dim=1).values[:, None, None])
        .clamp(min=0)
        .sum(dim=1)
    )
    centres = (brightest * th.arange(64)).sum(dim=1) / brightest.sum(dim=1) * 4  # to 0..255
    np.testing.assert_allclose(
        centres, [np.interp(1.25 + 2.5 * i, rows[:, 0], rows[:, 2]) for i in range(4)], atol=12
    )


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        write_toy_dataset(tmp_path, 1, ToyConfig(height=8, width=8, seconds=1))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    write_toy_dataset(tmp_path / "a", 1, ToyConfig(height=8, width=8, seconds=1))
    with pytest.raises(ValueError, match="already holds other data"):
        write_toy_dataset(tmp_path / "a", 1, ToyConfig(height=8, width=8, seconds=1, seed=5))
