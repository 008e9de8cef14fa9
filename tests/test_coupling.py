"""The coupling meter of training runs, and the clips that are held out for it."""

import csv
import dataclasses
import hashlib
import os

import pytest
import tiny
import torch as th
from test_learn_toy import Copycat, tied_clips
from test_tasks import SMALLER
from test_train import loop

from mm_diffusion import rng
from mm_diffusion.config import DataConfig, JointTrainConfig
from mm_diffusion.data import clips as data_clips
from mm_diffusion.data.decode import ClipInfo
from mm_diffusion.data.held_out import LEAST_FILES, split
from mm_diffusion.data.index import ClipIndex
from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import SINGLE_PROCESS, World
from mm_diffusion.training import coupling
from mm_diffusion.training.coupling import CouplingMeter, denoising_errors, make_meter, mismatched

OTHER_TASKS = ["video2audio", "audio2video"]
INFO = ClipInfo(
    **{field.name: 1 for field in dataclasses.fields(ClipInfo)}  # which splitting does not read
)


def meter(clips=None, world=SINGLE_PROCESS):
    _, diffusion = tiny.build(as_built=True)
    return CouplingMeter(clips or tied_clips(6), diffusion, batch_size=4, world=world)


# What it says


@pytest.mark.parametrize(("across", "is_coupled"), [(0.0, False), (-0.9, True)])
def test_a_model_that_uses_the_other_modality_is_coupled_and_no_other(across, is_coupled, capsys):
    values = meter()(Copycat(across))
    for name in tiny.SHAPES:
        assert (values[f"coupling_{name}"] > coupling.THRESHOLD) == is_coupled
        if not is_coupled:
            assert values[f"coupling_{name}"] == pytest.approx(0, abs=1e-6)
    logged = capsys.readouterr().out
    assert logged.strip().endswith(
        "coupled" if is_coupled else "not coupled yet, as all are below 0.05"
    )
    assert ("not coupled" in logged) != is_coupled


def test_the_loss_of_held_out_clips_is_that_of_training_at_the_same_noise_levels():
    model, diffusion = tiny.build(**SMALLER)
    clips = tiny.clips(0, 3)
    values = CouplingMeter(clips, diffusion, 2)(model)
    noise = rng.randn_like(clips, rng.per_sample(0, "coupling", indices=range(3)))
    errors = denoising_errors(model, diffusion, clips, noise, batch_size=2)
    for key in clips:
        quartiles = errors[key].view(4, 2).mean(dim=1) / 3
        assert values[f"val_loss_{key}"] == pytest.approx(quartiles.mean().item(), rel=1e-6)
        found = [values[f"val_loss_{key}_q{q}"] for q in range(4)]
        assert found == pytest.approx(quartiles.tolist(), rel=1e-6)
        assert len(set(found)) == 4


def test_of_mixed_tasks_it_tells_what_a_clean_modality_is_worth():
    """A video that is the clean audio's level: at equal noise levels nothing tells of it."""
    received = []

    class Reads(th.nn.Module):
        def forward(self, video, audio, timesteps):
            received.append(timesteps)
            is_clean = isinstance(timesteps, dict) and int(timesteps["audio"].max()) == 0
            level = audio.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1) * is_clean
            return level.expand_as(video), th.zeros_like(audio)

    _, diffusion = tiny.build(as_built=True, prediction="x_start")
    tasks = ("joint", "audio2video")
    values = CouplingMeter(tied_clips(6), diffusion, 4, task_mix=tasks)(Reads())
    assert values["coupling_video"] == values["coupling_audio"] == 0
    assert values["coupling_audio2video_q0"] > 100  # what is matched is predicted exactly
    assert "coupling_video2audio" not in values
    assert all(th.equal(t["audio"], 0 * t["video"]) for t in received if isinstance(t, dict))


@pytest.mark.parametrize("flags", [{"learn_sigma": True, "use_kl": True}, {"prediction": "v"}])
def test_it_measures_whatever_is_trained_and_says_the_same_every_time(flags):
    model, diffusion = tiny.build(**SMALLER, **flags)
    this = CouplingMeter(tiny.clips(0, 2), diffusion, 2)
    state = th.get_rng_state()
    first = this(model)
    assert this(model) == first
    assert th.equal(th.get_rng_state(), state)
    assert len(first) == 2 * 2 * 5
    assert all(value == value for value in first.values())


