"""The upsampler: recorded figures of the published one, training, and sampling with it."""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path

import golden_data
import numpy as np
import pytest
import tiny
import torch as th
from torchvision.io import read_image, write_png

from mm_diffusion import checkpoint
from mm_diffusion.checkpoint import (
    CheckpointError,
    load_weights,
    published_names,
    published_state_dict,
)
from mm_diffusion.config import (
    DataConfig,
    ModelConfig,
    SamplingConfig,
    SRDiffusionConfig,
    TrainConfig,
    UpsamplerConfig,
    parse,
    pick,
)
from mm_diffusion.config.flags import flag_name
from mm_diffusion.data.decode import probe, read_window
from mm_diffusion.dist_util import SINGLE_PROCESS
from mm_diffusion.generation import previews
from mm_diffusion.generation.load import load_noise, load_upsampler
from mm_diffusion.generation.output import claim_folder
from mm_diffusion.generation.run import UPSAMPLING
from mm_diffusion.sampling import (
    SAMPLERS,
    SR_SETTINGS,
    bind,
    frames_that_fit,
    make_sampler,
    prepare,
    sample_joint,
    upsample_video,
)
from mm_diffusion.script_util import (
    SR_CARRIED_FLAGS,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    merge_checkpoint_flags,
)
from mm_diffusion.train_util import TrainLoop
from mm_diffusion.training.resume import flags_to_start_with, start_from

SCRIPT = Path(__file__).resolve().parents[1] / "py_scripts/multimodal_sample_sr.py"
INDEX = golden_data.index()
CASES = [case for case, facts in INDEX.items() if facts.get("kind") == "sr_unet"]
RESPACED = {"ddpm": "5", "ddim": "ddim5", "dpm_solver": "", "dpm_solver++": ""}


# Recorded figures


@pytest.mark.parametrize("case", CASES)
def test_the_upsampler_gives_the_published_figures(case):
    facts = INDEX[case]
    model = tiny.filled(image_sr_create_model_and_diffusion(**facts["config"])[0]).eval()
    inputs = {
        key: golden_data.noise(x["noise_name"], x["shape"]) for key, x in facts["inputs"].items()
    }
    with th.no_grad():
        out = model(inputs["x"], th.tensor(facts["timesteps"]), low_res=inputs["low_res"])
    arrays, kind = golden_data.arrays(case), facts["outputs"]["out"]
    assert list(out.shape) == kind["shape"]
    if kind["kind"] == "strided":
        found, wanted = out.flatten()[:: kind["flat_step"]], arrays["out__strided"]
    else:
        found, wanted = out, arrays["out"]
    th.testing.assert_close(found, th.from_numpy(wanted), rtol=0, atol=2e-5)
    assert sum(p.numel() for p in model.parameters()) == facts["params"]


def test_the_published_upsampler_has_the_published_tensors():
    with th.device("meta"):
        model, _ = image_sr_create_model_and_diffusion()
    manifest = golden_data.manifest("manifest_sr")
    assert {name: list(p.shape) for name, p in published_state_dict(model).items()} == manifest[
        "tensors"
    ]
    assert sum(p.numel() for p in model.parameters()) == manifest["total_params"] == 311_027_910


