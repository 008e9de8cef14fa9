"""Clips that are spoiled on purpose: changes are what they say, and metrics do what they should."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch as th
from test_metrics import TinyEmbedding, TinyI3D

from mm_diffusion.config import CheckMetricsConfig, ClipReadingConfig, MetricsConfig
from mm_diffusion.data import images, toy
from mm_diffusion.dist_util import SINGLE_PROCESS
from mm_diffusion.evaluation import counterfactuals, temporal_av_align
from mm_diffusion.evaluation.bright_object import horizontal_position
from mm_diffusion.evaluation.changes import CHANGES, change_clip
from mm_diffusion.evaluation.clips import ClipFolder
from mm_diffusion.evaluation.counterfactuals import (
    EXPECTED,
    FALL,
    OPEN,
    RISE,
    STAY,
    UNCHANGED,
    figures_under_changes,
    judge,
)
from mm_diffusion.evaluation.measures import Measure, SpatialAlign, make_measures
from mm_diffusion.evaluation.scores import compute_scores
from mm_diffusion.evaluation.spatial_av_align import Box

SCRIPT = Path(__file__).resolve().parents[1] / "py_scripts/check_metrics.py"
FPS, SECONDS = 8, 2
TOY = toy.ToyConfig(height=32, width=32, fps=FPS, seconds=SECONDS)
SIZES = ClipReadingConfig(video_size="16,3,32,32", audio_size="2,32000", video_fps=FPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of four toy clips."""
    root = tmp_path_factory.mktemp("toy")
    toy.write_toy_dataset(root, 4, TOY)
    return root / "video_dev"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def no_onsets(monkeypatch):
    """Without Temporal AV-Align: librosa takes long to load."""
    monkeypatch.setattr(temporal_av_align, "why_no_onsets", lambda: "left out for speed")


@pytest.fixture
def clips(folder):
    opened = ClipFolder(str(folder), SIZES, "data_dir")
    return [opened.clip(number) for number in range(len(opened))]


# ---------------------------------------------------------------- changes


@pytest.mark.parametrize("name", CHANGES)
def test_a_clip_is_changed_alike_at_every_rate_at_which_it_is_read(clips, name):
    """Deterministic changes commute with reading; noise is as strong in all readings."""
    true, other, _, _ = clips
    clip = change_clip(true, other, CHANGES[name])
    again = clip.frames_at(FPS, 16), clip.audio_at(16000, 32000)
    originals = images.to_float(th.stack([*clip.original_frames()]))
    th.testing.assert_close(again, (clip.video, clip.audio), rtol=0, atol=0)
    th.testing.assert_close(originals, clip.video, rtol=0, atol=1.01 / 127.5)
    half, source = clip.audio_at(8000, 16000), true
    if name == "other audio":
        source = other
    expected = source.audio_at(8000, 16000)
    if name.startswith("audio") and name.endswith("late"):
        expected = expected.roll(CHANGES[name].delay_frames * 1000, dims=-1)
    th.testing.assert_close(half, CHANGES[name].audio(expected), rtol=0, atol=0)


def test_changes_do_what_their_names_say(clips):
    true, other, _, _ = clips
    changed = {name: change_clip(true, other, change) for name, change in CHANGES.items()}
    same_audio = {"unchanged", "image mirrored", "image noise", "darker"}
    for name, clip in changed.items():
        assert th.equal(clip.audio, true.audio) == (name in same_audio), name
    assert th.equal(changed["both mirrored"].video, true.video.flip(-1))
    assert th.equal(changed["both mirrored"].audio, true.audio.flip(0))
    assert th.equal(changed["time reversed"].video[0], true.video[-1])
    assert th.equal(changed["time reversed"].audio[:, 0], true.audio[:, -1])
    late = changed["audio 4 frames late"].audio
    assert th.equal(late[:, 8000:], true.audio[:, :-8000])
    assert th.equal(changed["other audio"].audio, other.audio)
    assert th.equal(changed["mono"].audio[0], changed["mono"].audio[1])
    noise = changed["audio noise"].audio - true.audio
    assert noise.square().mean() == pytest.approx(true.audio.square().mean().item(), rel=0.05)
    assert th.corrcoef(noise)[0, 1].abs() < 0.05
    frames = changed["image noise"].video - true.video
    assert 0.1 < frames.std() < 0.2
    assert not th.equal(frames[0], frames[1])
    is_lit = true.video > -1
    left = (changed["darker"].video[is_lit] + 1) / (true.video[is_lit] + 1)
    th.testing.assert_close(left, th.full(left.shape, 0.6), rtol=1e-4, atol=0)


