"""Evaluation as published: the I3D of FVD, presets, mono clips, published names of flags."""

import dataclasses
import json
import sys

import golden_data
import pytest
import torch as th
from test_metrics import (  # noqa: F401 (fixtures)
    AS_READ,
    SIZES,
    TakesWaveform,
    cache,
    clip_sizes,
    clips,
    flags_of,
    networks,
    report_on,
    saved_script,
    script,
    values,
)

from mm_diffusion.config import EVALUATION_PRESETS, EvalConfig, parse
from mm_diffusion.data import decode, images, toy
from mm_diffusion.dist_util import SINGLE_PROCESS
from mm_diffusion.evaluation import evaluate, features, i3d, measures

# ---------------------------------------------------------------- I3D


def published_weight(name, shape):
    """As the figures in golden/ were taken with."""
    if name.endswith("num_batches_tracked"):
        return th.zeros((), dtype=th.long)
    value = golden_data.weight(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.5 * value.abs()
    return 1 + 0.1 * value if name.endswith("bn.weight") else value


@pytest.fixture(scope="module")
def i3d_path(tmp_path_factory):
    shapes = golden_data.manifest("manifest_i3d")["tensors"]
    weights = {name: published_weight(name, shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    th.save(weights, path, _use_new_zipfile_serialization=False)
    return path


def test_i3d_gives_the_published_logits_for_the_published_weights(i3d_path):
    video = golden_data.noise("i3d.video", (1, 3, 16, 224, 224)).tanh()
    compute = features.load_i3d(str(i3d_path), SINGLE_PROCESS.device)
    expected = th.from_numpy(golden_data.arrays("i3d")["logits"])[0]
    th.testing.assert_close(compute(video[0].transpose(0, 1)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"--i3d_path: I3D needs at least 9 frames \(got 8\)"):
        compute(th.zeros(8, 3, 224, 224))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("logits.conv3d.bias"), r"1 tensors differ, such as logits.*: None"),
        (lambda w: w.update(fc=th.zeros(2)), r"1 tensors differ, such as fc: \(2,\)"),
        (lambda w: w.update({"Mixed_3b.b0.bn.bias": th.zeros(3)}), r"Mixed_3b.b0.bn.bias: \(3,\)"),
    ],
)
def test_other_weights_than_those_of_i3d_are_refused_in_one_line(tmp_path, i3d_path, change, words):
    weights = th.load(i3d_path)
    change(weights)
    th.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt: not the weights of I3D .*{words}") as caught:
        features.load_i3d(str(tmp_path / "other.pt"), SINGLE_PROCESS.device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "stride"), [(16, 2), (15, 2), (7, 1), (1, 2)])
