"""Previews beside training: a few clips, or upsampled images, at every save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import blobfile as bf
import torch as th
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from .. import logger
from ..config import DataConfig, SRDiffusionConfig, TrainConfig
from ..data import encode, images
from ..dist_util import World, barrier
from ..evaluation.image_quality import psnr
from ..respace import SpacedDiffusion
from ..sampling import (
    LOOPS,
    PREVIEW_SETTINGS,
    SR_SETTINGS,
    Progress,
    make_sampler,
    part_of,
    sample_joint,
    upsample_video,
)
from ..script_util import create_diffusion
from .load import usual_respacing
from .output import GalleryDrawer

MOST_PREVIEW_RANKS = 8  # clips of more ranks say no more, and all ranks wait for them
BAR = "{l_bar}{bar}| {remaining} left"


@contextmanager
def preview_bar(world: World) -> Iterator[Progress]:
    """A progress function, which rank 0 shows as a bar."""
    hidden = world.rank > 0
    with tqdm(total=1.0, desc="preview", leave=False, disable=hidden, bar_format=BAR) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def warned_if_not_finite(step: int) -> Iterator[None]:
    """A preview that contains NaN or Inf becomes a warning, and training continues."""
    try:
        yield
    except FloatingPointError as error:
        logger.warn(f"no preview at step {step}: {error}")


def make_preview(
    diffusion: SpacedDiffusion, config: TrainConfig, data: DataConfig, world: World
) -> Callable[[nn.Module, int], None] | None:
    """A function `(model, step)` that samples a few clips into `output_dir`/samples/NNNNNN.

    Always the same numbers; `output_dir`/samples/index.html shows them. None for no preview_clips.
    """
    name, count = config.sample_fn, config.preview_clips
    sampler = make_sampler(name, diffusion, **PREVIEW_SETTINGS.get(name, {}))
    indices = range(world.rank * count, (world.rank + 1) * count)
    samples = bf.join(config.output_dir, "samples")
    drawer = GalleryDrawer(samples)

    def save(index: int, video: th.Tensor, audio: th.Tensor, step: int) -> None:
        file = f"{name}_samples_{step}_0_{index:05d}.{config.save_type}"
        path = bf.join(samples, f"{step:06d}", file)
        if config.save_type == "wav":
            encode.write_wav(path, audio, data.audio_fps)
        else:
            encode.write_clip(path, video, data.video_fps, audio, data.audio_fps)
        logger.log_clip(f"clip {index}", video, data.video_fps, audio, data.audio_fps, step)

    def generate(model: nn.Module, step: int) -> None:
        sample: dict[str, th.Tensor] = {"video": th.empty(0), "audio": th.empty(0)}
        with preview_bar(world) as progress, warned_if_not_finite(step):
            sample = sample_joint(model, sampler, indices, 0, world.device, progress)
        for index, video, audio in zip(indices, sample["video"], sample["audio"], strict=False):
            save(index, video, audio, step)

    def preview(model: nn.Module, step: int) -> None:
        if world.rank < MOST_PREVIEW_RANKS:
            generate(model, step)
        barrier()
        if config.save_type == "mp4" and world.rank == 0:
            drawer.draw()

    return preview if count else None


def make_sr_preview(
    process: SRDiffusionConfig,
    config: TrainConfig,
    pairs: Callable[[], tuple[th.Tensor, th.Tensor]],
    world: World,
) -> Callable[[nn.Module, int], None] | None:
    """A function `(model, step)` that upsamples images into `output_dir`/samples/NNNNNN.

    pairs: -> large [B, 3, H, W] and low-res [B, 3, h, w], always the same. A row of the contact
    sheet shows one: low-res, upsampled, bicubic, large. None for no preview_clips.
    """
    name = config.sample_fn
    respacing = usual_respacing(process.diffusion_steps) if name in LOOPS else ""
    diffusion = create_diffusion(dataclasses.replace(process, timestep_respacing=respacing))
    sampler = make_sampler(name, diffusion, **SR_SETTINGS.get(name, {}))
    upsample = partial(upsample_video, device=world.device)

    def preview(model: nn.Module, step: int) -> None:
        if world.rank >= MOST_PREVIEW_RANKS:
            return
        large, small = pairs()
        done = []
        with preview_bar(world) as progress, warned_if_not_finite(step):
            for k, image in enumerate(small.split(1)):
                part = part_of(progress, k / len(small), (k + 1) / len(small))
                done.append(upsample(model, sampler, image, 0, k, progress=part))
            compare(large, small, th.cat(done), step)

    def compare(large: th.Tensor, small: th.Tensor, upsampled: th.Tensor, step: int) -> None:
        size = large.shape[-2:]
        bicubic = F.interpolate(small, size, mode="bicubic").clamp(-1, 1)
        ours, base = psnr(upsampled, large), psnr(bicubic, large)
        logger.log(f"preview: upsampled {ours:.1f} dB, bicubic {base:.1f} dB (PSNR)")
        nearest = F.interpolate(small, size, mode="nearest")
        rows = th.stack([nearest, upsampled, bicubic, large], dim=1)  # [B, 4, 3, H, W]
        file = f"upsampled_{step}_0_{world.rank:05d}.png"
        path = bf.join(config.output_dir, "samples", f"{step:06d}", file)
        images.save_contact_sheet(path, rows)
        logger.log_image("upsampled", rearrange(rows, "b k c h w -> c (b h) (k w)"), step)

    return preview if config.preview_clips else None
