"""The benchmark of learning: coupling, distances, tables and samples; training is too slow here."""

import sys
from pathlib import Path

import pytest
import tiny
import torch as th

from mm_diffusion.data import decode, images, toy

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learn_toy

from mm_diffusion.checkpoint import save_weights
from mm_diffusion.dist_util import SINGLE_PROCESS
from mm_diffusion.script_util import model_and_diffusion_defaults


class Copycat(th.nn.Module):
    """Predicts its input as the noise, plus `across` times the other modality's mean."""

    def __init__(self, across):
        super().__init__()
        self.across = across

    def forward(self, video, audio, timesteps):
        means = [x.flatten(1).mean(dim=1) for x in (audio, video)]
        return tuple(
            x + self.across * mean.view(-1, *(1,) * (x.ndim - 1))
            for x, mean in zip((video, audio), means, strict=True)
        )


def tied_clips(count):
    """Clips whose frames are as bright as their audio is offset."""
    level = th.linspace(-1, 1, count)
    return {
        "video": level.view(-1, 1, 1, 1, 1).expand(-1, *tiny.SHAPES["video"]),
        "audio": level.view(-1, 1, 1).expand(-1, *tiny.SHAPES["audio"]),
    }


@pytest.mark.parametrize(("across", "sign"), [(0.0, 0), (-0.9, 1)])
def test_coupling_is_positive_only_where_the_model_uses_the_other_modality(across, sign):
    _, diffusion = tiny.build(as_built=True)
    row = learn_toy.coupling(Copycat(across), diffusion, tied_clips(6), 4, th.device("cpu"))
    for name in tiny.SHAPES:
        values = [row[f"coupling_{name}_{level}"] for level in learn_toy.NOISE_LEVELS]
        assert row[f"coupling_{name}"] == pytest.approx(sum(values) / len(values))
        if sign:
            assert min(values[:4]) > 0.1
        else:
            assert values == pytest.approx([0] * len(values), abs=1e-5)


def test_mirroring_images_leaves_the_audio():
    clips = tiny.clips(0, 2)
    mirrored, _ = learn_toy.mirror_images((clips, {}))
    assert mirrored["audio"].equal(clips["audio"])
    assert mirrored["video"].flip(-1).equal(clips["video"])


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"step": 0.0, "spatial": -0.25}, {"step": 500.0, "spatial": 0.75}]
    learn_toy.write_rows(tmp_path / "learning.csv", rows)
    assert learn_toy.read_rows(tmp_path / "learning.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["learning.csv"]
    assert learn_toy.read_rows(tmp_path / "none.csv") == []
    (tmp_path / "old.csv").write_text("step,fd_joint\n0,\n500,2.5\n")
    assert learn_toy.read_rows(tmp_path / "old.csv") == [
        {"step": 0.0},
        {"step": 500.0, "fd_joint": 2.5},
    ]


def toy_clips(seed, count):
    """Clips of the toy data, as small as the benchmark's models have them."""
    config = toy.ToyConfig(height=16, width=16, fps=8, seconds=1, sample_rate=1024, seed=seed)
    made = [toy.make_clip(config, k)[:2] for k in range(count)]
    videos, audios = map(th.stack, zip(*made, strict=True))
    return {"video": images.to_float(videos), "audio": audios}


MISMATCHES = {
    "audio of other clips": lambda audio: audio.roll(1, 0),
    "channels swapped": lambda audio: audio.flip(1),
    "half a beat late": lambda audio: audio.roll(113, -1),
}


@pytest.mark.parametrize("how", MISMATCHES)
def test_the_joint_distance_grows_where_audio_does_not_fit_video(how):
    held_out, data = toy_clips(1, 128), toy_clips(0, 64)
    own = learn_toy.distances(data, held_out)
    others = learn_toy.distances(data | {"audio": MISMATCHES[how](data["audio"])}, held_out)
    assert others["fd_joint"] > 4 * own["fd_joint"]
    assert others["fd_video"] == own["fd_video"]


def test_distances_of_one_modality_do_not_depend_on_which_clips_are_paired():
    held_out, data = toy_clips(1, 48), toy_clips(0, 32)
    rows = learn_toy.judge_data(data, held_out)
    for name in ("fd_video", "fd_audio"):
        assert rows["data, mismatched"][name] == pytest.approx(rows["data"][name])
    assert learn_toy.distances(data, data) == pytest.approx(
        dict.fromkeys(("fd_video", "fd_audio", "fd_joint"), 0)
    )


def test_distances_do_not_depend_on_the_unit_of_brightness_or_loudness():
    held_out, data = toy_clips(1, 48), toy_clips(0, 32)
    halved = ({name: x / 2 for name, x in clips.items()} for clips in (data, held_out))
    assert learn_toy.distances(*halved) == pytest.approx(
        learn_toy.distances(data, held_out), rel=1e-4
    )


def judged(*steps):
    keys = [
        *learn_toy.COLUMNS,
        *(f"coupling_{m}_{level}" for m in tiny.SHAPES for level in learn_toy.NOISE_LEVELS),
    ]
    return [dict.fromkeys(keys, 1.5 + step) | {"step": float(step)} for step in steps]


def folder_of_runs(root, **flags):
    """Two judged runs, of which `shift` is the better, with the checkpoint of a small model."""
    flags = model_and_diffusion_defaults() | tiny.FLAGS | flags
    flags |= {"video_fps": 4, "audio_fps": 64, "sample_fn": "dpm_solver++", "batch_size": 2}
    flags |= {"generated_clips": 3, "held_out_clips": 4}
    for name, last in (("shift", 10), ("no_shift", 20)):
        (root / name).mkdir()
        learn_toy.write_rows(root / name / "learning.csv", judged(0, last))
    model, _ = tiny.build()
    save_weights(str(root / "shift/ema_0.999_000010.pt"), model, flags)
    return flags


def test_the_end_is_a_table_curves_and_the_clips_of_the_best_run(tmp_path):
    flags = folder_of_runs(tmp_path, samples_dir=str(tmp_path / "fig"))
    data = {"data": judged(0)[0] | {"spatial": 0.75}, "data, mismatched": judged(0)[0]}
    learn_toy.conclude(tmp_path, flags, data, SINGLE_PROCESS)
    lines = (tmp_path / "learning.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("| untrained") for line in tables) == 2
    assert {line.count("|") for line in tables} == {
        len(learn_toy.COLUMNS) + 2,
        len(learn_toy.NOISE_LEVELS) + 2,
    }
    assert "0.750" in next(line for line in tables if line.startswith("| data "))
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "fig").iterdir()}
    assert names == {"samples.png", *(f"sample_{k}.mp4" for k in range(4))}
    for k in range(4):
        path = tmp_path / "fig" / f"sample_{k}.mp4"
        info = decode.probe(path)
        assert (info.width, info.sample_rate, info.duration_seconds) == (256, 16000, 1.0)
        assert path.stat().st_size < 200_000


def test_nan_zero_integers_and_missing_values_each_have_a_cell_of_their_own():
    text = learn_toy.table(
        ["a", "b", "c", "d"], [("x", {"a": float("nan"), "b": -1e-5, "c": 7.0}, "abcd")]
    )
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[2:-1]] == [
        "nan",
        "0.000",
        "7",
        "",
    ]


def test_samples_need_a_run_that_was_judged():
    with pytest.raises(ValueError, match="samples_dir"):
        learn_toy.best_run({"shift": [{"step": 0.0}]})
