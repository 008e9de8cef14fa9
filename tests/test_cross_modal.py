"""One modality from the other: recorded figures, unchanged conditioning, the two scripts."""

import csv
import json
import re
import runpy
import subprocess
import sys

import golden_data
import numpy as np
import pytest
import tiny
import torch as th
from media_files import make_clip, moving_frames, small_clip
from test_diffusion import coupled, make, start_noise
from test_launchers import REPO, assert_refused, recorded
from test_launchers import run as run_launcher
from test_upsampler import saved

from mm_diffusion import unet
from mm_diffusion.config import notes_on
from mm_diffusion.data.decode import probe, read_wav, read_window
from mm_diffusion.dpm_solver import METHODS, DPMSolver, NoiseSchedule
from mm_diffusion.generation.run import generate_clips
from mm_diffusion.sampling import SAMPLERS, make_sampler, prepare, sample_joint
from mm_diffusion.tree import tree_map

RESPACED = {"ddpm": "5", "ddim": "ddim5", "dpm_solver": "", "dpm_solver++": ""}
SOLVERS = {"dpm_solver": {"steps": 6}, "dpm_solver++": {"steps": 5, "method": "multistep"}}
CASES = golden_data.index()["conditional"]["cases"]
OTHER = {"video": "audio", "audio": "video"}
SCRIPTS = {"video": "video2audio_sample", "audio": "audio2video_sample_sr"}
ADAPTIVE = {"method": "adaptive", "atol": 0.05, "rtol": 0.5}
SOLVER = ["--sample_fn", "dpm_solver", "--timestep_respacing", ""]
WAYS = [*((name, 0.0) for name in SAMPLERS), ("ddpm", 4.0), ("ddim", 4.0)]


def setup(name, scale=0.0, **settings):
    model, diffusion = tiny.build(
        timestep_respacing=RESPACED[name], predict_xstart=True
    )  # untrained, yet bounded
    return prepare(model), make_sampler(
        name, diffusion, classifier_scale=scale, **SOLVERS.get(name, {}) | settings
    )


def exact_alphas():
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


# Samplers