# ---------------------------------------------------------------- expectations


def with_networks(tmp_path):
    """Flags of untrained networks."""
    th.jit.script(TinyI3D()).save(str(tmp_path / "i3d.pt"))
    th.jit.script(TinyEmbedding()).save(str(tmp_path / "embedding.pt"))
    paths = {"i3d_path": str(tmp_path / "i3d.pt")}
    return paths | {"audio_embedding_path": str(tmp_path / "embedding.pt")}


def object_boxes(video):
    """A box, 30 of 256 pixels wide, around the bright object."""
    centres = 256 * horizontal_position(video[None])[0][0]
    return [Box(k, -1, x - 15, 0, x + 15, 256) for k, x in enumerate(centres.tolist())]


def full_boxes(video):
    """A detector that sees nothing: a box around every frame."""
    return [Box(k, -1, 0, 0, 256, 256) for k in range(len(video))]


def all_measures(tmp_path, detect):
    measures = make_measures(MetricsConfig(**with_networks(tmp_path)), SINGLE_PROCESS.device)
    return measures | {"spatial": Measure(SpatialAlign(MetricsConfig(), detect))}


@pytest.mark.usefixtures("no_onsets")
def test_every_score_has_an_expectation_and_no_change_has_two(clips, tmp_path):
    measures = all_measures(tmp_path, object_boxes)
    counts = {name: th.ones(2) for name in ("peaks", "onsets", "pairs")}
    rows = counterfactuals._compute(clips[:2], measures, num_workers=1)
    rows |= {"temporal": counts, "temporal_published": counts}
    names = [score.name for score in compute_scores(rows, rows)[0]]
    objects = {counterfactuals.PANNING, counterfactuals.LOUDNESS}
    assert set(names) | objects == EXPECTED.keys()
    for expected in EXPECTED.values():
        named = [*expected.fall, *expected.rise, *expected.open]
        assert len(named) == len(set(named))
        assert set(named) < CHANGES.keys() - {UNCHANGED}


@pytest.mark.usefixtures("no_onsets")
def test_metrics_of_toy_clips_do_what_they_should(clips, tmp_path):
    """All but Temporal AV-Align, which needs longer clips: see the slow test."""
    measures = all_measures(tmp_path, object_boxes)
    found = figures_under_changes(clips, measures, has_bright_objects=True)
    outcomes = judge(found)
    assert not counterfactuals.failures(outcomes), counterfactuals.table(outcomes)
    assert {outcome.did for outcome in outcomes if outcome.should != OPEN} == {FALL, STAY, RISE}


@pytest.mark.usefixtures("no_onsets")
def test_a_detector_that_sees_nothing_is_caught(clips):
    measures = make_measures(MetricsConfig(), SINGLE_PROCESS.device)
    measures["spatial"] = Measure(SpatialAlign(MetricsConfig(), full_boxes))
    wrong = counterfactuals.failures(judge(figures_under_changes(clips, measures)))
    assert "Spatial AV-Align, channels swapped: stayed, should fall" in wrong
    assert all(line.startswith("Spatial AV-Align") for line in wrong)


