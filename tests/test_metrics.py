"""Evaluation: distances have their closed forms, scores their known values, bad input a message."""

import dataclasses
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch as th
import torchaudio
import torchvision
from media_files import MEDIA, real_media
from media_files import make_clip as write_any_clip
from test_dist import LAUNCHERS, REPOSITORY, untouched
from test_launchers import assert_refused, recorded, run
from test_upsampler import flags_for, sample, saved

from mm_diffusion.config import ClipReadingConfig, EvalConfig, MetricsConfig
from mm_diffusion.data import DataError, decode, encode, images, toy
from mm_diffusion.dist_util import SINGLE_PROCESS
from mm_diffusion.evaluation import (
    compute,
    evaluate,
    features,
    measures,
    scores,
    spatial_av_align,
    stereo,
    temporal_av_align,
)
from mm_diffusion.evaluation.bright_object import horizontal_position, why_unaligned
from mm_diffusion.evaluation.clips import ClipFolder
from mm_diffusion.evaluation.distances import (
    Points,
    TooFewError,
    earth_movers_distance,
    frechet_distance,
    gaussian_distances,
    kernel_distances,
    nearest,
    standard_frechet_distance,
)
from mm_diffusion.evaluation.memorisation import find_neighbours
from mm_diffusion.evaluation.report import Report
from mm_diffusion.evaluation.spatial_av_align import Box, Boxes, Event, Events, count_hits

TOY = toy.ToyConfig(height=32, width=32, seconds=2, sample_rate=4000)


def clip_sizes(video_size, audio_size, video_fps, audio_fps):
    sizes = {"video_size": video_size, "audio_size": audio_size}
    return ClipReadingConfig(video_fps=video_fps, audio_fps=audio_fps, **sizes)


SIZES = clip_sizes("8,3,32,32", "2,8000", 4, 4000)
HZ = 16000


