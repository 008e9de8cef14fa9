"""Flags -> networks and diffusions, as published; and flags that travel with a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from .config import (
    SR,
    DiffusionConfig,
    ModelConfig,
    SRDiffusionConfig,
    UpsamplerConfig,
    channel_multipliers,
    flag_defaults,
    pick,
)
from .config.flags import convert
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .respace import SpacedDiffusion, space_timesteps
from .unet import ImageSuperResModel, MultimodalUNet

MEAN_TYPES = {  # by the name of `prediction`
    "noise": ModelMeanType.EPSILON,
    "x_start": ModelMeanType.START_X,
    "v": ModelMeanType.V,
}
# Flags that may differ from a checkpoint's: some start from it, some are of a single run.
CARRIED_TOO = ("dropout", "use_kl", "rescale_learned_sigmas")
RUN_FLAGS = ("use_checkpoint", "checkpoint_resolutions", "use_fp16", "timestep_respacing")
FREE_FLAGS = {*CARRIED_TOO, *RUN_FLAGS}


# What checkpoints were trained with that are older than these flags.
EARLIER_VALUES = {
    "antialias": True,
    "prediction": "",
    "cross_attention_rope": False,
    SR + "prediction": "",
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the joint model and its diffusion with their defaults."""
    return flag_defaults(ModelConfig, DiffusionConfig)


def image_sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the upsampler and its diffusion with their defaults."""
    return flag_defaults(UpsamplerConfig, SRDiffusionConfig)


def _trained(flags: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in flags if name.removeprefix(SR) not in FREE_FLAGS)


TRAINED_FLAGS = _trained(model_and_diffusion_defaults())
SR_TRAINED_FLAGS = _trained(image_sr_model_and_diffusion_defaults())
# What a later run takes from a checkpoint where its command line says nothing else.
CARRIED_FLAGS = (*TRAINED_FLAGS, *CARRIED_TOO, "video_fps", "audio_fps", "antialias", "task_mix")
SR_CARRIED_FLAGS = (*SR_TRAINED_FLAGS, *(SR + name for name in CARRIED_TOO), "antialias")


def merge_checkpoint_flags(
    values: dict[str, Any],
    explicit: set[str],
    trained: Mapping[str, Any],
    path: str,
    carried: Collection[str] = CARRIED_FLAGS,
) -> dict[str, Any]:
    """Flags that the checkpoint at `path` carries take the place of defaults.

    ValueError where an explicit one contradicts what was trained. `carried`: CARRIED_FLAGS of the
    joint model, or SR_CARRIED_FLAGS.
    """
    if trained:  # by an earlier version, where it lacks a flag
        earlier = {name: value for name, value in EARLIER_VALUES.items() if name in carried}
        trained = earlier | dict(trained)
    fixed = {*TRAINED_FLAGS, *SR_TRAINED_FLAGS} & set(carried)
    merged = values | dict(trained)
    for name in sorted(explicit & set(trained) & fixed):
        if _meaning(name, values[name], merged) != _meaning(name, trained[name], merged):
            raise ValueError(
                f"--{name} {values[name]} contradicts {path}, trained with {trained[name]}:"
                " leave the flag out"
            )
    taken = {name: trained[name] for name in carried if name in trained and name not in explicit}
    return values | taken


def _meaning(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """What a flag's value stands for: the same for two ways to write it."""
    text = str(value).replace(" ", "")
    prefix = SR if name.startswith(SR) else ""
    if name.removeprefix(prefix) in ("prediction", "predict_xstart"):
        both = {**values, name: value}
        is_xstart = str(both.get(f"{prefix}predict_xstart", False)) == "True"
        return both.get(f"{prefix}prediction") or ("x_start" if is_xstart else "noise")
    if name == "channel_mult":
        width = int(str(values["video_size"]).split(",")[3])
        return channel_multipliers(text, width)
    if name == "sr_channel_mult":
        return channel_multipliers(text, int(values["large_size"]), SR)
    return "" if name == "audio_type" else text  # whose values name one convolution


# ---------------------------------------------------------------- command lines of other scripts


def add_dict_to_argparser(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """A flag for each entry, of the type of its default (text for None)."""
    for name, default in defaults.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=partial(convert, kind, name))


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The values of these flags."""
    return {key: getattr(args, key) for key in keys}


# ---------------------------------------------------------------- factories


def _with_defaults(flags: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(flags.keys() - known)
    if unknown:
        raise ValueError(f"unknown flag {unknown[0]!r}: choose from {', '.join(sorted(known))}")
    return known | flags


def create_model_and_diffusion(**flags: Any) -> tuple[MultimodalUNet, SpacedDiffusion]:
    """Flags as on the command line (those left out have their defaults) -> model, diffusion.

    ValueError, naming the flag, for an unknown flag or an impossible value.
    """
    values = _with_defaults(flags, model_and_diffusion_defaults())
    process = pick(DiffusionConfig, values)
    model = MultimodalUNet(pick(ModelConfig, values), process.learn_sigma)
    return model, create_diffusion(process)


def image_sr_create_model_and_diffusion(**flags: Any) -> tuple[ImageSuperResModel, SpacedDiffusion]:
    """Flags as on the command line, or without "sr_" -> upsampler, diffusion; errors as above."""
    known = image_sr_model_and_diffusion_defaults()
    short = {name for name in flags if name not in known and SR + name in known}
    twice = [name for name in short if SR + name in flags]
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))}: given with and without {SR}")
    prefixed = {SR + name if name in short else name: value for name, value in flags.items()}
    values = _with_defaults(prefixed, known)
    process = pick(SRDiffusionConfig, values)
    model = ImageSuperResModel(pick(UpsamplerConfig, values), process.learn_sigma)
    return model, create_diffusion(process)


def create_diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    """The diffusion over the steps that `timestep_respacing` keeps; ValueError naming the flag."""
    loss = LossType.RESCALED_MSE if config.rescale_learned_sigmas else LossType.MSE
    variance = ModelVarType.LEARNED_RANGE if config.learn_sigma else ModelVarType.FIXED_LARGE
    steps = config.diffusion_steps
    try:
        return SpacedDiffusion(
            space_timesteps(steps, config.timestep_respacing or [steps]),
            betas=get_named_beta_schedule(config.noise_schedule, steps),
            model_mean_type=MEAN_TYPES[config.predicted],
            model_var_type=variance,
            loss_type=LossType.RESCALED_KL if config.use_kl else loss,
            rescale_timesteps=config.rescale_timesteps,
        )
    except ValueError as error:
        raise ValueError(f"{'upsampler: ' if config.prefix else ''}{error}") from None