def judged(values, figure="Spatial AV-Align", **changed):
    """figure: value unchanged and under the changes -> what it did by change, what is wrong."""
    found = {name: {figure: values} for name in CHANGES}
    found |= {name.replace("_", " "): {figure: value} for name, value in changed.items()}
    outcomes = {outcome.change: outcome for outcome in judge(found)}
    return outcomes


def test_a_figure_is_judged_by_its_tolerance():
    outcomes = judged(0.8, image_mirrored=0.75, channels_swapped=0.77, both_mirrored=0.85)
    assert [outcomes[name].did for name in list(CHANGES)[1:4]] == [FALL, STAY, RISE]
    assert [outcomes[name].is_wrong for name in list(CHANGES)[1:4]] == [False, True, True]
    assert outcomes["image noise"].should == OPEN
    assert not outcomes["image noise"].is_wrong
    assert outcomes["channels swapped"].cell() == "0.77 = !↓"
    assert outcomes["image mirrored"].cell() == "0.75 ↓"


def test_a_tolerance_of_figures_without_unit_is_a_share_of_the_largest():
    outcomes = judged(
        0.0, "FVD", image_noise=100.0, darker=0.009, channels_swapped=0.009, mono=0.02
    )
    found = {name: outcomes[name].did for name in ("darker", "channels swapped", "mono")}
    assert found == {"darker": STAY, "channels swapped": STAY, "mono": RISE}
    wrong = {name for name, outcome in outcomes.items() if outcome.is_wrong}
    assert wrong == {"darker", "mono"}


def test_what_becomes_undefined_is_wrong_and_what_always_was_is_not_judged():
    outcomes = judged(0.8, darker=None)
    assert outcomes["darker"].is_wrong
    assert outcomes["darker"].cell() == "- undefined !="
    assert not any(outcome.is_wrong for outcome in judged(None).values())


def test_one_clip_is_refused(clips):
    with pytest.raises(ValueError, match="give at least 2"):
        figures_under_changes(clips[:1], {})


# ---------------------------------------------------------------- the script


def run_script(monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", ["check_metrics.py", *map(str, line)])
    runpy.run_path(str(SCRIPT))["main"]()


def flags_of(config):
    return [part for name, value in config.items() for part in (f"--{name}", str(value))]


@pytest.mark.usefixtures("no_onsets")
def test_the_script_fails_with_a_line_for_each_wrong_figure(folder, monkeypatch, capsys):
    """4 frames per second are too few for bursts of 1 to 3 per second."""
    sizes = {"video_size": "8,3,32,32", "audio_size": "2,32000", "video_fps": 4}
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, folder, *flags_of(sizes), "--bright_object", True)
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    wrong = {line.rpartition(", ")[0] for line in err.splitlines() if ", should " in line}
    assert f"{counterfactuals.LOUDNESS}, audio 4 frames late: stayed" in wrong
    assert all(line.startswith(counterfactuals.LOUDNESS) for line in wrong)
    assert f"| {counterfactuals.PANNING}" in out
    assert "left out: FVD, KVD" in out
    assert "reference clips;" not in out


@pytest.mark.slow
def test_the_script_finds_nothing_wrong_with_toy_clips(tmp_path, monkeypatch, capsys):
    """At 16 frames per second, dense enough for bursts of 1 to 3 per second."""
    config = toy.ToyConfig(height=64, width=64, fps=16)
    toy.write_toy_dataset(tmp_path / "toy", 8, config)
    flags = {"video_size": "80,3,64,64", "video_fps": 16, **with_networks(tmp_path)}
    run_script(monkeypatch, tmp_path / "toy/video_dev", *flags_of(flags), "--bright_object", True)
    assert " !" not in capsys.readouterr().out.partition("\n\n")[2]


@pytest.mark.parametrize("name", ["ref_path", "boxes_dir", "events_dir"])
def test_files_that_know_nothing_of_the_changes_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name} folder: "):
        dataclasses.replace(CheckMetricsConfig(), **{name: "folder"})