def test_ranks_share_the_clips_and_say_what_one_process_says(monkeypatch):
    model, _ = tiny.build(**SMALLER, cross_attention_shift=False)
    whole = meter(tiny.clips(0, 3))(model)
    parts = []
    monkeypatch.setattr(coupling, "all_sum", lambda x: parts.append(x) or x)
    for rank in range(2):
        meter(tiny.clips(0, 3), World(rank=rank, size=2))(model)
    per_rank = len(parts) // 2
    sums = [one + two for one, two in zip(parts[:per_rank], parts[per_rank:], strict=True)]
    for key, (own, other) in zip(("video", "audio"), sums, strict=True):
        ratio = (other / own - 1).mean().item()
        assert ratio == pytest.approx(whole[f"coupling_{key}"], rel=1e-4, abs=1e-6)


def test_mismatched_clips_pair_every_modality_with_that_of_another_clip():
    clips = {"a": th.arange(4), "b": th.arange(4), "c": th.arange(4)}
    found = mismatched(clips, 2)
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == found["c"].tolist() == [2, 3, 0, 1]


# In training


def test_every_save_has_a_row_with_what_the_average_gives(tmp_path):
    this, found = meter(tied_clips(4)), []

    def listening(model):
        found.append((model.training, next(model.parameters()).detach().clone()))
        return this(model)

    intervals = {"max_steps": 3, "save_interval": 2, "log_interval": 2}
    trainer = loop(tmp_path, meter=listening, ema_rate="0.5", flags=SMALLER, **intervals)
    trainer.run_loop()
    with (tmp_path / "progress.csv").open(newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["2", "3"]
    for row in rows.values():
        assert float(row["val_loss_video"]) > 0
        assert row["coupling_audio"] != ""
    assert [training for training, _ in found] == [False] * 2
    assert th.equal(found[-1][1], next(iter(trainer.emas.values()))[0])
    assert not th.equal(found[-1][1], trainer.params[0])
    assert trainer.model.training


@pytest.mark.parametrize("limit", ["save_interval", "lr_anneal_steps", "max_steps"])
def test_it_is_left_out_where_it_would_take_more_than_its_share_of_the_time(limit, capsys):
    _, diffusion = tiny.build(as_built=True)
    config = JointTrainConfig(output_dir="x", batch_size=4, **{limit: 10})
    assert make_meter(diffusion, config, DataConfig(), SINGLE_PROCESS) is None
    logged = capsys.readouterr().out
    assert "with 10 steps to a save;" in logged
    least = int(logged.split()[-4])
    assert 4 * least >= coupling.MIN_CLIPS * coupling.steps_per_clip(["joint"]) > 4 * (least - 1)


@pytest.mark.parametrize("tasks", [[], ["joint"], ["video2audio"], ["joint", *OTHER_TASKS]])
def test_a_clip_takes_less_than_two_percent_of_the_passes_of_its_training_steps(tasks):
    """A step takes as long as three passes without gradients; measured."""
    passes = []
    model = Copycat(0.0)
    model.register_forward_pre_hook(lambda *call: passes.append(call))
    _, diffusion = tiny.build(as_built=True)
    CouplingMeter(tied_clips(1), diffusion, 4, task_mix=tasks)(model)
    assert 0.8 * 0.02 < len(passes) / (3 * coupling.steps_per_clip(tasks)) < 0.02


# Held-out clips


def index(names, folder="/data"):
    return ClipIndex([(f"{folder}/{name}", INFO) for name in names], {"bad": "is bad"}, folder)


def names_of(part, folder="/data"):
    return [path.removeprefix(f"{folder}/") for path, _ in part.clips]


NAMES = [f"{k % 7}/clip_{k}.mp4" for k in range(400)]


def test_a_share_of_the_files_is_held_out_whatever_others_there_are_and_wherever_they_lie():
    training, held_out = split(index(NAMES), 0.1)
    assert sorted(names_of(training) + names_of(held_out)) == sorted(NAMES)
    assert 20 < len(held_out.clips) < 60
    assert training.bad == {"bad": "is bad"}
    moved = split(index(NAMES, "/else/where"), 0.1)[1]
    assert names_of(moved, "/else/where") == names_of(held_out)
    more = split(index([*NAMES, "new/a.mp4", "new/b.mp4"]), 0.1)[1]
    assert set(names_of(held_out)) <= set(names_of(more))
    name = names_of(held_out)[0]
    assert int(hashlib.sha256(f"/{name}".encode()).hexdigest()[:8], 16) < 0.1 * 16**8


@pytest.mark.parametrize(
    "folders", ["/data", "/data/", "data", "./data/../data", "/data/0,/data/0x,/data", "/", "."]
)
def test_the_hash_of_the_path_below_its_folder_decides_what_is_held_out(folders):
    """The definition, for one path at a time: a run that resumes has to hold out the same files."""
    prefixes = [os.path.abspath(folder) for folder in folders.split(",")]
    names = [f"{k % 3}{'x' * (k % 2)}/clip_{k}é\udcff.mp4" for k in range(300)]
    paths = [os.path.join(folder, name) for folder in folders.split(",") for name in names]

    def fraction(path):
        full = os.path.abspath(path)
        below = min((full.removeprefix(prefix) for prefix in prefixes), key=len)
        return int(hashlib.sha256(os.fsencode(below)).hexdigest()[:13], 16) / 16**13

    training, held_out = split(ClipIndex([(p, INFO) for p in paths], {}, folders), 0.3)
    assert held_out.paths() == [path for path in paths if fraction(path) < 0.3]
    assert training.paths() == [path for path in paths if fraction(path) >= 0.3]


def test_small_sets_are_trained_on_as_a_whole():
    least = LEAST_FILES * 10
    assert split(index(NAMES[: least - 1]), 0.1)[1].clips == []
    assert len(split(index(NAMES[: least - 1]), 0.1)[0].clips) == least - 1
    assert split(index(NAMES), 0.0)[1].clips == []
    assert len(split(index(NAMES[:least]), 0.1)[0].clips) < least


def test_no_clip_that_is_held_out_is_trained_on(tmp_path, monkeypatch, capsys):
    toy = ToyConfig(height=16, width=16, seconds=1, fps=4, sample_rate=8000)
    write_toy_dataset(tmp_path, 10, toy)
    sizes = {"video_size": "2,3,8,8", "audio_size": "2,4000", "audio_fps": 8000}
    config = DataConfig(data_dir=str(tmp_path), num_workers=0, batch_size=4, **sizes)
    monkeypatch.setattr("mm_diffusion.data.held_out.LEAST_FILES", 1)
    held_out = data_clips.read_held_out(config, "", 0.4, most=3)
    batches = data_clips.load_data(config, World(), val_share=0.4)
    used = th.cat([next(batches)[0]["audio"] for _ in range(8)])
    used = {tuple(clip.flatten()[::97].tolist()) for clip in [*used, *used.flip(1)]}
    kept = [tuple(clip.flatten()[::97].tolist()) for clip in held_out["audio"]]
    assert len(set(kept)) == 3
    assert not used & set(kept)
    assert len(used) > 8
    assert "are held out (--val_share 0.4)" in capsys.readouterr().out
    whole = data_clips.read_held_out(config, str(tmp_path), 0.4, most=64)
    assert len(whole["video"]) == 30  # three windows of each file
    assert data_clips.read_held_out(config, "", 0.0, most=3) is None


def test_training_and_its_held_out_clips_take_an_index_that_is_there(tmp_path, monkeypatch):
    """Fault: the folder was searched once for each, which takes seconds for a million files."""
    write_toy_dataset(tmp_path, 3, ToyConfig(height=16, width=16, seconds=1, fps=4))
    sizes = {"video_size": "2,3,8,8", "audio_size": "2,4000", "audio_fps": 8000}
    config = DataConfig(data_dir=str(tmp_path), num_workers=0, batch_size=1, **sizes)
    monkeypatch.setattr("mm_diffusion.data.held_out.LEAST_FILES", 0)
    index = data_clips.index_clips(config)
    monkeypatch.delattr(data_clips, "index_clips")
    batch, _ = next(data_clips.load_data(config, index=index))
    assert batch["video"].shape == (1, 2, 3, 8, 8)
    held_out = data_clips.read_held_out(config, "", 1.0, most=3, index=index)
    assert len(held_out["video"]) == 3


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"--val_share 1.0"):
        JointTrainConfig(output_dir="x", val_share=1.0)
    assert JointTrainConfig(output_dir="x", val_dir="d").held_out_share == 0
    assert JointTrainConfig(output_dir="x").held_out_share == 0.02
