"""Previews beside training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import blobfile as bf
import torch as th
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .. import logger
from ..data import encode, images
from ..dist_util import World, barrier
from ..respace import SpacedDiffusion
from ..sampling import (
    PREVIEW_SETTINGS,
    SR_SETTINGS,
    make_sampler,
    part_of,
    sample_joint,
    upscale_video,
)
from ..script_util import (
    DataConfig,
    create_diffusion,
    sr_process,
)
from .load import usual_respacing
from .output import show_gallery


@contextmanager
def preview_bar(world: World) -> Iterator[Callable[[float], None]]:
    """A progress function, which rank 0 shows as a bar."""
    form = "{l_bar}{bar}| {remaining} left"
    with tqdm(
        total=1.0, desc="preview", leave=False, disable=world.rank > 0, bar_format=form
    ) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def warned_if_not_finite(step: int) -> Iterator[None]:
    """A preview that fails for it is told, and training goes on."""
    try:
        yield
    except FloatingPointError as error:
        logger.warn(f"no preview at step {step}: {error}")


def make_preview(
    diffusion: SpacedDiffusion,
    sample_fn: str,
    save_type: str,
    clips_per_rank: int,
    folder: str,
    data: DataConfig,
    world: World,
) -> Callable[[nn.Module, int], None] | None:
    """A function `(model, step)` that draws a few clips into `folder`/samples/NNNNNN, always the same numbers.

    Films are shown in `folder`/samples/index.html.
    """
    if save_type not in ("mp4", "wav"):
        raise ValueError(f"save_type {save_type!r}: choose mp4 or wav")
    sampler = make_sampler(sample_fn, diffusion, **PREVIEW_SETTINGS.get(sample_fn, {}))
    if clips_per_rank == 0:
        return None
    indices = range(world.rank * clips_per_rank, (world.rank + 1) * clips_per_rank)

    def preview(model: nn.Module, step: int) -> None:
        sample: dict[str, th.Tensor] = {}
        with preview_bar(world) as progress, warned_if_not_finite(step):
            sample = sample_joint(model, sampler, indices, 0, world.device, progress)
        for k, video, audio in (
            zip(indices, sample["video"], sample["audio"], strict=True) if sample else ()
        ):
            path = bf.join(
                folder,
                "samples",
                f"{step:06d}",
                f"{sample_fn}_samples_{step}_0_{k:05d}.{save_type}",
            )
            if save_type == "wav":
                encode.write_wav(path, audio, data.audio_fps)
            else:
                encode.write_clip(path, video, data.video_fps, audio, data.audio_fps)
            logger.log_clip(f"clip {k}", video, data.video_fps, audio, data.audio_fps, step)
        barrier()
        if save_type == "mp4" and world.rank == 0:
            show_gallery(bf.join(folder, "samples"))

    return preview


def psnr(images: th.Tensor, true: th.Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]."""
    return float(10 * th.log10(4 / (images - true).square().mean()))


def make_sr_preview(
    flags: Mapping[str, Any],
    sample_fn: str,
    pictures: Callable[[], tuple[th.Tensor, th.Tensor]],
    folder: str,
    world: World,
) -> Callable[[nn.Module, int], None]:
    """A function `(model, step)` that upsamples the low-res ones of `pictures()` into `folder`/samples/NNNNNN.

    pictures: -> true [B, 3, H, W] and low-res [B, 3, h, w], always the same. A row of the contact sheet shows one:
    low-res, upsampled, bicubic, true.
    """
    process = sr_process(flags)
    respacing = usual_respacing(process.diffusion_steps) if sample_fn in ("ddpm", "ddim") else ""
    process = dataclasses.replace(process, timestep_respacing=respacing)
    sampler = make_sampler(sample_fn, create_diffusion(process), **SR_SETTINGS.get(sample_fn, {}))

    def upscale(
        model: nn.Module, small: th.Tensor, k: int, progress: Callable[[float], None]
    ) -> th.Tensor:
        part = part_of(progress, k / len(small), (k + 1) / len(small))
        return upscale_video(
            model, sampler, small[k : k + 1], 0, k, device=world.device, progress=part
        )

    def preview(model: nn.Module, step: int) -> None:
        true, small = pictures()
        size = true.shape[-2:]
        upsampled = None
        with preview_bar(world) as progress, warned_if_not_finite(step):
            upsampled = th.cat([upscale(model, small, k, progress) for k in range(len(small))])
        if upsampled is None:
            return
        bicubic = F.interpolate(small, size, mode="bicubic").clamp(-1, 1)
        columns = [F.interpolate(small, size, mode="nearest"), upsampled, bicubic, true]
        logger.log(
            f"upsampled {psnr(upsampled, true):.1f} dB, bicubic {psnr(bicubic, true):.1f} dB (PSNR) in the preview"
        )
        path = bf.join(folder, "samples", f"{step:06d}", f"upsampled_{step}_0_{world.rank:05d}.png")
        images.save_contact_sheet(path, th.stack(columns, dim=1))
        logger.log_image(
            "upsampled",
            th.cat([th.cat(list(row), dim=-1) for row in zip(*columns, strict=True)], dim=1),
            step,
        )

    return preview
