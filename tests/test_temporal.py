"""Temporal alignment: of the toy clips, which pulse together, and of clips that do not."""

import math

import pytest
import torch as th

from mm_diffusion.data.toy import ToyConfig, make_clip
from mm_diffusion.evaluation.bright_object import temporal_alignment


@pytest.fixture(scope="module")
def clips():
    config = ToyConfig(height=16, width=16, fps=12, seconds=2, sample_rate=1024)
    made = [make_clip(config, k) for k in range(48)]
    return th.stack([clip[0] for clip in made]) / 127.5 - 1, th.stack([clip[1] for clip in made])


def test_audio_is_loud_when_its_own_object_is_bright(clips):
    videos, audios = clips
    assert temporal_alignment(videos, audios) > 0.85
    assert abs(temporal_alignment(videos, audios.roll(1, 0))) < 0.15


def test_time_counts_and_position_and_level_do_not(clips):
    videos, audios = clips
    value = temporal_alignment(videos, audios)
    assert temporal_alignment(videos.flip(-1), 0.1 * audios.flip(1)) == pytest.approx(value)
    assert temporal_alignment(videos.flip(1), audios) < 0.5 * value


def test_silence_gives_nan(clips):
    videos, audios = clips
    assert math.isnan(temporal_alignment(videos, th.zeros_like(audios)))