@pytest.fixture(autouse=True)
def cache(compiled_librosa, tmp_path_factory, monkeypatch):
    """A cache folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copy(compiled_librosa, folder)
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(folder))
    return folder


def noise(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def with_moments(mean, covariance_root, count=64):
    """Points [N, D] whose sample mean and unbiased covariance are exactly mean and root^T root."""
    raw = noise(count, len(mean))
    raw -= raw.mean(dim=0)
    white = th.linalg.qr(raw)[0] * math.sqrt(count - 1)
    return white @ covariance_root + mean


# ---------------------------------------------------------------- distances


def unweighted(distances):
    """A distance between points [N, D], [M, D] of weight 1."""

    def distance(x, y):
        return distances(Points.unweighted(x), Points.unweighted(y)).item()

    return distance


kernel_distance = unweighted(kernel_distances)
gaussian_distance = unweighted(gaussian_distances)


def test_frechet_distance_of_axis_parallel_gaussians_is_the_closed_form():
    """sum (mu_i - nu_i)^2 + (sigma_i - tau_i)^2."""
    mu, nu, sigma, tau = th.tensor(
        [[0.0, 1, -2, 3], [1, 1, 0, 0], [1, 2, 0.5, 3], [2, 2, 0, 1]], dtype=th.float64
    )
    expected = ((mu - nu).square() + (sigma - tau).square()).sum().item()
    x, y = with_moments(mu, sigma.diag()), with_moments(nu, tau.diag(), count=50)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_any_gaussians_takes_the_root_of_the_product_of_covariances():
    a, b = noise(5, 5, seed=1), noise(5, 5, seed=2)
    x, y = with_moments(th.zeros(5).double(), a), with_moments(th.zeros(5).double(), b)
    roots = th.linalg.eigvals((a.T @ a) @ (b.T @ b)).real.sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx(
        (a.square().sum() + b.square().sum() - 2 * roots).item(), rel=1e-9
    )


@pytest.mark.parametrize(("count", "dimensions"), [(40, 7), (6, 30)])
def test_frechet_distance_is_symmetric_zero_for_one_set_and_blind_to_rotations(count, dimensions):
    x, y = noise(count, dimensions), 2 * noise(count + 3, dimensions, seed=1) + 0.5
    rotation = th.linalg.qr(noise(dimensions, dimensions, seed=2))[0]
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(
        frechet_distance(x @ rotation, y @ rotation), rel=1e-9
    )
    assert frechet_distance(x, x + 1) == pytest.approx(dimensions, rel=1e-9)


def test_standard_frechet_distance_is_blind_to_units_and_takes_what_does_not_vary_as_it_is():
    x, y, units = (
        noise(40, 5),
        noise(43, 5, seed=1) + 0.5,
        th.tensor([1, 10, 0.01, 3, 700]).double(),
    )
    assert standard_frechet_distance(x * units, y * units) == pytest.approx(
        standard_frechet_distance(x, y), rel=1e-9
    )
    still = th.zeros(43, 1).double()
    moved = standard_frechet_distance(th.cat([x, 2 + still[:40]], 1), th.cat([y, still], 1))
    assert moved == pytest.approx(standard_frechet_distance(x, y) + 4, rel=1e-9)
    assert standard_frechet_distance(y + 3 * y.std(dim=0), y) == pytest.approx(9 * 5, rel=1e-9)


def test_kernel_distance_is_the_mean_over_pairs_written_out():
    x, y = noise(5, 3).float(), noise(4, 3, seed=1).float() + 1

    def k(a, b):
        return (float(a.double() @ b.double()) / 3 + 1) ** 3

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    xx, yy = (
        mean(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y)
    )
    assert kernel_distance(x, y) == pytest.approx(
        xx + yy - 2 * mean(k(a, b) for a in x for b in y), rel=1e-12
    )


def test_gaussian_distance_is_the_mean_over_pairs_written_out():
    """Under exp(-|a - b|^2 / (2 s^2)), s the median distance of the second set."""
    x, y = noise(5, 3), noise(4, 3, seed=1) + 1
    s = sorted((a - b).norm().item() for i, a in enumerate(y) for b in y[:i])[2]

    def mean(first, second):
        pairs = [(a, b) for a in first for b in second if a is not b]
        return sum(math.exp(-((a - b).norm().item() ** 2) / (2 * s**2)) for a, b in pairs) / len(
            pairs
        )

    x, y = list(x), list(y)
    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert gaussian_distance(th.stack(x), th.stack(y)) == pytest.approx(expected, rel=1e-12)


def test_gaussian_distance_is_bounded_blind_to_units_and_rotations_and_needs_spread():
    x, y = noise(40, 5), noise(43, 5, seed=1)
    rotation = th.linalg.qr(noise(5, 5, seed=2))[0]
    distance = gaussian_distance(x + 1, y)
    assert gaussian_distance(7 * (x + 1) @ rotation, 7 * y @ rotation) == pytest.approx(distance)
    assert abs(gaussian_distance(x, y)) < 0.05 < distance < gaussian_distance(x + 9, y) < 2
    with pytest.raises(TooFewError, match="reference points that differ"):
        gaussian_distance(x, th.zeros(3, 5))


@pytest.mark.parametrize("distance", [kernel_distance, gaussian_distance])
def test_kernel_distances_are_unbiased(distance):
    """Two sets of one distribution are 0 apart on average."""
    trials = [distance(noise(6, 2, seed=k), noise(6, 2, seed=1000 + k)) for k in range(400)]
    error = th.tensor(trials).std().item() / math.sqrt(len(trials))
    assert abs(sum(trials) / len(trials)) < 4 * error
    assert min(trials) < 0 < max(trials)


def test_kernel_distance_does_not_depend_on_blocks(monkeypatch):
    x, y = noise(9, 4), noise(7, 4, seed=1)
    whole = kernel_distance(x, y), nearest(x, x, th.arange(9) // 2)[0]
    monkeypatch.setattr("mm_diffusion.evaluation.distances.BLOCK", 2)
    assert kernel_distance(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert nearest(x, x, th.arange(9) // 2)[0].equal(whole[1])


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, gaussian_distance])
def test_one_point_has_no_spread_and_is_refused(distance):
    with pytest.raises(TooFewError, match="at least 2 in each set, got 1 and 5"):
        distance(noise(1, 3), noise(5, 3))


def test_moving_a_histogram_by_k_bins_costs_k_bin_widths():
    x = th.tensor([0, 3, 1, 0, 0, 0])
    assert earth_movers_distance(x, x.roll(2), 0.5) == pytest.approx(1.0)
    assert earth_movers_distance(x, 7 * x) == 0
    assert earth_movers_distance(x, 0 * x).isnan()


def test_the_nearest_is_found_and_points_of_a_group_are_no_neighbours():
    y = th.tensor([[0.0, 0], [3, 0], [10, 10]])
    distance, index = nearest(th.tensor([[3.0, 4], [0, 0]]), y)
    assert index.tolist() == [1, 0]
    assert distance.tolist() == pytest.approx([4 / math.sqrt(2), 0])
    assert nearest(y, y, th.arange(3))[1].tolist() == [1, 0, 1]
    assert nearest(y, y, th.tensor([0, 0, 1]))[1].tolist() == [2, 2, 1]
    with pytest.raises(TooFewError, match="no neighbour among 3 points of 1 groups"):
        nearest(y, y, th.zeros(3))


# ---------------------------------------------------------------- temporal AV-Align


def clicks(*seconds, length=2.0):
    """[2, L]: bursts of noise at these times, equal in both channels, and silence between."""
    audio = th.zeros(int(length * HZ), dtype=th.float64)
    for k, begin in enumerate(seconds):
        size = int(0.05 * HZ)
        audio[int(begin * HZ) :][:size] += 0.3 * noise(size, seed=k) * th.linspace(1, 0, size)
    return audio.expand(2, -1).float()


def test_onsets_are_found_where_audio_events_begin():
    times = [0.31, 0.8, 1.25, 1.6]
    assert temporal_av_align.onsets(clicks(*times), HZ) == pytest.approx(times, abs=0.03)
    assert temporal_av_align.onsets(th.zeros(2, HZ), HZ) == []


def test_onsets_are_those_that_librosa_finds_in_the_file(tmp_path):
    """Read by librosa: mono, 22,050 Hz."""
    audio = toy.make_clip(toy.ToyConfig(height=8, width=8), 0)[1]
    soundfile.write(tmp_path / "a.wav", audio.T.numpy(), HZ, subtype="FLOAT")
    librosa = temporal_av_align.load_librosa()
    mono, rate = librosa.load(tmp_path / "a.wav")
    assert rate == 22050
    expected = librosa.onset.onset_detect(y=mono, sr=rate, units="time")
    assert temporal_av_align.onsets(audio, HZ) == expected.tolist() != []


@pytest.mark.parametrize("index", range(4))
def test_every_burst_of_a_toy_clip_is_an_onset_and_nothing_else_is(index):
    """But near the ends of the clip, where librosa takes its beginning for an onset."""
    config = toy.ToyConfig(height=8, width=8)
    (thing,) = toy.sample_sources(config, np.random.default_rng([config.seed, index]))
    bursts = (np.arange(1, 30) - thing.burst_phase) / thing.bursts_per_second
    bursts = bursts[(bursts > 0.15) & (bursts < config.seconds - 0.1)]
    found = np.array(temporal_av_align.onsets(toy.make_clip(config, index)[1], HZ))
    found = found[(found > 0.17) & (found < config.seconds - 0.1)]
    assert len(found) == len(bursts)
    assert ((found - bursts > -0.03) & (found - bursts < 0.08)).all()


def moving(*moves):
    """[F, 3, 64, 64]: a texture that has moved by so many pixels in each frame."""
    texture = th.nn.functional.interpolate(
        noise(1, 3, 24, 24).float(), (96, 96), mode="bicubic"
    ).clamp(-1, 1)[0]
    return th.stack([texture.roll(s, -1)[:, 16:80, 16:80] for s in np.cumsum(moves).tolist()])


def test_motion_is_the_displacement_and_its_peak_the_jump():
    """A texture that moves by d pixels a frame has a flow of about d everywhere."""
    moves = [0, 1, 1, 3, 1, 1, 1]
    frames = moving(*moves)
    assert temporal_av_align.motion(frames) == pytest.approx(moves[1:], rel=0.2)
    assert temporal_av_align.motion_peaks(frames, fps=4, least=0) == [3 / 4]
    assert temporal_av_align.motion_peaks(frames, fps=4, least=5) == []


def test_matching_pairs_nothing_twice_and_finds_the_most_pairs():
    assert temporal_av_align.count_pairs([1.0], [0.9, 1.0, 1.1], 0.25) == 1
    assert temporal_av_align.count_pairs([1.0, 1.4], [1.2, 1.6], 0.25) == 2
    assert temporal_av_align.count_pairs([1.0, 2.0], [1.25, 2.3], 0.25) == 1
    assert temporal_av_align.count_pairs([], [1.0], 0.25) == 0


def in_memory(video, audio, fps):
    """What of a Clip needs no file."""
    return types.SimpleNamespace(video=video, audio=audio, fps=fps, sample_rate=HZ)


@pytest.mark.parametrize(
    ("fps", "apart", "pairs"),
    [(4, 0.2, 1), (4, -0.2, 1), (4, 0.3, 0), (4, -0.3, 0), (8, 0.1, 1), (8, 0.2, 0)],
)
def test_an_onset_and_a_peak_of_motion_are_a_pair_if_at_most_one_frame_apart(fps, apart, pairs):
    clip = in_memory(moving(0, 1, 1, 3, 1, 1, 1), clicks(3 / fps + apart), fps)
    found = temporal_av_align.compute(clip)
    assert {name: count.item() for name, count in found.items()} == {
        "peaks": 1,
        "onsets": 1,
        "pairs": pairs,
    }


def test_the_published_count_lets_onsets_share_a_peak_and_may_exceed_one():
    """Onsets less than a frame away from a peak; 4 of them at 1 peak are 4 / (1 + 4 - 4)."""
    count = temporal_av_align.count_onsets
    assert count([1.0], [0.74, 0.76, 1.0, 1.1, 1.24, 1.26], 0.25) == 4
    assert count([1.0, 1.2], [1.1], 0.25) == 1
    assert count([1.0], [1.25], 0.25) == 0
    assert count([], [1.0], 0.25) == 0 == count([1.0], [], 0.25)
    counts = [th.tensor([n]) for n in (1.0, 4.0, 4.0)]
    assert temporal_av_align.overlap(*counts).item() == 4


@pytest.mark.parametrize("fps", [4, 8])
def test_the_published_count_is_of_the_frames_and_audio_in_the_file(tmp_path, fps):
    """Whatever size and rates the clip is read at, unless its frame rate is lower."""
    audio = toy.make_clip(toy.ToyConfig(height=8, width=8, seconds=4), 0)[1]
    video = moving(0, 1, 1, 3, 1, 1, 4, 1, 1, 1, 3, 1, 1, 4, 1, 1)
    path = written(tmp_path / "a", "a", video, audio, rate=16000) + "/a.mp4"
    frames = list(decode.read_frames(path, 0, 16, 4))
    peaks = temporal_av_align.motion_peaks(frames, 4, least=0)
    soundfile.write(tmp_path / "a.wav", audio.T.numpy(), HZ, subtype="PCM_16")
    librosa = temporal_av_align.load_librosa()
    waveform, rate = librosa.load(tmp_path / "a.wav")
    times = librosa.onset.onset_detect(y=waveform, sr=rate, units="time").tolist()
    assert len(peaks) > 1 < len(times)
    sizes = clip_sizes(f"{4 * fps},3,8,8", "2,32000", fps, 8000)
    clip = ClipFolder(str(tmp_path / "a"), sizes, "samples_path").clip(0)
    found = {k: int(v) for k, v in temporal_av_align.compute_published(clip).items()}
    pairs = temporal_av_align.count_onsets(peaks, times, 1 / 4)
    assert found == {"peaks": len(peaks), "onsets": len(times), "pairs": pairs}


@pytest.mark.slow
def test_the_published_count_of_eight_toy_clips_is_the_published_figure(tmp_path):
    """0.601, which the published code gives for these files."""
    toy.write_toy_dataset(tmp_path, 8, toy.ToyConfig())
    found = values(report_on({"samples_path": str(tmp_path / "video_dev")}, ClipReadingConfig()))
    assert found["Temporal AV-Align, published count"] == pytest.approx(0.601, abs=5e-4)
    assert found["Temporal AV-Align"] < 0.1


def test_overlap_is_intersection_over_union_of_the_clips_that_have_anything():
    peaks, onsets, pairs = th.tensor([[4.0, 0, 3, 0], [4, 0, 0, 2], [2, 0, 0, 0]])
    overlap = temporal_av_align.overlap(peaks, onsets, pairs)
    assert overlap.tolist() == pytest.approx([2 / 6, math.nan, 0, 0], nan_ok=True)


# ---------------------------------------------------------------- stereo


@pytest.mark.parametrize("delay", [0, 3, -7, 12])
@pytest.mark.parametrize("gain_db", [0.0, 6.0, -9.0])
def test_level_and_time_differences_are_those_that_were_made(delay, gain_db):
    """Positive for the right: louder there, and later on the left."""
    source = 0.1 * noise(HZ // 2)
    audio = th.stack([source.roll(delay), 10 ** (gain_db / 20) * source])
    pieces = stereo.segments(audio, HZ)
    assert stereo.level_difference_db(pieces).tolist() == pytest.approx([gain_db] * 5, abs=0.5)
    assert stereo.time_difference(pieces, HZ).tolist() == pytest.approx(
        [delay / HZ] * 5, abs=0.2 / HZ
    )
    assert stereo.time_difference(pieces.flip(1), HZ).tolist() == pytest.approx(
        [-delay / HZ] * 5, abs=0.2 / HZ
    )


def test_correlation_of_channels_is_the_cosine_of_their_angle():
    left, other = noise(2, 4000)
    other = (
        other
        - other.mean()
        - left * ((other - other.mean()) @ (left - left.mean())) / (left - left.mean()).norm() ** 2
    )
    other = other * left.std() / other.std()
    assert stereo.correlation(
        th.stack([left, math.cos(1) * left + math.sin(1) * other])
    ) == pytest.approx(math.cos(1), abs=1e-3)
    for constant in (0.0, 0.1, 0.3, -0.9):
        assert math.isnan(stereo.correlation(th.full((2, 80000), constant)))


def panned(gain_db=0.0, delay=0, seed=0):
    """[2, L]: noise louder on the right by so much, and later on the left by so many samples."""
    source = 0.1 * noise(HZ // 2, seed=seed)
    return th.stack([source.roll(delay), 10 ** (gain_db / 20) * source]).float()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_channel_has_an_ild_but_no_itd(silent):
    """Once it was one of -1 ms."""
    audio = panned()
    audio[silent] = 0
    found = stereo.compute(audio, HZ)
    assert found["audible"] == 5 == found["ild"][-1 if silent == 0 else 0]
    assert not found["itd"].any()
    audio[silent, HZ // 10 : HZ // 5] = audio[1 - silent, HZ // 10 : HZ // 5]
    assert stereo.compute(audio, HZ)["itd"].sum() == stereo.compute(audio, HZ)["itd"][20] == 1


def computed_of(videos, audios, fps=4):
    """What the measures without weights compute of clips [N, F, 3, H, W] and [N, 2, L]."""
    pairs = list(zip(videos, audios, strict=True))
    rows = [temporal_av_align.compute(in_memory(*pair, fps)) for pair in pairs]
    return {"temporal": stacked(rows), **computed_without_onsets(videos, audios)}


def computed_without_onsets(videos, audios):
    return {
        "stereo": stacked([stereo.compute(audio, HZ) for audio in audios]),
        "thumbnail": stacked([{"pixels": features.thumbnail(video)} for video in videos]),
    }


def stacked(rows):
    return {row: th.stack([clip[row] for clip in rows]) for row in rows[0]}


def scores_of(audios, reference_audios):
    """Scores by name of audio clips, each with frames that do not move."""
    generated, reference = (
        computed_of(th.zeros(len(x), 3, 3, 16, 16), x) for x in (audios, reference_audios)
    )
    return {score.name: score for score in scores.compute_scores(generated, reference)[0]}


def test_ild_is_in_decibels_and_itd_in_milliseconds():
    ours, true = panned(6, 8), panned(-3, -4)
    found = scores_of([ours], [true])
    assert found["ILD, mean |R - L| (dB)"].value == pytest.approx(6, abs=0.5)
    assert found["ILD, mean |R - L| (dB)"].reference == pytest.approx(3, abs=0.5)
    assert found["ITD, mean |L - R| (ms)"].value == pytest.approx(0.5, abs=0.025)
    assert found["ITD, mean |L - R| (ms)"].reference == pytest.approx(0.25, abs=0.025)
    assert found["ILD distance (dB)"].value == pytest.approx(9, abs=1)
    assert found["ITD distance (ms)"].value == pytest.approx(0.75, abs=0.05)


def tones(low_gain, high_gain):
    """[2, L]: 500 Hz and 3 kHz, whose right channels are louder by so many dB."""
    low, high = tone(500, HZ), tone(3000, HZ)
    right = 10 ** (low_gain / 20) * low + 10 ** (high_gain / 20) * high
    return 0.1 * th.stack([low + high, right])


def test_ild_w_is_of_the_band_of_directions_and_clipped():
    """Levels below it do not count; shifting all differences by d costs d."""
    for low_gain in (-9, 0, 12):
        found = scores_of([tones(low_gain, 7)], [tones(0, 2)])
        assert found["ILD-W (dB)"].value == pytest.approx(5, abs=0.13)
    assert scores_of([tones(0, 50)], [tones(0, 0)])["ILD-W (dB)"].value == pytest.approx(
        24, abs=0.2
    )
    mirrored = [tones(0, 7), tones(0, 7).flip(0)]
    assert scores_of(mirrored, [x.flip(0) for x in mirrored])["ILD-W (dB)"].value == 0
    low_only = 0.1 * tone(500, HZ).expand(2, -1)
    assert stereo.compute(low_only, HZ)["ild_band"].sum() == 0


def test_smr_is_the_energy_of_the_difference_over_that_of_the_sum():
    left, right = 0.1 * noise(2, 4000)
    mid, side = (left + right).square().sum(), (left - right).square().sum()
    expected = 10 * math.log10(side / mid)
    assert stereo.side_to_mid_db(th.stack([left, right])) == pytest.approx(expected, rel=1e-6)
    assert stereo.side_to_mid_db(th.stack([left, 2 * left])) == pytest.approx(
        20 * math.log10(1 / 3)
    )
    assert stereo.side_to_mid_db(th.stack([left, left])) == -60
    assert math.isnan(stereo.side_to_mid_db(th.zeros(2, 100)))
    clips_of = [th.stack([left, gain * left]).float() for gain in (2, 3)]
    found = scores_of(clips_of[:1] * 2, clips_of)
    three, two = 20 * math.log10(1 / 3), 20 * math.log10(2 / 4)
    assert found["SMR-Err (dB)"].value == pytest.approx(abs(three - two) / 2, rel=1e-4)


def test_histograms_have_their_bins_where_the_differences_are():
    generated, silent = (
        computed_of(th.zeros(1, 3, 3, 16, 16), [audio]) for audio in (panned(6, 8), th.zeros(2, HZ))
    )
    for name, place in {"ILD, R - L (dB)": 6, "ITD, L - R (ms)": 0.5}.items():
        held = scores.histograms(generated, silent)[name]
        edges, shares = held["edges"], held["samples"]
        bins = zip(itertools.pairwise(edges), shares, strict=True)
        assert sum(share for (low, high), share in bins if low <= place <= high) == 1
        assert edges == pytest.approx([-edge for edge in reversed(edges)])
        assert held["reference"] is None is scores.histograms(generated, {})[name]["reference"]


def test_a_dash_has_a_note_that_says_why():
    one_sided = panned() * th.tensor([[0.0], [1]])
    found = scores_of([one_sided], [th.zeros(2, HZ)])
    for name in ("ITD, mean |L - R| (ms)", "left-right correlation"):
        assert found[name].note == "one channel is always silent; reference: all clips are silent"
    assert found["ILD, mean |R - L| (dB)"].note == "reference: all clips are silent"
    assert (
        found["ITD distance (ms)"].note
        == "samples: one channel is always silent; reference: all clips are silent"
    )
    assert found["ILD distance (dB)"].note == "reference: all clips are silent"
    without = "1 clips without onsets or peaks of motion left out"
    assert (
        scores_of([clicks(0.5)], [th.zeros(2, HZ)])["Temporal AV-Align"].note
        == f"reference: {without}"
    )
    aims = {name: score for name, score in found.items() if "distance" not in name}
    assert all(score.note for score in aims.values() if None in (score.value, score.reference))


# ---------------------------------------------------------------- memorisation


def lit(places):
    """[N] in 0..1 -> clips [N, 2, 3, 8, 8] with a spot at this place of their width."""
    x = (th.arange(8) + 0.5) / 8
    row = (-((x - places[:, None]) ** 2) / 0.05).exp()
    return row[:, None, None, None].expand(-1, 2, 3, 8, -1).float().clone()


def memorisation(videos, reference_videos):
    quiet = [th.zeros(2, HZ // 10)]
    generated, reference = (
        computed_of(clips, quiet * len(clips)) for clips in (videos, reference_videos)
    )
    neighbours = find_neighbours(generated, reference)
    found, _ = scores.compute_scores(generated, reference, neighbours=neighbours)
    by_name = {score.name: score for score in found}
    return by_name, neighbours.notes("sample {}".format, "true {}".format)


def test_of_two_sets_of_one_distribution_neither_is_nearer_to_the_other_than_to_itself():
    """Mirrored neighbours count for both sides, or twice as many samples would be nearer."""
    draw = th.rand(2, 200, generator=th.Generator().manual_seed(0))
    score = memorisation(lit(draw[0]), lit(draw[1]))[0][scores.NEAREST]
    assert score.value / score.reference == pytest.approx(1, abs=0.25)


def test_windows_of_a_file_that_are_alike_do_not_hide_what_is_memorised():
    """Of still scenes, in four windows each, samples are half copies and half other scenes."""
    scenes, others = 2 * th.rand(2, 30, 1, 1, 8, 8, generator=th.Generator().manual_seed(0)) - 1
    windows = scenes.repeat_interleave(4, dim=0).expand(-1, 2, 3, -1, -1)
    copies, others = (x.expand(-1, 2, 3, -1, -1) for x in (scenes, others))
    reference = {"thumbnail": {"pixels": windows + 0.01 * noise(*windows.shape)}}
    samples = th.cat([copies + 0.05 * noise(*copies.shape, seed=1), others])
    found = find_neighbours(
        {"thumbnail": {"pixels": samples}}, reference, th.arange(30).repeat_interleave(4)
    )
    is_memorised = found.distance <= found.threshold
    assert is_memorised.tolist() == [True] * 30 + [False] * 30
    assert found.distance[30:].median() == pytest.approx(found.own.median().item(), rel=0.1)
    assert find_neighbours(reference, reference, th.zeros(120)).own is None


def test_a_copy_of_a_reference_clip_is_found_also_flipped():
    true = lit(th.tensor([0.1, 0.25, 0.4]))
    found, notes = memorisation(
        th.stack([true[1].flip(-1), true[2], lit(th.tensor([0.7]))[0]]), true
    )
    score = found[scores.NEAREST]
    assert score.value == pytest.approx(0, abs=1e-7)
    assert score.reference > 0.01
    assert any("distance 0.000: sample 0 and true 1 (flipped)" in note for note in notes)
    assert any(note.endswith("distance 0.000: sample 1 and true 2") for note in notes)


# ---------------------------------------------------------------- features


def tone(hz, rate, seconds=1.0):
    return 0.5 * (2 * math.pi * hz * th.arange(int(seconds * rate)) / rate).sin()


class TakesWaveform(th.nn.Module):
    """The features are the waveform."""

    def forward(self, x: th.Tensor):
        return x


class TakesFrames(th.nn.Module):
    """Depends on every pixel by its place, and on whether it is bright or dark."""

    def forward(self, x: th.Tensor):
        place = th.arange(x.size(4)) * 0.01 + th.arange(x.size(3))[:, None] * 0.02
        return ((x + x * x) * (5 * place).cos()).mean(dim=4).flatten(1)


def saved_script(folder, module):
    th.jit.script(module).save(str(folder / "network.pt"))
    return str(folder / "network.pt")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_the_audio_embedding_gets_each_view_at_16_khz(tmp_path, rate):
    embed = features.load_audio_embedding(
        saved_script(tmp_path, TakesWaveform()), "waveform", SINGLE_PROCESS.device
    )
    found = embed(th.stack([tone(300, rate), tone(700, rate)]), rate)
    left, right = tone(300, HZ), tone(700, HZ)
    inner = slice(1000, 15000)
    for view, expected in {
        "left": left,
        "right": right,
        "mid": (left + right) / 2,
        "side": (left - right) / 2,
    }.items():
        assert found[view].shape == (1, HZ)
        th.testing.assert_close(found[view][0, inner], expected[inner], rtol=0, atol=5e-3)


@pytest.mark.parametrize("turned", [False, True])
def test_i3d_gets_the_frames_in_their_range_interpolated_between_pixels_and_cropped(
    tmp_path, turned
):
    """20 x 30 pixels become 224 x 336, of which the middle 224 x 224."""
    frames = noise(4, 3, 20, 30).float().clamp(-1, 1)
    rows, columns = (
        (((th.arange(224) + first + 0.5) * 20 / 224 - 0.5).clamp(0, size - 1)).double()
        for first, size in ((0, 20), (56, 30))
    )
    if turned:
        frames, rows, columns = frames.transpose(-1, -2), columns, rows

    def between(x, at):
        """The last axis at fractional places."""
        low = at.floor().long()
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        return x[..., low] * (1 - at + low) + x[..., high] * (at - low)

    large = between(between(frames.double(), columns).transpose(-1, -2), rows).transpose(-1, -2)
    expected = TakesFrames()(large.transpose(0, 1)[None].float())[0]
    found = features.load_i3d(saved_script(tmp_path, TakesFrames()), SINGLE_PROCESS.device)(frames)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_log_mel_front_end_is_torchaudios_in_patches():
    audio = noise(2, 2 * HZ).float()
    mel = torchaudio.transforms.MelSpectrogram(
        HZ,
        512,
        400,
        160,
        125.0,
        7500.0,
        n_mels=64,
        power=1.0,
        center=False,
        wkwargs={"periodic": True},
    )
    patches = features.log_mel_patches(audio)
    assert patches.shape == (2, 2, 96, 64)
    padded = th.nn.functional.pad(
        audio, (56, 56)
    )  # torchaudio centres the window in its 512 samples
    expected = (mel(padded) + 0.01).log().transpose(1, 2)[:, :192]
    th.testing.assert_close(patches.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_short_audio_is_one_patch():
    assert features.log_mel_patches(th.zeros(4, 100)).shape == (4, 1, 96, 64)
    assert features.log_mel_patches(th.zeros(4, 100)).unique().tolist() == pytest.approx(
        [math.log(0.01)]
    )


def test_mid_and_side_of_equal_channels_are_the_channel_and_silence():
    left, right, mid, side = features.views(noise(1, 50).expand(2, -1))
    assert left.equal(right)
    assert mid.equal(left)
    assert not side.any()


# ---------------------------------------------------------------- spatial AV-Align


def true_boxes(config, index):
    """Where the objects of a toy clip are, in every video frame, by the formulas that drew them."""
    things = toy.sample_sources(config, np.random.default_rng([config.seed, index]))
    boxes = []
    for frame in range(config.num_frames):
        for thing in things:
            x, y = toy.centre_pixels(thing, np.array((frame + 0.5) / config.fps), config)
            side = 256 / np.array([config.width, config.height])
            x, y, r = x * side[0], y * side[1], thing.radius * 256
            boxes.append(Box(frame, thing.category, x - r, y - r, x + r, y + r))
    return boxes


def test_positions_are_in_the_units_of_the_toy_metadata():
    assert spatial_av_align.PIXELS == toy.METADATA_PIXELS
    assert spatial_av_align.EVENT_HZ == toy.METADATA_HZ
    assert spatial_av_align.MAX_ITD_SECONDS == toy.MAX_EAR_DELAY_SECONDS


def toy_events(index):
    return [Event(*map(int, row.split(",")[:3])) for row in toy.make_clip(TOY, index)[2]]


def hits(events, boxes, fps, match_categories=False, num_frames=100):
    return count_hits(Events(events), Boxes(boxes, fps, num_frames), match_categories)


def test_where_the_metadata_is_true_every_event_is_a_hit():
    for index in range(4):
        events = toy_events(index)
        assert hits(events, true_boxes(TOY, index), TOY.fps) == (20, 0)
        assert hits(events, true_boxes(TOY, index), TOY.fps, match_categories=True) == (20, 0)
        assert hits(events, [], TOY.fps) == (0, 20)
        wrong = [
            Box(b.frame, 1 - b.category, b.x0, b.y0, b.x1, b.y1) for b in true_boxes(TOY, index)
        ]
        assert hits(events, wrong, TOY.fps, match_categories=True) == (0, 20)


def test_for_boxes_that_are_shifted_the_score_is_that_of_interval_arithmetic():
    """|x - centre| <= radius + 40 in one of the three frames around round(0.4 e), at most 7."""
    found = set()
    for index, shift in itertools.product(range(3), [-150, -90, 85, 100]):
        boxes = [
            Box(b.frame, b.category, b.x0 + shift, b.y0, b.x1 + shift, b.y1)
            for b in true_boxes(TOY, index)
        ]
        x = np.array([event.x for event in toy_events(index)])
        centre = np.array([(b.x0 + b.x1) / 2 for b in boxes])
        gap = np.abs(x[:, None] - centre) - (boxes[0].x1 - boxes[0].x0) / 2
        frame = np.round(0.4 * np.arange(20)).clip(max=7)
        near = np.abs(np.arange(8) - frame[:, None]) <= 1
        expected = int(((gap <= 40) & near).any(axis=1).sum())
        assert hits(toy_events(index), boxes, TOY.fps, num_frames=8) == (expected, 20 - expected)
        found.add(expected)
    assert len(found - {0, 20}) > 2


@pytest.mark.parametrize(
    ("event", "box", "hit"),
    [
        (Event(0, 0, 100), Box(0, 0, 140, 0, 150, 9), True),
        (Event(0, 0, 100), Box(0, 0, 140.5, 0, 150, 9), False),
        (Event(0, 0, 100), Box(0, 0, 20, 0, 60, 9), True),
        (Event(0, 0, 100), Box(0, 0, 20, 0, 59, 9), False),
        (Event(5, 0, 100), Box(3, 0, 90, 0, 110, 9), True),
        (Event(5, 0, 100), Box(1, 0, 90, 0, 110, 9), True),
        (Event(5, 0, 100), Box(4, 0, 90, 0, 110, 9), False),
        (Event(5, 0, 100), Box(0, 0, 90, 0, 110, 9), False),
        # 0.4 * 7 = 2.8: the nearest frame is 3, the one on screen is 2.
        (Event(7, 0, 100), Box(4, 0, 90, 0, 110, 9), True),
        (Event(7, 0, 100), Box(1, 0, 90, 0, 110, 9), False),
    ],
)
def test_a_hit_is_within_40_pixels_and_one_frame(event, box, hit):
    assert hits([event], [box], fps=4) == (int(hit), int(not hit))


def test_an_event_nearest_to_a_frame_behind_the_last_one_belongs_to_the_last():
    """0.4 * 49 = 19.6 of 20 frames, as in all clips of 5 s."""
    for frame, hit in {17: 0, 18: 1, 19: 1}.items():
        box = Box(frame, 0, 90, 0, 110, 9)
        assert hits([Event(49, 0, 100)], [box], fps=4, num_frames=20) == (hit, 1 - hit)


@pytest.mark.parametrize(("boxes_start", "shown"), [(0, 5), (1.25, 0)])
def test_times_are_compared_in_the_seconds_of_the_file(boxes_start, shown):
    """An event in the window from 1.25 s on, at 4 fps."""
    events = Events([Event(0, 0, 100)], Fraction(5, 4))
    rows = [[Box(shown + k, 0, 90, 0, 110, 9)] for k in range(-2, 3)]
    near = [count_hits(events, Boxes(boxes, 4, 20, Fraction(boxes_start)))[0] for boxes in rows]
    assert near == [0, 1, 1, 1, 0]


def test_the_localiser_finds_a_toy_object_where_it_is():
    found, true = [], []
    for index in range(6):
        _, audio, rows = toy.make_clip(toy.ToyConfig(height=8, width=8), index)
        place = {int(row.split(",")[0]): float(row.split(",")[2]) for row in rows}
        for event in spatial_av_align.localise(audio, HZ):
            found.append(event.x)
            true.append(place[event.frame])
    assert len(found) == 300
    assert np.corrcoef(found, true)[0, 1] > 0.98


def test_a_source_that_is_only_later_on_one_side_is_localised_by_its_itd():
    source = 0.1 * noise(HZ // 2)
    (right,) = {
        round(e.x) for e in spatial_av_align.localise(th.stack([source.roll(5), source]), HZ)
    }
    assert right == pytest.approx(128 + 256 * 5 / HZ / 1.2e-3, abs=3)
    assert spatial_av_align.localise(th.zeros(2, HZ), HZ) == []


def test_a_detector_that_is_sure_of_persons_gives_boxes_in_256_pixels():
    detection = {
        "labels": th.tensor([1, 1, 3]),
        "scores": th.tensor([0.9, 0.2, 0.9]),
        "boxes": th.tensor([[8.0, 4, 16, 8]] * 3),
    }
    assert spatial_av_align.person_boxes(2, detection, th.Size([5, 3, 16, 32])) == [
        Box(2, 1, 64, 64, 128, 128)
    ]


def test_a_detector_of_torchvision_loads_its_weights_and_takes_every_frame(tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    th.save(
        torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict(),
        tmp_path / "w.pth",
    )
    detect = spatial_av_align.load_detector(name, str(tmp_path / "w.pth"), th.device("cpu"))
    assert detect(th.zeros(1, 3, 32, 32)) == []
    th.save({"a": th.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"--detector_path .*other\.pth: does not hold the weights of fasterrcnn"
    ):
        spatial_av_align.load_detector(name, str(tmp_path / "other.pth"), th.device("cpu"))
    with pytest.raises(
        ValueError, match=r"missing\.pth: no such file; weights of .* are at https://.*\.pth"
    ):
        spatial_av_align.load_detector(name, str(tmp_path / "missing.pth"), th.device("cpu"))
    with pytest.raises(ValueError, match="choose from fasterrcnn"):
        spatial_av_align.load_detector("yolo", "", th.device("cpu"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,1\n", "row 1.*does not begin with 3 numbers"),
        ("frame,category,x\n0,1,2\n1,1,here\n", "row 3.*does not begin with 3 numbers"),
        ("0,1,nan\n", "row 1.*does not begin with 3 numbers"),
        ("0.5,1,3\n", "frame 0.5 .*integers"),
        ("0,1,3\n90,1,3\n", "row 2 .*frame 90 at 10 Hz is outside the clip of 2.00 s"),
        ("-1,1,3\n", "frame -1"),
        ("19,1,3\n20,1,3\n", "row 2 .*frame 20 at 10 Hz is outside the clip of 2.00 s"),
        ("0,1,300\n", "x 300 is outside 0..256"),
    ],
)
def test_rows_out_of_range_are_refused_with_file_and_row(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"a.csv.*{words}"):
        spatial_av_align.read_events(tmp_path / "a.csv", 2.0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0,1,9,9,5,20", "is not a box"),
        ("0,1,300,0,310,9", "is not a box"),
        ("0,1,-9,0,-1,9", "is not a box"),
        ("0,1,0,257,9,260", "is not a box"),
        ("0,1,0,-9,9,-1", "is not a box"),
        ("8,1,0,0,1,1", "4 Hz"),
    ],
)
def test_empty_boxes_and_boxes_outside_the_image_are_refused(tmp_path, row, words):
    (tmp_path / "a.csv").write_text(row)
    with pytest.raises(ValueError, match=f"a.csv.*{words}"):
        spatial_av_align.read_boxes(tmp_path / "a.csv", 4, 2.0)
    (tmp_path / "a.csv").write_text("")
    assert spatial_av_align.read_boxes(tmp_path / "a.csv", 4, 2.0) == []
    (tmp_path / "a.csv").write_text("7,1,-5,250,9,300")
    assert spatial_av_align.read_boxes(tmp_path / "a.csv", 4, 2.0) == [Box(7, 1, 0, 250, 9, 256)]


def test_the_last_event_of_a_clip_whose_length_is_rounded_is_in_it(tmp_path):
    (tmp_path / "a.csv").write_text("49,1,3")
    for seconds in (4.96, 5.0, 5.004):
        assert spatial_av_align.read_events(tmp_path / "a.csv", seconds) == [Event(49, 1, 3)]
    (tmp_path / "a.csv").write_text("50,1,3")
    with pytest.raises(ValueError, match="frame 50 at 10 Hz"):
        spatial_av_align.read_events(tmp_path / "a.csv", 5.004)


# ---------------------------------------------------------------- folders of clips


class TinyI3D(th.nn.Module):
    """Colour by thirds of the time; insists on being called as the usual file is."""

    def forward(
        self, x: th.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ):
        assert x.size(3) == 224
        assert return_features and not rescale and not resize  # noqa: PT018 (TorchScript)
        return x.mean(dim=[3, 4]).flatten(1)[:, ::4]


class TinyEmbedding(th.nn.Module):
    """Four bands of a log-mel patch."""

    def forward(self, x: th.Tensor):
        return x.mean(dim=2).view(-1, 4, 16).mean(dim=2)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    th.jit.script(TinyI3D()).save(str(folder / "i3d.pt"))
    th.jit.script(TinyEmbedding()).save(str(folder / "embedding.pt"))
    return {
        "i3d_path": str(folder / "i3d.pt"),
        "audio_embedding_path": str(folder / "embedding.pt"),
    }


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Toy clips, others as samples of them, and true boxes of those."""
    root = tmp_path_factory.mktemp("clips")
    toy.write_toy_dataset(root / "true", 5, TOY)
    other = toy.ToyConfig(**{**vars(TOY), "seed": 1})
    toy.write_toy_dataset(root / "generated", 3, other)
    (root / "boxes").mkdir()
    for index in range(3):
        rows = [
            f"{b.frame},{b.category},{b.x0},{b.y0},{b.x1},{b.y1}" for b in true_boxes(other, index)
        ]
        (root / f"boxes/toy_{index:05d}.csv").write_text("\n".join(rows))
    return root


