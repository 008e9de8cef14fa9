"""How near an upsampler comes to true frames, at what cost: to choose its sampler and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch as th
import torch.nn.functional as F
from tqdm import tqdm

from ..config import FrameDataConfig
from ..data import decode, images
from ..data.clips import count_frames
from ..data.frames import FrameIndex, choose_resize
from ..evaluation import image_quality
from .load import Upsampler

Figures = dict[str, float | None]
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "flicker": "flicker (grey levels)",
    "seconds": "s per frame",
}


def true_clips(
    index: FrameIndex, config: FrameDataConfig, num_frames: int
) -> Iterator[tuple[str, th.Tensor]]:
    """(path, frames [F, 3, h, w] uint8) of each file: its first `num_frames`, one of an image."""
    for path, info in index.clips:
        if not info.is_video:
            yield path, images.read_image(path)[None]
        else:
            count = min(num_frames, count_frames(info.duration_seconds, config.video_fps))
            yield path, th.stack([*decode.read_frames(path, 0, count, config.video_fps)])


def check(
    upsampler: Upsampler, index: FrameIndex, config: FrameDataConfig, num_frames: int
) -> dict[str, Any]:
    """{"mean": {"upsampled", "bicubic": figures}, "clips": {path: the same}}.

    Frames are made small as in training, but without noise and JPEG. Flicker is None for images.
    """
    large_size, small_size = upsampler.model.model.large_size, upsampler.small_size
    resize = choose_resize(upsampler.antialias)
    clips: dict[str, dict[str, Figures]] = {}
    files = tqdm(true_clips(index, config, num_frames), total=len(index.clips), unit="clip")
    for number, (path, frames) in enumerate(files):
        large = th.stack([images.fit_image(x, large_size, large_size, resize) for x in frames])
        small = th.stack([images.fit_image(x, small_size, small_size, resize) for x in large])
        true, low_res = images.to_float(large), images.to_float(small)
        start = time.perf_counter()
        upsampled = upsampler(number, low_res, lambda done: None)
        seconds = (time.perf_counter() - start) / len(frames)
        bicubic = F.interpolate(low_res, large.shape[-2:], mode="bicubic").clamp(-1, 1)
        ours = {**_figures(upsampled, true), "seconds": seconds}
        clips[path] = {"upsampled": ours, "bicubic": _figures(bicubic, true)}
    kinds = {kind: [clip[kind] for clip in clips.values()] for kind in ("upsampled", "bicubic")}
    return {"mean": {kind: _mean(rows) for kind, rows in kinds.items()}, "clips": clips}


def _figures(frames: th.Tensor, true: th.Tensor) -> Figures:
    flicker = image_quality.flicker(frames, true)
    return {
        "psnr": image_quality.psnr(frames, true),
        "ssim": image_quality.ssim(frames, true),
        "flicker": None if math.isnan(flicker) else flicker,
    }


def _mean(rows: list[Figures]) -> Figures:
    """Mean of each figure over the clips that have it."""
    means: Figures = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


def table(means: dict[str, Figures]) -> str:
    """A row for each kind of frames."""
    lines = ["  ".join([f"{'':9}", *TITLES.values()])]
    for kind, figures in means.items():
        cells = [f"{kind:9}"]
        for name, title in TITLES.items():
            value = figures.get(name)
            cells.append(("-" if value is None else f"{value:.4g}").rjust(len(title)))
        lines.append("  ".join(cells))
    return "\n".join(lines)
