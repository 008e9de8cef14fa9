"""The package as a library, called as the users of guided-diffusion call that."""

import argparse

import golden_data
import pytest
import tiny
import torch as th

from mm_diffusion.calls import bind
from mm_diffusion.checkpoint import published_state_dict
from mm_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from mm_diffusion.unet import window_shift

STEPS = {"timestep_respacing": "ddim4"}
SIZES = {name: (2, *shape) for name, shape in tiny.SHAPES.items()}


def noise(sizes=SIZES):
    return {name: golden_data.noise(name, shape) for name, shape in sizes.items()}


def same(a, b):
    return a.keys() == b.keys() and all(th.equal(a[name], b[name]) for name in a)


# load_state_dict


@pytest.mark.parametrize("build", [tiny.build, tiny.build_upsampler])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_state_dict_takes_published_names_strictly(build, prefix):
    source, empty = build()[0], build(as_built=True)[0]
    state = {prefix + name: value for name, value in published_state_dict(source).items()}
    missing, unexpected = empty.load_state_dict(state)
    assert missing == unexpected == []
    assert same(empty.state_dict(), source.state_dict())


@pytest.mark.parametrize("build", [tiny.build, tiny.build_upsampler])
def test_load_state_dict_takes_its_own_names_too(build):
    source, empty = build()[0], build(as_built=True)[0]
    empty.load_state_dict(source.state_dict())
    assert same(empty.state_dict(), source.state_dict())


def test_load_state_dict_takes_published_names_within_another_module():
    source, empty = tiny.build()[0], tiny.build(as_built=True)[0]
    state = {f"1.{name}": value for name, value in published_state_dict(source).items()}
    th.nn.Sequential(th.nn.Identity(), empty).load_state_dict(state)
    assert same(empty.state_dict(), source.state_dict())


def test_load_state_dict_stays_strict():
    model = tiny.build()[0]
    state = published_state_dict(model)
    state["video_out.2.video_conv.more"] = state.pop("video_out.2.video_conv.bias")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*video_conv.more"):
        model.load_state_dict(state)


# Loops


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_take_a_network_a_shape_and_its_noise(loop):
    model, diffusion = tiny.build(**STEPS)
    with window_shift("zero"):
        th.manual_seed(1)
        wanted = getattr(diffusion, loop)(bind(model), noise())
        th.manual_seed(1)
        found = getattr(diffusion, loop)(
            model, SIZES, noise=noise(), clip_denoised=True, model_kwargs={}, progress=False
        )
    assert same(found, wanted)


def test_loops_hand_model_kwargs_to_the_network():
    model, diffusion = tiny.build_upsampler(sr_timestep_respacing="ddim4")
    low_res, x_T = golden_data.noise("low", (2, 3, 8, 8)), golden_data.noise("x", (2, 3, 32, 32))
    wanted = diffusion.ddim_sample_loop(bind(model, {"low_res": low_res}), x_T)
    kwargs = {"low_res": low_res}
    found = diffusion.ddim_sample_loop(model, (2, 3, 32, 32), noise=x_T, model_kwargs=kwargs)
    assert th.equal(found, wanted)


def test_without_noise_a_shape_is_sampled_from_the_seed_or_the_generator():
    def model_fn(x, t):
        return {name: 0.1 * leaf for name, leaf in x.items()}

    diffusion = tiny.build(as_built=True, **STEPS)[1]
    found = []
    for seed in (1, 1, 2):
        th.manual_seed(seed)
        found.append(diffusion.ddim_sample_loop(model_fn, shape=SIZES))
    assert {name: tuple(leaf.shape) for name, leaf in found[0].items()} == SIZES
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_progress_true_shows_a_bar(capsys):
    diffusion = tiny.build(as_built=True, **STEPS)[1]
    diffusion.ddim_sample_loop(lambda x, t: 0.1 * x, (1, 2), progress=True)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cond_fn": print}, "cond_fn: has no counterpart"),
        ({"noise": th.zeros(1, 3)}, r"noise \(1, 3\): need the shape \(1, 2\)"),
        ({"shape": None, "x_T": th.zeros(1, 2), "noise": th.zeros(1, 2)}, "noise already"),
    ],
)
def test_what_the_loops_cannot_do_is_refused(options, words):
    diffusion = tiny.build(as_built=True, **STEPS)[1]
    with pytest.raises(ValueError, match=words):
        diffusion.ddim_sample_loop(lambda x, t: x, **{"shape": (1, 2), **options})


def test_training_losses_take_a_network_and_model_kwargs():
    model, diffusion = tiny.build_upsampler()
    x, t = golden_data.noise("x", (2, 3, 32, 32)), th.tensor([3, 71])
    cond = {"low_res": golden_data.noise("low", (2, 3, 8, 8))}
    eps = golden_data.noise("eps", x.shape)
    wanted = diffusion.training_losses(bind(model, cond), x, t, eps)["loss"]
    assert th.equal(
        diffusion.training_losses(model, x, t, noise=eps, model_kwargs=cond)["loss"], wanted
    )


# Command lines of other scripts


def test_a_script_of_guided_diffusion_parses_its_flags():
    defaults = {**model_and_diffusion_defaults(), "lr": 1e-4, "steps": 5, "name": "", "path": None}
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    line = "--num_channels 32 --learn_sigma yes --lr 0.5 --path x --channel_mult 1,2"
    args = parser.parse_args(line.split())
    assert args_to_dict(args, ["lr", "steps", "name", "path"]) == {
        "lr": 0.5,
        "steps": 5,
        "name": "",
        "path": "x",
    }
    flags = args_to_dict(args, model_and_diffusion_defaults().keys())
    assert flags["learn_sigma"] is True
    with th.device("meta"):
        model, _ = create_model_and_diffusion(**flags)
    assert model.config.num_channels == 32


def test_a_flag_of_another_type_is_named(capsys):
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {"use_fp16": False})
    with pytest.raises(SystemExit):
        parser.parse_args(["--use_fp16", "perhaps"])
    assert "--use_fp16 'perhaps': need a value of type bool" in capsys.readouterr().err