def flags_of(clips, **more):
    return {
        "samples_path": str(clips / "generated/video_dev"),
        "ref_path": str(clips / "true/video_dev"),
        "boxes_dir": str(clips / "boxes"),
        "events_dir": str(clips / "generated/metadata_dev"),
        "bootstrap_draws": 20,
        **more,
    }


def report_on(flags, sizes=SIZES):
    config = EvalConfig(**flags)
    return evaluate.evaluate(
        config.samples_path,
        config,
        sizes,
        measures.make_measures(config, SINGLE_PROCESS.device),
        SINGLE_PROCESS,
    )


def values(report):
    return {score.name: score.value for score in report.scores}


def test_clips_compared_with_themselves_are_no_distance_apart(clips, networks):
    flags = flags_of(
        clips, **networks, boxes_dir="", events_dir="", samples_path=str(clips / "true/video_dev")
    )
    report = report_on(flags)
    zero = {f"FAD {view}" for view in features.VIEWS} | {"FVD", "ILD-W (dB)", "SMR-Err (dB)"}
    zero |= {"ILD distance (dB)", "ITD distance (ms)"}
    unbiased = {f"KAD {view}" for view in features.VIEWS} | {"KVD", "I3D MMD (Gaussian)"}
    for score in report.scores:
        if score.name in zero:
            assert score.value == pytest.approx(0, abs=1e-4), score
        elif score.name in unbiased:  # over pairs of different clips only
            assert score.value < 0
        elif score.name == scores.MEMORISED:
            assert score.value == 1 > score.reference
        elif score.name.startswith("nearest"):
            assert score.value == 0 < score.reference
        else:
            assert score.value == score.reference
    assert zero | unbiased < {score.name for score in report.scores}