@pytest.mark.parametrize("case", CASES)
def test_the_sampler_of_the_scripts_draws_the_published_clips(case, monkeypatch):
    target, calls = CASES[case]["target"], iter(range(100))
    monkeypatch.setattr(
        th, "randn_like", lambda x: golden_data.noise(f"{case}.like{next(calls)}", x.shape)
    )
    x_T = start_noise(case, batch=1)
    known = OTHER[target]
    truth = {known: 0.5 * golden_data.noise(f"cond.{known}0", x_T[known].shape)}
    sampler = make_sampler(
        "ddpm", make(respacing="4"), classifier_scale=3.0 if "guide" in case else 0.0
    )
    sample = sampler(coupled, x_T, conditioning=truth)
    wanted = th.from_numpy(golden_data.arrays("conditional")[f"{case}_{target}"])
    th.testing.assert_close(sample[target], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", OTHER)
@pytest.mark.parametrize(("name", "scale"), WAYS)
def test_what_is_given_comes_back_as_it_is_and_decides_the_rest(name, scale, known):
    """Fault: the given modality came back as the model's own re-synthesis."""
    model, sampler = setup(name, scale)
    truth, other = ({known: tiny.clips(k, 1)[known]} for k in (0, 1))
    clip = sample_joint(model, sampler, [3], 5, conditioning=truth)
    free = sample_joint(model, sampler, [3], 5)
    assert list(clip) == ["video", "audio"]
    assert th.equal(clip[known], truth[known])
    assert not th.equal(free[known], truth[known])
    for another in (free, sample_joint(model, sampler, [3], 5, conditioning=other)):
        assert (clip[OTHER[known]] - another[OTHER[known]]).abs().max() > 1e-4


@pytest.mark.parametrize("known", OTHER)
@pytest.mark.parametrize(("name", "scale"), WAYS)
def test_a_clip_does_not_depend_on_its_neighbours(name, scale, known):
    """Fault: guidance was weakened by the batch size."""
    model, sampler = setup(name, scale, **(ADAPTIVE if name == "dpm_solver++" else {}))
    truth = {known: tiny.clips(0, 3)[known]}
    together = sample_joint(model, sampler, [4, 5, 6], 5, conditioning=truth)
    alone = sample_joint(model, sampler, [6], 5, conditioning={known: truth[known][2:]})
    for key in alone:
        th.testing.assert_close(together[key][2:], alone[key], rtol=1e-3, atol=1e-3)
    assert (together[OTHER[known]][0] - together[OTHER[known]][2]).abs().max() > 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_draw_the_clips_of_one_process(name):
    model, sampler = setup(name)
    found = {}

    def given(k):
        return {"video": tiny.clips(k, 1)["video"][0]}

    def save(k, video, audio, large):
        found[k] = {"video": video, "audio": audio}

    for rank in range(2):
        generate_clips(
            model, sampler, range(3)[rank::2], save, batch_size=2, seed=7, conditioning=given
        )
    together = sample_joint(
        model, sampler, range(3), 7, conditioning={"video": tiny.clips(0, 3)["video"]}
    )
    for k, clip in found.items():
        assert th.equal(clip["video"], given(k)["video"])
        th.testing.assert_close(clip, tree_map(lambda x, k=k: x[k], together), rtol=1e-3, atol=1e-3)
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_copies_the_sounds_level_into_the_picture_gives_it_the_given_one(name):
    _, diffusion = tiny.build(predict_xstart=True, timestep_respacing=RESPACED[name])
    alphas = th.from_numpy(diffusion.sqrt_alphas_cumprod).float()
    original_step = {t: i for i, t in enumerate(diffusion.timestep_map)}

    def copies(x, t):
        alpha = alphas[th.tensor([original_step[int(step)] for step in t])]
        level = (x["audio"].mean(dim=(1, 2)) / alpha).reshape(-1, 1, 1, 1, 1)
        return {"video": level.expand_as(x["video"]), "audio": th.zeros_like(x["audio"])}

    sampler = make_sampler(name, diffusion, **({"steps": 20} if name == "dpm_solver" else {}))
    levels = th.tensor([-0.6, 0.0, 0.7]).reshape(3, 1, 1)
    x_T = tree_map(lambda x: golden_data.noise(f"copy {x.ndim}", x.shape), tiny.clips(0, 3))
    x_T["audio"] -= x_T["audio"].mean(dim=(1, 2), keepdim=True)  # so that the noise hides no level
    sample = sampler(
        copies,
        x_T,
        [th.Generator() for _ in range(3)],
        conditioning={"audio": levels.expand(3, 2, 64)},
    )
    assert (
        sample["video"] - levels[..., None, None]
    ).abs().max() < 0.15  # the noise at the solvers' last time


@pytest.mark.parametrize("step_control", ["batch", "sample"])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_where_streams_are_apart_the_free_one_is_solved_as_if_it_were_alone(
    method, predict_x0, step_control
):
    """Neither does a given stream steer the adaptive steps, nor is it solved for."""

    def apart(x, t):
        return tree_map(lambda leaf: 0.3 * leaf + 0.1, x)

    x_T = {
        "a": golden_data.noise("a", (2, 3, 5)),
        "g": 30 * golden_data.noise("g", (2, 7)),
        "b": th.ones(2, 4),
    }
    settings = {"method": method, "steps": 7, "order": 2, "step_control": step_control}
    given = {"g": golden_data.noise("known", (2, 7))}
    together = DPMSolver(apart, exact_alphas(), predict_x0).sample(
        x_T, conditioning=given, **settings
    )
    alone = DPMSolver(apart, exact_alphas(), predict_x0).sample(
        {key: x_T[key] for key in "ab"}, **settings
    )
    assert list(together) == ["a", "g", "b"]
    assert th.equal(together["g"], given["g"])
    for key in "ab":
        th.testing.assert_close(together[key], alone[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_sees_the_given_stream_with_its_one_noise_at_the_level_of_the_time(
    method, denoise
):
    schedule, seen = NoiseSchedule(exact_alphas()), []
    truth, noise = golden_data.noise("truth", (2, 50)), golden_data.noise("its noise", (2, 50))
    truth = truth * th.tensor([[1.0], [9.0]])  # so that adaptive steps differ

    def model(x, t):
        seen.extend(zip(x["g"], t, strict=True))
        return {"h": 0.2 * x["h"] + x["g"].mean(dim=1, keepdim=True), "g": x["g"]}

    x_T = {"h": golden_data.noise("h", (2, 6)), "g": noise}
    solver = DPMSolver(model, exact_alphas(), predict_x0=True)
    settings = {
        "method": method,
        "steps": 9,
        "order": 3,
        "step_control": "sample",
        "denoise": denoise,
    }
    sample = solver.sample(x_T, conditioning={"g": truth}, **settings)
    assert th.equal(sample["g"], truth)
    assert len(seen) >= 9
    for row, step in seen:
        residue, alpha, sigma = min(
            mixture(row, *parts) for parts in zip(truth, noise, strict=True)
        )
        assert residue < 1e-4
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-4)
        sooner, later = schedule.alpha(
            (step + th.tensor([0.98, 2.02])) / 1000
        ).tolist()  # rounded down
        assert later <= alpha <= sooner


def mixture(row, truth, noise):
    """(largest residue, alpha, sigma) of row = alpha truth + sigma noise."""
    parts = th.stack([truth, noise], dim=1)
    weights = th.linalg.lstsq(parts, row[:, None]).solution
    return (parts @ weights - row[:, None]).abs().max().item(), *weights.flatten().tolist()


def test_guidance_does_not_vanish_in_float16():
    """The gradient of a mean over 2 x 80,000 samples is below what float16 can hold."""
    x_T = {
        "video": golden_data.noise("v", (1, 2, 3, 4, 4)),
        "audio": golden_data.noise("a", (1, 2, 80000)),
    }
    truth = {"audio": 0.5 * golden_data.noise("t", (1, 2, 80000))}

    def draw(dtype, scale):
        def model(x, t):
            return tree_map(
                lambda leaf: leaf.float(), coupled(tree_map(lambda leaf: leaf.to(dtype), x), t)
            )

        sampler = make_sampler("ddpm", make(respacing="4"), classifier_scale=scale)
        return sampler(model, x_T, [th.Generator().manual_seed(1)], conditioning=truth)["video"]

    moved, wanted = (draw(dtype, 3e4) - draw(dtype, 0.0) for dtype in (th.float16, th.float32))
    assert wanted.abs().max() > 0.02
    assert (moved - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_guidance_recomputes_activations_where_asked_to(monkeypatch):
    calls, recompute = [], unet.checkpoint
    monkeypatch.setattr(
        unet, "checkpoint", lambda *args, **kwargs: calls.append(1) or recompute(*args, **kwargs)
    )

    def draw(use_checkpoint, scale=5.0):
        model, diffusion = tiny.build(
            timestep_respacing="ddim4", use_checkpoint=use_checkpoint, predict_xstart=True
        )
        sampler = make_sampler("ddim", diffusion, classifier_scale=scale)
        return sample_joint(
            prepare(model), sampler, [0], 1, conditioning={"audio": tiny.clips(0, 1)["audio"]}
        )["video"]

    plain = draw(False)
    draw(True, scale=0.0)
    assert calls == []
    th.testing.assert_close(draw(True), plain, rtol=1e-5, atol=1e-5)
    assert calls


@pytest.mark.parametrize("name", SOLVERS)
def test_guidance_is_refused_where_there_is_none(name):
    with pytest.raises(
        ValueError,
        match=rf"scale 3.0: .*no guidance in sample_fn {re.escape(name)}; choose ddpm or ddim",
    ):
        make_sampler(name, tiny.build(as_built=True)[1], classifier_scale=3.0)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match="classifier_scale"):
        make_sampler("ddpm", tiny.build(as_built=True)[1], classifier_scale=scale)


@pytest.mark.parametrize(
    "given", [{"i": th.zeros(1)}, {"g": th.zeros(1, 3)}, {"g": th.zeros(1, 2), "h": th.ones(1)}]
)
def test_the_solver_wants_some_of_what_it_samples(given):
    with pytest.raises(ValueError, match="conditioning"):
        DPMSolver(lambda x, t: x, exact_alphas()).sample(
            {"g": th.ones(1, 2), "h": th.ones(1)}, conditioning=given
        )


# Scripts


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of three video files, checkpoints, and a function that runs the script."""
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path / "cache"))
    base, sr = saved(tmp_path)
    (tmp_path / "videos/more").mkdir(parents=True)
    for k, name in enumerate(("a.mp4", "b.mkv", "more/c.mov")):
        small_clip(tmp_path / "videos" / name, seed=k)

    def sample(known, out, *more, upsampled=False):
        line = [
            "--multimodal_model_path",
            base,
            "--data_dir",
            str(tmp_path / "videos"),
            "--output_dir",
            str(out),
        ]
        line += ["--timestep_respacing", "3", "--batch_size", "2", "--clip_stride", "20"]
        line += ["--sr_model_path", sr, "--sr_timestep_respacing", "ddim4"] if upsampled else []
        monkeypatch.setattr(sys, "argv", [SCRIPTS[known], *line, *more])
        runpy.run_path(str(REPO / f"py_scripts/{SCRIPTS[known]}.py"))["main"]()
        return {
            path.name: sorted(file.name for file in path.iterdir())
            for path in out.iterdir()
            if path.is_dir()
        }

    return sample


@pytest.mark.parametrize("known", OTHER)
def test_a_script_writes_what_it_drew_with_what_was_given_beside_the_clips_as_they_were(
    world, tmp_path, known, capsys
):
    out, upsampled = tmp_path / "out", known == "audio"
    found = world(known, out, "--classifier_scale", "2", upsampled=upsampled)
    names = [f"ddpm_samples_1_42_{k:05d}" for k in range(3)]
    kinds = ["original", "ground_truth", *(["sr_mp4"] if upsampled else [])]
    assert found.pop("gallery")
    assert (out / "index.html").is_file()
    assert found == {
        "audios": [f"{n}.wav" for n in names],
        **{kind: [f"{n}.mp4" for n in names] for kind in kinds},
    }
    paths = [tmp_path / "videos" / name for name in ("a.mp4", "b.mkv", "more/c.mov")]
    sources = [read_window(path, 0, 4, 4, 8, 8, 64, 64) for path in paths]
    for k, name in enumerate(names):
        truth, drawn = (
            read_window(out / f"{kind}/{name}.mp4", 0, 4, 4, 8, 8, 64, 64) for kind in kinds[1::-1]
        )
        distances = [
            (truth[0].float() - source[0].float()).abs().mean() for source in sources
        ]  # H.264 is not exact
        assert distances.index(min(distances)) == k
        assert (truth[1] - sources[k][1]).abs().max() <= 1 / 32768
        same = [th.equal(a, b) for a, b in zip(truth, drawn, strict=True)]
        assert same == ([True, False] if known == "video" else [False, True])
        assert th.equal(read_wav(out / f"audios/{name}.wav")[0], drawn[1])
    if upsampled:
        info = probe(out / f"sr_mp4/{names[0]}.mp4")
        assert (info.width, info.height, info.channels) == (32, 32, 2)
    with open(out / "sources.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == names
    assert [row["file"][-5:] for row in rows] == ["a.mp4", "b.mkv", "c.mov"]
    assert "has no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("known", OTHER)
def test_the_clips_of_a_script_hold_the_very_tensor_given_and_do_not_depend_on_the_batch(
    world, tmp_path, known, monkeypatch
):
    written = {}

    def keep(folder, name, *clip):
        written.setdefault((folder, name), {}).update(zip(OTHER, clip, strict=False))

    def keep_truth(folder, name, truth, how):
        written.setdefault((folder, name), {}).update(truth=truth)

    monkeypatch.setattr("mm_diffusion.generation.output.write_sample", keep)
    monkeypatch.setattr("mm_diffusion.generation.output.write_truth", keep_truth)
    for size in "13":
        world(known, tmp_path / size, "--batch_size", size)
    assert len(written) == 6
    for k in range(3):
        one, three = (written[str(tmp_path / size), f"ddpm_samples_1_42_{k:05d}"] for size in "13")
        assert th.equal(one[known], one["truth"][known])
        for key in OTHER:
            th.testing.assert_close(one[key], three[key], rtol=1e-3, atol=1e-3)


def test_a_rerun_completes_the_folder_and_other_clips_or_scales_are_refused(world, tmp_path):
    out = tmp_path / "out"
    world("video", out, "--all_save_num", "2", "--sample_fn", "ddim")
    assert len(list((out / "original").iterdir())) == 2
    gone = out / "ground_truth/ddim_samples_1_42_00001.mp4"
    gone.unlink()
    stamp = (out / "original/ddim_samples_1_42_00000.mp4").stat().st_mtime_ns
    assert len(world("video", out, "--sample_fn", "ddim")["original"]) == 3
    assert gone.exists()
    assert (out / "original/ddim_samples_1_42_00000.mp4").stat().st_mtime_ns == stamp
    for known, more in (("video", ["--classifier_scale", "1"]), ("audio", [])):
        with pytest.raises(ValueError, match=r"clips of another run \(given differ"):
            world(known, out, "--sample_fn", "ddim", *more)
    small_clip(tmp_path / "videos/d.mp4", seed=9)
    with pytest.raises(ValueError, match=r"clips of another run \(given differ"):
        world("video", out, "--sample_fn", "ddim")


def test_long_films_give_their_first_windows_before_any_gives_its_second(world, tmp_path):
    found = world(
        "video",
        tmp_path / "out",
        "--clip_stride",
        "2",
        "--all_save_num",
        "4",
        "--sample_fn",
        "ddim",
    )
    assert len(found["original"]) == 4
    with open(tmp_path / "out/sources.csv") as file:
        rows = [(row["file"][-5:], float(row["start_seconds"])) for row in csv.DictReader(file)]
    assert rows[:4] == [("a.mp4", 0), ("b.mkv", 0), ("c.mov", 0), ("a.mp4", 0.5)]
    assert len(rows) == 9


def test_the_solvers_draw_in_a_script(world, tmp_path):
    out = tmp_path / "out"
    assert len(world("audio", out, *SOLVER, "--sample_steps", "4")["original"]) == 3
    assert json.loads((out / "sampling.json").read_text())["given"][:2] == ["audio", 0.0]


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        ([*SOLVER, "--classifier_scale", "3"], "no guidance in sample_fn dpm_solver"),
        (["--classifier_scale", "-1"], "classifier_scale -1.0"),
        (["--data_dir", ""], "--data_dir"),
        (["--data_dir", "EMPTY"], r"EMPTY: holds no clips .*check --data_dir"),
        (["--data_dir", "no such place"], "no such place: no such data folder"),
        (
            ["--data_dir", "SHORT"],
            r"short.mp4: lasts 0.60 s, need 1.00 s \(4 frames at 4 per second\)",
        ),
        (["--data_dir", "SILENT"], "silent.mp4: has no audio stream"),
        (["--multimodal_model_path", ""], "no checkpoint given"),
        (["--multimodal_model_path", "nothing.pt"], "nothing.pt"),
        (["--multimodal_model_path", "EMPTY"], "EMPTY: holds neither"),
        (["--clip_stride", "0"], "clip_stride 0"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(
    world, tmp_path, monkeypatch, more, culprit
):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "SHORT", "SILENT"):
        (tmp_path / name).mkdir()
    small_clip(tmp_path / "SHORT/long.mp4")
    small_clip(tmp_path / "SHORT/short.mp4", frames=6, samples=9600)
    make_clip(tmp_path / "SILENT/silent.mp4", moving_frames(20, 0))
    with pytest.raises((ValueError, OSError), match=culprit) as caught:
        world("audio", tmp_path / "out", *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_short_videos_are_left_out_and_reported_where_that_is_allowed(world, tmp_path, capsys):
    small_clip(tmp_path / "videos/short.mp4", frames=6, samples=9600)
    found = world("video", tmp_path / "out", "--max_bad_share", "0.5", "--sample_fn", "ddim")
    assert len(found["original"]) == 3
    output = capsys.readouterr().out
    assert "3 conditioning clips, 1 files left out" in output
    assert "short.mp4: lasts 0.60 s" in output


def test_the_scale_has_a_note_only_where_it_has_no_effect():
    configs = {
        name: runpy.run_path(str(REPO / f"py_scripts/{name}.py"))["CONFIGS"]
        for name in (*SCRIPTS.values(), "multimodal_sample_sr")
    }
    notes = {
        name: notes_on({"classifier_scale", "save_type", "sr_model_path"}, *found)
        for name, found in configs.items()
    }
    named = {name: [note.split()[0] for note in found] for name, found in notes.items()}
    assert named == {
        "audio2video_sample_sr": ["--save_type"],
        "video2audio_sample": ["--save_type", "--sr_model_path"],
        "multimodal_sample_sr": ["--save_type", "--classifier_scale"],
    }


# Launchers


@pytest.mark.parametrize("name", SCRIPTS.values())
def test_a_launcher_asks_for_clips_and_weights_and_its_flags_are_known(name, tmp_path):
    assert_refused(run_launcher(name), "DATA_DIR is not set")
    assert_refused(run_launcher(name, DATA_DIR=tmp_path), "MODEL_PATH is not set")
    assert_refused(
        run_launcher(name, DATA_DIR=tmp_path, MODEL_PATH=tmp_path / "none"),
        "MODEL_PATH=",
        "no such file",
    )
    line = recorded(
        tmp_path, name, NUM_GPUS="1", DATA_DIR=tmp_path, MODEL_PATH=tmp_path, CLASSIFIER_SCALE="3.5"
    )
    assert line[:2] == ["python", str(REPO / f"py_scripts/{name}.py")]
    assert "3.5" in line
    command = [sys.executable, *line[1:], "--no_such_flag", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_refused(done, "unrecognized arguments: --no_such_flag 1 ")
