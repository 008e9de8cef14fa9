"""Models from checkpoints, as the samplers run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th
from torch import nn

from .. import checkpoint, logger
from ..compiling import compile_mode
from ..respace import SpacedDiffusion
from ..sampling import (
    SAMPLERS,
    SR_SETTINGS,
    InferenceModel,
    choose_precision,
    frames_that_fit,
    make_sampler,
    prepare,
    upscale_video,
)
from ..script_util import (
    SR,
    SR_CARRIED_FLAGS,
    SampleConfig,
    create_model_and_diffusion,
    image_sr_create_model_and_diffusion,
    image_sr_model_and_diffusion_defaults,
    merge_checkpoint_flags,
    model_and_diffusion_defaults,
    numbers,
    sr_half,
    sr_process,
)

SR_DDIM_STEPS = 25  # as published

Upscale = Callable[[int, th.Tensor, Callable[[float], None]], th.Tensor]


def solver_settings(config: SampleConfig, prefix: str = "") -> dict[str, Any]:
    """Flags (of the upsampler, with its prefix) -> settings; 0 and empty leave the sampler's own."""
    flags = {
        "steps": "sample_steps",
        "order": "solver_order",
        "method": "solver_method",
        "skip_type": "skip_type",
    }
    chosen = {setting: getattr(config, prefix + name) for setting, name in flags.items()}
    return {setting: value for setting, value in chosen.items() if value}


def load_model(
    path: str,
    weights: dict[str, th.Tensor],
    flags: Mapping[str, Any],
    config: SampleConfig,
    device: th.device,
) -> tuple[InferenceModel, SpacedDiffusion]:
    """The joint model of a checkpoint, ready for the samplers on `device`, and its diffusion; misfits are listed."""
    model, diffusion = create_model_and_diffusion(
        **{name: flags[name] for name in model_and_diffusion_defaults()}
    )
    precision = choose_precision(config.precision, flags["use_fp16"], device)
    return _filled(model, path, weights, config, precision, device), diffusion


def _filled(
    model: nn.Module,
    path: str,
    weights: dict[str, th.Tensor],
    config: SampleConfig,
    precision: str,
    device: th.device,
) -> InferenceModel:
    mode = compile_mode(config.compile)
    misfits = checkpoint.load_weights(model, weights, config.is_strict, name=path)
    if misfits:
        logger.warn(f"{path}: {len(misfits)} tensors left out: {', '.join(misfits)}")
    return prepare(model.to(device), precision, mode)


def load_upsampler(
    config: SampleConfig, flags: dict, given: set[str], device: th.device
) -> tuple[Upscale | None, dict[str, Any]]:
    """The upsampler as a function `(index, frames [F, 3, h, w], progress) -> [F, 3, H, W]`, and what describes it.

    (None, {}) without `sr_model_path`. Errors, naming the flag, where checkpoint, noise file and flags do not fit.
    """
    if not config.sr_model_path:
        if config.load_noise:
            raise ValueError(
                f"load_noise {config.load_noise}: is for the upsampler; give its --sr_model_path too"
            )
        return None, {}
    path, *more = checkpoint.find_checkpoints(config.sr_model_path)
    if more:
        raise ValueError(f"sr_model_path {config.sr_model_path}: need one checkpoint")
    weights, trained = checkpoint.load_state(path)
    flags = merge_checkpoint_flags(flags, given, trained, path, SR_CARRIED_FLAGS)
    if "sr_timestep_respacing" not in given and config.sr_sample_fn == "ddim":
        flags["sr_timestep_respacing"] = usual_respacing(flags["sr_diffusion_steps"])
    model, diffusion = image_sr_create_model_and_diffusion(
        **{name: flags[name] for name in image_sr_model_and_diffusion_defaults()}
    )
    settings = SR_SETTINGS.get(config.sr_sample_fn, {}) | solver_settings(config, SR)
    process = vars(sr_process(flags))
    sampler = make_sampler(config.sr_sample_fn, diffusion, config.clip_denoised, SR, **settings)
    noise = load_noise(config.load_noise, model.large_size) if config.load_noise else None
    own = config.precision if flags["sr_use_fp16"] is None else ""
    precision = choose_precision(own, sr_half(flags), device)
    prepared = _filled(model, path, weights, config, precision, device)
    frames_at_once = config.sr_batch_size

    def upscale(index: int, video: th.Tensor, progress: Callable[[float], None]) -> th.Tensor:
        nonlocal frames_at_once  # decided once: the free memory changes, and other sizes would be compiled anew
        frames_at_once = frames_at_once or frames_that_fit(prepared.model, device, len(video))
        return upscale_video(
            prepared,
            sampler,
            video,
            config.seed,
            index,
            frames_at_once=frames_at_once,
            noise=noise,
            device=device,
            progress=progress,
        )

    description = {
        "upsampler": checkpoint.fingerprint(weights),
        "sr_sampler": [config.sr_sample_fn, settings, config.clip_denoised],
        "sr_process": process,
        "sr_precision": precision,
        "sr_noise": checkpoint.fingerprint({"noise": noise}) if noise is not None else "",
        "sr_sizes": [model.small_size, model.large_size],
    }
    return upscale, description