def test_scores_are_those_of_the_features_by_hand(clips, networks):
    found = values(report_on(flags_of(clips, **networks)))

    def points(folder, count):
        windows = [
            decode.read_window(
                clips / folder / f"video_dev/toy_{k:05d}.mp4", 0, 8, 4, 32, 32, 4000, 8000
            )
            for k in range(count)
        ]
        video = th.stack([images.to_float(frames.permute(0, 3, 1, 2)) for frames, _ in windows])
        return video.mean(dim=(3, 4)).transpose(1, 2).flatten(1)[:, ::4]

    x, y = points("generated", 3), points("true", 5)
    assert found["FVD"] == pytest.approx(frechet_distance(x, y), rel=1e-2)
    assert found["KVD"] == pytest.approx(kernel_distance(x, y), rel=1e-2)
    assert found["Spatial AV-Align"] == 1
    assert found["FAD side"] > 0


def test_the_localiser_in_place_of_the_metadata_finds_the_boxes_as_well(clips):
    report = report_on(flags_of(clips, events_dir=""))
    (score,) = [score for score in report.scores if score.name == "Spatial AV-Align"]
    assert score.value > 0.9
    assert score.count == 60


@pytest.fixture
def detector(monkeypatch):
    """In place of a network: takes the brightest spot of a frame for the object."""

    def detect(video):
        x = 256 * horizontal_position(video[None])[0][0]
        return [
            Box(frame, 1, place - 40, 0, place + 40, 256) for frame, place in enumerate(x.tolist())
        ]

    monkeypatch.setattr(spatial_av_align, "load_detector", lambda name, path, device: detect)