def test_padding_gives_the_size_divided_by_the_stride_rounded_up(size, stride):
    pooled = i3d.max_pool(th.zeros(1, 1, size, size, size), (3, 3, 3), (stride,) * 3)
    assert set(pooled.shape[2:]) == {-(-size // stride)}


# ---------------------------------------------------------------- presets


class FramesAsFeatures(th.nn.Module):
    """The mean of each frame."""

    def forward(self, x: th.Tensor):
        return x.mean(dim=[1, 3, 4])


def test_presets_stand_for_flags_and_explicit_ones_prevail(monkeypatch):
    def flags(*line):
        monkeypatch.setattr(sys, "argv", ["eval.py", *line])
        return evaluate.with_preset(*parse("Help.", EvalConfig))

    names = set(EVALUATION_PRESETS["savgbench"])
    plain = flags()
    assert {name: plain[name] for name in names} == {
        "i3d_fps": 0,
        "i3d_frames": 0,
        "audio_embedding_input": "logmel",
        "audio_embedding_fps": 16000,
        "audio_embedding_samples": 0,
    }
    for preset, num_frames in {"savgbench": 20, "mm_diffusion": 16}.items():
        found = flags("--preset", preset)
        assert (found["i3d_fps"], found["i3d_frames"]) == (10, num_frames)
        assert (found["audio_embedding_fps"], found["audio_embedding_samples"]) == (44100, 80000)
        assert flags("--preset", preset, "--i3d_frames", "9")["i3d_frames"] == 9
    with pytest.raises(ValueError, match="--preset 'other': choose from savgbench, mm_diffusion"):
        flags("--preset", "other")


def test_a_preset_reads_the_beginning_of_each_clip_for_i3d_and_the_embedding(tmp_path):
    """Of the second window of a file, too; and the rest of the report does not change."""
    toy.write_toy_dataset(tmp_path, 2, toy.ToyConfig(height=32, width=32, seconds=4))
    clip_dir = str(tmp_path / "video_dev")
    for name, module in {"i3d": FramesAsFeatures(), "embedding": TakesWaveform()}.items():
        (tmp_path / name).mkdir()
        saved_script(tmp_path / name, module)
    flags = {
        "samples_path": clip_dir,
        "ref_path": clip_dir,
        "i3d_path": str(tmp_path / "i3d/network.pt"),
        "audio_embedding_path": str(tmp_path / "embedding/network.pt"),
    }
    preset = EVALUATION_PRESETS["savgbench"] | {"audio_embedding_samples": 8000}
    config = EvalConfig(preset="savgbench", **flags, **preset)
    made = measures.make_measures(config, SINGLE_PROCESS.device)
    folder = evaluate.ClipFolder(clip_dir, SIZES, "samples_path")
    clip = folder.clip(1)
    assert clip.start == 2
    frames, audio = decode.read_window(clip.path, 2, 20, 10, 32, 32, 44100, 8000)
    rows = made["i3d"].compute(clip)["features"]
    expected = images.to_float(frames.permute(0, 3, 1, 2)).mean(dim=(1, 2, 3))
    th.testing.assert_close(rows, expected, rtol=0, atol=1e-2)
    assert made["embedding"].compute(clip)["left"].equal(audio[:1])

    report = report_on({"preset": "savgbench", **flags, **preset})
    plain = report_on({**flags, "audio_embedding_input": "waveform"})
    found, other = values(report), values(plain)
    assert report.how["i3d"].startswith("first 20 frames at 10 fps, shorter side to 224")
    assert report.how["embedding"].startswith("first 8000 samples at 44100 Hz as waveform")
    assert found["FAD mid x 1000"] == 1000 * found["FAD mid"]
    assert set(found) - set(other) == {"FAD mid x 1000"}
    for name in ("Temporal AV-Align", "ILD, mean |R - L| (dB)"):
        assert found[name] == other[name]


def test_the_report_says_what_each_figure_is_made_of(tmp_path, clips, networks):  # noqa: F811
    report = report_on(flags_of(clips, **networks))
    saved = json.loads(json.dumps(report.as_json()))
    assert {score["measure"] for score in saved["scores"]} == set(saved["how"]) - {"clips"}
    assert "8 frames at 4 fps, 32 x 32 pixels, resized (bicubic) without" in saved["how"]["clips"]
    assert "all samples at 16000 Hz as logmel; output of embedding.pt" in saved["how"]["embedding"]
    assert "\nTemporal AV-Align, published count: size and rate of the file" in report.text()
    frames = "all frames at the rate of the clip, shorter side to 224"
    assert f"\nFVD; KVD; I3D MMD (Gaussian): {frames}" in report.text()
    antialiased = dataclasses.replace(SIZES, antialias=True)
    report = report_on({"samples_path": str(clips / "generated/video_dev")}, antialiased)
    assert "(bicubic) with antialiasing" in report.how["clips"]


# ---------------------------------------------------------------- mono, published names


def test_mono_clips_get_every_figure_but_those_of_two_channels(clips, networks):  # noqa: F811
    """Files of two equal channels, read for a mono model."""
    flags = flags_of(clips, **networks)
    mono = clip_sizes("8,3,32,32", "1,8000", 4, 4000)
    stereo, report = report_on(flags), report_on(flags, mono)
    gone = set(values(stereo)) - set(values(report))
    assert gone == {
        *(f"{kind} {view}" for kind in ("FAD", "KAD") for view in ("left", "right", "side")),
        *("left-right correlation", "SMR, side to mid (dB)", "SMR-Err (dB)", "ILD-W (dB)"),
        *("ILD, mean |R - L| (dB)", "ITD, mean |L - R| (ms)"),
        *("ILD distance (dB)", "ITD distance (ms)"),
    }
    assert {name: values(stereo)[name] for name in values(report)} == values(report)
    assert "left out: figures of stereo" in report.text()
    assert report.histograms == {}
    localised = report_on({**flags, "events_dir": ""}, mono)
    assert "Spatial AV-Align" not in values(localised)


def test_evaluation_takes_the_published_names_of_its_folders(
    clips,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    fake, ref = str(clips / "generated/video_dev"), str(clips / "true/video_dev")
    line = ["--fake_dir", fake, "--ref_dir", ref, "--sample_num", "2", *AS_READ]
    script("eval", monkeypatch, *line, "--output_dir", str(tmp_path))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["settings"]["clips"] == {"samples": 2, "reference": 2}
    assert report["settings"]["samples_path"] == fake
    assert report["settings"]["ref_path"] == ref
    with pytest.raises(ValueError, match=r"--fake_dir .* and --samples_path x: two names"):
        script("eval", monkeypatch, *line, "--samples_path", "x")
    script("eval", monkeypatch, *line, "--output_dir", str(tmp_path), "--sample_num", "9")
    notes = json.loads((tmp_path / "metrics_2.json").read_text())["notes"]
    assert "--samples_path: 3 clips, fewer than --sample_num 9" in notes


def test_a_number_of_clips_is_part_of_what_is_cached_of_a_reference(clips):  # noqa: F811
    config = EvalConfig(**flags_of(clips, boxes_dir="", events_dir=""))
    made = measures.make_measures(config, SINGLE_PROCESS.device)
    arguments = config.samples_path, config, SIZES, made, SINGLE_PROCESS
    counts = [evaluate.evaluate(*arguments, sample_num=n).settings["clips"] for n in (0, 2, 0)]
    assert [count["reference"] for count in counts] == [5, 2, 5]