def test_a_step_of_training_gives_the_published_losses_and_gradients():
    """Fault: the published training of the upsampler crashes on its first step."""
    facts = INDEX["train_sr01"]
    model, diffusion = image_sr_create_model_and_diffusion(**facts["config"], diffusion_steps=1100)
    tiny.filled(model).train()
    x_start, low_res = (
        (0.5 * golden_data.noise(f"train.sr.{name}", (2, 3, side, side))).clamp(-1, 1)
        for name, side in (("x", 64), ("low", 16))
    )
    noise = golden_data.noise("train.sr.noise", x_start.shape)
    terms = diffusion.training_losses(
        bind(model, {"low_res": low_res}), x_start, th.tensor(facts["t"]), noise
    )
    for name, values in facts["terms"].items():
        th.testing.assert_close(terms[name].detach(), th.tensor(values), rtol=1e-5, atol=1e-5)
    loss = terms["loss"].mean()
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[ours].grad for name, ours in published_names(model).items()}
    assert th.stack([g.norm() for g in gradients.values()]).norm().item() == pytest.approx(
        facts["grad_norm"], rel=1e-4
    )
    for name, norm in facts["param_grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name


# The network


def test_defaults_are_the_published_ones():
    published = tiny.PUBLISHED_UPSAMPLER | {"sr_use_fp16": None}
    defaults = image_sr_model_and_diffusion_defaults()
    assert {name: defaults[name] for name in published} == published


@pytest.mark.parametrize(("size", "levels"), [(64, 4), (128, 5), (256, 6), (512, 6)])
def test_the_large_size_sets_the_multipliers(size, levels):
    with th.device("meta"):
        model, _ = image_sr_create_model_and_diffusion(
            large_size=size, small_size=size // 4, num_channels=32
        )
    assert len(model.widths) == levels
    assert model.widths[0] == 32  # of 512 pixels too, unlike the joint model's


def test_the_way_up_can_have_its_own_number_of_heads():
    model, _ = tiny.build_upsampler(sr_num_heads=2, sr_num_heads_upsample=4)
    heads = {
        name.split(".")[0]: m.num_heads
        for name, m in model.named_modules()
        if hasattr(m, "num_heads")
    }
    assert heads == {"input_blocks": 2, "middle_block": 2, "output_blocks": 4}
    by_width, _ = tiny.build_upsampler(sr_num_head_channels=16)
    assert {m.num_heads for m in by_width.modules() if hasattr(m, "num_heads")} == {4}


@pytest.mark.parametrize(
    "flags", [{}, {"sr_resblock_updown": False}, {"sr_use_scale_shift_norm": False}]
)
def test_recomputed_activations_give_the_same_gradients(flags):
    gradients = []
    for use_checkpoint in (False, True):
        model, _ = tiny.build_upsampler(use_checkpoint=use_checkpoint, sr_dropout=0.2, **flags)
        model.train()
        th.manual_seed(3)
        x, low_res = golden_data.noise("x", (2, 3, 32, 32)), golden_data.noise("low", (2, 3, 8, 8))
        model(x, th.tensor([3, 71]), low_res=low_res).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(th.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_low_res_picture_matters_and_learned_sigma_doubles_the_channels(learn_sigma):
    model, _ = tiny.build_upsampler(sr_learn_sigma=learn_sigma)
    x, t = golden_data.noise("x", (1, 3, 32, 32)), th.tensor([5])
    with th.no_grad():
        a, b = (model(x, t, low_res=golden_data.noise(name, (1, 3, 8, 8))) for name in "ab")
    assert a.shape[1] == (6 if learn_sigma else 3)
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ({"large_size": 30}, "large_size 30 is not a multiple of small_size 8"),
        ({"large_size": 9, "small_size": 9}, "large_size 9 is not a multiple of 2"),
        ({"sr_class_cond": True}, "sr_class_cond"),
        ({"sr_num_heads": 3}, "num_heads"),
        ({"sr_channel_mult": "wide"}, "sr_channel_mult"),
        ({"large_size": 96, "sr_channel_mult": ""}, "sr_channel_mult"),
        ({"sr_num_res_blocks": 0}, "sr_num_res_blocks"),
        ({"sr_diffusion_steps": 0}, "diffusion_steps"),
        ({"sr_timestep_respacing": "ddim77"}, "timestep_respacing"),
        ({"sr_wide": 1}, "unknown flag 'sr_wide'"),
        ({"num_channels": 64}, "num_channels: given with and without sr_"),
    ],
)
def test_an_impossible_upsampler_is_refused_with_the_flag_named(flags, culprit):
    with pytest.raises(ValueError, match=culprit) as caught:
        tiny.build_upsampler(**flags)
    assert "\n" not in str(caught.value)


def test_half_precision_of_the_upsampler_follows_the_base_unless_it_is_set():
    """Fault: one command line set use_fp16 twice, and the last won for both models."""
    for base in (False, True):
        assert UpsamplerConfig(use_fp16=base).half_precision == base
        for own in (False, True):
            assert UpsamplerConfig(use_fp16=base, sr_use_fp16=own).half_precision == own


# Sampling


def upsampler(name="ddim", method=None, **flags):
    model, diffusion = tiny.build_upsampler(sr_timestep_respacing=RESPACED[name], **flags)
    settings = SR_SETTINGS.get(name, {}) | ({"steps": 5} if name.startswith("dpm") else {})
    settings |= {"method": method} if method else {}
    return prepare(model), make_sampler(name, diffusion, prefix="sr_", **settings)


def frames(count=5):
    return (0.4 * golden_data.noise("frames", (count, 3, 8, 8))).clamp(-1, 1)