@pytest.mark.usefixtures("detector")
def test_with_a_detector_and_the_localiser_the_reference_gets_a_score_too(clips):
    report = report_on(flags_of(clips, boxes_dir="", events_dir="", detector_path=__file__))
    (score,) = [score for score in report.scores if score.name == "Spatial AV-Align"]
    assert score.value > 0.9 < score.reference
    assert (score.count, score.reference_count) == (60, 100)


def test_measurements_of_the_reference_are_cached_by_content(
    clips, networks, cache, tmp_path, monkeypatch
):
    first = report_on(flags_of(clips, **networks))
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in (clips / "true/video_dev").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    computed = []
    compute_all = compute.compute_all

    def record(folder, missing, world):
        computed.append(sorted(missing))
        return compute_all(folder, missing, world)

    monkeypatch.setattr(compute, "compute_all", record)
    again = report_on(flags_of(clips, **networks, ref_path=str(copy)))
    assert values(again) == values(first)
    assert computed[-1] == []
    with monkeypatch.context() as patched:
        patched.setattr(compute, "FORMAT", compute.FORMAT + 1)
        report_on(flags_of(clips, **networks))
    measured = ["embedding", "i3d", "stereo", "temporal", "temporal_published", "thumbnail"]
    assert computed[-1] == measured
    (copy / "toy_00004.mp4").write_bytes((copy / "toy_00003.mp4").read_bytes())
    assert values(report_on(flags_of(clips, **networks, ref_path=str(copy)))) != values(first)
    for path in cache.glob("metrics_*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert values(report_on(flags_of(clips, **networks))) == values(first)


def test_other_weights_and_inputs_of_a_network_are_another_measure(tmp_path):
    def key(name, **flags):
        config = EvalConfig(**{f: str(path) for f, path in flags.items()})
        return measures.make_measures(config, SINGLE_PROCESS.device)[name].key

    for number in (1, 2):
        th.jit.script(th.nn.Linear(number, 1)).save(str(tmp_path / f"{number}.pt"))
    (tmp_path / "copy.pt").write_bytes((tmp_path / "1.pt").read_bytes())
    for name, flag in {"i3d": "i3d_path", "embedding": "audio_embedding_path"}.items():
        first, other, copy = (
            key(name, **{flag: tmp_path / f"{file}.pt"}) for file in ("1", "2", "copy")
        )
        assert first == copy != other
    wave = key(
        "embedding", audio_embedding_path=tmp_path / "1.pt", audio_embedding_input="waveform"
    )
    assert wave != key("embedding", audio_embedding_path=tmp_path / "1.pt")


def test_content_is_that_of_the_files_as_they_are_read(clips, tmp_path):
    def content(sizes=SIZES, folder=clips / "generated/video_dev"):
        return ClipFolder(str(folder), sizes, "ref_path").content()

    changes = {"video_size": "8,3,16,32", "audio_size": "2,7999", "video_fps": 8, "audio_fps": 8000}
    changes["antialias"] = True
    known = {
        content(),
        *(content(dataclasses.replace(SIZES, **{name: value})) for name, value in changes.items()),
    }
    assert len(known) == 1 + len(changes)
    assert content(dataclasses.replace(SIZES, num_workers=1)) == content()
    shutil.copytree(clips / "generated/video_dev", tmp_path / "copy")
    assert content(folder=tmp_path / "copy") == content()


def test_content_tells_files_apart_that_differ_in_their_length_only(tmp_path):
    """Of a long file only the ends are read."""
    folders = []
    for between in (0, 9):
        (tmp_path / "long.bin").write_bytes(b"a" * 2**20 + b"a" * between + b"z" * 2**20)
        index = types.SimpleNamespace(paths=lambda: [str(tmp_path / "long.bin")])
        dataset = types.SimpleNamespace(index=index)
        folder = types.SimpleNamespace(dataset=dataset, config=SIZES, most=0)
        folders.append(ClipFolder.content(folder))
    assert folders[0] != folders[1]


def test_a_report_is_never_overwritten_by_another(clips, tmp_path):
    report = report_on(flags_of(clips, ref_path=""))
    other = Report(report.scores, ["another"], [], {})
    paths = [report.save(str(tmp_path)), other.save(str(tmp_path)), report.save(str(tmp_path))]
    assert [os.path.basename(path) for path in paths] == [
        "metrics.json",
        "metrics_2.json",
        "metrics.json",
    ]
    assert json.loads(Path(paths[1]).read_text())["notes"] == ["another"]


def test_metrics_without_weights_are_left_out_with_the_flag_that_adds_them(clips):
    report = report_on({"samples_path": str(clips / "generated/video_dev")})
    text = report.text()
    for what, flag in {
        "FVD, KVD": "i3d_path",
        "FAD, KAD": "audio_embedding_path",
        "Spatial": "detector_path",
    }.items():
        assert f"left out: {what}" in text
        assert f"--{flag} adds them" in text
    assert "--ref_path adds them" in text
    assert {score.name for score in report.scores}.isdisjoint(
        {"FVD", "FAD left", "Spatial AV-Align"}
    )
    assert "left out: Spatial" not in report_on(flags_of(clips)).text()


def test_without_librosa_one_line_says_how_to_get_it(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    report = report_on(flags_of(clips))
    (line,) = [line for line in report.text().splitlines() if "librosa" in line]
    assert "published count" not in report.text()
    assert line.startswith("left out: Temporal AV-Align; pip install librosa==0.11.0 (or pip")
    assert {"Temporal AV-Align", "Spatial AV-Align"} & set(values(report)) == {"Spatial AV-Align"}


def written(folder, name, video, audio, fps=4, rate=4000):
    folder.mkdir(exist_ok=True)
    encode.write_clip(folder / f"{name}.mp4", video, fps, audio, rate)
    return str(folder)


def test_silent_black_short_and_single_clips_give_notes_instead_of_nan(tmp_path, clips, networks):
    folder = written(tmp_path / "odd", "black", -th.ones(5, 3, 32, 32), th.zeros(2, 5000))
    report = report_on(
        {"samples_path": folder, "ref_path": str(clips / "true/video_dev"), **networks}
    )
    text = report.text()
    for words in (
        "1 of 1 clips silent",
        "1 of 1 clips black",
        "1 files are shorter than 2 s",
        "1 clips only",
    ):
        assert words in text
    assert "nan" not in text
    for score in report.scores:
        assert score.value is not None or score.note, score
    missing = {score.name for score in report.scores if score.value is None}
    assert {
        "FVD",
        "KVD",
        "Temporal AV-Align",
        "left-right correlation",
        "ITD distance (ms)",
    } <= missing
    json.loads(Path(report.save(folder)).read_text(), parse_constant=pytest.fail)


def test_seconds_that_no_clip_covers_are_reported(tmp_path):
    for name, seconds in {"a": 5.5, "b": 2.5, "c": 4, "d": 1}.items():
        video, audio, _ = toy.make_clip(toy.ToyConfig(**{**vars(TOY), "seconds": seconds}), 0)
        folder = written(tmp_path / "long", name, video, audio)
    report = report_on({"samples_path": folder})
    assert report.settings["clips"]["samples"] == 6
    note = (
        "--samples_path: 2 s at the end of 2 files are left out, too short for another clip of 2 s"
    )
    assert note in report.notes
    first, *_ = ClipFolder(folder, SIZES, "samples_path", most=2).notes()
    assert first.startswith("--samples_path: 1.5 s at the end of 1 files")
    (tmp_path / "whole").mkdir()
    shutil.move(tmp_path / "long/c.mp4", tmp_path / "whole")
    assert "left out, too short" not in report_on({"samples_path": str(tmp_path / "whole")}).text()


def test_the_report_holds_the_histograms_of_both_sets(clips):
    report = json.loads(json.dumps(report_on(flags_of(clips)).as_json()))
    assert len(report["histograms"]) == 2
    for held in report["histograms"].values():
        assert len(held["edges"]) == len(held["samples"]) + 1 == len(held["reference"]) + 1
        assert sum(held["samples"]) == pytest.approx(1) == pytest.approx(sum(held["reference"]))


def test_the_dash_of_a_reference_without_boxes_is_explained(clips):
    score = spatial_score(flags_of(clips))
    assert score.reference is None
    assert score.note == "reference: the CSV files are of the samples only"


def test_equal_channels_do_not_differ_and_low_frame_rates_are_reported(tmp_path):
    audio = 0.1 * noise(1, 8000).float().expand(2, -1)
    folder = written(tmp_path / "mono", "a", noise(4, 3, 32, 32).float().clamp(-1, 1), audio, fps=2)
    report = report_on({"samples_path": folder})
    assert "1 files have a frame rate below --video_fps 4" in report.text()
    found = values(report)
    assert found["ILD, mean |R - L| (dB)"] == found["ITD, mean |L - R| (ms)"] == 0
    assert found["left-right correlation"] == pytest.approx(1)


def test_too_few_clips_for_a_covariance_are_reported(clips, networks):
    report = report_on(flags_of(clips, **networks))
    notes = {score.name: score.note for score in report.scores}
    assert notes["FVD"].startswith("too few")
    assert notes["KVD"] == ""  # which is unbiased for any number
    assert "samples: 3 clips only" in report.text()


def test_long_files_give_clips_one_after_the_other_with_their_part_of_the_rows(tmp_path):
    config = toy.ToyConfig(**{**vars(TOY), "seconds": 4})
    video, audio, rows = toy.make_clip(config, 0)
    flags = {"samples_path": written(tmp_path / "long", "a", video, audio)}
    for kind, lines in {
        "events": rows,
        "boxes": [
            f"{b.frame},{b.category},{b.x0},{b.y0},{b.x1},{b.y1}" for b in true_boxes(config, 0)
        ],
    }.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.csv").write_text("\n".join(lines))
        flags[f"{kind}_dir"] = str(tmp_path / kind)
    report = report_on(flags)
    assert report.settings["clips"] == {"samples": 2, "reference": 0}
    (score,) = [score for score in report.scores if score.name == "Spatial AV-Align"]
    assert (score.value, score.count) == (1, 40)


def csv_files(folder, name, events, boxes):
    """Flags for CSV files of a clip, below the folder."""
    rows = {
        "events": [f"{e.frame},{e.category},{e.x}" for e in events],
        "boxes": [f"{b.frame},{b.category},{b.x0},{b.y0},{b.x1},{b.y1}" for b in boxes],
    }
    for kind, lines in rows.items():
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{name}.csv").write_text("\n".join(lines))
    return {f"{kind}_dir": str(folder / kind) for kind in rows}


def spatial_score(flags, sizes=SIZES):
    (score,) = [
        score for score in report_on(flags, sizes).scores if score.name == "Spatial AV-Align"
    ]
    return score


def test_an_event_at_the_end_of_a_window_is_a_hit_of_a_box_just_behind_it(tmp_path):
    video, audio, _ = toy.make_clip(toy.ToyConfig(**{**vars(TOY), "seconds": 4}), 0)
    flags = {"samples_path": written(tmp_path / "long", "a", video, audio)}
    flags |= csv_files(tmp_path, "a", [Event(19, 0, 100)], [Box(8, 0, 90, 0, 110, 9)])
    score = spatial_score(flags)
    assert (score.value, score.count) == (1, 1)


@pytest.mark.parametrize("fps", [4, 8, 5])
@pytest.mark.parametrize(("num_frames", "until"), [(8, 4), (5, 3.75), (3, 3.75)])
def test_hits_are_those_of_the_whole_file_however_it_is_cut_and_whatever_its_rate(
    tmp_path, fps, num_frames, until
):
    """Boxes count their frames at the rate of the file, which is read at 4 fps."""
    draw = np.random.default_rng(0)
    video, audio, _ = toy.make_clip(toy.ToyConfig(**{**vars(TOY), "seconds": 4, "fps": fps}), 0)
    events = [Event(frame, 0, x) for frame, x in enumerate(draw.integers(0, 256, 40).tolist())]
    boxes = [
        Box(frame, 0, x, 0, x + 9, 9)
        for frame, x in enumerate(draw.integers(0, 240, 4 * fps).tolist())
    ]
    flags = {"samples_path": written(tmp_path / "long", "a", video, audio, fps)} | csv_files(
        tmp_path, "a", events, boxes
    )
    score = spatial_score(
        flags, clip_sizes(f"{num_frames},3,32,32", f"2,{num_frames * 1000}", 4, 4000)
    )
    whole = [event for event in events if event.frame / 10 < until]
    found, missed = hits(whole, boxes, fps, num_frames=4 * fps)
    assert score.count == len(whole)
    assert score.value == found / (found + missed)
    assert 0.1 < score.value < 0.9


def test_events_localised_in_a_later_window_are_compared_with_boxes_of_its_time(
    tmp_path,
):
    """Two loud halves, left and then right, and boxes that say so; windows of 1.25 s."""
    source = 0.3 * noise(16000, seed=3).float()
    second_half = th.arange(16000) >= 8000
    audio = th.stack([source * ~second_half, source * second_half])
    flags = {"samples_path": written(tmp_path / "long", "a", th.zeros(16, 3, 32, 32), audio)}
    boxes = [
        Box(frame, 0, *((0, 0, 30, 256) if frame < 8 else (226, 0, 256, 256)))
        for frame in range(16)
    ]
    flags |= csv_files(tmp_path, "a", [], boxes) | {"events_dir": ""}
    score = spatial_score(flags, clip_sizes("5,3,32,32", "2,5000", 4, 4000))
    assert score.count >= 37
    assert score.value > 0.95


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("located", [True, False])
def test_boxes_detected_in_a_later_window_are_compared_with_events_of_its_time(tmp_path, located):
    config = toy.ToyConfig(**{**vars(TOY), "seconds": 4})
    video, audio, rows = toy.make_clip(config, 0)
    flags = {
        "samples_path": written(tmp_path / "long", "a", video, audio),
        "detector_path": __file__,
    }
    events = [Event(*map(int, row.split(",")[:3])) for row in rows]
    flags |= {} if located else {"events_dir": csv_files(tmp_path, "a", events, [])["events_dir"]}
    score = spatial_score(flags, clip_sizes("5,3,32,32", "2,5000", 4, 4000))
    assert score.count >= 37
    assert score.value > 0.9


def test_clips_of_one_name_that_would_share_a_csv_are_refused(tmp_path):
    video, audio, _ = toy.make_clip(TOY, 0)
    folders = [written(tmp_path / name, "clip", video, audio) for name in ("a", "b")]
    flags = {"samples_path": ",".join(folders)}
    assert report_on(flags).settings["clips"]["samples"] == 2
    flags |= csv_files(tmp_path, "clip", [], true_boxes(TOY, 0))
    with pytest.raises(
        ValueError, match=r"a/clip.mp4 and .*b/clip.mp4: would share clip.csv; .*rename"
    ):
        report_on(flags)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples_path": ""}, "check --samples_path"),
        ({"samples_path": "{tmp}"}, "holds no clips .*--samples_path"),
        ({"ref_path": "{tmp}"}, "holds no clips .*--ref_path"),
        (
            {"i3d_path": "{tmp}/none.pt"},
            "--i3d_path .*none.pt: no such file; needs the published weights",
        ),
        (
            {"audio_embedding_path": "{tmp}/none.pt"},
            "--audio_embedding_path .*no such file; needs any TorchScript",
        ),
        ({"i3d_path": __file__}, "--i3d_path .*: holds no weights .*needs the published weights"),
        ({"audio_embedding_path": __file__}, "--audio_embedding_path .*: not a TorchScript file"),
        ({"audio_embedding_path": "x", "audio_embedding_fps": 44100}, "logmel takes 16000 Hz"),
        ({"boxes_dir": "{tmp}/none"}, "--boxes_dir .*no such folder"),
        ({"boxes_dir": "{tmp}"}, "toy_0000..csv: missing"),
        ({"boxes_dir": ""}, "--events_dir .*needs boxes"),
        ({"events_dir": "", "match_categories": True}, "--match_categories"),
        ({"detector_path": "x"}, "give one of them"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(clips, tmp_path, change, words):
    change = {
        name: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for name, value in change.items()
    }
    with pytest.raises((ValueError, DataError), match=words):
        report_on(flags_of(clips) | change)


def test_a_network_that_takes_something_else_is_named(clips, networks):
    with pytest.raises(
        ValueError,
        match=r"--i3d_path: the module does not accept \[1, 3, 8, 224, 224\]|vector for each",
    ):
        report_on(flags_of(clips, i3d_path=networks["audio_embedding_path"]))


class GivesNumber(th.nn.Module):
    """One number for each input, or for all of them."""

    def __init__(self, for_all: bool) -> None:
        super().__init__()
        self.for_all = for_all

    def forward(self, x: th.Tensor):
        return x.mean() if self.for_all else x.flatten(1).mean(dim=1)


@pytest.mark.parametrize("for_all", [False, True])
def test_a_network_without_vectors_is_named(tmp_path, for_all):
    embed = features.load_audio_embedding(
        saved_script(tmp_path, GivesNumber(for_all)), "waveform", SINGLE_PROCESS.device
    )
    with pytest.raises(
        ValueError, match="--audio_embedding_path: the module does not return a vector for each"
    ):
        embed(th.stack([tone(300, HZ)] * 2), HZ)


def test_other_containers_and_rates_are_read_as_well(tmp_path):
    (tmp_path / "any").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    write_any_clip(
        tmp_path / "any/a.mkv", frames, fps=15, audio=0.1 * noise(1, 22050 * 2).numpy(), rate=22050
    )
    found = values(report_on({"samples_path": str(tmp_path / "any")}))
    assert found["left-right correlation"] == pytest.approx(1)
    assert found["ILD, mean |R - L| (dB)"] == pytest.approx(0, abs=0.5)


@real_media
def test_real_clips_get_every_metric_that_needs_no_weights(tmp_path, monkeypatch):
    # The published count would take a minute for the frames of 1280 x 720.
    monkeypatch.setattr(temporal_av_align, "compute_published", temporal_av_align.compute)
    for name in ("nasa_13013.mp4", "big_buck_bunny_0_30.webm"):
        (tmp_path / name).symlink_to(MEDIA / name)
    sizes = clip_sizes("20,3,64,64", "2,80000", 4, 16000)
    report = report_on({"samples_path": str(tmp_path), "ref_path": str(tmp_path)}, sizes)
    assert report.settings["clips"]["samples"] == 6 + 2
    assert "--samples_path: 3 s at the end of 1 files are left out" in report.text()
    found = {score.name: score for score in report.scores}
    assert (
        found["nearest reference clip (RMS, median)"].value
        == 0
        < found["nearest reference clip (RMS, median)"].reference
    )
    for name in (
        "ILD, mean |R - L| (dB)",
        "ITD, mean |L - R| (ms)",
        "left-right correlation",
    ):
        assert found[name].value == found[name].reference > 0
    assert 0 < found["left-right correlation"].value < 1  # true stereo
    assert 0 < found["Temporal AV-Align"].value < 1


# ---------------------------------------------------------------- scripts


def script(name, monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *line])
    runpy.run_path(str(REPOSITORY / f"py_scripts/{name}.py"))["main"]()


READING = {"video_size": "8,3,32,32", "audio_size": "2,8000", "audio_fps": "4000"}  # as SIZES
AS_READ = [part for name, value in READING.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("output", ["", "~/out"])
def test_paths_from_the_home_folder_are_understood(clips, tmp_path, monkeypatch, output, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(clips / "generated", tmp_path / "generated")
    shutil.copytree(clips / "boxes", tmp_path / "boxes")
    line = ["--samples_path", "~/generated/video_dev", "--boxes_dir", "~/boxes", *AS_READ]
    script("eval", monkeypatch, *line, *(["--output_dir", output] if output else []))
    assert (tmp_path / (output[2:] or "generated/video_dev") / "metrics.json").exists()
    assert "Spatial AV-Align" in capsys.readouterr().out


def test_the_report_on_several_folders_needs_a_place_of_its_own(
    clips, tmp_path, monkeypatch, capsys
):
    several = ",".join(str(clips / kind / "video_dev") for kind in ("true", "generated"))
    for more in ([], ["--output_dir", several]):  # as the launcher has it
        with pytest.raises(
            ValueError, match=r"--samples_path .*: several folders; give --output_dir"
        ):
            script("eval", monkeypatch, "--samples_path", several, *more, *AS_READ)
    script(
        "eval",
        monkeypatch,
        "--samples_path",
        several,
        "--output_dir",
        str(tmp_path / "out"),
        *AS_READ,
    )
    assert (
        json.loads((tmp_path / "out/metrics.json").read_text())["settings"]["clips"]["samples"] == 8
    )


def test_video_and_audio_of_unequal_duration_are_refused_with_both_flags(clips, monkeypatch):
    line = [
        "--samples_path",
        str(clips / "generated/video_dev"),
        "--video_size",
        "8,3,32,32",
        "--audio_size",
        "2,80000",
    ]
    words = "--video_size 8,3,32,32 at --video_fps 4 lasts 2 s, but "
    words += "--audio_size 2,80000 at --audio_fps 16000 5 s"
    with pytest.raises(ValueError, match=words):
        script("eval", monkeypatch, *line)
    report = report_on({"samples_path": line[1]}, dataclasses.replace(SIZES, audio_size="2,1000"))
    assert report.notes[0].endswith("--audio_size 2,1000 at --audio_fps 4000 0.25 s")
    assert (
        clip_sizes("16,3,8,8", "2,8533", 30, 16000).duration_mismatch() == ""
    )  # as near as whole samples come


@pytest.mark.parametrize(
    ("video", "audio", "reason"),
    [
        (noise(8, 3, 32, 32).clamp(-1, 1), th.zeros(2, 8000), "the audio is silent"),
        (-th.ones(8, 3, 32, 32), 0.1 * noise(2, 8000), "no object stands out in the frames"),
        (
            noise(1, 3, 32, 32).clamp(-1, 1).expand(8, -1, -1, -1),
            0.1 * noise(2, 8000),
            "the object does not move",
        ),
    ],
)
def test_an_undefined_spatial_alignment_is_explained(
    tmp_path, monkeypatch, capsys, video, audio, reason
):
    folder = written(tmp_path / "odd", "a", video.float(), audio.float())
    script("spatial_alignment", monkeypatch, folder, *AS_READ)
    assert capsys.readouterr().out.split(maxsplit=4)[-1] == f"- ({reason})\n"


def test_why_clips_are_not_aligned_is_empty_for_those_that_are():
    videos, audios = (
        th.stack(x) for x in zip(*(toy.make_clip(TOY, k)[:2] for k in range(3)), strict=True)
    )
    videos = images.to_float(videos)
    assert why_unaligned(videos, audios) == ""
    assert why_unaligned(videos, audios * th.tensor([[0.0], [1]])) == "the audio does not move"
    halves = th.arange(8)[:, None, None, None] < 4
    early, late = videos.where(halves, -1), audios * (th.arange(8000) >= 4000)
    assert why_unaligned(early, late) == "no frame has both object and audio"


def evaluated(command, flags, folder):
    """eval.py as a process (or several): its screen and its report."""
    folder.mkdir()
    shutil.copy(temporal_av_align._compiled_path(), folder)
    line = [*command, str(REPOSITORY / "py_scripts/eval.py")]
    flags = flags | READING
    line += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    env = untouched() | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MM_DIFFUSION_CACHE": str(folder),
    }
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    report = os.path.join(flags["samples_path"], "metrics.json")
    with open(report) as file:
        saved_report = json.load(file)
    os.remove(report)
    return done.stdout, saved_report


def without_gpu_warning(text):
    """The lines that do not depend on the machine."""
    return [line for line in text.splitlines() if not line.startswith("warning: no GPU found")]


def test_two_ranks_report_the_same_as_one_and_once(clips, networks, tmp_path):
    flags = flags_of(clips, **networks)
    alone = evaluated([sys.executable], flags, tmp_path / "1")
    both = evaluated(LAUNCHERS["torchrun"], flags, tmp_path / "2")
    assert alone[1] == both[1]
    assert alone[0].splitlines()[:8] == without_gpu_warning(both[0])[:8]
    assert both[0].count("FVD ") == 1
    assert alone[1]["settings"]["clips"] == {"samples": 3, "reference": 5}
    assert {score["name"]: score["value"] for score in alone[1]["scores"]} == values(
        report_on(flags)
    )


def test_sampling_ends_with_metrics_of_either_folder_by_itself(
    tmp_path, monkeypatch, clips, networks, capsys
):
    base, sr = saved(tmp_path)
    out = tmp_path / "out"
    more = [
        "--ref_path",
        str(clips / "true/video_dev"),
        "--i3d_path",
        networks["i3d_path"],
        "--num_workers",
        "1",
    ]
    sample(out, monkeypatch, *flags_for(base, sr, out, *more))
    for kind, side in (("original", 8), ("sr_mp4", 32)):
        report = json.loads((out / kind / "metrics.json").read_text())
        assert report["settings"]["video_size"] == f"4,3,{side},{side}"
        assert report["settings"]["clips"] == {"samples": 3, "reference": 10}
        assert {"FVD", "Temporal AV-Align"} <= {score["name"] for score in report["scores"]}
    assert capsys.readouterr().out.count("FVD ") == 2


def test_sampling_refuses_impossible_metrics_before_it_generates(tmp_path, monkeypatch, clips):
    base, _ = saved(tmp_path)
    out = tmp_path / "out"
    ref = ["--ref_path", str(clips / "true/video_dev")]
    for more, words in (
        (["--i3d_path", "x.pt"], "--i3d_path: needs --ref_path"),
        (["--ref_path", str(tmp_path / "none")], "no such data folder"),
        ([*ref, "--i3d_path", "x.pt"], "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(out, monkeypatch, *flags_for(base, "", out, *more))
        assert not out.exists()


def test_every_metrics_flag_is_one_of_the_sampling_script_too():
    configs = runpy.run_path(str(REPOSITORY / "py_scripts/multimodal_sample_sr.py"))["CONFIGS"]
    assert MetricsConfig in configs


def test_the_launcher_passes_paths_on_and_names_those_that_do_not_exist(tmp_path):
    assert_refused(run("multimodal_eval"), "SAMPLES_PATH")
    assert_refused(
        run("multimodal_eval", SAMPLES_PATH=tmp_path, I3D_PATH=tmp_path / "none"),
        "I3D_PATH",
        "none",
    )
    place = tmp_path / "my clips"
    place.mkdir()
    names = (
        "SAMPLES_PATH",
        "REF_PATH",
        "I3D_PATH",
        "AUDIO_EMBEDDING_PATH",
        "DETECTOR_PATH",
        "BOXES_DIR",
        "EVENTS_DIR",
    )
    line = recorded(
        tmp_path,
        "multimodal_eval",
        "--num_workers",
        "2",
        NUM_GPUS="1",
        **dict.fromkeys(names, place),
    )
    assert line[:2] == ["python", str(REPOSITORY / "py_scripts/eval.py")]
    assert line.count(str(place)) == len(names) + 1  # the report goes beside the clips
    assert line[-2:] == ["--num_workers", "2"]
    done = subprocess.run(
        [sys.executable, *line[1:], "--no_such_flag", "1"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert_refused(done, "unrecognized arguments: --no_such_flag 1 ")