def usual_respacing(steps: int) -> str:
    """The steps that DDIM keeps in the upsampler unless told otherwise."""
    return f"ddim{SR_DDIM_STEPS}" if steps % SR_DDIM_STEPS == 0 else str(min(SR_DDIM_STEPS, steps))


def check_frames_fit(video_size: str, upsampler: Mapping[str, Any]) -> None:
    """ValueError where the joint model makes frames that the upsampler (as described) does not take."""
    _, _, height, width = numbers("video_size", video_size, 4)
    small = upsampler["sr_sizes"][0] if upsampler else None
    if small not in (None, height) or small not in (None, width):
        raise ValueError(
            f"sr_model_path: this upsampler takes frames of {small} x {small}, the joint model makes"
            f" {width} x {height}; choose checkpoints that fit"
        )


def load_noise(path: str, size: int) -> th.Tensor:
    """A noise picture [3, size, size] from a .npy file; ValueError, naming the file, if it is no such thing."""
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"load_noise {path}: is no readable .npy file ({error})") from None
    if (
        not isinstance(noise, np.ndarray)
        or noise.shape != (3, size, size)
        or noise.dtype.kind not in "fiu"
    ):
        found = (
            f"{noise.dtype} {list(noise.shape)}"
            if isinstance(noise, np.ndarray)
            else "several arrays"
        )
        raise ValueError(
            f"load_noise {path}: holds {found}, need numbers of shape [3, {size}, {size}]"
        )
    if not np.isfinite(noise).all():
        raise ValueError(f"load_noise {path}: holds numbers that are not finite")
    return th.from_numpy(noise.astype(np.float32))


def check_sample_config(config: SampleConfig) -> None:
    """ValueError, naming the flag, for what cannot be sampled."""
    if not config.output_dir:
        raise ValueError("output_dir is empty: say where the clips go with --output_dir")
    if "://" in config.output_dir:
        raise ValueError(f"output_dir {config.output_dir}: clips are written to local folders only")
    if config.seed < 0:
        raise ValueError(f"seed {config.seed}: must not be negative")
    for name in ("all_save_num", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    if config.sr_batch_size < 0:
        raise ValueError(
            f"sr_batch_size {config.sr_batch_size}: need at least 1, or 0 for what fits in memory"
        )
    compile_mode(config.compile)
    for prefix in ("", SR):
        name = getattr(config, f"{prefix}sample_fn")
        if name not in SAMPLERS:
            raise ValueError(f"{prefix}sample_fn {name!r}: choose from {', '.join(SAMPLERS)}")