@pytest.mark.parametrize("name", [*SAMPLERS, "dpm_solver adaptive"])
def test_a_frame_does_not_depend_on_the_chunk_it_is_in(name):
    """Adaptive steps, too, are each frame's own."""
    name, *method = name.split()
    model, sampler = upsampler(name, method=method[0] if method else None)
    whole = upsample_video(model, sampler, frames(), 3, 7, frames_at_once=5)
    assert whole.shape == (5, 3, 32, 32)
    assert whole.isfinite().all()  # fault: alphas in float16 made the upsampler's solver give NaN
    assert whole.abs().max() <= 1
    for chunk in (0, 1, 2):
        th.testing.assert_close(
            upsample_video(model, sampler, frames(), 3, 7, frames_at_once=chunk),
            whole,
            rtol=0,
            atol=3e-3,
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_still_scene_stays_still_and_clips_differ(name):
    """Fault: the ancestral loop added x_T as the noise of every step; ours draws anew."""
    model, sampler = upsampler(name)
    still = frames(1).expand(3, -1, -1, -1)
    out = upsample_video(model, sampler, still, 3, 7, frames_at_once=2)
    th.testing.assert_close(out[1:], out[:1].expand(2, -1, -1, -1), rtol=0, atol=3e-3)
    for seed, index in ((3, 8), (4, 7)):
        assert (upsample_video(model, sampler, still[:1], seed, index) - out[:1]).abs().max() > 0.05


def test_the_noise_of_the_steps_is_not_the_noise_of_the_start():
    """Fault as above: with x_T as every step's noise, the result is a function of x_T alone."""
    model, sampler = upsampler("ddpm")
    noise = golden_data.noise("start", (3, 32, 32))
    a, b = (upsample_video(model, sampler, frames(1), seed, 0, noise=noise) for seed in (1, 2))
    assert (a - b).abs().max() > 0.05


def test_given_noise_takes_the_place_of_the_drawn_one():
    model, sampler = upsampler()
    noise = golden_data.noise("start", (3, 32, 32))
    a, b = (upsample_video(model, sampler, frames(2), seed, seed, noise=noise) for seed in (1, 2))
    assert th.equal(a, b)
    assert not th.equal(a, upsample_video(model, sampler, frames(2), 1, 1))


def test_published_settings_are_multistep_of_order_2_and_50_steps():
    model, diffusion = tiny.build_upsampler()
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    sampler = make_sampler("dpm_solver", diffusion, prefix="sr_", **SR_SETTINGS["dpm_solver"])
    upsample_video(model, sampler, frames(1), 0, 0)
    assert len(calls) == 50
    assert SR_SETTINGS["dpm_solver"] == {
        "steps": 50,
        "order": 2,
        "method": "multistep",
        "skip_type": "time_uniform",
    }


def test_25_ddim_steps_of_1100_are_the_published_ones():
    _, diffusion = tiny.build_upsampler(sr_diffusion_steps=1100, sr_timestep_respacing="ddim25")
    assert list(diffusion.timestep_map) == list(range(0, 1100, 44))


def test_frames_of_another_size_are_refused():
    model, sampler = upsampler()
    with pytest.raises(ValueError, match=r"takes \[3, 8, 8\]"):
        upsample_video(model, sampler, th.zeros(2, 3, 16, 16), 0, 0)


def test_chunks_of_frames_are_alike_so_that_compiled_networks_fill_up_little():
    """Cut at the limit, 19 of 20 frames would leave one, which a compiled network fills up."""
    model, sampler = upsampler("ddim")
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    upsample_video(model, sampler, frames().repeat(4, 1, 1, 1)[:20], 3, 7, frames_at_once=19)
    assert set(sizes) == {10}


def test_the_automatic_chunk_shrinks_with_the_size_of_the_pictures():
    with th.device("meta"):
        large, small = (
            image_sr_create_model_and_diffusion(large_size=size, small_size=64)[0]
            for size in (512, 256)
        )
    chunks = [frames_that_fit(model, th.device("cpu"), 20) for model in (large, small)]
    assert 1 <= chunks[0] < chunks[1] < 20
    assert frames_that_fit(tiny.build_upsampler()[0], th.device("cpu"), 20) == 20


def test_in_half_precision_more_frames_fit():
    with th.device("meta"):
        model = image_sr_create_model_and_diffusion()[0]
        half = prepare(model, "bf16").model
    assert frames_that_fit(half, th.device("cpu"), 20) > frames_that_fit(
        model, th.device("cpu"), 20
    )


def test_the_chunk_is_that_of_the_precision_in_use(tmp_path, monkeypatch):
    base, sr = saved(tmp_path)
    seen = []
    monkeypatch.setattr(
        "mm_diffusion.generation.load.frames_that_fit",
        lambda network, *_: seen.append(next(network.parameters()).dtype) or 4,
    )
    out = tmp_path / "out"
    more = ["--precision", "bf16", "--all_save_num", "1", "--gallery", "False"]
    sample(out, monkeypatch, *flags_for(base, sr, out, *more))
    assert seen == [th.bfloat16]


# Training


def pairs(start_sample=0, batch=2):
    def draw(first):
        return (0.5 * golden_data.noise(f"pictures {first}", (batch, 3, 32, 32))).clamp(-1, 1)

    number = start_sample // batch
    while True:
        large = draw(number)
        yield large, {"low_res": th.nn.functional.avg_pool2d(large, 4)}
        number += 1


def train(folder, steps, **config):
    model, diffusion = tiny.build_upsampler()
    options = {
        "lr": 1e-3,
        "lr_anneal_steps": steps,
        "batch_size": 2,
        "save_interval": 2,
        "ema_rate": "0.9",
    }
    config = TrainConfig(**{**options, "output_dir": str(folder), **config})
    loop = TrainLoop(
        model,
        diffusion,
        pairs,
        config,
        flags=image_sr_model_and_diffusion_defaults() | tiny.SR_FLAGS,
    )
    loop.run_loop()
    return loop


def test_microbatches_give_the_gradients_of_the_whole_batch():
    """Fault: the published loop would have trained on the first microbatch only."""
    found = []
    for microbatch in (1, 2):
        model, diffusion = tiny.build_upsampler()
        config = TrainConfig(output_dir="nowhere", batch_size=2, microbatch=microbatch)
        loop = TrainLoop(model, diffusion, pairs, config)
        loop._forward_backward(*next(loop.data))
        found.append(th.cat([p.grad.flatten() for p in loop.params]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_2_and_2_steps_of_the_upsampler_equal_4_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "halves", 4, max_steps=2)
    resumed = train(tmp_path / "halves", 4)
    assert all(th.equal(a, b) for a, b in zip(whole.params, resumed.params, strict=True))


def test_a_guided_diffusion_checkpoint_with_classes_starts_a_run_and_what_was_taken_is_told(
    tmp_path, monkeypatch
):
    logged = []
    monkeypatch.setattr("mm_diffusion.logger.log", logged.append)
    model, _ = tiny.build_upsampler()
    state = published_state_dict(model) | {"label_emb.weight": th.zeros(10, 128)}
    del state["out.2.bias"]
    th.save(state, tmp_path / "guided.pt")
    fresh, _ = tiny.build_upsampler(as_built=True)
    start_from(str(tmp_path / "guided.pt"), fresh)
    count = len(state) - 1
    assert f"{count} of the model's {count + 1} tensors taken" in logged[0]
    assert "start anew: out.2.bias" in logged[1]
    assert "have no place in the model: label_emb.weight" in logged[2]
    for name, value in published_state_dict(fresh).items():
        assert name == "out.2.bias" or th.equal(value, state[name])


def test_a_checkpoint_of_another_architecture_starts_nothing(tmp_path):
    th.save({"fc.weight": th.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt: not one of its tensors"):
        start_from(str(tmp_path / "other.pt"), tiny.build_upsampler()[0])


def test_a_run_starts_with_the_averages_of_the_given_weights(tmp_path):
    given, _ = tiny.build_upsampler()
    checkpoint.save_weights(str(tmp_path / "init.pt"), given, {})
    model, diffusion = tiny.build_upsampler(as_built=True)
    config = TrainConfig(output_dir=str(tmp_path), init_checkpoint=str(tmp_path / "init.pt"))
    loop = TrainLoop(model, diffusion, pairs, config)
    for ema, param, wanted in zip(
        loop.emas["0.9999"], loop.params, given.parameters(), strict=True
    ):
        assert th.equal(param, wanted)
        assert th.equal(ema, wanted)


def test_flags_of_the_weights_to_start_from_yield_to_given_ones_and_those_of_a_resumed_run_do_not(
    tmp_path, monkeypatch
):
    path = str(tmp_path / "model000002.pt")
    checkpoint.save_weights(
        path, tiny.build_upsampler()[0], image_sr_model_and_diffusion_defaults() | tiny.SR_FLAGS
    )
    for source, contradicts in (("init_checkpoint", False), ("resume_checkpoint", True)):
        line = ["script.py", f"--{source}", path, "--sr_diffusion_steps", "50"]
        line += ["--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", line)
        values, given = parse("A script.", UpsamplerConfig, SRDiffusionConfig, TrainConfig)
        if contradicts:
            with pytest.raises(ValueError, match=r"--sr_diffusion_steps 50 contradicts"):
                flags_to_start_with(values, given, SR_CARRIED_FLAGS)
        else:
            values = flags_to_start_with(values, given, SR_CARRIED_FLAGS)
            assert values["sr_diffusion_steps"] == 50
            assert values["sr_num_channels"] == 32


@pytest.mark.parametrize("trained", [{}, {"cross_attention_rope": True}])
def test_a_flag_that_earlier_checkpoints_lack_may_be_given_with_initial_weights(
    tmp_path, monkeypatch, trained
):
    path = str(tmp_path / "init.pt")
    checkpoint.save_weights(path, th.nn.Linear(1, 1), {"num_channels": 32, **trained})
    for text, value in (("True", True), ("False", False)):
        line = ["script.py", "--init_checkpoint", path, "--cross_attention_rope", text]
        monkeypatch.setattr(sys, "argv", [*line, "--output_dir", str(tmp_path / "run")])
        values, given = parse("A script.", ModelConfig, DataConfig, TrainConfig)
        values = flags_to_start_with(values, given)
        assert (values["cross_attention_rope"], values["num_channels"]) == (value, 32)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "dpm_solver++"])
def test_a_preview_shows_low_res_upsampled_bicubic_and_true_side_by_side(tmp_path, name):
    model, _ = tiny.build_upsampler()
    flags = image_sr_model_and_diffusion_defaults() | tiny.SR_FLAGS
    process = pick(SRDiffusionConfig, flags)
    config = TrainConfig(output_dir=str(tmp_path), sample_fn=name)
    large, cond = next(pairs())
    preview = previews.make_sr_preview(
        process, config, lambda: (large, cond["low_res"]), SINGLE_PROCESS
    )
    preview(model, 12)
    (path,) = (tmp_path / "samples/000012").glob("*.png")
    image = read_image(str(path)).float() / 127.5 - 1
    tiles = [
        image[:, 2 : 2 + 64, 2 + 66 * k : 66 * (k + 1)] for k in range(4)
    ]  # enlarged to 64 pixels, 2 between
    low, upsampled, bicubic, true = (tile[:, ::2, ::2] for tile in tiles)
    assert (true - large[0]).abs().max() < 0.01
    assert (low[:, ::4, ::4] - cond["low_res"][0]).abs().max() < 0.01
    assert 0.01 < (bicubic - low).abs().mean() < (upsampled - low).abs().mean()


# Scripts and files


def saved(folder, **flags):
    """A joint checkpoint and one of an upsampler that fits it."""
    joint, _ = tiny.build()
    checkpoint.save_weights(
        str(folder / "model000001.pt"), joint, tiny.FLAGS | {"video_fps": 4, "audio_fps": 64}
    )
    large, _ = tiny.build_upsampler(**flags)
    flags = image_sr_model_and_diffusion_defaults() | tiny.SR_FLAGS | flags
    checkpoint.save_weights(str(folder / "sr000001.pt"), large, flags)
    return str(folder / "model000001.pt"), str(folder / "sr000001.pt")


def sample(folder, monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", ["multimodal_sample_sr.py", *line])
    runpy.run_path(str(SCRIPT))["main"]()
    return {
        kind: sorted(path.name for path in (folder / kind).glob("*"))
        for kind in ("original", "audios", "sr_mp4")
    }


def flags_for(base, sr, out, *more):
    line = [
        "--multimodal_model_path",
        base,
        "--output_dir",
        str(out),
        "--all_save_num",
        "3",
        "--batch_size",
        "2",
    ]
    line += ["--sample_fn", "ddim", "--timestep_respacing", "ddim5"]
    return [
        *line,
        *(["--sr_model_path", sr, "--sr_timestep_respacing", "ddim5"] if sr else []),
        *more,
    ]


def test_sampling_with_the_upsampler_gives_as_many_large_clips_and_the_same_small_ones(
    tmp_path, monkeypatch
):
    """Fault: with the upsampler on, one published script made half of all_save_num."""
    base, sr = saved(tmp_path)
    plain, full = tmp_path / "plain", tmp_path / "full"
    without = sample(plain, monkeypatch, *flags_for(base, "", plain, "--gallery", "False"))
    assert not (plain / "index.html").exists()
    found = sample(full, monkeypatch, *flags_for(base, sr, full))
    assert len(found["original"]) == len(found["audios"]) == len(found["sr_mp4"]) == 3
    assert found["original"] == found["sr_mp4"] == without["original"]
    assert without["sr_mp4"] == []
    for name in found["original"]:
        assert (plain / "original" / name).read_bytes() == (full / "original" / name).read_bytes()
        info = probe(full / "sr_mp4" / name)
        assert (info.width, info.height, info.fps, info.channels, info.sample_rate) == (
            32,
            32,
            4,
            2,
            64,
        )
        small, large = (
            read_window(full / kind / name, 0, 4, 4, 8, 8, 64, 64)
            for kind in ("original", "sr_mp4")
        )
        assert th.equal(small[1], large[1])


def test_checkpoints_of_one_name_get_folders_of_their_own(tmp_path, monkeypatch):
    runs = [tmp_path / "runs" / name for name in ("first", "second")]
    for run in runs:
        run.mkdir(parents=True)
        os.link(saved(tmp_path)[0], run / "model000001.pt")
    out, three = tmp_path / "out", ["--all_save_num", "1", "--gallery", "False"]
    sample(out, monkeypatch, *flags_for(",".join(map(str, runs)), "", out, *three))
    assert [path.parent.relative_to(out) for path in sorted(out.rglob("original"))] == [
        Path("first/model000001"),
        Path("second/model000001"),
    ]


def test_a_folder_without_large_clips_is_completed_and_what_is_there_is_kept(tmp_path, monkeypatch):
    base, sr = saved(tmp_path)
    out = tmp_path / "out"
    sample(out, monkeypatch, *flags_for(base, "", out))
    found = sample(out, monkeypatch, *flags_for(base, sr, out))
    assert len(found["sr_mp4"]) == 3
    assert "sr_mp4/" + found["sr_mp4"][2] in (out / "index.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    gone = out / "sr_mp4" / found["sr_mp4"][1]
    gone.unlink()
    sample(out, monkeypatch, *flags_for(base, sr, out))
    kept = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp}
    assert kept == {path for path in stamps if path.name != gone.name}
    with pytest.raises(ValueError, match="sr_process"):
        sample(out, monkeypatch, *flags_for(base, sr, out)[:-1], "10")


@pytest.mark.parametrize("noise", [False, True])
def test_large_clip_k_is_that_of_seed_and_k_or_of_the_given_noise_in_any_batch(
    tmp_path, monkeypatch, noise
):
    base, sr = saved(tmp_path)
    more = ["--seed", "9"]
    if noise:
        np.save(tmp_path / "noise.npy", golden_data.noise("start", (3, 32, 32)).numpy())
        more += ["--load_noise", str(tmp_path / "noise.npy")]
    written = {}
    monkeypatch.setattr(
        "mm_diffusion.generation.output.write_sample",
        lambda folder, name, *clip: written.update({folder + name: clip[-1]}),
    )
    for size in "13":
        sample(
            tmp_path / size,
            monkeypatch,
            *flags_for(base, sr, tmp_path / size, *more, "--batch_size", size),
        )
    joint, diffusion = tiny.build(timestep_respacing="ddim5")
    clips = sample_joint(prepare(joint), make_sampler("ddim", diffusion), range(3), seed=9)
    model, sampler = upsampler("ddim")
    start = golden_data.noise("start", (3, 32, 32)) if noise else None
    for k in range(3):
        wanted = upsample_video(model, sampler, clips["video"][k], 9, k, noise=start)
        for size in "13":
            large = written[f"{tmp_path / size}ddim_samples_1_9_{k:05d}"]
            th.testing.assert_close(large, wanted, rtol=0, atol=3e-3)


def sampling_flags(**options):
    """Values of all flags of a sampling script with an upsampler."""
    configs = (SamplingConfig, *UPSAMPLING)
    defaults = {flag_name(c, f): f.default for c in configs for f in dataclasses.fields(c)}
    return defaults | {"output_dir": "out", **options}


def loaded_upsampler(tmp_path, monkeypatch, **options):
    """What `load_upsampler` makes of flags: settings, precision, strictness, clip_denoised."""
    _, sr = saved(tmp_path)
    seen = {}

    def load(model, path, weights, config, precision):
        seen.update(strict=config.is_strict, precision=precision)
        return model

    def made(name, diffusion, clip_denoised, prefix, **settings):
        seen.update(clip_denoised=clip_denoised, settings=settings, steps=diffusion.num_timesteps)
        return make_sampler(name, diffusion, clip_denoised, prefix, **settings)

    monkeypatch.setattr("mm_diffusion.generation.load._load", load)
    monkeypatch.setattr("mm_diffusion.generation.load.make_sampler", made)
    flags = sampling_flags(sr_model_path=sr, **options)
    load_upsampler(flags, set(options), th.device("cpu"))
    return seen


def test_flags_of_the_upsampler_reach_its_sampler_and_weights(tmp_path, monkeypatch):
    """Fault: use_fp16 was set twice for two models, and the last value won."""
    usual = loaded_upsampler(tmp_path, monkeypatch)
    assert usual == {
        "strict": True,
        "precision": "fp32",
        "clip_denoised": True,
        "settings": {},
        "steps": 25,
    }
    assert loaded_upsampler(tmp_path, monkeypatch, use_fp16=True)["precision"] == "bf16"
    assert (
        loaded_upsampler(tmp_path, monkeypatch, use_fp16=True, sr_use_fp16=False)["precision"]
        == "fp32"
    )
    assert loaded_upsampler(tmp_path, monkeypatch, sr_use_fp16=True)["precision"] == "bf16"
    assert loaded_upsampler(tmp_path, monkeypatch, precision="bf16")["precision"] == "bf16"
    assert (
        loaded_upsampler(tmp_path, monkeypatch, precision="bf16", sr_use_fp16=False)["precision"]
        == "fp32"
    )
    assert not loaded_upsampler(tmp_path, monkeypatch, is_strict=False)["strict"]
    assert not loaded_upsampler(tmp_path, monkeypatch, clip_denoised=False)["clip_denoised"]
    solver = loaded_upsampler(tmp_path, monkeypatch, sr_sample_fn="dpm_solver", sr_sample_steps=7)
    assert solver["settings"] == SR_SETTINGS["dpm_solver"] | {"steps": 7}
    assert solver["steps"] == 100


def test_clips_of_another_process_are_refused_and_an_empty_folder_is_free(tmp_path, monkeypatch):
    base, sr = saved(tmp_path)
    large, _ = checkpoint.load_state(sr)
    th.save(large, tmp_path / "published.pt")  # without flags
    sizes = [text for name, value in tiny.SR_FLAGS.items() for text in (f"--{name}", str(value))]
    line = flags_for(base, str(tmp_path / "published.pt"), tmp_path / "out", *sizes)
    claim_folder(tmp_path / "out", {"upsampler": "of a run that drew nothing", "seed": 3})
    sample(tmp_path / "out", monkeypatch, *line)
    with pytest.raises(ValueError, match="sr_process"):
        sample(tmp_path / "out", monkeypatch, *line, "--sr_noise_schedule", "cosine")
    with pytest.raises(ValueError, match="process"):
        sample(tmp_path / "out", monkeypatch, *line, "--timestep_respacing", "ddim10")


def test_the_training_script_trains_previews_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        image = (
            (127 + 60 * golden_data.noise(f"picture {k}", (3, 40, 50))).clamp(0, 255).to(th.uint8)
        )
        write_png(image, str(tmp_path / f"images/{k}.png"))
    flags = [text for name, value in tiny.SR_FLAGS.items() for text in (f"--{name}", str(value))]
    line = [
        "--data_dir",
        str(tmp_path / "images"),
        "--output_dir",
        str(tmp_path / "run"),
        "--num_workers",
        "0",
    ]
    line += [
        "--batch_size",
        "2",
        "--save_interval",
        "1",
        "--log_interval",
        "1",
        "--preview_clips",
        "2",
        *flags,
    ]
    for steps in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["image_sr_train.py", *line, "--max_steps", steps])
        runpy.run_path(str(SCRIPT.with_name("image_sr_train.py")))["main"]()
    output = capsys.readouterr().out
    assert output.count("3 images") == 2
    assert "resumed from" in output
    assert "PSNR" in output
    assert (tmp_path / "run/model000002.pt").exists()
    assert len(list((tmp_path / "run/samples").glob("*/*.png"))) == 2
    assert checkpoint.load_state(str(tmp_path / "run/model000002.pt"))[1]["large_size"] == 32


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        (["--sr_sample_fn", "plms"], "sr_sample_fn 'plms'"),
        (["--sr_batch_size", "-1"], "sr_batch_size -1"),
        (
            ["--sr_sample_fn", "dpm_solver"],
            "sr_timestep_respacing does not go with sr_sample_fn dpm_solver",
        ),
        (["--sr_sample_steps", "5"], "sr_sample_fn ddim has no steps"),
        (["--sr_num_channels", "64"], "--sr_num_channels 64 contradicts"),
        (["--large_size", "64"], "--large_size 64 contradicts"),
        (["--load_noise", "nothing.npy"], "load_noise nothing.npy"),
    ],
)
def test_a_wrong_flag_of_the_upsampler_is_named_before_anything_is_written(
    tmp_path, monkeypatch, more, culprit
):
    base, sr = saved(tmp_path)
    with pytest.raises(ValueError, match=culprit) as caught:
        sample(tmp_path / "out", monkeypatch, *flags_for(base, sr, tmp_path / "out", *more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [np.zeros((3, 32, 16)), np.zeros((1, 3, 32, 32)), np.array(["a"]), b"no array", b""],
    ids=str,
)
def test_a_noise_file_of_another_shape_is_refused(tmp_path, content):
    path = tmp_path / "noise.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=r"load_noise .*noise.npy") as caught:
        load_noise(str(path), 32)
    assert "\n" not in str(caught.value)


def test_a_noise_file_is_used_for_all_clips(tmp_path):
    noise = np.random.default_rng(0).standard_normal((3, 32, 32))
    np.save(tmp_path / "noise.npy", noise)
    assert th.equal(load_noise(str(tmp_path / "noise.npy"), 32), th.from_numpy(noise).float())


def test_an_upsampler_of_another_size_is_refused(tmp_path, monkeypatch):
    base, sr = saved(tmp_path, small_size=16)
    with pytest.raises(ValueError, match="takes frames of 16 x 16, the joint model makes 8 x 8"):
        sample(tmp_path / "out", monkeypatch, *flags_for(base, sr, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_joint_checkpoint_is_no_upsampler_and_the_misfit_is_told(tmp_path):
    base, _ = saved(tmp_path)
    weights, _ = checkpoint.load_state(base)
    with pytest.raises(CheckpointError, match=r"probably wrong: the path \(one is the joint model"):
        load_weights(tiny.build_upsampler()[0], weights)


@pytest.mark.parametrize(
    ("flags", "blamed"),
    [
        ({"sr_num_channels": 64}, "num_channels"),
        ({"sr_num_res_blocks": 2}, "num_res_blocks"),
        ({"sr_learn_sigma": False}, "learn_sigma"),
        ({"sr_attention_resolutions": "1"}, "attention_resolutions"),
        ({"sr_resblock_updown": False}, "resblock_updown"),
    ],
)
def test_a_misfit_blames_the_flag(flags, blamed):
    state = published_state_dict(tiny.build_upsampler(**flags)[0])
    with pytest.raises(CheckpointError, match=rf"probably wrong: .*{blamed}"):
        load_weights(tiny.build_upsampler()[0], state)


def test_flags_of_both_checkpoints_are_kept_apart():
    """The upsampler's factors and widths do not affect the joint model, nor the reverse."""
    values = image_sr_model_and_diffusion_defaults() | {
        "video_fps": 4,
        "num_channels": 128,
        "use_fp16": False,
    }
    trained = {"sr_num_channels": 32, "num_channels": 7, "video_fps": 9, "use_fp16": True}
    merged = merge_checkpoint_flags(values, set(), trained, "sr.pt", SR_CARRIED_FLAGS)
    assert (merged["sr_num_channels"], merged["num_channels"], merged["video_fps"]) == (32, 128, 4)
    assert merged["use_fp16"] is False


def test_the_note_of_a_folder_tells_which_upsampler_made_its_clips(tmp_path, monkeypatch):
    base, sr = saved(tmp_path)
    out = tmp_path / "out"
    sample(out, monkeypatch, *flags_for(base, sr, out))
    note = json.loads((out / "sampling.json").read_text())
    assert note["upsampler"] == checkpoint.fingerprint(checkpoint.load_state(sr)[0])
    assert note["sr_sizes"] == [8, 32]


def test_noise_without_an_upsampler_is_refused():
    with pytest.raises(ValueError, match="sr_model_path"):
        load_upsampler(sampling_flags(load_noise="noise.npy"), set(), th.device("cpu"))
