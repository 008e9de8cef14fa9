"""PSNR, SSIM and flicker have their closed forms; the check of an upsampler reports them."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch as th
from torchvision.io import write_png

from mm_diffusion import checkpoint
from mm_diffusion.data import encode
from mm_diffusion.evaluation.distances import frechet_distance
from mm_diffusion.evaluation.image_quality import flicker, patches, psnr, ssim
from mm_diffusion.script_util import image_sr_model_and_diffusion_defaults

SCRIPT = Path(__file__).resolve().parents[1] / "py_scripts/check_upsampler.py"


def noise(*shape, seed=0):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def textured(count=3, side=24, seed=0):
    return (0.4 * noise(count, 3, side, side, seed=seed)).clamp(-0.9, 0.9)


def test_psnr_is_that_of_the_root_mean_square_error_and_bounded():
    frames = textured()
    assert psnr(frames + 0.02, frames) == pytest.approx(20 * math.log10(2 / 0.02), abs=1e-3)
    assert psnr(frames, frames) == pytest.approx(100)


def test_ssim_of_one_window_is_the_formula_written_out():
    x, y = textured(1, side=11).double(), textured(1, side=11).double().flip(-1) + 0.05
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    a, b = (np.tensordot((0.299, 0.587, 0.114), (z[0].numpy() + 1), 1) * 127.5 for z in (x, y))
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    expected *= (2 * covariance + c2) / (variances + c2)
    assert ssim(x, y) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_one_for_equal_frames_symmetric_and_falls_with_noise():
    frames = textured()
    little, much = (frames + share * noise(*frames.shape, seed=1) for share in (0.05, 0.3))
    assert ssim(frames, frames) == pytest.approx(1)
    assert ssim(frames, much) == pytest.approx(ssim(much, frames))
    assert 1 > ssim(little, frames) > ssim(much, frames) > ssim(noise(*frames.shape), frames)
    with pytest.raises(ValueError, match="11 x 11 pixels, got 8 x 24"):
        ssim(frames[..., :8, :], frames[..., :8, :])


def test_flicker_is_the_change_beyond_that_of_the_reference_in_grey_levels():
    still = textured(1).expand(4, -1, -1, -1)
    bright = th.tensor([0, 0.1, 0, 0.1]).view(4, 1, 1, 1)
    assert flicker(still + bright, still) == pytest.approx(12.75, rel=1e-4)
    assert flicker(still, still + bright) == pytest.approx(-12.75, rel=1e-4)
    assert flicker(still + 0.1, still) == pytest.approx(0, abs=1e-4)
    moving = textured(4)
    assert flicker(moving.flip(0), moving) == pytest.approx(0, abs=1e-4)
    assert math.isnan(flicker(still[:1], still[:1]))


def grey(luma):
    """Frames [F, 3, H, W] of luma [F, H, W] in grey levels."""
    return (luma[:, None] / 127.5 - 1).expand(-1, 3, -1, -1)


def test_patches_hold_the_luma_of_frames_and_leave_out_what_is_left_over():
    luma = (255 * th.rand(2, 18, 25, generator=th.Generator().manual_seed(0))).double()
    found = patches(grey(luma))
    assert found.shape == (2 * 2 * 3, 64)
    kept = luma[:, :16, :24]
    th.testing.assert_close(8 * found.flatten().sort().values, kept.flatten().sort().values)
    assert any(th.allclose(8 * row, kept[1, 8:, 16:].flatten()) for row in found)
    assert len(patches(textured(20, 64))) == 1024


def test_the_frechet_distance_of_patches_is_in_squared_grey_levels():
    """Of a shift it is the shift squared; in general at most the mean square error (Gelbrich)."""
    x, y = (patches(textured(20, 32, seed)) for seed in (0, 1))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x + 3 / 8, x) == pytest.approx(9)
    assert 0 < frechet_distance(x, y) < (x - y).square().sum(dim=1).mean()


# ---------------------------------------------------------------- the script


def save_upsampler(folder, antialias):
    model, _ = tiny.build_upsampler()
    flags = image_sr_model_and_diffusion_defaults() | tiny.SR_FLAGS | {"antialias": antialias}
    checkpoint.save_weights(str(folder / "sr000001.pt"), model, flags)


@pytest.fixture
def folder(tmp_path):
    """A tiny upsampler, a video of a still scene, and an image."""
    save_upsampler(tmp_path, antialias=False)
    (tmp_path / "data").mkdir()
    scene = th.nn.functional.interpolate(textured(1, 8), (32, 32), mode="bicubic")[0]
    image = ((scene + 1) * 127.5).clamp(0, 255).to(th.uint8)
    write_png(image, str(tmp_path / "data/image.png"))
    video = image.expand(6, -1, -1, -1)
    encode.write_clip(tmp_path / "data/scene.mp4", video, 4, th.zeros(2, 24000), 16000)
    return tmp_path


def check(folder, out, monkeypatch, *more):
    line = ["--sr_model_path", folder / "sr000001.pt", "--data_dir", folder / "data"]
    line += ["--output_dir", folder / out, "--num_frames", 2, *more]
    monkeypatch.setattr(sys, "argv", ["check_upsampler.py", *map(str, line)])
    runpy.run_path(str(SCRIPT))["main"]()
    return json.loads((folder / out / "upsampler.json").read_text())


def test_the_check_compares_upsampled_and_bicubic_frames_with_the_true_ones(
    folder, monkeypatch, capsys
):
    found = check(folder, "few", monkeypatch, "--sr_timestep_respacing", "ddim2")["ddim"]
    image, scene = (
        found["clips"][str(folder / "data" / name)] for name in ("image.png", "scene.mp4")
    )
    assert image["upsampled"]["flicker"] is None
    assert scene["upsampled"]["flicker"] == pytest.approx(0, abs=0.1)  # a still scene stays still
    for clip in (image, scene):
        assert clip["bicubic"]["psnr"] > clip["upsampled"]["psnr"]  # weights that were not trained
        assert clip["bicubic"]["ssim"] > 0.9 > clip["upsampled"]["ssim"]
        assert clip["upsampled"]["seconds"] > 0
        assert clip["upsampled"]["passes"] == 2
    for kind, mean in found["mean"].items():
        values = [clip[kind]["psnr"] for clip in (image, scene)]
        assert mean["psnr"] == pytest.approx(sum(values) / 2)
        assert mean["flicker"] == scene[kind]["flicker"]
    assert found["mean"]["bicubic"]["frechet"] < found["mean"]["upsampled"]["frechet"]
    assert found["settings"]["sr_process"]["timestep_respacing"] == "ddim2"
    text = capsys.readouterr().out
    assert f"{found['mean']['upsampled']['psnr']:.4g}" in text
    other = check(folder, "more", monkeypatch, "--sr_timestep_respacing", "ddim4")["ddim"]
    assert other["mean"]["upsampled"]["psnr"] != found["mean"]["upsampled"]["psnr"]
    assert other["mean"]["bicubic"] == found["mean"]["bicubic"]


def test_frames_are_made_small_as_in_the_training_of_the_upsampler(folder, monkeypatch):
    (folder / "data/scene.mp4").unlink()
    few = ["--sr_timestep_respacing", "ddim2"]
    plain = check(folder, "plain", monkeypatch, *few)["ddim"]
    save_upsampler(folder, antialias=True)
    smooth = check(folder, "smooth", monkeypatch, *few)["ddim"]
    assert smooth["mean"]["bicubic"]["psnr"] != plain["mean"]["bicubic"]["psnr"]


def test_samplers_side_by_side_take_the_steps_they_are_given_and_give_what_they_give_alone(
    folder, monkeypatch, capsys
):
    steps = {"ddpm": 3, "ddim": 4, "dpm_solver": 5, "dpm_solver++": 6}
    names = [f"{name}:{count}" for name, count in steps.items()]
    found = check(folder, "all", monkeypatch, "--samplers", ",".join(names))
    passes = {name: report["mean"]["upsampled"]["passes"] for name, report in found.items()}
    assert passes == dict(zip(names, steps.values(), strict=True))
    text = capsys.readouterr().out
    assert all(name in text for name in names)
    alone = ["--sr_sample_fn", "dpm_solver", "--sr_sample_steps", 5]
    alone = check(folder, "one", monkeypatch, *alone)["dpm_solver"]
    beside = found["dpm_solver:5"]
    assert beside["settings"] == alone["settings"]
    for report in (beside, alone):
        report["mean"]["upsampled"].pop("seconds")
    assert beside["mean"] == alone["mean"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--samplers", "ddim25"], "'ddim25': need NAME:STEPS"),
        (["--samplers", "ddim:25,euler:5"], "'euler:5': need NAME:STEPS .*dpm_solver"),
        (["--samplers", "ddim:0"], "'ddim:0': need NAME:STEPS"),
        (
            ["--samplers", "ddim:5,dpm_solver:5", "--sr_sample_steps", "7"],
            "--sr_sample_steps: --samplers",
        ),
        (["--samplers", "dpm_solver:5,ddim:77"], "ddim77"),
    ],
)
def test_samplers_that_cannot_be_compared_are_refused_before_any_frame(
    folder, monkeypatch, more, problem
):
    for path in (folder / "data").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=problem):
        check(folder, "none", monkeypatch, *more)


def test_a_check_without_an_upsampler_is_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match="--sr_model_path is empty"):
        check(folder, "none", monkeypatch, "--sr_model_path", "")
