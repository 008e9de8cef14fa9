"""Flags: published names and defaults, wrong values, and flags that a checkpoint carries."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import tiny

from mm_diffusion.checkpoint import published_state_dict
from mm_diffusion.config import channel_multipliers, notes_on, parse, pick
from mm_diffusion.config.flags import flag_name
from mm_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from mm_diffusion.script_util import (
    CARRIED_FLAGS,
    SR_CARRIED_FLAGS,
    TRAINED_FLAGS,
    create_model_and_diffusion,
    merge_checkpoint_flags,
    model_and_diffusion_defaults,
)

MODEL = {
    "video_size": "20,3,64,64",
    "audio_size": "2,80000",
    "num_channels": 128,
    "num_res_blocks": 2,
    "channel_mult": "",
    "num_heads": 4,
    "num_head_channels": 64,
    "num_heads_upsample": -1,
    "cross_attention_resolutions": "2,4,8",
    "cross_attention_windows": "1,4,8",
    "cross_attention_shift": True,
    "video_attention_resolutions": "2,4,8",
    "audio_attention_resolutions": "-1",
    "dropout": 0.0,
    "use_checkpoint": False,
    "checkpoint_resolutions": "",
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "video_type": "2d+1d",
    "audio_type": "1d",
    "class_cond": False,
    "use_fp16": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
DATA = {
    "data_dir": "",
    "num_workers": 4,
    "video_fps": 4,
    "audio_fps": 16000,
    "random_flip": True,
    "clip_stride": 1,
}
TRAIN = {
    "schedule_sampler": "uniform",
    "lr": 2e-4,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "lr_warmup_steps": 0,
    "grad_clip": 0.0,
    "batch_size": 4,
    "microbatch": -1,
    "ema_rate": "0.9999",
    "seed": 42,
    "fp16_scale_growth": 1e-3,
    "log_interval": 100,
    "save_interval": 10000,
    "output_dir": "",
    "resume_checkpoint": "",
    "sample_fn": "dpm_solver",
    "save_type": "mp4",
    "use_db": False,
    "devices": "",
}
SAMPLE = {
    "multimodal_model_path": "",
    "all_save_num": 96,
    "clip_denoised": True,
    "is_strict": True,
    "batch_size": 4,
    "seed": 42,
    "output_dir": "",
    "devices": "",
}
UPSAMPLING = {
    "sr_model_path": "",
    "sr_sample_fn": "ddim",
    "load_noise": "",
    "sr_diffusion_steps": 1100,
}
FRAMES = {name: DATA[name] for name in ("data_dir", "num_workers", "video_fps", "random_flip")}
CROSS_MODAL = {"sample_fn": "ddpm", "random_flip": False, "classifier_scale": 0.0}
SCRIPTS = {
    "train": "multimodal_train",
    "sr_train": "image_sr_train",
    "sample": "multimodal_sample_sr",
    "video2audio": "video2audio_sample",
    "audio2video": "audio2video_sample_sr",
}
FOLDER = Path(__file__).resolve().parents[1] / "py_scripts"
LOADED = {script: runpy.run_path(str(FOLDER / f"{name}.py")) for script, name in SCRIPTS.items()}
CONFIGS = {script: names["CONFIGS"] for script, names in LOADED.items()}
PUBLISHED = {
    "train": {**MODEL, **DATA, **TRAIN},
    "sr_train": {
        **tiny.PUBLISHED_UPSAMPLER,
        **FRAMES,
        **TRAIN,
        "lr": 1e-4,
        "batch_size": 6,
        "sample_fn": "ddim",
        "use_fp16": False,
    },
    "sample": {**MODEL, **tiny.PUBLISHED_UPSAMPLER, **DATA, **SAMPLE, **UPSAMPLING},
    "video2audio": {**MODEL, **DATA, **SAMPLE, **CROSS_MODAL},
    "audio2video": {
        **MODEL,
        **tiny.PUBLISHED_UPSAMPLER,
        **DATA,
        **SAMPLE,
        **UPSAMPLING,
        **CROSS_MODAL,
    },
}


@pytest.fixture
def command(monkeypatch):
    """Parses a command line, given as one string, with the flags of a script."""

    def run(line, script="train"):
        monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
        return parse("A script.", *CONFIGS[script], defaults=LOADED[script].get("DEFAULTS"))

    return run


@pytest.mark.parametrize("script", CONFIGS)
def test_defaults_are_those_of_the_published_launchers(command, script):
    values, given = command("", script)
    assert given == set()
    assert {name: values[name] for name in PUBLISHED[script]} == PUBLISHED[script]


def test_the_defaults_of_the_factory_are_the_model_and_diffusion_flags():
    added = {"cross_attention_rope": False, "prediction": ""}  # which change nothing
    assert model_and_diffusion_defaults() == MODEL | added


@pytest.mark.parametrize("script", CONFIGS)
def test_every_published_flag_parses_to_its_own_type(command, script):
    line = " ".join(f"--{name} {value}" for name, value in PUBLISHED[script].items() if value != "")
    values, given = command(line, script)
    assert values == command("", script)[0]
    assert given == {name for name, value in PUBLISHED[script].items() if value != ""}
    for name, value in PUBLISHED[script].items():
        assert type(values[name]) is type(value)


@pytest.mark.parametrize("script", CONFIGS)
def test_flags_without_effect_are_accepted_with_a_note(command, script):
    _, given = command("--t_lr 1e-4 --frame_gap 1", script)
    assert [note.split()[0] for note in notes_on(given, *CONFIGS[script])] == [
        "--t_lr",
        "--frame_gap",
    ]
    assert all("no effect" in note for note in notes_on(given, *CONFIGS[script]))
    assert notes_on({"lr"}, *CONFIGS[script]) == []


@pytest.mark.parametrize("text", ["True", "true", "1", "yes", "YES"])
def test_booleans_read_true(command, text):
    assert command(f"--use_fp16 {text}")[0]["use_fp16"] is True


@pytest.mark.parametrize("text", ["False", "false", "0", "no", "No"])
def test_booleans_read_false(command, text):
    assert command(f"--cross_attention_shift {text}")[0]["cross_attention_shift"] is False


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        ("--use_fp16 maybe", "use_fp16"),
        ("--use_fp16", "use_fp16"),
        ("--lr fast", "lr"),
        ("--batch_size 2.5", "batch_size"),
        ("--num_chanels 64", "num_chanels"),
        ("--batch 4", "batch"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_flag_is_one_line_with_its_name_and_status_2(command, capsys, line, culprit):
    with pytest.raises(SystemExit) as caught:
        command(line)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert culprit in err


@pytest.mark.parametrize("script", CONFIGS)
def test_help_lists_every_flag_with_its_default(command, capsys, script):
    with pytest.raises(SystemExit) as caught:
        command("--help", script)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in PUBLISHED[script])


def test_help_groups_the_flags_by_subject(command, capsys):
    with pytest.raises(SystemExit):
        command("--help")
    out = capsys.readouterr().out
    titles = ["The coupled U-Net:", "Clips on disk:", "The trainer of the joint model:"]
    places = [out.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    groups = [out[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
    for flag, owner in (("num_channels", 0), ("data_dir", 1), ("lr", 2), ("save_interval", 2)):
        assert [f"--{flag} " in group for group in groups] == [k == owner for k in range(3)]


REQUIRED = {"output_dir": "x"}


def test_every_flag_has_a_help_text_and_a_simple_type():
    for config in {config for configs in CONFIGS.values() for config in configs}:
        fields = dataclasses.fields(config)
        given = {f.name: REQUIRED[f.name] for f in fields if f.name in REQUIRED}
        defaults = {flag_name(config, f): f.default for f in fields}
        assert all(field.metadata["help"] for field in fields)
        assert pick(config, defaults | given) == config(**given)


# Factories


def shapes(model):
    return {name: tuple(value.shape) for name, value in published_state_dict(model).items()}


def test_strings_and_numbers_build_the_same():
    as_text = {name: str(value) for name, value in tiny.FLAGS.items()}
    typed = {
        **tiny.FLAGS,
        "channel_mult": (1, 2),
        "video_size": [4, 3, 8, 8],
        "cross_attention_windows": (1, 2),
    }
    model, diffusion = create_model_and_diffusion(**tiny.FLAGS, learn_sigma=True)
    for flags in ({**as_text, "learn_sigma": "True"}, {**typed, "learn_sigma": 1}):
        other, process = create_model_and_diffusion(**flags)
        assert shapes(other) == shapes(model)
        assert other.config == model.config
        assert process.num_timesteps == diffusion.num_timesteps
        assert process.model_var_type == diffusion.model_var_type == ModelVarType.LEARNED_RANGE


def test_an_unknown_flag_and_a_value_of_another_type_are_named():
    with pytest.raises(ValueError, match="num_chanels"):
        create_model_and_diffusion(num_chanels=64)
    for name, value in {
        "num_channels": "wide",
        "learn_sigma": "perhaps",
        "dropout": "a",
        "num_heads": None,
    }.items():
        with pytest.raises(ValueError, match=name):
            create_model_and_diffusion(**{**tiny.FLAGS, name: value})


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (64, (1, 2, 3, 4)),
        (128, (1, 1, 2, 3, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
    ],
)
def test_the_width_of_the_image_sets_the_multipliers_unless_they_are_given(size, wanted):
    assert channel_multipliers("", size) == wanted
    assert channel_multipliers("1,3", size) == (1, 3)


@pytest.mark.parametrize(
    ("flags", "mean", "var", "loss"),
    [
        ({}, ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, LossType.MSE),
        ({"learn_sigma": True}, ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE, LossType.MSE),
        ({"predict_xstart": True}, ModelMeanType.START_X, ModelVarType.FIXED_LARGE, LossType.MSE),
        ({"use_kl": True}, ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, LossType.RESCALED_KL),
        (
            {"rescale_learned_sigmas": True},
            ModelMeanType.EPSILON,
            ModelVarType.FIXED_LARGE,
            LossType.RESCALED_MSE,
        ),
    ],
)
def test_flags_choose_the_diffusion(flags, mean, var, loss):
    diffusion = tiny.build(as_built=True, **flags)[1]
    assert (diffusion.model_mean_type, diffusion.model_var_type, diffusion.loss_type) == (
        mean,
        var,
        loss,
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [("noise_schedule", "sigmoid"), ("timestep_respacing", "ddim77"), ("diffusion_steps", 0)],
)
def test_an_impossible_diffusion_is_refused_with_the_flag_named(flag, value):
    with pytest.raises(ValueError, match=flag if flag != "noise_schedule" else "schedule"):
        create_model_and_diffusion(**{**tiny.FLAGS, flag: value})


# Flags that travel with a checkpoint


def test_flags_of_the_checkpoint_take_the_place_of_defaults(command):
    values, given = command("--lr 0.1 --dropout 0.3")
    trained = {**tiny.FLAGS, "lr": 0.5, "dropout": 0.1, "no_flag_any_more": 1}
    merged = merge_checkpoint_flags(values, given, trained, "m.pt")
    assert {name: merged[name] for name in tiny.FLAGS} == tiny.FLAGS
    assert merged["lr"] == 0.1
    assert merged["dropout"] == 0.3
    assert "no_flag_any_more" not in merged


@pytest.mark.parametrize(
    ("trained", "antialias"),
    [({}, False), ({**tiny.FLAGS, "antialias": False}, False), ({**tiny.FLAGS}, True)],
)
def test_clips_are_resized_as_those_the_checkpoint_was_trained_on(command, trained, antialias):
    """Published files carry no flags; ours carried some before there was this one."""
    values, given = command("--data_dir x")
    for carried in (CARRIED_FLAGS, SR_CARRIED_FLAGS):
        merged = merge_checkpoint_flags(values, given, trained, "m.pt", carried)
        assert merged["antialias"] is antialias
    values, given = command("--antialias 1")
    assert merge_checkpoint_flags(values, given, trained, "m.pt")["antialias"] is True


@pytest.mark.parametrize(
    "line", ["--num_channels 64", "--channel_mult 1,2,3", "--predict_xstart True"]
)
def test_a_flag_that_contradicts_the_checkpoint_is_named(command, line):
    values, given = command(line)
    name = line.split()[0]
    with pytest.raises(ValueError, match=name) as caught:
        merge_checkpoint_flags(values, given, {**MODEL, **tiny.FLAGS}, "m.pt")
    assert "m.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line", ["--num_channels 32", "--channel_mult 1,2", "--cross_attention_shift yes"]
)
def test_a_flag_that_agrees_with_the_checkpoint_is_welcome(command, line):
    values, given = command(line)
    merged = merge_checkpoint_flags(values, given, {**MODEL, **tiny.FLAGS}, "m.pt")
    assert merged["num_channels"] == 32


def test_what_shapes_the_model_must_agree_and_the_rest_may_change():
    assert {
        "video_size",
        "num_channels",
        "learn_sigma",
        "diffusion_steps",
        "noise_schedule",
    } <= set(TRAINED_FLAGS)
    assert not {"dropout", "use_checkpoint", "use_fp16", "timestep_respacing", "lr"} & set(
        TRAINED_FLAGS
    )


def test_the_published_multipliers_do_not_contradict_the_empty_default(command):
    values, given = command("--channel_mult 1,2,3,4 --audio_type linear")
    merge_checkpoint_flags(values, given, MODEL, "m.pt")
    with pytest.raises(ValueError, match="channel_mult"):
        merge_checkpoint_flags(*command("--channel_mult 1,2,3,5"), MODEL, "m.pt")
