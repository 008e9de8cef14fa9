"""Models from checkpoints, as the samplers run them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from torch import nn

from .. import checkpoint, logger
from ..config import (
    SR,
    SamplerConfig,
    SamplingConfig,
    SRDiffusionConfig,
    SRSamplerConfig,
    UpsamplerConfig,
    UpsamplingConfig,
    pick,
)
from ..devices.compile_choice import choose_compilation
from ..dist_util import group_rank
from ..respace import SpacedDiffusion
from ..sampling import (
    SR_SETTINGS,
    InferenceModel,
    Progress,
    Sampler,
    choose_precision,
    frames_that_fit,
    make_sampler,
    prepare,
    upsample_video,
)
from ..script_util import (
    SR_CARRIED_FLAGS,
    create_model_and_diffusion,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    merge_checkpoint_flags,
    model_and_diffusion_defaults,
)

SR_DDIM_STEPS = 25  # as published

Weights = dict[str, th.Tensor]


def load_model(
    path: str,
    weights: Weights,
    flags: Mapping[str, Any],
    config: SamplingConfig,
    device: th.device,
) -> tuple[InferenceModel, SpacedDiffusion]:
    """The joint model of a checkpoint, ready for the samplers on `device`, and its diffusion."""
    names = model_and_diffusion_defaults()
    model, diffusion = create_model_and_diffusion(**{name: flags[name] for name in names})
    precision = choose_precision(config.precision, flags["use_fp16"], device)
    how = pick(SamplerConfig, flags)
    sampler = make_sampler(how.sample_fn, diffusion, **how.solver_settings())
    config = _with_compilation(config, device, sampler, clips_at_once=config.batch_size)
    return _load(model.to(device), path, weights, config, precision), diffusion


def _with_compilation(
    config: SamplingConfig, device: th.device, sampler: Sampler, clips_at_once: int
) -> SamplingConfig:
    """The config with what --compile auto means for the passes of this rank's clips."""
    clips = math.ceil(config.all_save_num / group_rank()[1])
    passes = math.ceil(clips / clips_at_once) * sampler.passes
    way = choose_compilation(config.compile, device, passes)
    return dataclasses.replace(config, compile=way)


def _load(
    model: nn.Module, path: str, weights: Weights, config: SamplingConfig, precision: str
) -> InferenceModel:
    """The model with these weights; with --is_strict False mismatched tensors are listed."""
    mismatched = checkpoint.load_weights(model, weights, config.is_strict, name=path)
    if mismatched:
        logger.warn(f"{path}: {len(mismatched)} tensors left out: {', '.join(mismatched)}")
    return prepare(model, precision, config.compile)


@dataclass
class Upsampler:
    """`upsampler(index, frames [F, 3, h, w], progress) -> [F, 3, H, W]` for clip `index`."""

    model: InferenceModel
    sampler: Sampler
    seed: int
    device: th.device
    frames_at_once: int  # 0: decided at the first clip, as free memory changes afterwards
    noise: th.Tensor | None
    description: dict[str, Any]
    antialias: bool = False  # how the images it was trained on were resized

    @property
    def small_size(self) -> int:
        """Side of the frames it takes, in pixels."""
        return self.model.model.small_size

    def __call__(self, index: int, video: th.Tensor, progress: Progress) -> th.Tensor:
        if not self.frames_at_once:
            self.frames_at_once = frames_that_fit(self.model.model, self.device, len(video))
        return upsample_video(
            self.model,
            self.sampler,
            video,
            self.seed,
            index,
            frames_at_once=self.frames_at_once,
            noise=self.noise,
            device=self.device,
            progress=progress,
        )


def load_upsampler(
    flags: dict[str, Any], explicit: set[str], device: th.device
) -> Upsampler | None:
    """The upsampler that the flags name, None without --sr_model_path.

    Errors, naming the flag, where checkpoint, noise file and flags do not fit.
    """
    config, upsampling = pick(SamplingConfig, flags), pick(UpsamplingConfig, flags)
    how = pick(SRSamplerConfig, flags)
    if not upsampling.sr_model_path:
        if upsampling.load_noise:
            raise ValueError(f"--load_noise {upsampling.load_noise}: needs --sr_model_path too")
        return None
    path, *others = checkpoint.find_checkpoints(upsampling.sr_model_path)
    if others:
        raise ValueError(f"--sr_model_path {upsampling.sr_model_path}: need one checkpoint")
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(flags, explicit, trained, path, SR_CARRIED_FLAGS)
    if "sr_timestep_respacing" not in explicit and how.sample_fn == "ddim":
        flags["sr_timestep_respacing"] = usual_respacing(flags["sr_diffusion_steps"])
    names = image_sr_model_and_diffusion_defaults()
    model, diffusion = image_sr_create_model_and_diffusion(**{name: flags[name] for name in names})
    settings = SR_SETTINGS.get(how.sample_fn, {}) | how.solver_settings()
    sampler = make_sampler(how.sample_fn, diffusion, config.clip_denoised, SR, **settings)
    noise = load_noise(upsampling.load_noise, model.large_size) if upsampling.load_noise else None
    network = pick(UpsamplerConfig, flags)
    own_precision = "" if network.sr_use_fp16 is not None else config.precision
    precision = choose_precision(own_precision, network.half_precision, device)
    description = {
        "upsampler": checkpoint.fingerprint(weights),
        "sr_sampler": [how.sample_fn, settings, config.clip_denoised],
        "sr_process": vars(pick(SRDiffusionConfig, flags)),
        "sr_precision": precision,
        "sr_noise": checkpoint.fingerprint({"noise": noise}) if noise is not None else "",
        "sr_sizes": [model.small_size, model.large_size],
    }
    config = _with_compilation(config, device, sampler, clips_at_once=1)  # a pass: its frames
    prepared = _load(model.to(device), path, weights, config, precision)
    return Upsampler(
        prepared,
        sampler,
        config.seed,
        device,
        frames_at_once=upsampling.sr_batch_size,
        noise=noise,
        description=description,
        antialias=flags.get("antialias", False),
    )


def usual_respacing(steps: int) -> str:
    """The steps that DDIM keeps in the upsampler by default."""
    count = min(SR_DDIM_STEPS, steps)
    return str(count) if steps % SR_DDIM_STEPS else f"ddim{count}"


def check_frames_fit(video_size: tuple[int, ...], upsampler: Upsampler | None) -> None:
    """ValueError where the joint model makes frames that the upsampler does not take."""
    *_, height, width = video_size
    if upsampler and {height, width} != {upsampler.small_size}:
        taken = f"{upsampler.small_size} x {upsampler.small_size}"
        made = f"the joint model makes {width} x {height}"
        raise ValueError(f"--sr_model_path: this upsampler takes frames of {taken}, {made}")


def load_noise(path: str, size: int) -> th.Tensor:
    """A noise image [3, size, size] from a .npy file; ValueError, naming the file, for others."""
    culprit = f"--load_noise {path}"
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{culprit}: no readable .npy file ({error})") from None
    if not isinstance(noise, np.ndarray):
        raise ValueError(f"{culprit}: holds several arrays, need one")
    if noise.shape != (3, size, size) or noise.dtype.kind not in "fiu":
        found = f"{noise.dtype} {list(noise.shape)}"
        raise ValueError(f"{culprit}: holds {found}, need numbers of shape [3, {size}, {size}]")
    if not np.isfinite(noise).all():
        raise ValueError(f"{culprit}: contains NaN or Inf")
    return th.from_numpy(noise.astype(np.float32))
